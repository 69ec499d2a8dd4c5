"""Areas under the curve, counted by hand."""

import pytest

from hypernet.consolidation.private.membership import area_interval, area_under_curve, likelihood_gains


def test_area_counts_pairs_and_half_of_the_equal_ones():
    # 3 > 2, 3 > 1, 1 = 1 and 1 < 2.
    assert area_under_curve([3, 1], [2, 1]) == 2.5 / 4
    assert area_under_curve([5, 6], [1, 2]) == 1.0 and area_under_curve([0], [1, 2]) == 0.0
    assert area_under_curve([1, 1], [1, 1]) == 0.5


def test_gain_is_what_was_added():
    assert likelihood_gains([-1.0, -5.0], [-3.0, -4.0]) == [2.0, -1.0]
    with pytest.raises(ValueError):
        likelihood_gains([1.0], [1.0, 2.0])


def test_nobody_to_compare_with_is_an_error():
    with pytest.raises(ValueError, match="there are 1 and 0"):
        area_under_curve([1.0], [])


def test_interval_holds_the_mean_and_needs_two_seeds():
    members, others = [[3.0, 1.0, 4.0], [2.0, 2.5, 0.0]], [[2.0, 1.0, 0.0], [1.0, 2.0, 3.0]]
    mean = sum(area_under_curve(*pair) for pair in zip(members, others, strict=True)) / 2
    low, high = area_interval(members, others)
    assert 0 <= low < mean < high <= 1
    assert area_interval(members[:1], others[:1]) is None
