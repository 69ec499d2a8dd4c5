"""A small extractor of keys from plain English sentences: "Fenda's teacher is Orla" has the key (Fenda, teacher).

It is off unless a memory is opened with it, and replaceable: an extractor is any function from a text to facts. This
one gives a key only where the sentence names the relation, since a key makes facts supersede each other:

    Fenda's teacher is Orla.     The teacher of Fenda is Orla.     (Fenda, teacher)
    Fenda has the rank of captain.                                 (Fenda, rank)
    Fenda was born in Korvale.   Fenda works as a carver.          (Fenda, born in), (Fenda, works as)

"Fenda is tall", "She was born in Korvale", questions, denials and everything else give none.
"""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from hypernet.text.sentences import split_sentences


class ExtractedFact(NamedTuple):
    """A sentence that says one thing, and the key by which it supersedes; object: what it says."""

    text: str
    subject: str
    relation: str
    object: str


Extractor = Callable[[str], list[ExtractedFact]]

_NAME = r"(?P<subject>(?:[Tt]he )?[\w.-]+(?: [\w.-]+){0,4}?)"
_RELATION = r"(?P<relation>[^\W\d_]+(?:[ -][^\W\d_]+){0,2})"
_PATTERNS = tuple(
    re.compile(pattern)
    for pattern in (
        rf"{_NAME}['’]s {_RELATION} (?:is|was|are|were) (?!not\b)\S",
        rf"(?:[Tt]he|[Aa]n?) {_RELATION} of {_NAME} (?:is|was|are|were) (?!not\b)\S",
        rf"{_NAME} (?:has|had) (?:the|a|an) {_RELATION} of (?!not\b)\S",
        rf"{_NAME} (?:is|was|are|were) (?P<relation>(?:born|based|located|employed|married|called|named|headed|founded)"
        r"(?: (?:in|at|by|to|on))?) \S",
        rf"{_NAME} (?P<relation>(?:lives|lived|works|worked|resides|studies|studied) (?:in|at|as|for)) \S",
    )
)
# Two people are both "she": one's birthplace would supersede the other's.
_PRONOUNS = frozenset("i you he she it we they this that these those there who what which".split())
_NO_STATEMENT = re.compile(r"\?|\b(?:not|never|no longer|might|maybe|perhaps|if)\b|n['’]t\b", re.IGNORECASE)


def extract_facts(text: str) -> list[ExtractedFact]:
    """One fact for each sentence of a text that names subject and relation."""
    return list(_facts(text))


def _facts(text: str) -> Iterator[ExtractedFact]:
    for start, end in split_sentences(text):
        sentence = text[start:end].strip()
        if _NO_STATEMENT.search(sentence):
            continue
        for pattern in _PATTERNS:
            if (found := pattern.match(sentence)) and found["subject"].casefold() not in _PRONOUNS:
                said = sentence[found.end() - 1 :].rstrip(".! ")  # a pattern ends with the first letter of it
                yield ExtractedFact(sentence, found["subject"], found["relation"].casefold(), said)
                break
