"""From how many questions on an adapter is cheaper than the prompt: of measured rows, and by document length.

add_break_even(group, model, cases)      # each row of a set gets `break_even`, by alternative
rows += surface(rows, model)             # what a document of some length costs, fitted to what was measured
"""

import logging
import math
import statistics
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import numpy as np

from benchmarks.measuring.cost import MODELLED, CostModel, Measured, SecondsModel, break_evens
from benchmarks.measuring.rows import Row, Rows
from benchmarks.report.names import ADAPTER, ALTERNATIVES, CEILING, FLOOR, GRADIENT
from hypernet.adapters.break_even import Costs, break_even

log = logging.getLogger(__name__)
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)


def cost_model(checkpoint: str) -> CostModel | None:
    """FLOPs of the checkpoint's model; None, with a warning, where it is not here any more."""
    from hypernet.doc_to_lora import DocToLoRA

    if not Path(checkpoint).is_dir():
        log.warning("No checkpoint at %s: its rows get no FLOPs; put it there, or leave it so.", checkpoint)
        return None
    return CostModel.of(DocToLoRA.from_pretrained(checkpoint).eval().requires_grad_(False))


def at_equal_length(row: Row) -> float | None:
    """Seconds of a question whose answer is as long as full context's, so that no method gains by answering less."""
    first, rate, tokens = (row.get(key) for key in ("first_token_s", "tokens_per_s", "answer_tokens"))
    return first + (tokens - 1) / rate if None not in (first, rate, tokens) else row.get("question_s")


def add_answer_tokens(group: Rows) -> None:
    ceiling = next((row for row in group if row["method"] == CEILING), None)
    if ceiling and ceiling["tokens_per_s"]:
        tokens = 1 + ceiling["tokens_per_s"] * (ceiling["question_s"] - ceiling["first_token_s"])
        for row in group:
            row["answer_tokens"] = tokens


def add_break_even(group: Rows, model: CostModel | None, cases: Rows) -> None:
    """Questions from which on a method is cheaper than each alternative; None: never. Absent: not measured."""
    found = {row["method"]: row for row in group}
    for row in group:
        if row["method"] not in (*ALTERNATIVES, ADAPTER, *GRADIENT):
            continue
        row["break_even"] = {}
        for other in ALTERNATIVES:
            if other == row["method"] or other not in found:
                continue
            result: Row = {}
            own, theirs = (_seconds(found[name]) for name in (row["method"], other))
            if own and theirs:
                result["seconds"] = _or_none(break_even(own, theirs))
                if group[0]["kind"] == "summary":
                    result["seconds_interval"] = _break_even_interval(row, found[other], cases)
            own, theirs = (_flops(found[name], model) for name in (row["method"], other))
            if own and theirs:
                result["flops"] = _or_none(break_even(own, theirs))
            if result:
                row["break_even"][other] = result


def _seconds(row: Row) -> Costs | None:
    values = row["prepare_s"], at_equal_length(row)
    return None if None in values else Costs(*values)


def _flops(row: Row, model: CostModel | None) -> Costs | None:
    if model is None:
        return None
    if row["method"] in MODELLED:
        return model.costs(row["method"], row["document_tokens"])
    if row["method"] in GRADIENT and row["prepare_flops"] is not None:
        return Costs(row["prepare_flops"], model.costs(ADAPTER, row["document_tokens"]).question)
    return None


def _break_even_interval(row: Row, other: Row, cases: Rows) -> list[float | None] | None:
    """Percentile bootstrap over the cases that were timed with both methods; None where there are fewer than three."""
    columns = []
    for name in (row["method"], other["method"]):
        columns.append(
            {
                (c["seed"], c["case"]): at_equal_length({**c, "answer_tokens": row.get("answer_tokens")})
                for c in cases
                if (c["task"], c["set"], c["method"]) == (row["task"], row["set"], name)
                and c.get("question_s") is not None
            }
        )
    prepared = [
        {(c["seed"], c["case"]): c["prepare_s"] for c in cases if (c["task"], c["set"], c["method"]) == place}
        for place in ((r["task"], r["set"], r["method"]) for r in (row, other))
    ]
    keys = [key for key in columns[0] if key in columns[1]]
    if len(keys) < 3:
        return None
    drawn = np.random.default_rng(0).integers(len(keys), size=(2000, len(keys)))
    medians = [
        np.median(np.array([part[key] for key in keys])[drawn], axis=1)
        for pair in zip(prepared, columns, strict=True)
        for part in pair
    ]
    values = break_evens(Costs(*medians[:2]), Costs(*medians[2:]))
    # Never is infinite, so no interpolation between values.
    low, high = (float(np.quantile(values, q, method="nearest")) for q in (0.025, 0.975))
    return [_or_none(low), _or_none(high)]


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


# Costs by length


def timed_rows(rows: Rows) -> list[Row]:
    """Rows whose seconds the surface is fitted to: single documents that the prompt holds whole."""
    ceilings = {row["set"]: row["fits"] for row in rows if is_by_length(row) and row["method"] == CEILING}
    return [
        row
        for row in rows
        if is_by_length(row)
        and row["method"] in MODELLED
        and (row["method"] not in (CEILING, "prefix_cache") or ceilings.get(row["set"], 0) == 1)
        and row["prepare_s"]
        and row["first_token_s"]
        and row["tokens_per_s"]
    ]


def is_by_length(row: Row) -> bool:
    """Whether it belongs to the encyclopedia's sets of one document, which are shown by the document's length."""
    return row["kind"] == "summary" and row["task"] == "encyclopedia" and row["documents"] == 1


def sized(model: CostModel | None, rows: Rows, retrieved: int) -> CostModel | None:
    """For questions and answers as long as those of the rows."""
    if model is None:
        return None
    asked = median(row["prompt_tokens"] for row in rows if row["method"] == FLOOR)
    answered = median(row.get("answer_tokens") for row in rows if row["method"] == CEILING)
    return model._replace(
        question_tokens=round(asked or model.question_tokens),
        answer_tokens=max(1, round(answered or model.answer_tokens)),
        retrieved_tokens=retrieved,
    )


def retrieved_tokens(rows: Rows) -> int:
    """At most so many does retrieval put into the prompt; 0 where it was not measured."""
    settings = [r["run"]["config"]["method"] for r in rows if r["kind"] == "summary" and r["method"] == "retrieval"]
    return max((s["num_chunks"] * s["max_chunk_tokens"] for s in settings), default=0)


def surface(rows: Rows, model: CostModel) -> list[Row]:
    measured = [
        Measured(r["method"], r["document_tokens"], r["prepare_s"], r["first_token_s"], 1 / r["tokens_per_s"])
        for r in timed_rows(rows)
    ]
    seconds = SecondsModel.fitted(model, measured)
    errors = []
    for m in measured:
        question_s = m.first_token_s + (model.answer_tokens - 1) * m.further_token_s
        errors.append(abs(seconds.costs(m.method, m.num_tokens).question / question_s - 1))
    counted = [
        r["prepare_flops"] / model.phases(ADAPTER, r["document_tokens"]).prepare
        for r in rows
        if r["method"] == ADAPTER and r["prepare_flops"]
    ]
    common = {
        "kind": "surface",
        "question_tokens": model.question_tokens,
        "answer_tokens": model.answer_tokens,
        "retrieved_tokens": model.retrieved_tokens,
        "longest_measured": max((m.num_tokens for m in measured), default=0),
        "fit_error": statistics.median(errors) if errors else None,
        "counted_over_formula": [min(counted), max(counted)] if counted else None,
    }
    result = []
    for length, method in product(LENGTHS, MODELLED):
        if method == "retrieval" and not model.retrieved_tokens:
            continue
        row = {**common, "num_tokens": length, "method": method, "flops": list(model.costs(method, length))}
        row["seconds"] = list(seconds.costs(method, length)) if method in seconds.lines else None
        result.append(row)
    return result


def median(values: Iterable[float | None]) -> float | None:
    """Of those that are there."""
    found = [value for value in values if value is not None]
    return statistics.median(found) if found else None
