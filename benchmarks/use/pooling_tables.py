"""Tables of the rows of benchmarks.use.private and benchmarks.use.retriever: means over the seeds, with 95 % intervals.

markdown(rows, "private"), markdown(rows, "retriever")
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from benchmarks.forgetting.intervals import nested_interval
from benchmarks.measuring.rows import Row, Rows
from benchmarks.report.tables import Cell, Table, number
from hypernet.consolidation.private.accounting import RenyiAccountant
from hypernet.consolidation.private.membership import area_interval
from hypernet.consolidation.private.pooled import PooledConsolidator

NAMES = {
    **{"dp_sgd": "sampled users, noise by round", "dp_ftrl": "users in turn, noise of a tree"},
    **{"own": "each user's own adapter", "pooled": "sum of 32 users' adapters", "before": "the base model"},
}


def markdown(rows: Rows, part: str) -> str:
    return TABLES[part](rows).markdown()


def private(rows: Rows) -> Table:
    """Utility and attack of the weights, each arm at the learning rate that the first seed chose."""
    lines = [_line(own) for own in _arms(rows, "weights", "mechanism").values()]
    before = {**_line([row for row in rows if row["kind"] == "before"]), "epsilon": "–"}
    return Table.of("", [before, *lines], _WEIGHTS)


def attacks(rows: Rows) -> Table:
    """The other attack, by what training added to log p."""
    return Table.of("", [_line(own) for own in _arms(rows, "weights", "mechanism").values()], _GAINED)


def spent(rows: Rows) -> Table:
    """What opacus says of them; the formula's epsilon of the same noise, computed here; and what was chosen."""
    lines = []
    for own in _arms(rows, "weights", "mechanism").values():
        if own[0]["epsilon"] is not None:
            means = {key: fmean(row[key] for row in own) for key in ("spent", "noise", "lr", "clipped")}
            lines.append({**_name(own[0]), **means, "check": max(map(_by_formula, own))})
    return Table.of("", lines, _SPENT)


def _by_formula(row: Row) -> float:
    config = row["run"]["config"]
    settings = {key: config["pooled"][key] for key in ("rounds", "sampling_rate")}
    pooled = PooledConsolidator(mechanism=row["mechanism"], seed=row["seed"], **settings)
    spending = pooled.spending(row["noise"], config["num_users"])
    return RenyiAccountant().epsilon(spending, delta=row["delta"])


def adapters(rows: Rows) -> Table:
    """Utility and attack of generated adapters."""
    return Table.of("", [_line(own) for own in _arms(rows, "adapters", "release").values()], _ADAPTERS)


def retriever(rows: Rows) -> Table:
    """By method; the last row is what any search could reach at most."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["kind"] == "search":
            found.setdefault(row["method"], []).append(row)
    lines = []
    for method, own in found.items():
        line: Row = {"name": method}
        for key in ("recall", "exact_match"):
            low, high = _interval(own, key) or (None, None)
            line |= {key: fmean(row[key] for row in own), f"{key}_low": low, f"{key}_high": high}
        lines.append(line)
    return Table.of("", lines, _RETRIEVER)


def gains(rows: Rows) -> Table:
    """Differences of recall to other methods on the same questions; an interval without 0 is a difference."""
    found = {(row["method"], row["seed"]): row for row in rows if row["kind"] == "search"}
    seeds = sorted({seed for _, seed in found})
    lines = []
    for one, other in (
        ("trained", "dense"),
        ("trained", "shuffled"),
        ("trained", "bm25"),
        ("trained and bm25", "bm25"),
    ):
        columns = [[s for seed in seeds for s in found[name, seed]["items"]["recall"]] for name in (one, other)]
        of_seed = [seed for seed in seeds for _ in found[one, seed]["items"]["recall"]]
        low, high = nested_interval(columns, lambda a, b: a - b, seeds=of_seed) or (None, None)
        difference = fmean(columns[0]) - fmean(columns[1])
        lines.append({"name": f"{one} against {other}", "recall": difference, "low": low, "high": high})
    return Table.of("", lines, _GAINS)


def _arms(rows: Rows, kind: str, key: str) -> dict[tuple[str, float | None], list[Row]]:
    """(name, epsilon) → its rows, one a seed; of several learning rates those that a seed without a choice took."""
    found: dict[tuple[str, float | None], list[Row]] = {}
    for row in rows:
        if row["kind"] == kind:
            found.setdefault((row[key], row["epsilon"]), []).append(row)
    taken = {}
    for arm, own in found.items():
        best: dict[int, Row] = {}
        first = own[0]["seed"]
        tried = [row for row in own if row["seed"] == first]
        lr = max(tried, key=lambda row: row.get("log_p", 0.0)).get("lr")
        for row in own:
            if row.get("lr") == lr:
                best[row["seed"]] = row
        taken[arm] = list(best.values())
    return taken


def _line(own: Sequence[Row]) -> Row:
    """Means of one arm, with the intervals of its areas."""
    keys = ("exact_match", "log_p", "auc", "auc_likelihood", "gain_members", "gain_others")
    line: Row = {**_name(own[0]), **{key: fmean(row[key] for row in own) for key in keys if key in own[0]}}
    gained = [[row["items"][who] for row in own] for who in ("members", "others")]
    halves = [len(row["items"]["members"]) for row in own]
    said = [
        [row["items"]["after"][:half] for row, half in zip(own, halves, strict=True)],
        [row["items"]["after"][half:] for row, half in zip(own, halves, strict=True)],
    ]
    for key, scores in (("gained", gained), ("said", said)):
        low, high = area_interval(*scores) or (None, None)
        line |= {f"{key}_low": low, f"{key}_high": high}
    return line


def _name(row: Row) -> Row:
    name = NAMES[row.get("mechanism") or row.get("release") or row["kind"]]
    epsilon = row.get("epsilon")
    return {"name": name, "epsilon": "∞" if epsilon is None else f"{epsilon:g}"}


def _interval(own: Sequence[Row], key: str) -> tuple[float, float] | None:
    scores = [score for row in own for score in row["items"][key]]
    seeds = [row["seed"] for row in own for _ in row["items"][key]]
    return nested_interval([scores], lambda one: one, seeds=seeds)


_NAMED: dict[str, Cell] = {"what": lambda row: row["name"], "epsilon": lambda row: row["epsilon"]}
_COMMON: dict[str, Cell] = {"common facts": number("exact_match")}
_SAID: dict[str, Cell] = {"AUC": number("auc_likelihood"), "low": number("said_low"), "high": number("said_high")}
_OF_GAINS: dict[str, Cell] = {"AUC of gains": number("auc"), "low": number("gained_low"), "high": number("gained_high")}
_WEIGHTS = _NAMED | _COMMON | {"their log p, nats": number("log_p", 1)} | _SAID
_GAINED = (
    _NAMED | _OF_GAINS | {"gain of members, nats": number("gain_members", 1), "of others": number("gain_others", 1)}
)
_ADAPTERS = _NAMED | _COMMON | _SAID | {"AUC of gains": number("auc")}
_SPENT = _NAMED | {
    **{"epsilon by opacus": number("spent", 3), "by the formula": number("check", 3), "noise, clips": number("noise")},
    **{"learning rate": number("lr", 0), "clipped": number("clipped")},
}
_RETRIEVER: Mapping[str, Cell] = {
    "search": lambda row: row["name"],
    **{"recall@1": number("recall"), "low": number("recall_low"), "high": number("recall_high")},
    **{
        "exact match": number("exact_match"),
        "its low": number("exact_match_low"),
        "its high": number("exact_match_high"),
    },
}
_GAINS: Mapping[str, Cell] = {
    "recall@1": lambda row: row["name"],
    **{"difference": number("recall", 2, "+"), "low": number("low", 2, "+"), "high": number("high", 2, "+")},
}
TABLES: dict[str, Callable[[Rows], Table]] = {
    **{
        "private": private,
        "private_spent": spent,
        "private_attacks": attacks,
        "private_adapters": adapters,
    },
    **{"retriever": retriever, "retriever_gains": gains},
}
