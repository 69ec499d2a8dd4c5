"""Whether an answer is the right one, as SQuAD counts it.

exact_match("The Eiffel Tower", ["Eiffel tower", "the tower"])     # 1.0
"""

import re
import string
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def exact_match(prediction: str, references: str | Sequence[str]) -> float:
    """1.0 if the normalized prediction equals one of the normalized references, else 0.0. Normalized as in SQuAD v1.1:
    small letters, no ASCII punctuation, no English articles, single blanks.

    Raises:
        ValueError: if there is no reference.

    Source: Rajpurkar et al. 2016, "Model Evaluation", https://arxiv.org/abs/1606.05250, and its script for v1.1.
    """
    words = squad_words(prediction)
    return float(any(words == squad_words(reference) for reference in at_least_one(references)))


def at_least_one(references: str | Sequence[str]) -> Sequence[str]:
    if isinstance(references, str):
        return [references]
    if not references:
        raise ValueError("There should be at least one reference answer, but the list is empty.")
    return references


def squad_words(text: str) -> list[str]:
    # The order counts: "a-b" loses its hyphen first, so its "a" is no article.
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()
