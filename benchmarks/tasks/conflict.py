"""Documents that contradict what the base model learned, by how often its training asked for it."""

import random
import re
from collections.abc import Iterator

from benchmarks.tasks.articles import other_value
from benchmarks.tasks.base import Asked, Case, some
from benchmarks.times_asked import band_of, bands, read_times_asked
from hypernet.data.encyclopedia import (
    Encyclopedia,
    Fact,
    background_facts,
    background_questions,
    known_facts,
    relations,
)
from hypernet.doc_to_lora import DocToLoRA


class ConflictTask:
    """Documents that contradict what the base model learned: of entities it knows by heart, of the real world.

    A third set says the same of entities that it was never asked about, which contradicts nothing. Attributes of a
    question: real_world (1, or 0 for invented entities), times_asked in the base model's training, times_asked_from
    (the smallest number of its band).

    Args:
        model: whose base model learned.
        num_cases: documents of each kind.
        facts_per_case: contradicted facts in a document.
        statements: background group → sentence with {s} and {v}; real-world documents are made of these.
        times_asked: file of `python -m benchmarks.times_asked`; None leaves the attributes out.
        num_bands: groups of about as many facts each, by times_asked.

    Raises:
        ValueError: statements for a group that has no facts, or times_asked of another base model.
    """

    def __init__(
        self,
        *,
        model: DocToLoRA,
        num_cases: int,
        statements: dict[str, str],
        facts_per_case: int = 3,
        times_asked: str | None = None,
        num_bands: int = 3,
    ) -> None:
        groups = {group for group, _, _ in background_facts()}
        if unknown := set(statements) - groups:
            raise ValueError(f"statements has {sorted(unknown)}; the background groups are {sorted(groups)}.")
        self.num_cases = num_cases
        self.statements = statements
        self.facts_per_case = facts_per_case
        self.counts: dict[tuple[str, str], int] | None = None
        if times_asked is not None:
            learner, self.counts = read_times_asked(times_asked)
            if learner != model.base_model_fingerprint:
                raise ValueError(
                    f"{times_asked} counts what the base model {learner[:12]} was asked in its training, but this is "
                    f"{model.base_model_fingerprint[:12]}. Count for this one with python -m benchmarks.times_asked, "
                    "or set task.times_asked=null."
                )
            self.lowest = bands(self.counts.values(), num_bands)

    def cases(self, seed: int) -> Iterator[Case]:
        test = Encyclopedia("test", seed=seed)
        kinds = (("known entities", self._known), ("the real world", self._real), ("entities never learned", self._new))
        for name, make in kinds:
            made = [make(test, test.rng(name, number)) for number in range(self.num_cases)]
            for number, (document, questions, practice) in enumerate(made):
                other = made[(number + 1) % len(made)][0]
                yield Case(name, str(number), (document,), tuple(questions), others=(other,), practice=practice)

    def _known(self, test: Encyclopedia, rng: random.Random) -> tuple[str, list[Asked], tuple[str, ...]]:
        facts = known_facts()
        name = rng.choice(facts).entity.name
        return self._of_entity(test, rng, [fact for fact in facts if fact.entity.name == name])

    def _new(self, test: Encyclopedia, rng: random.Random) -> tuple[str, list[Asked], tuple[str, ...]]:
        entity = test.entity(rng, rng.choice(relations()).entity_kind)
        told = [relation for relation in relations() if relation.entity_kind == entity.kind]
        return self._of_entity(test, rng, [Fact(entity, relation, "") for relation in told])

    def _of_entity(
        self, test: Encyclopedia, rng: random.Random, facts: list[Fact]
    ) -> tuple[str, list[Asked], tuple[str, ...]]:
        """A fact without a value has no other answer than the document's."""
        sentences, asked, practice = [], [], []
        for entity, relation, old in some(rng, facts, self.facts_per_case):
            value = other_value(test, rng, relation.value_kind, old)
            sentence = rng.choice(relation.sentences).format(s=entity.name, n=entity.name, v=value)
            sentences.append(sentence[0].upper() + sentence[1:])
            forms = [form.format(n=entity.name) for form in rng.sample(relation.questions, len(relation.questions))]
            attributes = self._attributes(relation.name, entity.name, real_world=False)
            asked.append(Asked(forms[0], (value,), relation.name, old_answer=old or None, attributes=attributes))
            practice += forms[1:]
        return " ".join(sentences), asked, tuple(practice)

    def _real(self, test: Encyclopedia, rng: random.Random) -> tuple[str, list[Asked], tuple[str, ...]]:
        group = rng.choice(sorted(self.statements))
        facts = [(subject, answer) for g, subject, answer in background_facts() if g == group]
        questions = {q.text: q for q in background_questions() if q.group == group}
        sentences, asked, practice = [], [], []
        for subject, answer in some(rng, facts, self.facts_per_case):
            value = rng.choice([other for _, other in facts if other != answer])
            sentences.append(self.statements[group].format(s=subject, v=value))
            about = re.compile(rf"\b{re.escape(subject)}\b")
            forms = [text for text, q in questions.items() if about.search(text) and q.answer == answer]
            forms = rng.sample(forms, len(forms))
            attributes = self._attributes(group, subject, real_world=True)
            asked.append(Asked(forms[0], (value,), group, old_answer=answer, attributes=attributes))
            practice += forms[1:]
        return " ".join(sentences), asked, tuple(practice)

    def _attributes(self, group: str, subject: str, *, real_world: bool) -> dict[str, float]:
        if self.counts is None:
            return {}
        times = self.counts.get((group, subject), 0)
        return {"real_world": int(real_world), "times_asked": times, "times_asked_from": band_of(times, self.lowest)}
