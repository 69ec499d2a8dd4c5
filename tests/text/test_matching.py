"""exact_match: normalized as in SQuAD v1.1; tests/benchmarks/measuring/test_metrics.py compares with torchmetrics."""

import pytest

from hypernet.text.matching import exact_match


@pytest.mark.parametrize(
    "prediction, reference, expected",
    [
        ("The Eiffel Tower", "eiffel tower.", 1.0),
        ("an  apple,\n a pear", "Apple Pear", 1.0),
        ("1,997", "1997", 1.0),
        ("a-b", "ab", 1.0),  # the hyphen goes first, so "a" is no article
        ("anthem", "them", 0.0),
        ("1997", "in 1997", 0.0),
        ("", "the", 1.0),
        ("“x”", "x", 0.0),  # punctuation is ASCII's
    ],
)
def test_exact_match_normalizes_as_squad(prediction, reference, expected):
    assert exact_match(prediction, reference) == exact_match(reference, prediction) == expected


def test_answer_needs_a_reference():
    with pytest.raises(ValueError, match="at least one reference"):
        exact_match("x", [])
