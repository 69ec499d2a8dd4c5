"""Facts that a base model knows, other values for them, and what makes it answer with these, each a class.

changes = draw(model, 256, seed=0, statements=statements, num_neighbours=2)
for size, learned in arm.learn(model, changes, sizes=[1, 8], seed=0):
    learned.answers(model, [(question, answer, change)])
"""

import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hypernet.adapters.adapter import LoRAAdapter
from hypernet.base.packed_rows import Segment, pack_row, pad_rows
from hypernet.consolidation.consolidator import Consolidator
from hypernet.consolidation.editing.edits import Edit, Edited, Editor
from hypernet.consolidation.editing.rome import random_like
from hypernet.consolidation.questions import TRAINING, Templates
from hypernet.consolidation.rehearsal import Rehearsal
from hypernet.consolidation.weights import MovedWeights, installed
from hypernet.data.encyclopedia import background_facts, background_questions, known_facts
from hypernet.doc_to_lora import DocToLoRA
from hypernet.memory.memory import Memory
from hypernet.text.tokens import framed_ids

_BATCH = 64
_STEPS = 24, 4.8  # of a night, and for each fact


class Known(NamedTuple):
    """A fact that the base model was trained on. sentence: with {v} for the value."""

    relation: str
    subject: str
    answer: str
    questions: tuple[str, ...]
    sentence: str


class Change(NamedTuple):
    """A fact with another value, one that another subject has.

    neighbours: facts of the same relation on other subjects. others: on the same subject. decoys: other subjects.
    """

    known: Known
    answer: str
    neighbours: tuple[Known, ...] = ()
    others: tuple[Known, ...] = ()
    decoys: tuple[str, ...] = ()

    @property
    def edit(self) -> Edit:
        return Edit(self.known.subject, self.known.questions[0], self.answer)

    @property
    def paraphrases(self) -> tuple[str, ...]:
        """Wordings that no arm is shown."""
        relation = self.known.relation.replace("_", " ")
        shown = {text.format(relation=relation, subject=self.known.subject) for text in TRAINING}
        return tuple(text for text in self.known.questions[1:] if text not in shown)

    @property
    def statement(self) -> str:
        text = self.known.sentence.replace("{v}", self.answer)
        return text[0].upper() + text[1:]

    @property
    def reverse(self) -> str:
        return f"Whose {self.known.relation.replace('_', ' ')} is {self.answer}?"


class Asked(NamedTuple):
    """change: that a document in the prompt would tell."""

    question: str
    answer: str
    change: Change


def known(statements: Mapping[str, str]) -> list[Known]:
    """All facts.

    Args:
        statements: group of the real world → sentence with {s} and {v}.

    Raises:
        ValueError: a group has none.
    """
    facts = background_facts()
    if missing := sorted({group for group, _, _ in facts} - set(statements)):
        raise ValueError(f"statements has no sentence for {', '.join(missing)}. Give one with {{s}} and {{v}}.")
    found = []
    asked = [question.text for question in background_questions() if question.group in statements]
    num_forms = len(asked) // len(facts)
    for place, (group, subject, answer) in enumerate(facts):
        questions = tuple(asked[place * num_forms : (place + 1) * num_forms])
        found.append(Known(group, subject, answer, questions, statements[group].replace("{s}", subject)))
    for fact in known_facts():
        name = fact.entity.name
        questions = tuple(form.format(n=name) for form in fact.relation.questions)
        sentence = fact.relation.sentences[0].format(s=name, n=name, v="{v}")
        found.append(Known(fact.relation.name, name, fact.value, questions, sentence))
    return found


def draw(
    model: DocToLoRA,
    number: int,
    *,
    seed: int,
    statements: Mapping[str, str],
    num_neighbours: int,
    num_decoys: int,
    min_p: float = 0.5,
) -> list[Change]:
    """So many facts, no neighbour of one among the others; each known with p >= min_p, and so are the neighbours.

    Raises:
        ValueError: the base model knows too few.
    """
    rng, facts = random.Random(f"editing/{seed}"), known(statements)
    rng.shuffle(facts)
    certain: dict[Known, bool] = {}

    def drawn(candidates: Sequence[Known], wanted: int) -> list[Known]:
        """The first so many that the base model knows."""
        found: list[Known] = []
        for start in range(0, len(candidates), _BATCH):
            part = [one for one in candidates[start : start + _BATCH] if one not in certain]
            likelihoods = model.log_likelihoods([one.questions[0] for one in part], [one.answer for one in part])
            for one, likelihood in zip(part, likelihoods, strict=True):
                certain[one] = likelihood >= torch.tensor(min_p).log().item()
            found += [one for one in candidates[start : start + _BATCH] if certain[one]]
            if len(found) >= wanted:
                return found[:wanted]
        return found

    chosen = drawn(facts, number)
    if len(chosen) < number:
        raise ValueError(f"The base model knows {len(chosen)} of {len(facts)} facts. Set sizes to at most that.")
    left = [one for one in facts if one not in set(chosen)]
    changes = []
    for one in chosen:
        of_relation = [other for other in facts if other.relation == one.relation and other.subject != one.subject]
        values = sorted({other.answer for other in of_relation} - {one.answer})
        rest = [other for other in left if other.relation == one.relation]
        neighbours = drawn(rng.sample(rest, min(2 * num_neighbours, len(rest))), num_neighbours)
        others = drawn([other for other in left if other.subject == one.subject], num_neighbours)
        answer = rng.choice(values)
        # One who has the new value already would be as right.
        wrong = [other.subject for other in of_relation if other.answer != answer]
        decoys = rng.sample(wrong, min(num_decoys, len(wrong)))
        changes.append(Change(one, answer, tuple(neighbours), tuple(others), tuple(decoys)))
    return changes


@dataclass(frozen=True)
class Learned:
    """What answers: weights of the base model, an adapter, or the statement in the prompt.

    norms: of each change that was made in a row, weight's name → Frobenius norm. steps: of training.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    adapter: LoRAAdapter | None = None
    join: str | None = None
    in_prompt: bool = False
    norms: Sequence[Mapping[str, float]] = ()
    steps: int = 0

    def answers(self, model: DocToLoRA, asked: Sequence[Asked]) -> list[tuple[bool, float]]:
        """Of each whether greedy decoding writes exactly this answer, and log p of it, in nats.

        Greedy decoding does where each of its tokens, and that which ends it, is the likeliest behind those before it.
        """
        found: list[tuple[bool, float]] = []
        with installed(model.base_model, self.tensors):
            for start in range(0, len(asked), _BATCH):
                found += self._batch(model, asked[start : start + _BATCH])
        return found

    def _batch(self, model: DocToLoRA, asked: Sequence[Asked]) -> list[tuple[bool, float]]:
        layout, tokenizer = model.layout, model.tokenizer
        documents = [one.change.statement if self.in_prompt else None for one in asked]
        prompts = layout.prompt_ids(tokenizer, [one.question for one in asked], documents)
        answers = framed_ids(tokenizer, [(layout.before_answer, one.answer, layout.after_answer) for one in asked])
        pairs = zip(prompts, answers, strict=True)
        packed = [pack_row((), [Segment(prompt + answer, len(prompt), False, 0)]) for prompt, answer in pairs]
        rows = pad_rows(packed, pad_id=tokenizer.pad_token_id or 0).to(model.device)
        joining = model.joining(self.join)
        with torch.inference_mode(), model.using(self.adapter, joining, prompts=prompts):
            log_p = model(rows).float().log_softmax(-1)
        targets = rows.targets()[rows.target_kind >= 0]
        sizes = [len(answer) for answer in answers]
        hits = (log_p.argmax(-1) == targets).split(sizes)
        own = log_p.gather(1, targets[:, None])[:, 0].split(sizes)
        return [(bool(hit.all()), float(part.sum())) for hit, part in zip(hits, own, strict=True)]


class Arm(Protocol):
    def learn(
        self, model: DocToLoRA, changes: Sequence[Change], *, sizes: Sequence[int], seed: int
    ) -> Iterator[tuple[int, Learned]]:
        """What answers after the first so many changes, for each of the sizes, ascending."""
        ...


class NoEdit(Arm):
    """Control: the base model as it is."""

    def learn(
        self, model: DocToLoRA, changes: Sequence[Change], *, sizes: Sequence[int], seed: int
    ) -> Iterator[tuple[int, Learned]]:
        for size in sizes:
            yield size, Learned()


class InPrompt(Arm):
    """Oracle: each fact's own statement in the prompt of all that is asked about it."""

    def learn(
        self, model: DocToLoRA, changes: Sequence[Change], *, sizes: Sequence[int], seed: int
    ) -> Iterator[tuple[int, Learned]]:
        for size in sizes:
            yield size, Learned(in_prompt=True)


class InARow(Arm):
    """Edits one after the other.

    Args:
        editor: that makes them.
        batch_size: edits made at once; None: all.
    """

    def __init__(self, editor: Editor, *, batch_size: int | None = 1) -> None:
        self.editor, self.batch_size = editor, batch_size

    def learn(
        self, model: DocToLoRA, changes: Sequence[Change], *, sizes: Sequence[int], seed: int
    ) -> Iterator[tuple[int, Learned]]:
        edited: Edited | None = None
        norms: list[dict[str, float]] = []
        done = 0
        for size in sizes:
            if self.batch_size is None:
                edited, norms, done = None, [], 0
            while done < size:
                end = size if self.batch_size is None else min(size, done + self.batch_size)
                before = edited
                edited = self.editor.edit(model, [change.edit for change in changes[done:end]], start=edited)
                norms.append(_norms(model, edited, before))
                done = end
            assert edited is not None
            yield size, Learned(edited.weights.tensors, norms=tuple(norms))


def _norms(model: DocToLoRA, edited: Edited, before: Edited | None) -> dict[str, float]:
    old = {} if before is None else before.weights.tensors
    own = edited.weights.tensors
    return {
        name: float((own[name].double() - old.get(name, model.base_model.get_parameter(name)).double()).norm())
        for name in own
    }


class RandomRankOne(Arm):
    """Control: in a row, changes of rank 1 in random directions, as large as those that an editor made.

    Args:
        norms: of the editor's changes in each sequence, by the question of its first change.
    """

    def __init__(self, norms: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
        self.norms = norms

    def learn(
        self, model: DocToLoRA, changes: Sequence[Change], *, sizes: Sequence[int], seed: int
    ) -> Iterator[tuple[int, Learned]]:
        norms = self.norms[changes[0].known.questions[0]]
        own = {name: model.base_model.get_parameter(name).detach() for name in norms[0]}
        edited = Edited(MovedWeights(own))
        done = 0
        for size in sizes:
            for place in range(done, size):
                edited = random_like(edited, norms[place], seed=seed * 1_000_003 + place)
            done = size
            yield size, Learned(edited.weights.tensors, norms=tuple(norms[:size]))


class Internalized(Arm):
    """A generated adapter of the statements; nothing in the base model moves, and dropping it undoes all.

    Args:
        join: of the statements' chunks; None: as the hypernetwork was trained.
    """

    def __init__(self, *, join: str | None = None) -> None:
        self.join = join

    def learn(
        self, model: DocToLoRA, changes: Sequence[Change], *, sizes: Sequence[int], seed: int
    ) -> Iterator[tuple[int, Learned]]:
        for size in sizes:
            adapter = model.internalize([change.statement for change in changes[:size]])
            yield size, Learned(adapter=adapter, join=self.join)


class Consolidated(Arm):
    """A night with the statements, from the base model, on all of them at once.

    Args:
        rehearsal: what is rehearsed.
        max_steps: of training; fewer for few facts, as in a night.
        batch_size, lr: of the questions in a step; peak learning rate.
    """

    def __init__(self, rehearsal: Rehearsal, *, max_steps: int, batch_size: int, lr: float) -> None:
        self.rehearsal, self.max_steps, self.batch_size, self.lr = rehearsal, max_steps, batch_size, lr

    def learn(
        self, model: DocToLoRA, changes: Sequence[Change], *, sizes: Sequence[int], seed: int
    ) -> Iterator[tuple[int, Learned]]:
        for size in sizes:
            steps = min(self.max_steps, round(_STEPS[0] + _STEPS[1] * size))
            consolidator = Consolidator(
                rehearsal=self.rehearsal,
                questions=Templates(),
                steps=steps,
                batch_size=self.batch_size,
                lr=self.lr,
                seed=seed,
            )
            with tempfile.TemporaryDirectory() as folder:
                memory = Memory.open(Path(folder) / "memory")
                for change in changes[:size]:
                    asked = {"consolidation": {"training": [change.edit.question], "held_out": []}}
                    key = {"subject": change.known.subject, "relation": change.known.relation}
                    memory.add(change.statement, user_id="alice", metadata=asked, **key)
                told = memory.list(user_id="alice")
                memory.close()
            trained = consolidator.train(model, told)
            yield size, Learned(trained.weights.tensors, steps=steps)
