"""What all forgetting benchmarks have in common: new facts, learned to a target accuracy, and what was known before.

model, told = load("assets/tiny"), new_facts(seed=0, number=25)
learned = learn(model, told, Recipe(moves=Everything(), lr=1e-3), seed=0, limits=Limits())
learned.reached, learned.steps                        # never to a number of steps: it stops at the target, or the limit
Known.draw(sizes, seed=0).measure(model, learned.state) # background, questions with the article, texts, ...

A new fact is a sentence of the encyclopedia's test split that the base model cannot know. Its answers are the truth,
the same for every method. Of the encyclopedia's four wordings two are trained on, with the templates of
`hypernet.consolidation.questions`; by the third, which is not, training sees that it may stop; the fourth is measured.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.measuring.measure import load_model
from benchmarks.measuring.metrics import contains
from benchmarks.measuring.rows import Row
from benchmarks.memory.nights import Wordings, _known, facts
from hypernet.adapters.adapter import LoRAAdapter
from hypernet.base.packed_rows import PackedRows, Segment, pack_row, pad_rows
from hypernet.base.targets import find_blocks
from hypernet.consolidation.consolidator import Consolidator, Enough
from hypernet.consolidation.moves import Moves
from hypernet.consolidation.objectives import Objective, Supervised, kl
from hypernet.consolidation.questions import QuestionWriter
from hypernet.consolidation.rehearsal import NoRehearsal, Rehearsal, Replay
from hypernet.consolidation.remedies import NoRemedy, Remedy
from hypernet.consolidation.weights import MovedWeights, installed
from hypernet.data.encyclopedia import Encyclopedia, background_facts, background_questions, relations
from hypernet.data.needles import Needles
from hypernet.data.records import UNKNOWN
from hypernet.doc_to_lora import DocToLoRA
from hypernet.memory.store.records import MemoryVersion
from hypernet.text.matching import exact_match
from hypernet.text.tokens import framed_ids, text_ids

_BATCH = 64
_WINDOW = 256  # tokens of a text
# How a base model that reads texts is asked for real facts.
CLOZE = {
    **{"capital": "The capital of {s} is", "opposite": "The opposite of {s} is"},
    **{"young_animal": "A young {s} is called a", "symbol": "The chemical symbol of {s} is"},
    "language": "The French word {s} means",
}


class NewFact(NamedTuple):
    """A sentence, the questions that it is learned by, the one that ends training, the one that is measured."""

    text: str
    subject: str
    relation: str
    training: tuple[str, ...]
    check: str
    asked: str
    answer: str


def new_facts(seed: int, number: int, *, kind: str | None = None) -> list[NewFact]:
    """Facts of the encyclopedia's test split.

    Args:
        kind: of entity that they are about; None: any.
    """
    kinds = {relation.name: relation.entity_kind for relation in relations()}
    forms = {relation.name: relation.questions for relation in relations()}
    writer, found = Wordings(), []
    for one in facts(seed, number if kind is None else 12 * number):
        if kind in (None, kinds[one.relation]) and len(found) < number:
            training = writer.training(_memory(one.text, one.subject, one.relation))
            check = forms[one.relation][2].format(n=one.subject)
            found.append(NewFact(*one[:3], tuple(training), check, one.question, one.answer))
    return found


def new_numbers(seed: int, number: int) -> list[NewFact]:
    """Secret numbers of names, as needles tell and ask them."""
    found = []
    for index in range(number):
        record = Needles("test", seed=seed, num_tokens=(8, 8), num_keys=(1, 1)).record(index)
        (question,) = record.questions
        subject = question.text.removeprefix("What is the secret number of ").removesuffix("?")
        text = next(sentence for sentence in record.sentences if question.answer in sentence)
        training = Wordings().training(_memory(text, subject, "secret number"))
        check = f"Which secret number does {subject} have?"
        found.append(NewFact(text, subject, "secret number", tuple(training), check, question.text, question.answer))
    return found


def as_facts(pairs: Sequence[tuple[str, str]]) -> list[NewFact]:
    """Questions with their answers, to be trained on as they are."""
    return [NewFact(question, question, "", (question,), question, question, answer) for question, answer in pairs]


class Truth(QuestionWriter):
    """The facts' own questions with their true answers, for the memories of `memories`."""

    def __init__(self, told: Sequence[NewFact]) -> None:
        self._of = dict(zip((memory.ref for memory in memories(told)), told, strict=True))

    def training(self, memory: MemoryVersion) -> list[str]:
        return list(self._of[memory.ref].training)

    def held_out(self, memory: MemoryVersion) -> list[str]:
        return [self._of[memory.ref].check]

    def answers(self, memory: MemoryVersion) -> Mapping[str, str]:
        return dict.fromkeys(self.training(memory), self._of[memory.ref].answer)


def memories(told: Sequence[NewFact]) -> list[MemoryVersion]:
    return [_memory(one.text, one.subject, one.relation, name=str(place)) for place, one in enumerate(told)]


def _memory(text: str, subject: str, relation: str, *, name: str = "") -> MemoryVersion:
    none = dict.fromkeys(
        ("user_id", "agent_id", "run_id", "role", "source", "sha256", "invalid_at", "expired_at", "stated_until")
    )
    told: dict[str, Any] = {"id": name, "version": 1, "text": text, "subject": subject, "relation": relation or None}
    at = {"valid_at": "", "created_at": "", "conflict": "", "metadata": {}}
    return MemoryVersion(**told, **none, **at)


# What answers


class State(NamedTuple):
    """The base model with these tensors in the place of its own, and an adapter whose chunks are routed."""

    tensors: Mapping[str, Tensor] = {}
    adapter: LoRAAdapter | None = None

    def generate(
        self, model: DocToLoRA, questions: Sequence[str], documents: Sequence[str | None] | None = None
    ) -> list[str]:
        found: list[str] = []
        with installed(model.base_model, self.tensors):
            for start in range(0, len(questions), _BATCH):
                part = slice(start, start + _BATCH)
                given = None if documents is None else documents[part]
                join = None if self.adapter is None else "route"
                found += model.generate(questions[part], self.adapter, join=join, documents=given, max_new_tokens=16)
        return found

    @contextmanager
    def active(self, model: DocToLoRA, prompts: Sequence[Sequence[int]]) -> Iterator[None]:
        """For forward passes of these prompts."""
        joining = None if self.adapter is None else model.joining("route")
        with installed(model.base_model, self.tensors), model.using(self.adapter, joining, prompts=prompts):
            yield


def load(checkpoint: str) -> DocToLoRA:
    """A checkpoint or a base model alone, in float32: bfloat16 rounds away what a step of training moves."""
    return load_model(checkpoint, "cpu").float().eval().requires_grad_(False)


# Learning


class Limits(NamedTuple):
    """target: share of the new facts answered, at which training ends. max_steps: of training, of which half are made
    where none is answered then. every: steps between two looks. batch_size, rehearsal_size: of a step.
    """

    target: float = 0.95
    max_steps: int = 200
    every: int = 2
    batch_size: int = 24
    rehearsal_size: int = 32


@dataclass(frozen=True)
class Recipe:
    """start: None, or "adapters": training starts from the generated ones."""

    moves: Moves
    lr: float
    objective: Objective = field(default_factory=Supervised)
    rehearsal: Rehearsal = field(default_factory=NoRehearsal)
    remedy: Remedy = field(default_factory=NoRemedy)
    start: str | None = None


@dataclass(frozen=True)
class Learned:
    """steps: that training took. checked: of the facts at its end, by the wording that ends it."""

    weights: MovedWeights
    steps: int
    checked: float
    reached: bool
    processor_s: float

    @property
    def state(self) -> State:
        return State(self.weights.tensors)

    def row(self) -> Row:
        return {
            **{"steps": self.steps, "checked": self.checked, "reached": self.reached},
            "processor_s": self.processor_s,
        }


def learn(
    model: DocToLoRA,
    told: Sequence[NewFact],
    recipe: Recipe,
    *,
    seed: int,
    limits: Limits,
    start: MovedWeights | None = None,
    background: Sequence[str] = (),
) -> Learned:
    """Trains until the target is reached, or the limit.

    Args:
        start: weights to start from; None: as the recipe says.
        background: questions that a choice of rows or a remedy tells the facts from, where nothing is rehearsed.
    """
    if recipe.start == "adapters":
        adapter = model.internalize([one.text for one in told]).fused()
        start = MovedWeights.of_adapter(model.base_model, adapter)
    consolidator = Consolidator(
        moves=recipe.moves,
        objective=recipe.objective,
        rehearsal=recipe.rehearsal,
        remedy=recipe.remedy,
        background=Replay(questions=background) if background else None,
        questions=Truth(told),
        steps=limits.max_steps,
        batch_size=limits.batch_size,
        rehearsal_size=limits.rehearsal_size,
        lr=recipe.lr,
        seed=seed,
    )
    rows = answer_rows(model, [one.check for one in told], [one.answer for one in told])

    def checked(tensors: Mapping[str, Tensor]) -> float | None:
        right = rightly(model, State(tensors), rows)
        return None if right is None else sum(right) / len(right)

    looks: list[float | None] = []

    def ended(tensors: Mapping[str, Tensor]) -> bool:
        looks.append(share := checked(tensors))
        if share is None or share >= limits.target:  # what diverged does not come back
            return True
        return share == 0 and 2 * limits.every * len(looks) >= limits.max_steps

    started = time.process_time()
    enough = Enough(ended, every=limits.every)
    trained = consolidator.train(model, memories(told), start=start, enough=enough)
    seconds = time.process_time() - started
    # Of the weights that come out: a remedy may have moved them after the target was reached.
    share = checked(trained.weights.tensors) or 0.0
    return Learned(trained.weights, len(trained.losses), share, share >= limits.target, seconds)


def answer_rows(
    model: DocToLoRA,
    questions: Sequence[str],
    answers: Sequence[str],
    documents: Sequence[str | None] | None = None,
) -> PackedRows:
    """A row for each question with its answer and what ends it."""
    documents = [None] * len(questions) if documents is None else list(documents)
    prompts = model.layout.prompt_ids(model.tokenizer, list(questions), documents)
    frame = model.layout.before_answer, model.layout.after_answer
    framed = framed_ids(model.tokenizer, [(frame[0], answer, frame[1]) for answer in answers])
    return _packed(model, prompts, framed)


def _packed(model: DocToLoRA, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> PackedRows:
    pairs = zip(prompts, answers, strict=True)
    rows = [pack_row((), [Segment(prompt + answer, len(prompt), False, 0)]) for prompt, answer in pairs]
    return pad_rows(rows, pad_id=model.tokenizer.pad_token_id or 0).to(model.device)


@torch.no_grad()
def rightly(model: DocToLoRA, state: State, rows: PackedRows) -> list[bool] | None:
    """Of each row whether greedy decoding gives its answer token for token; None: the weights diverged."""
    begins = (rows.target_kind >= 0).int().argmax(1).tolist()  # of the answers, which routing must not read
    prompts = [row[: begin + 1].tolist() for row, begin in zip(rows.ids, begins, strict=True)]
    with state.active(model, prompts):
        logits = model.base_model(input_ids=rows.ids, use_cache=False).logits
    where = rows.target_kind >= 0
    if not logits[where].isfinite().all():
        return None
    wrong = where & (logits.argmax(-1) != rows.targets())
    return (~wrong.any(1)).tolist()


def scores(
    model: DocToLoRA,
    state: State,
    told: Sequence[NewFact],
    *,
    match: str = "exact",
    documents: Sequence[str] | None = None,
) -> list[float]:
    """Of each fact whether it is answered in the wording that is measured."""
    right = exact_match if match == "exact" else contains
    answers = state.generate(model, [one.asked for one in told], documents)
    return [float(right(text, (one.answer,))) for text, one in zip(answers, told, strict=True)]


def snapshot(model: DocToLoRA) -> dict[str, Tensor]:
    """Copies of the base model's parameters, by which `changed` counts."""
    return {name: parameter.detach().clone() for name, parameter in model.base_model.named_parameters()}


def changed(model: DocToLoRA, weights: MovedWeights, before: Mapping[str, Tensor]) -> Row:
    """Counted from the tensors' difference to what they were before training.

    Returns:
        changed_share: of the parameters that differ. changed_rows: of matrices, of a down projection its columns, one a
        neuron. frozen_difference: the largest of a parameter that should not have moved.

    Raises:
        ValueError: the weights have a tensor that the base model lacks.
    """
    if unknown := sorted(set(weights.tensors) - set(before)):
        raise ValueError(f"The base model has no parameter {unknown[0]!r}. Give weights of this base model.")
    numbers, rows, frozen = 0, 0, 0.0
    with installed(model.base_model, weights.tensors):
        for name, parameter in model.base_model.named_parameters():
            differs = parameter.data != before[name]
            if name not in weights.tensors:
                frozen = max(frozen, float((parameter.data - before[name]).abs().max()))
                continue
            numbers += int(differs.sum())
            if differs.dim() > 1:
                rows += int(differs.any(0 if "down_proj" in name else 1).sum())
    total = sum(parameter.numel() for parameter in before.values())
    return {"changed_share": numbers / total, "changed_rows": rows, "frozen_difference": frozen}


# What was known before


class Sizes(NamedTuple):
    """How many questions, texts and windows of 256 tokens are measured.

    real_only: of the background the facts of the real world alone. cloze: whether these are also asked as beginnings of
    sentences. wikitext, nq_open: files, or None. match: "exact" or, of answers in sentences, "contains".
    """

    num_background: int = 96
    num_in_context: int = 32
    num_unknown: int = 32
    num_texts: int = 8
    num_windows: int = 8
    num_nq: int = 128
    real_only: bool = False
    cloze: bool = False
    match: str = "exact"
    wikitext: str | None = None
    nq_open: str | None = None


class _Asked(NamedTuple):
    question: str
    answers: tuple[str, ...]
    document: str | None = None


@dataclass(frozen=True)
class Known:
    """What a model knew and could before: sets of questions, texts and windows of WikiText.

    skipped: what is not measured, and why.
    """

    sets: Mapping[str, Sequence[_Asked]]
    cloze: Sequence[tuple[str, str]]
    texts: Sequence[str]
    windows: str
    sizes: Sizes
    skipped: Mapping[str, str]

    @classmethod
    def draw(cls, sizes: Sizes, *, seed: int) -> "Known":
        """Of none of its background questions, or their facts, `other_known` has one."""
        rng = Encyclopedia("known", seed=seed).rng("forgetting")
        real = {group for group, _, _ in background_facts()}
        asked = [q for q in background_questions(held_out=True) if q.group in real or not sizes.real_only]
        found = rng.sample(asked, min(sizes.num_background, len(asked)))
        sets = {"background": [_Asked(one.text, (one.answer,)) for one in found]}
        read = Encyclopedia("validation", seed=seed)
        articles = [read.record(f"in context/{place}") for place in range(sizes.num_in_context)]
        sets["in_context"] = [
            _Asked(one.questions[0].text, (one.questions[0].answer,), one.document) for one in articles
        ]
        others = [read.record(f"unknown/{place}").questions[0].text for place in range(sizes.num_unknown)]
        # A model that speaks in sentences does not say this word.
        sets |= {"abstention": [_Asked(text, (UNKNOWN,)) for text in others]} if sizes.match == "exact" else {}
        texts = [read.record(f"text/{place}").document for place in range(sizes.num_texts)]
        windows, skipped = "", {}
        if (file := _given(sizes.wikitext, "wikitext", skipped)) is not None:
            windows = file.read_text(encoding="utf-8")
        if (file := _given(sizes.nq_open, "nq_open", skipped)) is not None:
            lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            sets["nq_open"] = [_Asked(f"{one['question']}?", tuple(one["answer"])) for one in lines[: sizes.num_nq]]
        # Of the held-out half, as the background is.
        cloze = [
            (CLOZE[group].format(s=subject), answer)
            for group, subject, answer in background_facts()
            if sizes.cloze and any(q.answer == answer and subject in q.text for q in asked if q.group == group)
        ]
        return cls(sets, cloze, texts, windows, sizes, skipped)

    def measure(self, model: DocToLoRA, state: State) -> Row:
        """Means, and below `items` the score of each question, text and window, in their order."""
        right = exact_match if self.sizes.match == "exact" else contains
        items: dict[str, list[float]] = {}
        for name, asked in self.sets.items():
            given = [one.document for one in asked]
            answers = state.generate(model, [one.question for one in asked], given)
            items[name] = [float(right(text, one.answers)) for text, one in zip(answers, asked, strict=True)]
        if self.cloze:
            prompts, answers = ([pair[place] for pair in self.cloze] for place in (0, 1))
            framed = text_ids(model.tokenizer, [f" {answer}" for answer in answers])
            found = rightly(model, state, _packed(model, text_ids(model.tokenizer, prompts), framed))
            items["cloze"] = [float(one) for one in found or [False] * len(self.cloze)]
        items["kl"] = [_kl(model, state, ids) for ids in text_ids(model.tokenizer, self.texts)]
        windows = _windows(model, self.windows, self.sizes.num_windows)
        items["wikitext_nats"] = [_nats(model, state, ids) for ids in windows]
        means = {name: sum(values) / len(values) for name, values in items.items() if values}
        if windows:
            means["perplexity"] = math.exp(min(means["wikitext_nats"], 700.0))
        return {**means, "items": {name: values for name, values in items.items() if values}}


def other_known(seed: int, number: int) -> list[tuple[str, str]]:
    """Questions with answers that the base model knows, about other facts than `Known` measures."""
    asked = {question.text: question.answer for question in background_questions(held_out=False)}
    return [(text, asked[text]) for text in _known(seed, number)]


def _given(path: str | None, name: str, skipped: dict[str, str]) -> Path | None:
    if path is None:
        skipped[name] = "no file is given"
        return None
    if not (file := Path(path)).is_file():
        skipped[name] = f"there is no file {path}"
        return None
    return file


@lru_cache(maxsize=2)
def _token_ids(tokenizer: Any, text: str) -> list[int]:
    lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 80]
    return text_ids(tokenizer, ["\n".join(lines[:400])])[0]


def _windows(model: DocToLoRA, text: str, number: int) -> list[list[int]]:
    ids = _token_ids(model.tokenizer, text) if text else []
    starts = range(0, min(len(ids) - _WINDOW, number * _WINDOW), _WINDOW)
    return [ids[start : start + _WINDOW] for start in starts]


@torch.no_grad()
def _kl(model: DocToLoRA, state: State, ids: list[int]) -> float:
    """KL(base ‖ state), nats a token."""
    given = torch.tensor([ids[:_WINDOW]], device=model.device)
    model.injector.clear()
    before = model.base_model(given).logits[0].float()
    with state.active(model, [ids[:_WINDOW]]):
        after = model.base_model(given).logits[0].float()
    return kl(before, after).item()


@torch.no_grad()
def _nats(model: DocToLoRA, state: State, ids: list[int]) -> float:
    """-log p of the text, nats a token."""
    given = torch.tensor([ids], device=model.device)
    with state.active(model, [ids]):
        logits = model.base_model(given).logits[0].float()
    return torch.nn.functional.cross_entropy(logits[:-1], given[0, 1:]).item()


@torch.no_grad()
def hidden_states(model: DocToLoRA, state: State, questions: Sequence[str]) -> Tensor:
    """What every block puts out at the last token of each prompt, [Q, L, D]."""
    prompts = model.layout.prompt_ids(model.tokenizer, list(questions), [None] * len(questions))
    decoder, name = find_blocks(model.base_model)
    found: list[Tensor] = []
    for start in range(0, len(prompts), _BATCH):
        part = prompts[start : start + _BATCH]
        rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in part], batch_first=True)
        last, kept = torch.tensor([len(ids) - 1 for ids in part]), []

        def keep(_module: object, _args: object, output: Any, kept: list[Tensor] = kept, last: Tensor = last) -> None:
            states = output[0] if isinstance(output, tuple) else output
            kept.append(states[torch.arange(len(last)), last])

        hooks = [block.register_forward_hook(keep) for block in getattr(decoder, name)]
        try:
            # Rows are padded behind, where a causal model's earlier positions do not look.
            with state.active(model, part):
                model.base_model(input_ids=rows.to(model.device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        found.append(torch.stack(kept, dim=1))
    return torch.cat(found).float()
