"""Consolidator: memories into weights, by training a student without them on what the base model answers with them.

consolidator = Consolidator(moves=LowRank(rank=16), objective=TeacherKL(), rehearsal=OtherSubjects())
trained = consolidator.train(model, memories, start=None, checkpoint=folder / "state.safetensors")
trained.weights.save(folder, model)

loss = objective(memories' questions) + weight * KL(base ‖ student)(rehearsed questions). Step i draws from (seed, i)
alone, so that a run that was killed goes on to the same weights, to the bit.
"""

import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from hypernet.base.generation import decode_answer, end_ids, generate_ids
from hypernet.base.packed_rows import PackedRows, Segment, pack_row, pad_rows
from hypernet.base.targets import find_blocks
from hypernet.consolidation.documents import Evidence
from hypernet.consolidation.moves import Examples, LowRank, Moves, settings_of
from hypernet.consolidation.objectives import DistilledTokens, Objective, TeacherKL, kl
from hypernet.consolidation.questions import QuestionWriter, Templates
from hypernet.consolidation.rehearsal import AboutSubject, OtherSubjects, Rehearsal
from hypernet.consolidation.remedies import NoRemedy, Remedy
from hypernet.consolidation.self_instruct.preference import Preference
from hypernet.consolidation.weights import MovedWeights, installed
from hypernet.doc_to_lora import DocToLoRA
from hypernet.io.files import replaced, save_tensors
from hypernet.memory.store.records import MemoryVersion
from hypernet.text.tokens import framed_ids

_BATCH = 64  # of answers
_KEPT_BYTES = 2**28  # of outputs of the base model
_PAIRS = 8  # of preferred answers in a step
_TEXTS = 4  # rehearsed in a step
_STEPS = 24, 4.8  # and for each memory: 48 for five, 144 for 25; of 64 four of the last five were not learned
_WARMUP_STEPS = 10  # where training ends by what is learned, so that the last step allowed changes nothing before it


class Enough(NamedTuple):
    """When what is learned ends training: reached: of the weights so far, by name. every: steps between asking it."""

    reached: Callable[[Mapping[str, Tensor]], bool]
    every: int = 5


class Lesson(NamedTuple):
    """A question, the memory that answers it (None: rehearsed), and the base model's answer with it in its prompt.

    Without a question the answer is a text, all of which is rehearsed.
    """

    question: str | None
    document: str | None
    answer: str


@dataclass(frozen=True)
class Trained:
    """losses: of each step that this process made. flops: counted as 2 forward and 6 for training, a parameter and
    token. lessons: on the memories, with those rehearsed behind them."""

    weights: MovedWeights
    losses: list[float]
    seconds: float
    flops: float
    lessons: list[Lesson]


class Consolidator:
    """Trains; nothing is written but its checkpoint.

    Args:
        moves, objective, rehearsal, questions: see their modules.
        steps: of the optimizer (AdamW, 10 % warmup, then a cosine to 0); None: 24, and 4.8 for each memory.
        batch_size, rehearsal_size: questions of a step.
        lr: peak learning rate.
        seed: of all that is drawn.
        checkpoint_steps: between checkpoints.
        preference: of a person's answers over the model's, where the questions have such pairs; None: without it.
        evidence: what the teacher reads of a memory; None: its whole text.
        remedy: against forgetting, beside rehearsal; None: without one.
        background: questions that moves and remedy tell lessons from where nothing is rehearsed; None: none.

    Raises:
        ValueError: a size is below 1, or lr not above 0 or not finite.
    """

    def __init__(
        self,
        *,
        moves: Moves | None = None,
        objective: Objective | None = None,
        rehearsal: Rehearsal | None = None,
        questions: QuestionWriter | None = None,
        steps: int | None = None,
        batch_size: int = 16,
        rehearsal_size: int = 24,
        lr: float = 3e-3,
        seed: int = 0,
        checkpoint_steps: int = 10,
        preference: Preference | None = None,
        evidence: Evidence | None = None,
        remedy: Remedy | None = None,
        background: Rehearsal | None = None,
    ) -> None:
        sizes = {"batch_size": batch_size, "rehearsal_size": rehearsal_size, "checkpoint_steps": checkpoint_steps}
        for name, size in {"steps": 1 if steps is None else steps, **sizes}.items():
            if size < 1:
                raise ValueError(f"{name} is {size}. Give at least 1.")
        if not 0 < lr < math.inf:
            raise ValueError(f"lr is {lr}. Give a finite number above 0.")
        self.moves, self.objective = moves or LowRank(), objective or TeacherKL()
        self.rehearsal, self.questions = rehearsal or OtherSubjects(), questions or Templates()
        self.steps, self.batch_size, self.rehearsal_size = steps, batch_size, rehearsal_size
        self.lr, self.seed, self.checkpoint_steps = lr, seed, checkpoint_steps
        self.preference, self.evidence = preference, evidence
        self.remedy, self.background = remedy or NoRemedy(), background

    @property
    def recipe(self) -> dict[str, Any]:
        """All that decides the weights beside memories, base model and parent."""
        parts = {name: settings_of(getattr(self, name)) for name in ("moves", "objective", "rehearsal", "questions")}
        parts["questions"] |= self.questions.recipe()
        if self.preference is not None:
            parts["preference"] = settings_of(self.preference)
        if self.evidence is not None:
            parts["evidence"] = settings_of(self.evidence)
        if not isinstance(self.remedy, NoRemedy):
            parts["remedy"] = settings_of(self.remedy)
            if self.remedy.rehearsal is not None:
                parts["remedy"]["rehearsal"] = settings_of(self.remedy.rehearsal)
        if self.background is not None:
            parts["background"] = settings_of(self.background)
        numbers = {name: getattr(self, name) for name in _NUMBERS}
        return {**parts, **numbers, "steps": list(_STEPS) if self.steps is None else self.steps}

    def lessons(self, model: DocToLoRA, memories: Sequence[MemoryVersion]) -> list[Lesson]:
        """Training wordings with their answers, the base model's unless they are given; some memories have none.

        Left out, where others remain, are answers that the base model gives without the memory too, which it did not
        read then; and of wordings that ask for one key's value, those that differ from what more than half of them say.
        """
        found = []
        for memory in memories:
            given = self.questions.answers(memory)
            for question in self.questions.training(memory):
                text = str(memory.text) if self.evidence is None else self.evidence.prompt(question, memory)
                found.append((memory, Lesson(question, text, given.get(question, ""))))
        asked = [lesson for _, lesson in found if not lesson.answer]
        read = iter(_answers(model, [(str(one.question), one.document) for one in asked]))
        unread = iter(_answers(model, [(str(one.question), None) for one in asked]))
        lessons, own = [], {memory.ref: list[tuple[Lesson, bool]]() for memory in memories}
        for memory, lesson in found:
            if lesson.answer:
                lessons.append(lesson)
            elif answer := next(read):
                own[memory.ref].append((lesson._replace(answer=answer), answer != next(unread)))
            else:
                next(unread)
        for memory in memories:
            part = [lesson for lesson, differs in own[memory.ref] if differs] or [one for one, _ in own[memory.ref]]
            lessons += part if memory.relation is None else _agreeing(part)
        return lessons

    def rehearsed(self, model: DocToLoRA, memories: Sequence[MemoryVersion]) -> list[str]:
        """The questions that are rehearsed while these memories are trained on."""
        trained = [
            AboutSubject(text, subject)
            for memory in memories
            for subject in self.questions.subjects(memory)
            for text in self.questions.training(memory)
            if subject in text
        ]
        return self.rehearsal.questions(model, seed=self.seed, trained=trained)

    def train(
        self,
        model: DocToLoRA,
        memories: Sequence[MemoryVersion],
        *,
        num_new: int | None = None,
        start: MovedWeights | None = None,
        checkpoint: Path | None = None,
        progress: Callable[[int, int], None] | None = None,
        enough: Enough | None = None,
    ) -> Trained:
        """The base model's weights with the memories in them.

        Args:
            num_new: the last ones, which `start` lacks: two thirds of each step's questions are on them; None: all.
            start: weights to start from; None: the base model's.
            checkpoint: a file to go on from; it is left for the caller to remove.
            progress: called with (steps done, steps altogether).
            enough: ends training before its last step; the learning rate then stays what it is after the warmup.

        Raises:
            ValueError: there is nothing to ask about the memories, or what moves or the remedy lacks what it needs.
        """
        started = time.perf_counter()
        num_old = 0 if num_new is None else len(memories) - num_new
        old, own = self.lessons(model, memories[:num_old]), self.lessons(model, memories[num_old:])
        if not own:
            raise ValueError(
                "None of these memories can be asked about: they have no subject and relation. Add them with both, or "
                "open the memory with an extractor."
            )
        rehearsed = _answered(model, [(text, None) for text in self.rehearsed(model, memories)])
        texts = [Lesson(None, None, text) for text in self.rehearsal.texts(model, seed=self.seed)]
        asked = rehearsed + texts if self.objective.on_policy else old + own + rehearsed + texts
        frozen = _Frozen(model, asked, with_hidden=self.objective.needs_hidden)
        pairs = [pair for memory in memories for pair in self.questions.preferences(memory)] if self.preference else []
        others = rehearsed
        if self.background is not None and not rehearsed:
            asked_of = self.background.questions(model, seed=self.seed)
            others = _answered(model, [(text, None) for text in asked_of])
        realigned = self._realigned(model)
        examples = Examples(*(_batches(model, part) for part in (old + own, others)))
        parameters = self.moves.start(model, start, seed=self.seed, examples=examples)
        self.remedy.start(model, examples, seed=self.seed)
        # Where nothing moves there is no step, and torch wants a tensor all the same.
        leaves = list(parameters.values()) or [torch.zeros((), requires_grad=True)]
        optimizer = torch.optim.AdamW(leaves, lr=self.lr, betas=(0.9, 0.95), weight_decay=0.0)
        first = _restore(checkpoint, parameters, optimizer)
        steps = (self.steps or round(_STEPS[0] + _STEPS[1] * len(memories))) if parameters else 0
        losses, tokens = [], [0, 0]
        for step in range(first, steps):
            rng = random.Random(f"{self.seed}/{step}")
            size_old = min(self.batch_size // 3, len(old))
            lessons = rng.sample(old, size_old) + rng.sample(own, min(self.batch_size - size_old, len(own)))
            again = rng.sample(rehearsed, min(self.rehearsal_size, len(rehearsed)))
            read = rng.sample(texts, min(_TEXTS, len(texts)))
            for group in optimizer.param_groups:
                group["lr"] = self.lr * _share_of_lr(step, steps, constant=enough is not None)
            loss = self._loss(
                model, parameters, lessons, (again, read), frozen, seed=self.seed * 1_000_003 + step, tokens=tokens
            )
            if pairs:
                loss = loss + self._preferred(model, parameters, rng.sample(pairs, min(_PAIRS, len(pairs))), tokens)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if checkpoint is not None and (step + 1) % self.checkpoint_steps == 0:
                _store(checkpoint, parameters, optimizer, step + 1)
            if progress is not None:
                progress(step + 1, steps)
            if enough is not None and (step + 1) % enough.every == 0:
                with torch.no_grad():
                    if enough.reached(self.moves.tensors(model, parameters)):
                        break
        if parameters and realigned:
            self._realign(model, parameters, realigned, tokens)
        size = sum(parameter.numel() for parameter in model.base_model.parameters())
        with torch.no_grad():
            weights = self.moves.result(model, parameters)
        flops = float(size * (2 * (frozen.num_tokens + tokens[0]) + 6 * tokens[1]))
        return Trained(weights, losses, time.perf_counter() - started, flops, old + own + rehearsed)

    def _loss(
        self,
        model: DocToLoRA,
        parameters: Mapping[str, Tensor],
        lessons: Sequence[Lesson],
        rehearsed: Sequence[Sequence[Lesson]],
        frozen: "_Frozen",
        *,
        seed: int,
        tokens: list[int],
    ) -> Tensor:
        moved = self.moves.tensors(model, parameters)
        if self.objective.on_policy:
            with self.remedy.around(model):
                lessons = self._drawn(model, moved, lessons, seed)
        teacher = frozen(lessons)
        student_rows = _rows(model, lessons, with_documents=False)
        with self.remedy.around(model):
            student = _forward(model, moved, student_rows, self.objective.needs_hidden)
        targets = student_rows.targets()[student_rows.target_kind >= 0]
        loss = self.objective(DistilledTokens(student.logits, teacher.logits, targets, student.hidden, teacher.hidden))
        tokens[1] += student.num_tokens
        for again in filter(None, rehearsed):
            with self.remedy.around(model):
                after = _forward(model, moved, _rows(model, again, with_documents=False), False)
            loss = loss + self.rehearsal.weight * kl(frozen(again).logits, after.logits)
            tokens[1] += after.num_tokens
        return loss

    def _realigned(self, model: DocToLoRA) -> list[Lesson]:
        """What the remedy rehearses after learning."""
        if self.remedy.rehearsal is None:
            return []
        found = _answered(model, [(text, None) for text in self.remedy.rehearsal.questions(model, seed=self.seed)])
        if not found:
            raise ValueError("The remedy's rehearsal has no question that the base model answers. Choose another one.")
        return found

    def _realign(
        self, model: DocToLoRA, parameters: Mapping[str, Tensor], rehearsed: Sequence[Lesson], tokens: list[int]
    ) -> None:
        frozen = _Frozen(model, rehearsed, with_hidden=False)

        def loss(step: int) -> Tensor:
            rng = random.Random(f"{self.seed}/after/{step}")
            again = rng.sample(rehearsed, min(self.rehearsal_size, len(rehearsed)))
            moved = self.moves.tensors(model, parameters)
            after = _forward(model, moved, _rows(model, again, with_documents=False), False)
            tokens[1] += after.num_tokens
            return kl(frozen(again).logits, after.logits)

        self.remedy.after(parameters.values(), loss)
        tokens[0] += frozen.num_tokens

    def _preferred(
        self,
        model: DocToLoRA,
        parameters: Mapping[str, Tensor],
        pairs: Sequence[tuple[str, str, str]],
        tokens: list[int],
    ) -> Tensor:
        assert self.preference is not None
        moved = self.moves.tensors(model, parameters)
        lessons = [Lesson(question, None, answer) for question, *both in pairs for answer in both]
        rows = _rows(model, lessons, with_documents=False)
        with torch.no_grad():
            before = _forward(model, {}, rows, False)
        with self.remedy.around(model):
            after = _forward(model, moved, rows, False)
        tokens[0] += before.num_tokens
        tokens[1] += after.num_tokens
        chosen, rejected = _log_p(after.logits, rows)
        return self.preference.weight * self.preference(chosen, rejected, *_log_p(before.logits, rows))

    def _drawn(
        self, model: DocToLoRA, moved: Mapping[str, Tensor], lessons: Sequence[Lesson], seed: int
    ) -> list[Lesson]:
        """The lessons with answers that the student draws."""
        prompts = model.layout.prompt_ids(model.tokenizer, [str(lesson.question) for lesson in lessons])
        longest = max(len(row) for row in model.tokenizer([lesson.answer for lesson in lessons])["input_ids"])
        with torch.random.fork_rng(devices=[]), torch.no_grad(), installed(model.base_model, moved):
            torch.manual_seed(seed)
            drawn = generate_ids(
                model.base_model, model.tokenizer, prompts, max_new_tokens=longest + 4, temperature=1.0
            )
        ends = end_ids(model.base_model, model.tokenizer)
        answers = [decode_answer(model.tokenizer, row, ends) for row in drawn]
        return [lesson._replace(answer=answer) for lesson, answer in zip(lessons, answers, strict=True)]


def _share_of_lr(step: int, steps: int, *, constant: bool) -> float:
    """Of the peak: a linear warmup, then a cosine to 0 or 1."""
    warmup = _WARMUP_STEPS if constant else max(1, steps // 10)
    warm = min(1.0, (step + 1) / warmup)
    return warm if constant else warm * (0.5 + 0.5 * math.cos(math.pi * step / steps))


_NUMBERS = ("steps", "batch_size", "rehearsal_size", "lr", "seed")


class _Output(NamedTuple):
    logits: Tensor
    hidden: Tensor | None
    num_tokens: int


def _answers(model: DocToLoRA, asked: Sequence[tuple[str, str | None]]) -> list[str]:
    found: list[str] = []
    for start in range(0, len(asked), _BATCH):
        part = asked[start : start + _BATCH]
        found += model.generate([question for question, _ in part], documents=[document for _, document in part])
    return found


def _answered(model: DocToLoRA, asked: Sequence[tuple[str, str | None]]) -> list[Lesson]:
    return [Lesson(*pair, answer) for pair, answer in zip(asked, _answers(model, asked), strict=True) if answer]


def _agreeing(lessons: Sequence[Lesson]) -> list[Lesson]:
    """Those with the answer that more than half of them have; all, if there is none."""
    for answer, number in Counter(lesson.answer for lesson in lessons).most_common(1):
        if 2 * number > len(lessons):
            return [one for one in lessons if one.answer == answer]
    return list(lessons)


def _rows(model: DocToLoRA, lessons: Sequence[Lesson], *, with_documents: bool) -> PackedRows:
    """One row for each lesson: prompt and answer."""
    layout, tokenizer = model.layout, model.tokenizer
    asked = [lesson for lesson in lessons if lesson.question is not None]
    documents = [lesson.document if with_documents else None for lesson in asked]
    found = iter(layout.prompt_ids(tokenizer, [str(lesson.question) for lesson in asked], documents))
    prompts = [next(found) if lesson.question is not None else [] for lesson in lessons]
    answers = framed_ids(tokenizer, [_framed(model, lesson) for lesson in lessons])
    pairs = zip(prompts, answers, strict=True)
    rows = [pack_row((), [Segment(prompt + answer, len(prompt), False, 0)]) for prompt, answer in pairs]
    return pad_rows(rows, pad_id=tokenizer.pad_token_id or 0).to(model.device)


def _batches(model: DocToLoRA, lessons: Sequence[Lesson]) -> list[PackedRows]:
    parts = [lessons[start : start + _BATCH] for start in range(0, len(lessons), _BATCH)]
    return [_rows(model, part, with_documents=False) for part in parts]


def _forward(model: DocToLoRA, moved: Mapping[str, Tensor], rows: PackedRows, with_hidden: bool) -> _Output:
    """Logits [N, V], and outputs of the blocks [L, N, D], where answer tokens are predicted."""
    where, hidden = rows.target_kind >= 0, list[Tensor]()
    model.injector.clear()
    with ExitStack() as undo:
        head = model.base_model.get_output_embeddings()
        undo.callback(head.register_forward_pre_hook(lambda _, args: (args[0][where],)).remove)
        if with_hidden:
            decoder, name = find_blocks(model.base_model)
            for block in getattr(decoder, name):

                def keep(_module: object, _args: object, output: Any) -> None:
                    hidden.append((output[0] if isinstance(output, tuple) else output)[where])

                undo.callback(block.register_forward_hook(keep).remove)
        # Rows are padded behind, where a causal model's earlier positions do not look.
        inputs = {"input_ids": rows.ids, "use_cache": False}
        logits = torch.func.functional_call(model.base_model, dict(moved), args=(), kwargs=inputs).logits
    num_tokens = int((rows.segments >= 0).sum())
    return _Output(logits.float(), torch.stack(hidden).float() if hidden else None, num_tokens)


class _Frozen:
    """The base model's outputs on lessons, with their memories in its prompt.

    Those of all `lessons` are computed once, unless they would take more than `_KEPT_BYTES`; others when they are asked
    for. num_tokens: computed so far.
    """

    def __init__(self, model: DocToLoRA, lessons: Sequence[Lesson], *, with_hidden: bool) -> None:
        self.model, self.with_hidden, self.num_tokens = model, with_hidden, 0
        self._kept: dict[Lesson, tuple[Tensor, Tensor | None]] = {}
        config = model.base_model.config
        width = config.vocab_size + (config.num_hidden_layers * config.hidden_size if with_hidden else 0)
        rows = framed_ids(model.tokenizer, [_framed(model, lesson) for lesson in lessons])
        # The first token of a text is not predicted.
        sizes = [len(row) - (lesson.question is None) for row, lesson in zip(rows, lessons, strict=True)]
        if 4 * width * sum(sizes) > _KEPT_BYTES:
            return
        for start in range(0, len(lessons), _BATCH):
            part, own = lessons[start : start + _BATCH], sizes[start : start + _BATCH]
            output = self(part)
            hidden = output.hidden.split(own, 1) if output.hidden is not None else [None] * len(part)
            self._kept |= dict(zip(part, zip(output.logits.split(own), hidden, strict=True), strict=True))

    @torch.no_grad()
    def __call__(self, lessons: Sequence[Lesson]) -> _Output:
        if all(lesson in self._kept for lesson in lessons):
            logits, hidden = zip(*(self._kept[lesson] for lesson in lessons), strict=True)
            together = torch.cat([one for one in hidden if one is not None], 1) if self.with_hidden else None
            return _Output(torch.cat(logits), together, 0)
        output = _forward(self.model, {}, _rows(self.model, lessons, with_documents=True), self.with_hidden)
        self.num_tokens += output.num_tokens
        return output


def _framed(model: DocToLoRA, lesson: Lesson) -> tuple[str, str, str]:
    if lesson.question is None:
        return "", lesson.answer, ""
    return model.layout.before_answer, lesson.answer, model.layout.after_answer


def _log_p(logits: Tensor, rows: PackedRows) -> Tensor:
    """log p of each row's whole answer from logits [N, V]; even rows, odd rows: [2, rows / 2]."""
    where = rows.target_kind >= 0
    of_tokens = logits.log_softmax(-1).gather(-1, rows.targets()[where][:, None])[:, 0]
    whole = of_tokens.new_zeros(len(where)).index_add(0, where.nonzero()[:, 0], of_tokens)
    return whole.view(-1, 2).T


def _store(path: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, step: int) -> None:
    tensors = {}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        tensors[f"value.{name}"] = parameter.detach()
        tensors |= {f"{key}.{name}": state[key] for key in ("step", "exp_avg", "exp_avg_sq")}
    with replaced(path) as temporary:
        save_tensors(
            {key: value.contiguous() for key, value in tensors.items()}, temporary, metadata={"step": str(step)}
        )


def _restore(path: Path | None, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Steps that were done before."""
    if path is None or not path.is_file():
        return 0
    with safe_open(path, "pt") as file, torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(file.get_tensor(f"value.{name}"))
            keys = ("step", "exp_avg", "exp_avg_sq")
            optimizer.state[parameter] = {key: file.get_tensor(f"{key}.{name}") for key in keys}
        return int(json.loads(file.metadata()["step"]))
