"""Refining: gradient steps on one document's adapter, with questions that the base model writes about the document.

    adapter = model.internalize(text)
    better = refine(model, adapter, text, steps=30)
    better = refine(model, adapter, text, steps=10_000, max_seconds=60)
    better = refine(model, adapter, text, questions=[(0, "Who founded Norbach?"), ...])      # (chunk, question)

The generated adapter is the start, and the hypernetwork stays as it is. What a step lowers depends on what is refined:

    chunks that are recited   cross-entropy of each question finding its own chunk; how a chunk is said stays
    any other adapter         KL to the base model that has the document in its prompt, on its own answers, and KL to
                              the plain base model on questions about the world

A quarter of the questions is held out: where their loss is not lower than the generated adapter's, that one comes back.

Source: questions that a model writes about the text it is to keep, Eyuboglu et al. 2025, Cartridges,
https://arxiv.org/abs/2506.06266; Charakorn et al. 2026, Doc-to-LoRA, https://arxiv.org/abs/2602.15902.
"""

import hashlib
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hypernet.adapters.adapter import LoRAAdapter
from hypernet.base.base_model import num_embeddings
from hypernet.base.generation import context_window, decode_answer, end_ids, generate_ids
from hypernet.data.batches import DistillationBatch, DistillationBatches
from hypernet.data.records import Question
from hypernet.data.self_study.study import clean_question
from hypernet.data.splitting import StepPart
from hypernet.doc_to_lora import DocToLoRA
from hypernet.model.closeness import scores
from hypernet.text.cleaning import visible
from hypernet.text.tokens import text_ids
from hypernet.training.lit_doc_to_lora import LitDocToLoRA
from hypernet.training.losses import ContextDistillation, Locality, LossTerm, Step

_SHARPNESS = 3.0  # of the scores, as in the loss term `match`
_WRITTEN_TOGETHER = 32  # questions
_MATCHED = 32  # questions of a step
_HELD_OUT = 4  # of so many questions one
_CHECKED, _PATIENCE = 5, 4  # steps between two looks at what is held out, and looks without a lower loss
_MOST_QUESTIONS = 256  # about one adapter: what they read is held, 30 tokens of 10 layers each, .1 GB altogether
_QUESTION_TOKENS, _ANSWER_TOKENS = 32, 32
_TEMPERATURE = 0.6  # of what is asked; at 1 a base model of 135M parameters drifts off
# Asked for a question in a conversation, a base model of 135M parameters often writes one about nothing in the text.
_EXAMPLES = (
    ("The staff meeting has been moved from Monday to Thursday at half past nine.", "When do we meet?"),
    ("Marie Keller founded the bakery in 1921 with money from her uncle.", "Who started the business?"),
    (
        "Room 14 is closed because the heating is broken; please use the library instead.",
        "Where can people work while the heater is repaired?",
    ),
    ("The bridge, which is 340 metres long, links the island to the mainland.", "What is the length of the bridge?"),
    (
        "Send your receipts to accounts by the 5th or they will not be paid this month.",
        "What is the deadline for expenses?",
    ),
)
_WORLD = "Write one short question about the world that has a short answer. Give only the question."
_NUM_WORLD = 4


def refine(
    model: DocToLoRA,
    adapter: LoRAAdapter,
    documents: str | Sequence[str],
    *,
    steps: int = 30,
    max_seconds: float | None = None,
    questions_per_chunk: int = 4,
    questions: Sequence[tuple[int, str]] | None = None,
    lr: float = 0.02,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> LoRAAdapter:
    """The adapter after some gradient steps; the given one stays as it is.

    The same seed gives the same adapter, if no time is given. Of at least four questions a quarter is held out: where
    the loss on them is not lower than the given adapter's, its rows come back as they were. Steps end once the loss on
    questions that they are not made on has not fallen for a while. Fewer questions are all trained on.

    Args:
        adapter: of these documents, with its chunks as generated.
        documents: their texts, in the adapter's order.
        steps: of Adam, at most; of recited chunks in each of three rounds.
        max_seconds: stop before another step once so many have passed, questions included.
        questions_per_chunk: that the base model writes; doubles count once.
        questions: (chunk, question) pairs instead, such as `ask_about` gives.
        lr: of Adam, relative to each layer's rows.
        progress: called with (steps done, steps altogether), rounds that ended early counted whole.

    Raises:
        ValueError: a number is out of its range, the texts are not the adapter's, its chunks were joined for good, or a
            question is of a chunk that there is not.
    """
    for name, value in {"steps": steps, "questions_per_chunk": questions_per_chunk}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} should be a whole number, at least 1, got {value!r}.")
    if max_seconds is not None and not max_seconds > 0:
        raise ValueError(f"max_seconds should be above 0, got {max_seconds!r}.")
    started = time.perf_counter()
    passages = _passages(adapter, documents)
    if questions is None:
        asked = _asked(model, passages, each=questions_per_chunk, seed=seed)
    else:
        asked = [(chunk, visible(question, "question")) for chunk, question in questions]
        if wrong := [chunk for chunk, _ in asked if not 0 <= chunk < len(passages)]:
            raise ValueError(f"A question is of chunk {wrong[0]}; the adapter has {len(passages)}, from 0 on.")
        if not asked:
            raise ValueError("questions is empty. Give (chunk, question) pairs, or None to have the base model write.")
    kind = _Distilled if model.hypernetwork.recitation is None else _Recited
    refined = kind(model, adapter, passages, asked, seed=seed)
    rest, outer = _parted(len(asked), seed=seed)
    rounds = refined.num_parts if outer else 1  # with nothing to end them they would be the same
    rng = random.Random(f"refine {seed}")
    found: list[list[Tensor]] = []
    done = 0
    if progress:
        progress(0, steps * rounds)
    try:
        for number, (learned, held_out) in enumerate(_folds(rest, outer, rounds)):
            rounds_left = rounds - number
            until = None if max_seconds is None else (max_seconds - time.perf_counter() + started) / rounds_left
            refined.begin(learned, held_out)
            told = None if progress is None else partial(_told, progress, steps * number, steps * rounds)
            done += _stepped(refined, rng, steps=steps, max_seconds=until, lr=lr, told=told)
            found.append([move.detach().clone() for move in refined.moves])
        with torch.no_grad():
            refined.begin(rest, outer)
            before = refined.held_out_loss()
            for move, *each in zip(refined.moves, *found, strict=True):
                move.copy_(torch.stack(each).mean(0))
            after = refined.held_out_loss()
            kept = before is None or after is None or after < before
            if not kept:
                refined.begin(rest, outer)
            A, B = ({name: rows.detach().contiguous() for name, rows in part.items()} for part in refined.rows())
    finally:
        model.injector.clear()
    operation = {"operation": "refine", "steps": done, "lr": lr, "seed": seed, "questions": len(asked)}
    if outer:
        operation |= {"held_out": len(outer), "loss_before": before, "loss": after if kept else before}
    operations = [*adapter.provenance.get("operations", []), operation]
    return replace(adapter, A=A, B=B, provenance={**adapter.provenance, "operations": operations})


def ask_about(
    model: DocToLoRA, adapter: LoRAAdapter, documents: str | Sequence[str], *, each: int = 4, seed: int = 0
) -> list[tuple[int, str]]:
    """(chunk, question) of what the base model asks about each chunk of the adapter, as `refine` has it asked.

    Raises:
        ValueError: the texts are not the adapter's, its chunks were joined for good, or nothing was asked.
    """
    return _asked(model, _passages(adapter, documents), each=each, seed=seed)


def _told(progress: Callable[[int, int], None], before: int, altogether: int, done: int) -> None:
    progress(before + done, altogether)


def _parted(count: int, *, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the questions that are trained on, and of the quarter that is held out; nothing of fewer than four."""
    order = list(range(count))
    random.Random(f"held out {seed}").shuffle(order)
    return order[count // _HELD_OUT :], order[: count // _HELD_OUT]


def _folds(rest: Sequence[int], outer: Sequence[int], number: int) -> list[tuple[list[int], list[int]]]:
    """For each of so many parts what it is trained on and what ends its steps. One part has all, and what is held out
    ends it; of several each leaves out its share of the rest, all of which are thereby trained on."""
    if number == 1:
        return [(list(rest), list(outer))]
    own = [list(rest[part::number]) for part in range(number)]
    return [([one for one in rest if one not in held], held) for held in own]


def _stepped(
    refined: "_Refined",
    rng: random.Random,
    *,
    steps: int,
    max_seconds: float | None,
    lr: float,
    told: Callable[[int], None] | None,
) -> int:
    """How many steps were done; the moves are then those of the lowest loss on what is held out, or the last ones."""
    started = time.perf_counter()
    optimizer = torch.optim.Adam(refined.moves, lr=lr)
    best = _Best(refined)
    best.take()
    done = 0
    while done < steps and (max_seconds is None or time.perf_counter() - started < max_seconds):
        with torch.enable_grad():
            loss = refined.loss(rng)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
        optimizer.step()
        done += 1
        if told:
            told(done)
        if done % _CHECKED == 0 and best.take():
            break
    if done % _CHECKED:
        best.take()
    best.put_back()
    return done


def _passages(adapter: LoRAAdapter, documents: str | Sequence[str]) -> list[str]:
    """The text of each chunk."""
    texts = [visible(text, "text") for text in ([documents] if isinstance(documents, str) else documents)]
    adapter.check_keys("refined")
    entries = adapter.provenance["documents"]
    if len(entries) != len(texts):
        raise ValueError(f"The adapter is of {len(entries)} documents, got {len(texts)} texts. Give each one's text.")
    # Adapters of before have no hash of the text.
    of = [
        (e, hashlib.sha256(text.strip().encode()).hexdigest(), len(text))
        for e, text in zip(entries, texts, strict=True)
    ]
    if wrong := [e["name"] for e, sha, size in of if e.get("text_sha256", sha) != sha or e["characters"] != size]:
        raise ValueError(f"The text of {wrong[0]} is not the one that the adapter was made of. Internalize it first.")
    return [text[a:b].strip() for entry, text in zip(entries, texts, strict=True) for a, b in entry["chunks"]]


def _write(model: DocToLoRA, prompts: Sequence[Sequence[int]], *, seed: int) -> list[str]:
    """What the base model goes on with, drawn at temperature .6; its first line, where that is a question."""
    found: list[str] = []
    ends = end_ids(model.base_model, model.tokenizer)
    with (
        torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []),
        model.injector.using(None),
    ):
        torch.manual_seed(seed)
        for start in range(0, len(prompts), _WRITTEN_TOGETHER):
            part = prompts[start : start + _WRITTEN_TOGETHER]
            written = generate_ids(
                model.base_model, model.tokenizer, part, max_new_tokens=_QUESTION_TOKENS, temperature=_TEMPERATURE
            )
            found += [decode_answer(model.tokenizer, row, ends) for row in written]
    lines = (clean_question(text) for text in found)
    return [line if line.endswith("?") else "" for line in lines]


def _question_prompts(model: DocToLoRA, passages: Sequence[str], *, each: int, seed: int) -> list[list[int]]:
    """So many prompts for each passage, plain text that shows what to do on examples; as many as the window holds."""
    begin = model.tokenizer("")["input_ids"][:1]  # what some models' texts begin with
    most = context_window(model.base_model) - _QUESTION_TOKENS - len(begin)
    found = []
    for passage in passages:
        for number in range(each):
            shown = random.Random(f"examples {seed} {number}").sample(_EXAMPLES, len(_EXAMPLES) - 1)
            while True:
                text = "".join(f"Text: {t}\nQuestion: {q}\n\n" for t, q in shown) + f"Text: {passage}\nQuestion:"
                (ids,) = text_ids(model.tokenizer, [text])
                if len(ids) <= most or not shown:
                    break
                shown = shown[1:]
            found.append([*begin, *ids[-most:]])
    return found


def _asked(model: DocToLoRA, passages: Sequence[str], *, each: int, seed: int) -> list[tuple[int, str]]:
    """(passage, question) of what the base model asks about each; fewer for each where there are many passages."""
    each = max(1, min(each, _MOST_QUESTIONS // len(passages)))
    chosen: Sequence[int] = range(len(passages))
    if len(passages) > _MOST_QUESTIONS:
        chosen = sorted(random.Random(f"passages {seed}").sample(chosen, _MOST_QUESTIONS))
    prompts = _question_prompts(model, [passages[number] for number in chosen], each=each, seed=seed)
    written = _write(model, prompts, seed=seed)
    pairs = zip((number for number in chosen for _ in range(each)), written, strict=True)
    asked = list(dict.fromkeys((number, question) for number, question in pairs if question))
    if not asked:
        raise ValueError("The base model wrote no question about the document. Give another seed, or a longer text.")
    return asked


class _Refined(ABC):
    """What moves, and the loss of a step. Rows move in units of their layer's size, so that one rate fits all."""

    num_parts = 1

    def __init__(self, model: DocToLoRA, adapter: LoRAAdapter) -> None:
        self.model, self.adapter = model, adapter
        self.moves: list[Tensor] = []

    @torch.no_grad()
    def begin(self, learned: Sequence[int], held_out: Sequence[int]) -> None:
        """From the adapter as it was given, with these questions, by their numbers."""
        for move in self.moves:
            move.zero_()

    def moving(self, shape: Sequence[int]) -> Tensor:
        move = torch.zeros(shape, device=self.model.device, requires_grad=True)
        self.moves.append(move)
        return move

    @abstractmethod
    def rows(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A and B as they are now."""

    @abstractmethod
    def loss(self, rng: random.Random) -> Tensor: ...

    @abstractmethod
    def held_out_loss(self) -> float | None:
        """Of the rows as they are now; None where nothing is held out."""


class _Best:
    """The moves at the lowest loss on what is held out; without it, the last ones."""

    def __init__(self, refined: _Refined) -> None:
        self.refined, self.since = refined, 0
        self.loss: float | None = None
        self.moves: list[Tensor] = []

    @torch.no_grad()
    def take(self) -> bool:
        """Whether it has not fallen for a while."""
        loss = self.refined.held_out_loss()
        if loss is None:
            return False
        if self.loss is None or loss < self.loss:
            self.since, self.loss = 0, loss
            self.moves = [move.detach().clone() for move in self.refined.moves]
        else:
            self.since += 1
        return self.since >= _PATIENCE

    @torch.no_grad()
    def put_back(self) -> None:
        for move, best in zip(self.refined.moves, self.moves, strict=bool(self.moves)):
            move.copy_(best)


def _size(rows: Tensor) -> Tensor:
    """Of each layer the root mean square of [C, L, R, d] where there is something, [L, 1, 1]."""
    count = (rows != 0).sum((0, 2, 3)).clamp(min=1)
    return (rows.float().square().sum((0, 2, 3)) / count).sqrt()[:, None, None]


class _Recited(_Refined):
    """Keys move in the whitened directions that they lie in, and keep their lengths: a longer key would be found by
    more questions, those about other texts too. How a chunk is said is right already: the right chunk's rows say .88 to
    .93 of the answers, and a step of saying costs as much as reading the sentences.

    Three parts of the questions end three rounds of steps, and the mean of their keys comes back: what one round finds
    depends on the few questions that end it (docs/experiments/2026-11-30-refining.md).
    """

    num_parts = 3

    def __init__(
        self,
        model: DocToLoRA,
        adapter: LoRAAdapter,
        passages: Sequence[str],
        asked: Sequence[tuple[int, str]],
        *,
        seed: int,
    ) -> None:
        super().__init__(model, adapter)
        assert model.hypernetwork.recitation is not None
        self.part = model.hypernetwork.recitation
        (self.name,) = adapter.A
        self.A, self.B = adapter.A[self.name].float(), adapter.B[self.name].float()
        num_keys, key_dim = self.part.num_key_layers, self.part.metric.shape[-1]
        self.keys = self.moving((len(self.A), num_keys, self.A.shape[2], key_dim))
        self.key_size = key_dim**-0.5  # a key is a unit vector: of its directions each has this size
        # A = P k, and P has full column rank.
        inverse = torch.stack([torch.linalg.pinv(metric) for metric in self.part.metric])
        self.start = torch.einsum("clrd, lkd -> clrk", self.A[:, :num_keys], inverse)
        prompts = model.layout.prompt_ids(model.tokenizer, [question for _, question in asked])
        with torch.no_grad(), model.injector.using(None):
            inputs, asked_tokens = model.read_questions(prompts)
            self.unit = self.part.whitened(inputs)
            self.weight = self.part.weights(self.unit, asked_tokens)
        self.chunks = torch.tensor([chunk for chunk, _ in asked], device=model.device)
        self.learned: list[int] = list(range(len(asked)))
        self.held_out: list[int] = []

    def begin(self, learned: Sequence[int], held_out: Sequence[int]) -> None:
        super().begin(learned, held_out)
        self.learned, self.held_out = list(learned), list(held_out)

    def _moved(self) -> Tensor:
        """k of each key as it is now, 0 where there is none, [C, num_key_layers, R, key_dim]."""
        moved = F.normalize(self.start + self.key_size * self.keys, dim=-1)
        return moved * self.start.norm(dim=-1, keepdim=True)

    def rows(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        num_keys = self.part.num_key_layers
        changed = torch.einsum("clrk, ldk -> clrd", self._moved() - self.start, self.part.metric)
        return {self.name: torch.cat([self.A[:, :num_keys] + changed, self.A[:, num_keys:]], 1)}, {self.name: self.B}

    def loss(self, rng: random.Random) -> Tensor:
        return self._found(rng.sample(self.learned, min(_MATCHED, len(self.learned))))

    def held_out_loss(self) -> float | None:
        return self._found(self.held_out).item() if self.held_out else None

    def _found(self, chosen: Sequence[int]) -> Tensor:
        """Cross-entropy of the chosen questions' chunks."""
        best = self.part.best_of_keys(self.unit[chosen], self._moved())
        return F.cross_entropy(_SHARPNESS * scores(best, self.weight[chosen]), self.chunks[chosen])


class _Distilled(_Refined):
    """All rows of A and B move; a step takes one passage of the document, of half the window or less."""

    terms: dict[str, LossTerm]

    def __init__(
        self,
        model: DocToLoRA,
        adapter: LoRAAdapter,
        passages: Sequence[str],
        asked: Sequence[tuple[int, str]],
        *,
        seed: int,
    ) -> None:
        super().__init__(model, adapter)
        self.start = [{name: rows.float() for name, rows in part.items()} for part in (adapter.A, adapter.B)]
        self.sizes = [{name: _size(rows) for name, rows in part.items()} for part in self.start]
        self.moved = [{name: self.moving(rows.shape) for name, rows in part.items()} for part in self.start]
        self.terms = {"kl": ContextDistillation(weight=1.0), "locality_kl": Locality(weight=0.5)}
        self.module = LitDocToLoRA(model=model, objective=self.terms, optimizer={})
        self.passages, self.place = _together(model, passages)
        prompts = model.layout.prompt_ids(model.tokenizer, [_WORLD] * _NUM_WORLD)
        world = list(filter(None, dict.fromkeys(_write(model, prompts, seed=seed))))
        known = self._answers(world, [None] * len(world))
        self.general = [Question(q, a, kind="background") for q, a in zip(world, known, strict=True) if a]
        self.source = DistillationBatches(
            None,  # type: ignore[arg-type]  # no steps are drawn from it
            model.tokenizer,
            max_chunk_tokens=model.max_chunk_tokens,
            frame=model.context_encoder.frame(model.tokenizer),
            min_chunk_tokens=model.context_encoder.min_chunk_tokens,
            num_embeddings=num_embeddings(model.base_model),
        )
        self.of = [self.place[chunk] for chunk, _ in asked]
        answers = self._answers([question for _, question in asked], [self.passages[place] for place in self.of])
        self.asked = [Question(q, a) if a else None for (_, q), a in zip(asked, answers, strict=True)]
        self.begin(range(len(asked)), [])

    def begin(self, learned: Sequence[int], held_out: Sequence[int]) -> None:
        super().begin(learned, held_out)
        self.batches, self.held_out = self._batches(learned), self._batches(held_out)
        if not self.batches:
            raise ValueError(
                "The base model answered no question about the document. Give another seed, or a longer text."
            )

    def _batches(self, chosen: Sequence[int]) -> list[DistillationBatch]:
        """One for each passage that something is asked about."""
        found = []
        for number, text in enumerate(self.passages):
            own = [q for one in chosen if self.of[one] == number and (q := self.asked[one]) is not None]
            if own:
                batch = self.source.batch([text], [[*own, *self.general]])
                # The whole adapter answers, not the passage's own chunks.
                found.append(batch._replace(chunk_counts=[self.adapter.num_chunks]).to(self.model.device))
        return found

    def _answers(self, questions: Sequence[str], documents: Sequence[str | None]) -> list[str]:
        found: list[str] = []
        for start in range(0, len(questions), _WRITTEN_TOGETHER):
            part = slice(start, start + _WRITTEN_TOGETHER)
            found += self.model.generate(questions[part], documents=documents[part], max_new_tokens=_ANSWER_TOKENS)
        return found

    def rows(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        A, B = (
            {name: rows + size[name] * moved[name] for name, rows in start.items()}
            for start, size, moved in zip(self.start, self.sizes, self.moved, strict=True)
        )
        return A, B

    def loss(self, rng: random.Random) -> Tensor:
        return self._of(rng.choice(self.batches))

    def held_out_loss(self) -> float | None:
        if not self.held_out:
            return None
        return sum(self._of(batch).item() for batch in self.held_out) / len(self.held_out)

    def _of(self, batch: DistillationBatch) -> Tensor:
        step = Step(StepPart.of(batch), *self.rows())
        self.module._compute(step, frozenset({"teacher", "student"}))
        return torch.stack([term.weight * term(step) for term in self.terms.values()]).sum()


def _together(model: DocToLoRA, passages: Sequence[str]) -> tuple[list[str], list[int]]:
    """Consecutive chunks in passages of at most half the window less question and answer, and each chunk's passage."""
    most = context_window(model.base_model) // 2 - _QUESTION_TOKENS - _ANSWER_TOKENS
    found: list[str] = []
    places: list[int] = []
    size = 0
    for text in passages:
        count = len(model.tokenizer(text)["input_ids"])
        if found and size + count <= most:
            found[-1] += " " + text
            size += count
        else:
            found.append(text)
            size = count
        places.append(len(found) - 1)
    return found, places
