"""Tables and the plot of the rows of benchmarks.own_documents.

markdown(rows, "methods")
"""

from statistics import fmean, median

from benchmarks.measuring.metrics import bootstrap_interval
from benchmarks.measuring.rows import Rows
from benchmarks.report.figures import Figure
from benchmarks.report.plots import MATCH, Axis, Panel, Point, Series, style_of
from benchmarks.report.tables import Table

NAMES = {
    "no_context": "no context",
    "other_document": "another document's adapter",
    "in_prompt": "document in the prompt",
    "closed_form": "closed form, untrained",
    "adapter": "own adapter",
    "oracle": "own adapter, the right sentence",
}
SETS = {"paragraphs": "a paragraph of Wikipedia", "notes": "a note of an unseen kind"}
_STYLES = {
    "no_context": "no_context",
    "other_document": "wrong_document",
    "in_prompt": "full_context",
    "adapter": "doc_to_lora",
}
CONTAINS = MATCH._replace(label="share of answers that contain the truth")


def markdown(rows: Rows, part: str) -> str:
    """One part's table."""
    return TABLES[part](rows).markdown()


def interval(rows: Rows, key: str = "contains") -> tuple[float, float]:
    """95 % of the mean, documents of all seeds drawn whole."""
    return bootstrap_interval([row[key] for row in rows], groups=[(row["seed"], row.get("document")) for row in rows])


def of(rows: Rows, name: str, method: str = "adapter") -> Rows:
    return [row for row in rows if (row["set"], row.get("method")) == (name, method)]


def methods(rows: Rows) -> Table:
    """Of each set and method the share of answers that contain the truth, with its interval, and token F1."""
    lines = []
    for name, title in SETS.items():
        for method, called in NAMES.items():
            own = of(rows, name, method)
            ends = (f"{end:.2f}" for end in interval(own))
            lines.append([title, called, str(len(own)), f"{_mean(own):.2f}", *ends, f"{_mean(own, 'f1'):.2f}"])
    return Table("", ["questions about", "method", "questions", "contains", "from", "to", "F1"], lines)


def readme(rows: Rows) -> Table:
    lines = [
        [title, *(f"{_mean(of(rows, name, method)):.2f}" for method in list(NAMES) if method in _README)]
        for name, title in SETS.items()
    ]
    return Table("", ["questions about", *(NAMES[m] for m in NAMES if m in _README)], lines)


def several(rows: Rows) -> Table:
    """Several documents in one adapter, and longer ones: the same questions, the share of one document's."""
    lines = []
    names = [name for name in dict.fromkeys(row["set"] for row in rows) if name not in SETS and _is_several(name)]
    for name in names:
        own = of(rows, name)
        first = of(rows, "article's first 1") if name.startswith("article") else of(rows, "paragraphs")
        ends = (f"{end:.2f}" for end in interval(own))
        share = f"{_mean(own) / _mean(first):.2f}" if _mean(first) else "–"
        lines.append([_SEVERAL.get(name, name), str(len(own)), f"{_mean(own):.2f}", *ends, share])
    return Table("", ["in one adapter", "questions", "contains", "from", "to", "of one paragraph's"], lines)


def others(rows: Rows) -> Table:
    """What it does to other questions, and what contradicts the base model."""
    lines = []
    for title, name, method, key in (
        ("sentences of paragraphs said word for word, whatever is asked", "paragraphs said", None, "whole"),
        ("chunks of notes said word for word, whatever is asked", "notes said", None, "whole"),
        ("questions that another text's adapter leaves to the base model", "left alone", None, "alone"),
        ("known questions still answered, without an adapter", "unrelated", "no_context", "contains"),
        ("known questions still answered, another text's adapter", "unrelated", "adapter", "contains"),
        ("nats a token lost of those answers", "unrelated", "adapter", "log_prob_lost"),
        ("nats a token lost of how a text goes on", "continued", None, "log_prob_lost"),
        ("passage against what is true: the passage's answer, no context", "conflicts", "no_context", "contains"),
        ("the passage's answer, own adapter", "conflicts", "adapter", "contains"),
        ("the passage's answer, passage in the prompt", "conflicts", "in_prompt", "contains"),
        ("the true answer, own adapter", "conflicts", "adapter", "true_answer"),
        ("the true answer, passage in the prompt", "conflicts", "in_prompt", "true_answer"),
    ):
        own = [row for row in rows if (row["set"], row.get("method")) == (name, method)]
        if not own:
            continue
        groups = [(row["seed"], row["question"] if method else row["document"]) for row in own]
        ends = bootstrap_interval([row[key] for row in own], groups=groups)
        lines.append([title, str(len(own)), f"{fmean(row[key] for row in own):.3f}", *(f"{end:.3f}" for end in ends)])
    return Table("", ["figure", "questions", "value", "from", "to"], lines)


def seconds(rows: Rows) -> Table:
    own = [row for row in rows if row["set"] == "seconds"]
    times = median(row["adapter_token_s"] / row["no_context_token_s"] for row in own)
    lines = [
        [f"loading of everything, {_of(own, 'tokens')} tokens to read", f"{_median(own, 'load_s'):.1f} s"],
        [f"document to adapter, {_of(own, 'chunks')} sentences", f"{_median(own, 'internalize_s'):.1f} s"],
        ["a token of a warm answer, relative to no adapter", f"{times:.2f}"],
    ]
    return Table("", ["a page of two", "median"], lines)


def plot(rows: Rows) -> Figure | None:
    """Contained answers by method, a panel for each set; bars reach over 95 %."""
    if not rows:
        return None
    styles = {method: style_of(_STYLES[method]) for method in _README}
    series = []
    for method, style in styles.items():
        of_sets = [of(rows, name, method) for name in SETS]
        points = [Point(place, _mean(own), list(interval(own))) for place, own in enumerate(of_sets)]
        series.append(Series(NAMES[method], style, points))
    panels = [Panel("SmolLM2-135M, one pass", series, Axis(""), CONTAINS, groups=list(SETS.values()))]
    return Figure("own_documents", panels, [(NAMES[method], style) for method, style in styles.items()], [], [])


_README = ("no_context", "other_document", "in_prompt", "adapter")
_SEVERAL = {"article's first 1": "an article's first paragraph"}
TABLES = {"methods": methods, "readme": readme, "several": several, "others": others, "seconds": seconds}


def _is_several(name: str) -> bool:
    return name.endswith(" paragraphs") or name.startswith("article's first")


def _mean(rows: Rows, key: str = "contains") -> float:
    return fmean(row[key] for row in rows)


def _median(rows: Rows, key: str) -> float:
    return median(row[key] for row in rows)


def _of(rows: Rows, key: str) -> str:
    return f"{_median(rows, key):,.0f}"
