"""Small curricula, over the encyclopedia alone and over sources of known sentences."""

from hypernet.data.curriculum import Curriculum, Stage
from hypernet.data.encyclopedia import Encyclopedia
from hypernet.data.records import UNKNOWN, Question, Record

STAGES = [
    Stage(steps=2, batch_size=5, facts_per_entity=(1, 1), num_distractors=(0, 0)),
    {"steps": 3, "batch_size": 3, "num_entities": [2, 3], "facts_per_entity": [2, 4], "unanswerable": 1.0},
    {
        "steps": 1,
        "batch_size": 2,
        "max_questions": 2,
        "facts_per_entity": [5, 5],
        "num_background": 3,
        "num_cross_document": 2,
    },
]


def make_curriculum(seed=0, stages=STAGES):
    return Curriculum(Encyclopedia("train", seed=seed), stages)


class Rows:
    """A finite dataset: document i has i + 1 sentences."""

    def __init__(self, name, size=1000):
        self.name, self.size = name, size

    def record(self, index):
        sentences = tuple(f"{self.name} {index} has line {line}." for line in range(index % self.size + 1))
        return Record(sentences, (Question(f"Who is {index}?", f"{self.name} {index}"),))

    def num_tokens(self, index):
        return 10 * (index % self.size + 1)

    def cross_document(self, rng, record):
        return Question("Who is not there?", UNKNOWN, "cross_document")


def make_mixed(*stages, seed=0):
    return Curriculum(Encyclopedia("train", seed=seed), stages, sources={"a": Rows("a"), "b": Rows("b", 7)})
