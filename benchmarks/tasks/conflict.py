"""Documents that contradict what the base model learned."""

import random
import re
from collections.abc import Iterator

from benchmarks.tasks.articles import other_value
from benchmarks.tasks.base import Asked, Case, some
from hypernet.data.encyclopedia import Encyclopedia, background_facts, background_questions, known_facts


class ConflictTask:
    """Documents that contradict what the base model learned: of entities it knows by heart, of the real world.

    Args:
        num_cases: documents of each kind.
        facts_per_case: contradicted facts in a document.
        statements: background group → sentence with {s} and {v}; real-world documents are made of these.

    Raises:
        ValueError: statements for a group that has no facts.
    """

    def __init__(self, *, num_cases: int, statements: dict[str, str], facts_per_case: int = 3) -> None:
        groups = {group for group, _, _ in background_facts()}
        if unknown := set(statements) - groups:
            raise ValueError(f"statements has {sorted(unknown)}; the background groups are {sorted(groups)}.")
        self.num_cases = num_cases
        self.statements = statements
        self.facts_per_case = facts_per_case

    def cases(self, seed: int) -> Iterator[Case]:
        test = Encyclopedia("test", seed=seed)
        for name, make in (("known entities", self._known), ("the real world", self._real)):
            made = [make(test, test.rng(name, number)) for number in range(self.num_cases)]
            for number, (document, questions, practice) in enumerate(made):
                other = made[(number + 1) % len(made)][0]
                yield Case(name, str(number), (document,), tuple(questions), others=(other,), practice=practice)

    def _known(self, test: Encyclopedia, rng: random.Random) -> tuple[str, list[Asked], tuple[str, ...]]:
        facts = known_facts()
        name = rng.choice(facts).entity.name
        chosen = some(rng, [fact for fact in facts if fact.entity.name == name], self.facts_per_case)
        sentences, asked, practice = [], [], []
        for fact in chosen:
            value = other_value(test, rng, fact.relation.value_kind, fact.value)
            sentence = rng.choice(fact.relation.sentences).format(s=name, n=name, v=value)
            sentences.append(sentence[0].upper() + sentence[1:])
            forms = rng.sample(fact.relation.questions, len(fact.relation.questions))
            asked.append(Asked(forms[0].format(n=name), (value,), fact.relation.name, old_answer=fact.value))
            practice += [form.format(n=name) for form in forms[1:]]
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
            asked.append(Asked(forms[0], (value,), group, old_answer=answer))
            practice += forms[1:]
        return " ".join(sentences), asked, tuple(practice)
