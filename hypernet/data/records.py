"""What every dataset yields: a document and the questions asked about it.

record = Record(sentences=("Velmar Tosk was born in Korvale.",), questions=(Question("Where was Velmar Tosk born?",
"Korvale"),))
"""

from typing import NamedTuple

import numpy as np


class StoredAnswer(NamedTuple):
    """An answer as the base model gave it with the document in its prompt, and how sure it was at each token.

    ids: the P tokens, the closing one included. indices, log_probs: its k most likely next tokens at each of them and
        their log-probabilities, [P, k]; what they leave of 1 belongs to all other tokens together.
    """

    ids: tuple[int, ...]
    indices: np.ndarray
    log_probs: np.ndarray


class Question(NamedTuple):
    """A question with its one right answer.

    kind: "document" (the answer stands in the document), "unanswerable" (it does not; the answer is `UNKNOWN`),
        "background" (the base model answers it from its own weights), "cross_document" (about another document; the
        answer is `UNKNOWN`) or "in_prompt" (its document stands in the prompt, and the adapter is another document's).
    group: what it asks for, e.g. the relation's name; tables are broken down by it.
    stored: the answer in the base model's own tokens, where it was stored; `answer` is then its text.
    """

    text: str
    answer: str
    kind: str = "document"
    group: str = ""
    stored: StoredAnswer | None = None


class Record(NamedTuple):
    """A document, as the sentences it is made of, and questions about it."""

    sentences: tuple[str, ...]
    questions: tuple[Question, ...]

    @property
    def document(self) -> str:
        return " ".join(self.sentences)


# What the base model says when neither the prompt nor its weights hold the answer.
UNKNOWN = "unknown"
