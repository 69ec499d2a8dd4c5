"""What every dataset yields: a document and the questions asked about it.

record = Record(sentences=("Velmar Tosk was born in Korvale.",), questions=(Question("Where was Velmar Tosk born?",
"Korvale"),))
"""

from typing import NamedTuple


class Question(NamedTuple):
    """A question with its one right answer.

    kind: "document" (the answer stands in the document), "unanswerable" (it does not; the answer is `UNKNOWN`) or
        "background" (the base model answers it from its own weights) or "foreign" (about another document; the answer
        is `UNKNOWN`).
    group: what it asks for, e.g. the relation's name; tables are broken down by it.
    """

    text: str
    answer: str
    kind: str = "document"
    group: str = ""


class Record(NamedTuple):
    """A document, as the sentences it is made of, and questions about it."""

    sentences: tuple[str, ...]
    questions: tuple[Question, ...]

    @property
    def document(self) -> str:
        return " ".join(self.sentences)


# What the base model says when neither the prompt nor its weights hold the answer.
UNKNOWN = "unknown"
