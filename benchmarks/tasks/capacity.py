"""How many facts an adapter holds, about few entities and about as many as facts."""

from collections.abc import Iterator, Sequence

from benchmarks.tasks.articles import practice_questions
from benchmarks.tasks.base import Asked, Case
from hypernet.data.encyclopedia import Encyclopedia, relations
from hypernet.doc_to_lora import DocToLoRA


class CapacityTask:
    """Articles of so many facts about so many entities and nothing else; every fact is asked for.

    Attributes: facts in the article, and rank (of one chunk; how many chunks an article takes is the model's own).

    Args:
        model: whose rank the attributes give.
        sets: (facts, entities) of each set.
        num_cases: of each set.
        num_practice: questions for methods that train on questions.

    Raises:
        ValueError: more facts than the entities have relations, or an entity without any.
    """

    def __init__(
        self, *, model: DocToLoRA, sets: Sequence[Sequence[int]], num_cases: int, num_practice: int = 16
    ) -> None:
        kinds = [relation.entity_kind for relation in relations()]
        most = min(map(kinds.count, kinds))
        for facts, entities in sets:
            if not entities <= facts <= most * entities:
                raise ValueError(
                    f"sets has {facts} facts about {entities} entities; each has 1 to {most}. Change one of the two."
                )
        self.model = model
        self.sets = sets
        self.num_cases = num_cases
        self.num_practice = num_practice

    def cases(self, seed: int) -> Iterator[Case]:
        encyclopedia = Encyclopedia("test", seed=seed)
        for facts, entities in self.sets:
            records = [
                encyclopedia.record(
                    f"capacity/{facts}/{entities}/{number}",  # any word names an article as well as a number does
                    num_entities=entities,
                    num_facts=facts,
                    num_distractors=0,
                )
                for number in range(self.num_cases)
            ]
            for number, record in enumerate(records):
                yield Case(
                    f"{facts} fact{'s' if facts > 1 else ''}, {entities} entit{'ies' if entities > 1 else 'y'}",
                    str(number),
                    (record.document,),
                    tuple(Asked(q.text, (q.answer,), q.group) for q in record.questions),
                    others=(records[(number + 1) % len(records)].document,),
                    practice=practice_questions(
                        record.questions,
                        encyclopedia.rng("practice", facts, entities, number),
                        self.num_practice,
                    ),
                    attributes={"facts": facts, "rank": self.model.hypernetwork.rank},
                )
