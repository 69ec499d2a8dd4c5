"""The report as one HTML page that needs nothing but itself: follows the reader's light or dark, fits a phone.

text = page(rows, summary="...")    # rows of benchmarks.measuring.aggregate, the sweep's among them
"""

import re
from collections.abc import Iterator
from html import unescape
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.measuring.rows import Rows
from benchmarks.report.figures import all_figures
from benchmarks.report.names import METHODS, TEXTS, name_of, order, task_name
from benchmarks.report.plots import PALETTE, inline, key_of
from benchmarks.report.tables import differences, set_tables

_MARKED = re.compile(r'<data value="([^"]*)">([^<]*)</data>')


def page(rows: Rows, *, summary: str = "") -> str:
    """The whole page.

    Args:
        summary: what a person says of the rows, in HTML; each figure of it is checked.

    Raises:
        ValueError: no `sweep` row says what made the others, or a figure of the summary is not what the rows say.
    """
    sweep = next((row for row in rows if row["kind"] == "sweep"), None)
    if sweep is None:
        raise ValueError("The rows have no row of kind sweep; write them with python -m benchmarks.report output=...")
    if wrong := list(unconfirmed(summary, rows)):
        raise ValueError(
            f"The summary is not what the rows say: {'; '.join(wrong)}. Write it anew, or set summary=null."
        )
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        **{"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True},
    )
    environment.globals |= {"inline": inline, "key_of": key_of, "name_of": name_of}
    figures, missing = all_figures(rows)
    methods = sorted({row["method"] for row in rows if row["kind"] == "summary"}, key=order)
    by_task = groupby(set_tables(rows), key=lambda pair: task_name(pair[0]))
    return environment.get_template("page.html.j2").render(
        **{"summary": summary, "sweep": sweep, "figures": figures, "missing": missing, "palette": PALETTE},
        differences=differences(rows),
        methods=[(name_of(m), METHODS.get(m, {}).get("text", "")) for m in methods],
        terms=TEXTS["terms"],
        tables=[(task, [table for _, table in pairs]) for task, pairs in by_task],
        seeds=max((row["seeds"] for row in rows if row["kind"] == "summary"), default=0),
    )


def unconfirmed(summary: str, rows: Rows) -> Iterator[str]:
    """What is wrong with each figure that the rows do not confirm.

    A figure is marked with its place: <data value="composition|8 documents|doc_to_lora|exact_match">0.82</data> is
    task, set, method and key of a row, or keys with a dot between them (break_even.retrieval.seconds, "never" for
    none). A number without a mark is one that nothing confirms.
    """
    found = {(row["task"], row["set"], row["method"]): row for row in rows if row["kind"] == "summary"}
    for place, text in _MARKED.findall(summary):
        *where, keys = unescape(place).split("|")
        value = found.get(tuple(where))
        for key in keys.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        said = "never" if value is None else f"{value:,.{len(text.partition('.')[2])}f}"
        if tuple(where) not in found or said != text:
            yield f"{place} is {said}, not {text}"
    for number in re.findall(r"\d[\d.,]*", re.sub(r"<[^>]*>", "", _MARKED.sub("", summary))):
        yield f"{number} is not marked"
