"""Membership: does a model, or an adapter, tell whose secrets it has read?

gains = likelihood_gains(after, before)                  # log p(secret) that training or an adapter has added, in nats
area_under_curve(gains_of_members, gains_of_others)      # .5: no better than a coin; 1: every secret is told
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def likelihood_gains(after: Sequence[float], before: Sequence[float]) -> list[float]:
    """What is taken for a sign of membership: by how much each became likelier than it was to the base model, which
    takes out that some secrets are likelier than others from the start.

    Source: Carlini et al. 2022, https://arxiv.org/abs/2112.03570, section 4, with the base model as the one reference
    """
    return [one - other for one, other in zip(after, before, strict=True)]


def area_under_curve(members: Sequence[float], others: Sequence[float]) -> float:
    """P(a member's score > another's) + P(both are equal) / 2, over all pairs: the area under the ROC curve.

    Raises:
        ValueError: there are no members, or no others.
    """
    if not len(members) or not len(others):
        raise ValueError(f"A curve needs members and others; there are {len(members)} and {len(others)}.")
    return float(_wins(members, others).mean())


def area_interval(
    members: Sequence[Sequence[float]],
    others: Sequence[Sequence[float]],
    *,
    confidence: float = 0.95,
    num_samples: int = 1000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean area over seeds: seeds are drawn again, and in each its scores.

    Args:
        members, others: scores of each seed.

    Returns:
        (low, high); None with fewer than two seeds.
    """
    if len(members) < 2:
        return None
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(members), (num_samples, len(members)))
    areas = np.zeros(drawn.shape)
    for place, pair in enumerate(zip(members, others, strict=True)):
        wins = _wins(*pair)
        where = drawn == place
        # How often each score is drawn again, each time that its seed is.
        times = [rng.multinomial(size, np.full(size, 1 / size), int(where.sum())) for size in wins.shape]
        areas[where] = ((times[0] @ wins) * times[1]).sum(1) / wins.size
    low, high = np.quantile(areas.mean(1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _wins(members: Sequence[float], others: Sequence[float]) -> npt.NDArray[np.float64]:
    """[M, O]: 1 where the member's score is higher, 1/2 where both are equal."""
    difference = np.asarray(members, np.float64)[:, None] - np.asarray(others, np.float64)[None, :]
    return (difference > 0) + (difference == 0) / 2
