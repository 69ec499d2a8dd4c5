"""Metrics against hand-computed values and values of torchmetrics' SQuAD."""

import random

import numpy as np
import pytest
from torchmetrics.functional.text import squad

from benchmarks.measuring.metrics import (
    RougeL,
    bootstrap_interval,
    contains,
    gap_closed,
    paired_interval,
    rouge_l,
    token_f1,
)
from hypernet.text.matching import exact_match


@pytest.mark.parametrize(
    "prediction, reference, expected",
    [
        ("the cat sat", "a cat", 2 * (1 / 2) * 1 / (3 / 2)),
        ("blue blue red", "blue green", 2 * (1 / 3) * (1 / 2) / (5 / 6)),  # "blue" is shared once
        ("blue blue", "blue blue sky", 0.8),
        ("1997.", "in 1997", 2 / 3),
        ("cat", "dog", 0.0),
        ("", "dog", 0.0),
        ("the", "a", 0.0),  # nothing is left of either
    ],
)
def test_token_f1_counts_shared_words(prediction, reference, expected):
    assert token_f1(prediction, reference) == pytest.approx(expected)
    assert token_f1(reference, prediction) == pytest.approx(expected)


@pytest.mark.parametrize(
    "prediction, references, expected",
    [
        ("It was built in 1998, they say.", "1998", 1.0),
        ("It was built in 19980.", "1998", 0.0),
        ("the Fenda, Elfax", ["nobody", "Fenda Elfax"], 1.0),
        ("Fenda and Elfax", "Fenda Elfax", 0.0),
        ("It holds 8.75 ml.", "875 ml", 0.0),
        ("It holds 8.75 ml.", "8.75 ml", 1.0),
        ("Some 14,200 people.", "14200", 1.0),
        ("In 1998. 12 came.", "1998", 1.0),
        ("Elfax Fenda", "Fenda Elfax", 0.0),
        ("", "x", 0.0),
        ("the cat", "the", 0.0),  # nothing is left of it
    ],
)
def test_contains_wants_all_words_in_a_row(prediction, references, expected):
    assert contains(prediction, references) == expected


def test_exact_match_and_f1_agree_with_torchmetrics_squad():
    rng = random.Random(0)
    words = ["the", "a", "an", "The", "cat", "Cat,", "dog.", "1997", "a-b", "U.S.", "“x”", "\n", "über", "!", "it's"]
    for _ in range(200):
        # Two empty answers are apart: v1.1's script gives them an F1 of 0, torchmetrics (as v2.0) 1.
        prediction = " ".join(["cat", *rng.choices(words, k=rng.randint(0, 6))])
        references = [" ".join(rng.choices(words, k=rng.randint(0, 6))) for _ in range(rng.randint(1, 3))]
        expected = squad(
            [{"prediction_text": prediction, "id": "0"}],
            [{"answers": {"answer_start": [0], "text": references}, "id": "0"}],
        )
        assert exact_match(prediction, references) == pytest.approx(expected["exact_match"].item() / 100)
        assert token_f1(prediction, references) == pytest.approx(expected["f1"].item() / 100)


# (reference, prediction, precision, recall, F1)
ROUGE_SCORES = [
    ("the cat sat on the mat", "the cat on a mat", 0.8, 0.6666666666666666, 0.7272727272727272),
    ("It's 3.5 km, isn't it?", "It is 3.5 km", 0.8, 0.5, 0.6153846153846154),
    ("Über die Straße", "uber die strasse", 0.3333333333333333, 0.25, 0.28571428571428575),
    ("a b c d e f g", "g f e d c b a", 0.14285714285714285, 0.14285714285714285, 0.14285714285714285),
    ("The quick-brown_fox jumps", "the quick brown fox JUMPS over", 0.8333333333333334, 1.0, 0.9090909090909091),
    ("running runs", "run runs", 0.5, 0.5, 0.5),
    ("", "x", 0, 0, 0),
    ("x", "", 0, 0, 0),
    ("今日", "今日", 0, 0, 0),
    ("e c b g d g d", "g a e f c b e d b d c d d c", 0.35714285714285715, 0.7142857142857143, 0.4761904761904762),
    ("d f a e d e f a", "e c b d a", 0.6, 0.375, 0.4615384615384615),
]


@pytest.mark.parametrize("reference, prediction, precision, recall, f1", ROUGE_SCORES)
def test_rouge_l_counts_words_without_stemming(reference, prediction, precision, recall, f1):
    assert rouge_l(prediction, reference) == pytest.approx(RougeL(precision, recall, f1))


def test_metrics_take_the_best_reference():
    assert exact_match("cat", ["dog", "the cat"]) == 1.0
    assert token_f1("big cat", ["dog", "big", "big red cat"]) == pytest.approx(0.8)
    # rouge_score's score_multi takes all three values from the reference with the best F1.
    best = rouge_l("alpha beta", ["alpha beta gamma delta", "alpha"])
    assert best == pytest.approx(RougeL(1.0, 0.5, 2 / 3))  # "alpha" has the same F1; the first of the best counts
    assert rouge_l("alpha beta", ("gamma", "alpha")).recall == 1.0


@pytest.mark.parametrize("metric", [exact_match, token_f1, rouge_l])
def test_metrics_refuse_empty_references(metric):
    with pytest.raises(ValueError, match="at least one reference answer, but the list is empty"):
        metric("x", [])


def test_bootstrap_interval_matches_the_normal_approximation():
    values = np.random.default_rng(0).normal(0.6, 0.2, size=2000)
    half = 1.96 * values.std() / len(values) ** 0.5
    low, high = bootstrap_interval(values)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_bootstrap_interval_draws_documents_whole():
    # Within a document all answers are alike, so 20 documents with 50 questions say as much as 20 values.
    per_document = np.random.default_rng(0).random(20)
    groups = [f"document {i}" for i in range(20) for _ in range(50)]
    clustered = bootstrap_interval(np.repeat(per_document, 50), groups=groups)
    assert clustered == pytest.approx(bootstrap_interval(per_document))
    low, high = bootstrap_interval(np.repeat(per_document, 50))
    assert high - low < 0.3 * (clustered[1] - clustered[0])


def test_bootstrap_interval_weights_questions_not_documents():
    # Drawn (0, 0), (0, 1) or (1, 1), with one and three questions: the means are 0, 3/4 and 1.
    low, high = bootstrap_interval([0, 1, 1, 1], groups=["a", "b", "b", "b"], confidence=0.3)
    assert (low, high) == (0.75, 0.75)
    assert bootstrap_interval([0, 1, 1, 1], groups=["a", "b", "b", "b"], confidence=0.9) == (0.0, 1.0)


def test_bootstrap_interval_depends_on_seed_and_confidence_only():
    values = [0.0, 1.0, 1.0, 0.5, 0.25, 1.0]
    assert bootstrap_interval(values) == bootstrap_interval(np.array(values), groups=list("abcdef"))
    assert bootstrap_interval(values, num_samples=50) != bootstrap_interval(values, num_samples=50, seed=1)
    wide, narrow = bootstrap_interval(values, confidence=0.99), bootstrap_interval(values, confidence=0.5)
    assert wide[0] < narrow[0] < np.mean(values) < narrow[1] < wide[1]
    assert bootstrap_interval([0.5, 0.5, 0.5]) == (0.5, 0.5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"values": []}, "at least 2 values to draw from, but there are 0. Score more questions"),
        ({"values": [1.0]}, "at least 2 values"),
        ({"values": [1.0, 0.0], "groups": ["a", "a"]}, "at least 2 groups .* there are 1. Score more documents"),
        ({"values": [1.0, 0.0], "groups": ["a"]}, "there are 1 for 2 values"),
        ({"values": [1.0, float("nan")]}, "finite numbers"),
        ({"values": [[1.0], [2.0]]}, r"shape \(2, 1\)"),
        ({"values": [1.0, 0.0], "confidence": 95}, "between 0 and 1, e.g. 0.95, but is 95"),
        ({"values": [1.0, 0.0], "num_samples": 0}, "at least 1, but is 0"),
    ],
)
def test_bootstrap_interval_refuses_what_it_cannot_use(arguments, message):
    values = arguments.pop("values")
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(values, **arguments)


def test_gap_closed_is_zero_at_the_floor_and_one_at_the_ceiling():
    assert gap_closed(0.5, 0.25, 0.75) == 0.5
    assert gap_closed(0.25, 0.25, 0.75) == 0.0
    assert gap_closed(0.75, 0.25, 0.75) == 1.0
    assert gap_closed(1.0, 0.25, 0.75) == 1.5
    assert gap_closed(0.0, 0.25, 0.75) == -0.5


@pytest.mark.parametrize("floor, ceiling", [(0.5, 0.5), (0.6, 0.5), (float("nan"), 0.5)])
def test_gap_closed_needs_a_gap(floor, ceiling):
    with pytest.raises(ValueError, match="The ceiling should be above the floor, but they are .* report the scores"):
        gap_closed(0.5, floor, ceiling)


def test_paired_interval_of_one_column_is_that_of_its_mean():
    rng = np.random.default_rng(0)
    values, groups = rng.random(120), np.arange(120) // 4
    low, high = paired_interval([values], lambda a: a, groups=groups.tolist(), num_samples=20000)
    expected = bootstrap_interval(values, groups=groups.tolist(), num_samples=20000)
    assert (low, high) == pytest.approx(expected, abs=2e-3)


def test_shared_difficulty_does_not_widen_a_paired_difference():
    rng = np.random.default_rng(0)
    hard = rng.random(200)
    low, high = paired_interval([hard + 0.1, hard], lambda a, b: a - b, groups=list(range(200)))
    assert low == pytest.approx(0.1) and high == pytest.approx(0.1)


def test_paired_ratio_covers_the_true_one_or_is_none():
    rng = np.random.default_rng(1)
    base = rng.random(300) + 0.5
    other = 0.8 * base + rng.normal(0, 0.05, 300)
    low, high = paired_interval([other, base], lambda a, b: a / b, groups=list(range(300)))
    assert low < 0.8 < high and high - low < 0.03
    assert paired_interval([[1.0, 0.0], [0.0, 0.0]], lambda a, b: a / b, groups=[0, 1]) is None
    assert paired_interval([[1.0, 0.0]], lambda a: a, groups=["x", "x"]) is None


def test_paired_interval_needs_the_same_questions():
    with pytest.raises(ValueError, match="same questions"):
        paired_interval([[1.0], [1.0, 2.0]], lambda a, b: a - b, groups=[0, 1])
