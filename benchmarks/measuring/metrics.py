"""Metrics: answers -> numbers, and how sure these are.

    token_f1(prediction, references), rouge_l(prediction, references)  # the best over the references
    contains(prediction, references)                                   # whether it holds one of them
    low, high = bootstrap_interval(scores, groups=document_ids)        # of the mean score
    paired_interval([a, b], lambda a, b: a / b, groups=document_ids)   # of a function of several methods' mean scores
    gap_closed(score, floor, ceiling)                                  # 0 at the floor, 1 at the ceiling

Scores are fractions, 0 to 1. No model and no tokenizer in here.
"""

import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from hypernet.text.matching import at_least_one, squad_words

_POINT = re.compile(r"(?<=\d)\.(?=\d)")  # SQuAD's normalization drops it


class RougeL(NamedTuple):
    """ROUGE-L of one prediction, each 0 to 1."""

    precision: float
    recall: float
    f1: float


def token_f1(prediction: str, references: str | Sequence[str]) -> float:
    """F1 of the words that prediction and reference share, counted with repetition, for the best reference. Normalized
    as in exact_match; 0.0 if they share none, even if both are empty.

    Raises:
        ValueError: if there is no reference.

    Source: Rajpurkar et al. 2016, "Model Evaluation", https://arxiv.org/abs/1606.05250, and its script for v1.1.
    """
    words = squad_words(prediction)
    scores = []
    for reference in at_least_one(references):
        reference_words = squad_words(reference)
        shared = (Counter(words) & Counter(reference_words)).total()
        scores.append(_f1(shared / len(words), shared / len(reference_words)) if shared else 0.0)
    return max(scores)


def contains(prediction: str, references: str | Sequence[str]) -> float:
    """1.0 if the words of one of the references stand in the prediction, all in a row, else 0.0. Normalized as in
    exact_match, but 8.75 is not 875; a reference without words stands in nothing.

    Raises:
        ValueError: if there is no reference.
    """
    words, *held = (squad_words(_POINT.sub(" point ", text)) for text in (prediction, *at_least_one(references)))
    for reference in held:
        starts = range(len(words) - len(reference) + 1) if reference else ()
        if any(words[start : start + len(reference)] == reference for start in starts):
            return 1.0
    return 0.0


def rouge_l(prediction: str, references: str | Sequence[str]) -> RougeL:
    """Precision, recall and F1 of the longest common subsequence of words, for the reference with the best F1. Words
    are runs of a-z and 0-9 in small letters, not stemmed; a text in another script scores 0. Needs the extra `bench`.

    Raises:
        ValueError: if there is no reference.

    Source: Lin 2004, section 3, https://aclanthology.org/W04-1013, as the package rouge-score computes it.
    """
    scores = _rouge_scorer().score_multi(list(at_least_one(references)), prediction)
    return RougeL(*map(float, scores["rougeL"]))


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    *,
    groups: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    num_samples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of values.

    Questions about one document stand or fall together, so name the documents in groups: they are drawn whole, and the
    interval says how the mean would move with other documents. For two methods on the same questions pass the
    differences of their scores.

    Args:
        values: one score per question.
        groups: one id per value, e.g. the document's; None: every value is drawn by itself.
        confidence: probability the interval should cover, between 0 and 1.
        num_samples: resamples drawn.
        seed: same values, groups and seed give the same interval.

    Returns:
        (low, high).

    Raises:
        ValueError: if values are not finite numbers, groups do not match them, there are fewer than two values or
            groups to draw from, or confidence or num_samples is out of range.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13; clusters drawn whole as in
    Davison and Hinkley 1997, section 3.8.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(
            f"values should be a list of finite numbers, but has shape {values.shape} or holds nan or inf."
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence should lie between 0 and 1, e.g. 0.95, but is {confidence}.")
    if num_samples < 1:
        raise ValueError(f"num_samples should be at least 1, but is {num_samples}.")
    if groups is not None and len(groups) != len(values):
        raise ValueError(
            f"groups should name one group per value, but there are {len(groups)} for {len(values)} values."
        )

    numbers: dict[Hashable, int] = {}
    members = [numbers.setdefault(group, len(numbers)) for group in (range(len(values)) if groups is None else groups)]
    if len(numbers) < 2:
        raise ValueError(
            f"An interval needs at least 2 {'values' if groups is None else 'groups'} to draw from, but there are "
            f"{len(numbers)}. Score more {'questions' if groups is None else 'documents'}."
        )
    sums = np.bincount(members, weights=values)
    counts = np.bincount(members)
    generator = np.random.default_rng(seed)
    means = np.empty(num_samples)
    for i in range(num_samples):
        drawn = generator.integers(len(sums), size=len(sums))
        means[i] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def paired_interval(
    columns: Sequence[Sequence[float]],
    statistic: Callable[..., np.ndarray],
    *,
    groups: Sequence[Hashable],
    confidence: float = 0.95,
    num_samples: int = 2000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of a function of several methods' mean scores on the same questions.

    Every resample draws the groups whole and the same ones for all methods, so what makes a document hard for all of
    them does not widen the interval of a difference or a ratio.

    Args:
        columns: one list of scores per method, all in the same order of questions.
        statistic: of the methods' means, called once with one array [num_samples] per column: lambda a, b: a - b.
        groups: one id per question; what is drawn, e.g. (seed, document).
        confidence, num_samples, seed: as for `bootstrap_interval`.

    Returns:
        (low, high); None if the statistic is undefined (not finite) in more than one resample of twenty, or if there
        are fewer than two groups.

    Raises:
        ValueError: if the columns or groups differ in length.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapters 8 and 13.
    """
    table = [np.asarray(column, dtype=np.float64) for column in columns]
    if {len(column) for column in table} != {len(groups)}:
        raise ValueError(
            f"Every column should have a score for each of the {len(groups)} groups' entries, but their lengths are "
            f"{[len(column) for column in table]}. Pass the methods' scores on the same questions."
        )
    numbers: dict[Hashable, int] = {}
    members = [numbers.setdefault(group, len(numbers)) for group in groups]
    if len(numbers) < 2:
        return None
    counts = np.bincount(members)
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(len(numbers), np.full(len(numbers), 1 / len(numbers)), size=num_samples)
    means = [drawn @ np.bincount(members, weights=column) / (drawn @ counts) for column in table]
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.asarray(statistic(*means), dtype=np.float64)
    finite = values[np.isfinite(values)]
    if len(finite) < 0.95 * num_samples:
        return None
    low, high = np.quantile(finite, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def gap_closed(score: float, floor: float, ceiling: float) -> float:
    """Share of the way from floor (say, no document) to ceiling (say, the document in the prompt) that score goes.
    Below 0 or above 1 if it lies outside.

    Raises:
        ValueError: if the ceiling is not above the floor; then there is no gap to close.
    """
    if not ceiling > floor:
        raise ValueError(
            f"The ceiling should be above the floor, but they are {ceiling} and {floor}: the document does not help "
            "the base model, so report the scores instead."
        )
    return (score - floor) / (ceiling - floor)


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    # With a tokenizer given it does not log a line that it chose its default one.
    return RougeScorer(["rougeL"], tokenizer=DefaultTokenizer(use_stemmer=False))


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
