"""When is it cheapest to sleep? `python -m benchmarks.memory.cadence`

Arrivals of memories are drawn for half a year: at one rate (stationary), in bursts, at a rate that rises or falls
(drifting), and at one that swings by the month (seasonal), all of the same mean. Each policy of
`hypernet.consolidation.cadence` is asked once an hour whether it is time. A schedule costs K for each run and h for
each memory and day until the next run; regret = cost / cost of the clairvoyant schedule - 1.

K and h are seconds of the processor on the tiny model, from benchmarks.memory.break_even:
    K = a night + forgotten share * questions a day * days * what asking a forgotten one again costs
    h = questions a day * what a waiting memory in the prompt adds to a question
Regret depends on K/h alone, which is also taken at a tenth and at ten times. Policies have their default parameters,
those of a grid that cost least on other streams of the stationary kind, or K and h themselves: economic as it is made,
pressure at K/h memory-days, when waiting has cost as much as a run.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import hydra
import numpy as np
from pydantic import Field

from benchmarks.measuring.rows import Row
from hypernet.cli.scripts import Script
from hypernet.cli.settings import Above0, AtLeast0, Count, OutputFile, Settings, Share
from hypernet.consolidation.cadence import (
    Cadence,
    Calendar,
    Economic,
    EveryN,
    Pressure,
    Waiting,
    clairvoyant,
    cost_of,
)

STREAMS = ("stationary", "bursty", "drifting", "seasonal")
_BURST, _BURST_DAYS = 10, 0.1  # memories of a burst in the mean, and the mean time from its begin to each of them
_SWING, _PERIOD_DAYS = 0.9, 30.0
_TUNING = 1_000_000  # streams from here on are for tuning
_GRID = tuple(step * 10**power for power in range(4) for step in (1.0, 2.0, 3.0, 5.0, 7.0))
# Policies with a parameter of which others are tried.
TUNED: Mapping[str, Callable[[float], Cadence]] = {
    "every n": lambda value: EveryN(memories=round(value)),
    "calendar": lambda value: Calendar(days=value),
    "pressure": lambda value: Pressure(memory_days=value),
    "economic": lambda value: Economic(run_cost=value, waiting_cost=1.0),
}


class Policy(NamedTuple):
    """parameters: default, tuned, or costs (K and h). value: memories, days, memory-days, or K/h."""

    name: str
    parameters: str
    value: float
    cadence: Cadence


DEFAULTS = (
    Policy("every n", "default", 25, EveryN()),
    Policy("calendar", "default", 14, Calendar()),
    Policy("quarterly", "default", 91, Calendar(days=91)),
    Policy("5 hours", "default", 5 / 24, Calendar(days=5 / 24)),
    Policy("pressure", "default", 50, Pressure()),
    Policy("economic", "default", 50, Economic()),
)


class CadenceSettings(Settings):
    days: Above0
    rate: Above0
    num_streams: Annotated[int, Field(ge=2, description="a whole number, at least 2")]
    num_tuning: Count
    check_hours: Above0
    night_s: Above0
    forgotten: Share
    forgotten_days: AtLeast0
    again_s: AtLeast0
    questions_per_day: AtLeast0
    waiting_s: float
    ratios: Annotated[list[Above0], Field(min_length=1, description="a list of numbers above 0, at least one")]
    output: OutputFile | None


SCRIPT = Script("benchmarks.memory.cadence", CadenceSettings)


def arrivals(kind: str, seed: int, *, days: float, rate: float) -> list[float]:
    """Days on which memories arrive, ascending; so many a day in the mean over all seeds, whatever the kind.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in STREAMS:
        raise ValueError(f"There is no stream {kind!r}: choose of {', '.join(STREAMS)}.")
    rng = np.random.default_rng([STREAMS.index(kind), seed])
    if kind == "bursty":
        begins = rng.uniform(0, days, rng.poisson(days * rate / _BURST))
        sizes = rng.geometric(1 / _BURST, len(begins))
        found = np.repeat(begins, sizes) + rng.exponential(_BURST_DAYS, sizes.sum())
        return sorted(found[found < days].tolist())
    # Thinning: at the highest rate there is, then each with the share that the rate of its day is of that.
    phase, falls = rng.uniform(), rng.random() < 0.5
    found = rng.uniform(0, days, rng.poisson(days * rate * (1 + _SWING)))
    swing = np.zeros_like(found)
    if kind == "drifting":
        swing = (2 * found / days - 1) * (-1 if falls else 1)
    elif kind == "seasonal":
        swing = np.sin(2 * math.pi * (found / _PERIOD_DAYS + phase))
    kept = rng.uniform(size=len(found)) * (1 + _SWING) < 1 + _SWING * swing
    return sorted(found[kept].tolist())


def schedule(cadence: Cadence, arrived: Sequence[float], *, days: float, check_hours: float) -> list[float]:
    """Days on which a policy sleeps that is asked every so many hours; the clock begins with the first memory."""
    sleeps: list[float] = []
    first, last = 0, arrived[0] if arrived else 0.0
    for check in range(1, int(days * 24 / check_hours) + 1):
        now = check * check_hours / 24
        end = bisect_right(arrived, now)
        if end > first and cadence.is_due(Waiting(arrived[first:end], last, now)):
            sleeps.append(now)
            first, last = end, now
    return sleeps


def costs(cfg: CadenceSettings) -> tuple[float, float]:
    """K and h, in seconds."""
    again = cfg.forgotten * cfg.questions_per_day * cfg.forgotten_days * cfg.again_s
    return cfg.night_s + again, cfg.questions_per_day * cfg.waiting_s


def measure(cfg: CadenceSettings) -> Iterator[Row]:
    """Rows of kind regret, and of kind free: what the policies do where waiting costs nothing."""
    span = {"days": cfg.days, "check_hours": cfg.check_hours}
    run_cost, waiting_cost = costs(cfg)
    streams = {
        kind: [arrivals(kind, seed, days=cfg.days, rate=cfg.rate) for seed in range(cfg.num_streams)]
        for kind in STREAMS
    }
    others = [arrivals("stationary", _TUNING + k, days=cfg.days, rate=cfg.rate) for k in range(cfg.num_tuning)]
    tried = {
        (name, value): [schedule(make(value), arrived, **span) for arrived in others]
        for name, make in TUNED.items()
        for value in _GRID
    }
    kept: dict[tuple[str, float, str], list[list[float]]] = {}  # as many policies sleep at several K
    for ratio in cfg.ratios if waiting_cost > 0 else ():
        prices = {"run_cost": ratio * run_cost, "waiting_cost": waiting_cost}
        policies = [*DEFAULTS, *_tuned(tried, others, prices, until=cfg.days)]
        policies += [
            Policy(
                "pressure",
                "costs",
                prices["run_cost"] / waiting_cost,
                Pressure(memory_days=prices["run_cost"] / waiting_cost),
            ),
            Policy("economic", "costs", prices["run_cost"] / waiting_cost, Economic(**prices)),
        ]
        for kind, own in streams.items():
            least = [cost_of(clairvoyant(a, until=cfg.days, **prices), a, until=cfg.days, **prices) for a in own]
            for policy in policies:
                place = policy.name, policy.value, kind
                if place not in kept:
                    kept[place] = [schedule(policy.cadence, arrived, **span) for arrived in own]
                sleeps = kept[place]
                paid = [cost_of(s, a, until=cfg.days, **prices) for s, a in zip(sleeps, own, strict=True)]
                regrets = [cost / best - 1 for cost, best in zip(paid, least, strict=True)]
                row = {"kind": "regret", "stream": kind, "ratio": ratio, **_named(policy), **prices}
                yield {**row, "streams": len(own), **_summary(regrets), "sleeps": _mean(map(len, sleeps))}
    # With h <= 0 each run is K lost: the clairvoyant never sleeps, and costs nothing.
    free = [*DEFAULTS, Policy("economic", "costs", math.inf, Economic(run_cost=run_cost, waiting_cost=0.0))]
    for policy in free:
        sleeps = [len(schedule(policy.cadence, arrived, **span)) for own in streams.values() for arrived in own]
        named = _named(policy) | {"value": policy.value if math.isfinite(policy.value) else None}
        yield {"kind": "free", **named, "sleeps": _mean(sleeps), "cost": run_cost * _mean(sleeps)}


def _tuned(
    tried: Mapping[tuple[str, float], Sequence[Sequence[float]]],
    others: Sequence[Sequence[float]],
    prices: Mapping[str, float],
    *,
    until: float,
) -> Iterator[Policy]:
    for name, make in TUNED.items():

        def paid(value: float, name: str = name) -> float:
            pairs = zip(tried[name, value], others, strict=True)
            return sum(cost_of(sleeps, arrived, until=until, **prices) for sleeps, arrived in pairs)

        best = min(_GRID, key=paid)
        yield Policy(name, "tuned", best, make(best))


def _named(policy: Policy) -> Row:
    return {"policy": policy.name, "parameters": policy.parameters, "value": policy.value}


def _summary(values: Sequence[float]) -> Row:
    from benchmarks.measuring.metrics import bootstrap_interval

    return {"regret": _mean(values), "interval": list(bootstrap_interval(values, groups=range(len(values))))}


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


@hydra.main(config_path="../../conf", config_name="memory_cadence", version_base="1.3")
@SCRIPT
def main(cfg: CadenceSettings) -> None:
    from benchmarks.measuring.rows import show_and_write

    show_and_write(measure(cfg), cfg.output, config=cfg.model_dump())


if __name__ == "__main__":
    SCRIPT.run(main, Path(__file__).parents[2] / "conf/memory_cadence.yaml")
