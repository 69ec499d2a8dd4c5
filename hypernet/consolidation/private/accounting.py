"""(epsilon, delta) of pooled training: what the weights tell of any one user, by opacus or by formulas of our own.

sampled = Spending(noise=1.0, rounds=60, sampling_rate=0.25)           # Gaussian noise on sums over sampled users
RenyiAccountant().epsilon(sampled, delta=1e-3)
OpacusAccountant("rdp").epsilon(sampled, delta=1e-3)                   # needs the extra `private`
tree = Spending.of_tree(noise=3.0, participations=[[1, 9], [2, 10]], rounds=16)
noise_for(8.0, sampled, RenyiAccountant(), delta=1e-3)                 # the least noise that gives this epsilon

Neighbours are pools that differ by one whole user, added or taken away. What a search over settings spends is not
in it.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import NamedTuple, Protocol, Self

OPACUS_KINDS = ("rdp", "prv")
_ORDERS = (*(1 + x / 10 for x in range(1, 100)), *range(11, 65), *(2**k for k in range(7, 11)))
_PRECISION = 1e-3  # of the noise that is searched for, relative
_MOST_NOISE = 1e4


class Spending(NamedTuple):
    """What is released: `rounds` noisy sums.

    noise: standard deviation of the Gaussian noise, in lengths of what one user can change in all that is released from
        a round. rounds: of training. sampling_rate: probability of each user to be in a round, drawn anew each time.
    """

    noise: float
    rounds: int
    sampling_rate: float

    @classmethod
    def of_tree(cls, *, noise: float, participations: Sequence[Sequence[int]], rounds: int) -> Self:
        """Noise of a tree's nodes, which is one release of all of them.

        Args:
            noise: of a node, in clips. participations: of each user the rounds it is in, from 1 on.
        """
        return cls(noise / tree_sensitivity(participations, rounds=rounds), 1, 1.0)

    def checked(self) -> Self:
        """Itself. ValueError unless noise is above 0, rounds at least 1 and the rate above 0 and at most 1."""
        if not 0 < self.noise < math.inf or self.rounds < 1 or not 0 < self.sampling_rate <= 1:
            raise ValueError(
                f"Accounting needs finite noise above 0, a round and a rate in (0, 1]; got noise {self.noise}, "
                f"{self.rounds} rounds, rate {self.sampling_rate}. Without noise epsilon is infinite."
            )
        return self


class Accountant(Hashable, Protocol):
    """Bounds epsilon from above."""

    def epsilon(self, spending: Spending, *, delta: float) -> float: ...


@dataclass(frozen=True)
class RenyiAccountant:
    """Rényi divergences of the sampled Gaussian mechanism, added over the rounds.

        R(α) = 1/(α - 1) log Σ_k C(α, k) (1 - q)^(α-k) q^k exp((k² - k) / 2σ²),  α whole;  α / 2σ² where q is 1
        (α - 1) R(α) ≤ between whole orders the straight line, as it is convex and 0 at α = 1
        ε = min_α  T R(α) + log((α - 1)/α) - (log δ + log α)/(α - 1)

    Source: Mironov, Talwar, Zhang 2019, https://arxiv.org/abs/1908.10530, section 3.3; from Rényi to (ε, δ): Canonne,
    Kamath, Steinke 2020, https://arxiv.org/abs/2004.00010, proposition 12.
    """

    def epsilon(self, spending: Spending, *, delta: float) -> float:
        """ValueError as `Spending.checked`, or delta is not between 0 and 1."""
        noise, rounds, rate = spending.checked()
        _check_delta(delta)
        found = (
            rounds * renyi(alpha, noise=noise, sampling_rate=rate)
            + math.log1p(-1 / alpha)
            - (math.log(delta) + math.log(alpha)) / (alpha - 1)
            for alpha in _ORDERS
        )
        return max(0.0, min(found))


@dataclass(frozen=True)
class OpacusAccountant:
    """opacus' accountants: "rdp", Rényi divergences also of fractional orders; "prv", numerically and tighter.

    Raises:
        ValueError: another kind, or opacus is not installed.
    """

    kind: str = "rdp"

    def __post_init__(self) -> None:
        if self.kind not in OPACUS_KINDS:
            raise ValueError(f"opacus accounts by {' or '.join(OPACUS_KINDS)}, not {self.kind!r}.")
        if not has_opacus():
            raise ValueError("This accountant is opacus': pip install 'doc-to-lora[private]', or take RenyiAccountant.")

    def epsilon(self, spending: Spending, *, delta: float) -> float:
        """ValueError as `RenyiAccountant.epsilon`."""
        from opacus.accountants import create_accountant

        noise, rounds, rate = spending.checked()
        _check_delta(delta)
        accountant = create_accountant(mechanism=self.kind)
        for _ in range(rounds):
            accountant.step(noise_multiplier=noise, sample_rate=rate)
        return float(accountant.get_epsilon(delta=delta))


def has_opacus() -> bool:
    return find_spec("opacus") is not None


def renyi(alpha: float, *, noise: float, sampling_rate: float) -> float:
    """Rényi divergence of one round in nats, or a bound on it where the order is no whole number; above 1."""
    if sampling_rate == 1:
        return alpha / (2 * noise**2)
    below, part = int(alpha), alpha - int(alpha)
    low = _log_moment(below, noise, sampling_rate) if below > 1 else 0.0
    high = _log_moment(below + 1, noise, sampling_rate) if part else 0.0
    return ((1 - part) * low + part * high) / (alpha - 1)


@lru_cache(maxsize=4096)
def _log_moment(order: int, noise: float, sampling_rate: float) -> float:
    """(α - 1) R(α) of a whole order from 2 on."""
    terms = [
        math.lgamma(order + 1)
        - math.lgamma(k + 1)
        - math.lgamma(order - k + 1)
        + (order - k) * math.log1p(-sampling_rate)
        + k * math.log(sampling_rate)
        + (k * k - k) / (2 * noise**2)
        for k in range(order + 1)
    ]
    largest = max(terms)
    return largest + math.log(sum(math.exp(term - largest) for term in terms))


def tree_nodes(step: int) -> list[tuple[int, int]]:
    """The (first, last) rounds of the nodes whose sum is that of rounds 1 to `step`: one for each bit that is set."""
    found, end = [], 0
    for bit in reversed(range(step.bit_length())):
        if step >> bit & 1:
            found.append((end + 1, end + 2**bit))
            end += 2**bit
    return found


def tree_sensitivity(participations: Sequence[Sequence[int]], *, rounds: int) -> float:
    """Length of what one user can change in all nodes that prefix sums of `rounds` rounds use, in clips.

    A user that is in n rounds of a node can change it by n clips: sqrt(Σ_nodes n²) of the user that changes most.

    Args:
        participations: of each user the rounds it is in, from 1 on.

    Raises:
        ValueError: nobody takes part, or in a round that there is not.

    Source: Kairouz et al. 2021, https://arxiv.org/abs/2103.00039, theorem 4.1; several rounds of a user as in
    Choquette-Choo et al. 2023, https://arxiv.org/abs/2211.06530, section 3, the tree's matrix having no entry below 0.
    """
    nodes = {node for step in range(1, rounds + 1) for node in tree_nodes(step)}
    largest = 0
    for steps in {tuple(sorted(steps)) for steps in participations}:
        if steps and not 1 <= steps[0] <= steps[-1] <= rounds:
            raise ValueError(f"Rounds go from 1 to {rounds}, and a user is in {list(steps)}.")
        times = Counter(node for node in nodes for step in steps if node[0] <= step <= node[1])
        largest = max(largest, sum(n * n for n in times.values()))
    if not largest:
        raise ValueError("Nobody takes part in any round: there is nothing to account for.")
    return math.sqrt(largest)


@lru_cache(maxsize=256)
def noise_for(epsilon: float, spending: Spending, accountant: Accountant, *, delta: float) -> float:
    """The least `Spending.noise` with which rounds and rate of `spending` stay within epsilon.

    Raises:
        ValueError: epsilon is not above 0, or no noise is enough.
    """
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon is {epsilon}. Give a finite number above 0; infinite is training without noise.")
    low, high = 0.0, 1.0
    while accountant.epsilon(spending._replace(noise=high), delta=delta) > epsilon:
        low, high = high, 2 * high
        if high > _MOST_NOISE:
            raise ValueError(f"No noise up to {_MOST_NOISE:g} gives epsilon {epsilon} at delta {delta}. Raise delta.")
    while high - low > _PRECISION * high:
        middle = (low + high) / 2
        if accountant.epsilon(spending._replace(noise=middle), delta=delta) > epsilon:
            low = middle
        else:
            high = middle
    return high


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta is {delta}. Give a number between 0 and 1, below 1 / users.")
