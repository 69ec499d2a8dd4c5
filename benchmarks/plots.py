"""The report's plots as SVG text that follows the page's colours: light, dark, and legible without colour."""

import io
import math
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

# Matplotlib writes this colour, the page's own text colour takes its place.
_TEXT = "#123456"
# Distinct for readers with colour-vision deficiency, of middle lightness for both backgrounds (after Okabe and Ito).
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56a0d3", "#8a6fc8", "#7a7a7a")
_MARKERS = "osD^vPX*<>hpd8"

LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
QUESTIONS_PER_VERSION = (0.5, 1, 2, 4, 8, 16, 32, 64, 128)

Rows = Sequence[dict[str, Any]]


def all_figures(rows: Rows, *, checkpoint: str) -> list[tuple[str, str, str]]:
    """(title, what it shows, SVG) of every plot that the rows have something for."""
    figures = [
        ("Accuracy by length", "Exact match with 95 % intervals by document tokens.", accuracy_by_length(rows)),
        (
            "Cost by length",
            "Milliseconds to prepare a document and to answer a question asked alone.",
            cost_by_length(rows),
        ),
        (
            "Memory by length",
            "KiB kept per document, and the most held at a time beyond the model while preparing or answering.",
            memory_by_length(rows),
        ),
        (
            "Capacity",
            "Share of the gap between no context and full context that is closed, by document tokens in one adapter.",
            capacity(rows),
        ),
        (
            "Quality against cost",
            "Exact match over the milliseconds per question, where a document is asked 1 or 32 questions.",
            pareto(rows),
        ),
        (
            "Quality over gradient steps",
            "Exact match over the seconds of training for one document; the last point is the number in the tables.",
            curves(rows),
        ),
        (
            "Break-even",
            "FLOPs of Doc-to-LoRA over those of the alternative, by document length and by questions asked before the "
            "document changes. Below 1 the adapter is cheaper; the line is the break-even. Lengths beyond the model's "
            "window are counted as if it had one.",
            break_even_surface(checkpoint),
        ),
    ]
    return [figure for figure in figures if figure[2]]


def accuracy_by_length(rows: Rows) -> str:
    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for method, style, points in _by_length(rows):
            values = [p["exact_match"] for p in points]
            low, high = zip(*((p["interval"] or (p["exact_match"],) * 2) for p in points), strict=True)
            errors = [
                [v - a for v, a in zip(values, low, strict=True)],
                [b - v for v, b in zip(values, high, strict=True)],
            ]
            errors = [[max(0.0, e) for e in side] for side in errors]
            x = [p["document_tokens"] for p in points]
            axes.errorbar(x, values, errors, label=_name(method), capsize=2, linewidth=1.2, elinewidth=0.6, **style)
        axes.set(xscale="log", xlabel="document tokens", ylabel="exact match", ylim=(-0.03, 1.03))
        _legend(axes)

    return _svg(draw, "accuracy") if _by_length(rows) else ""


def cost_by_length(rows: Rows) -> str:
    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for method, style, points in _by_length(rows):
            for axes, key in ((left, "prepare_s"), (right, "question_s")):
                chosen = [p for p in points if p[key] is not None]
                x, y = [p["document_tokens"] for p in chosen], [1000 * p[key] for p in chosen]
                axes.plot(x, y, label=_name(method), linewidth=1.2, **style)
        for axes, label in ((left, "ms to prepare a document"), (right, "ms per question")):
            axes.set(xscale="log", yscale="log", xlabel="document tokens", ylabel=label)
        _legend(right)

    return _svg(draw, "cost") if _by_length(rows) else ""


def memory_by_length(rows: Rows) -> str:
    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for method, style, points in _by_length(rows):
            x = [p["document_tokens"] for p in points]
            left.plot(
                x, [max(p["stored_bytes"], 1) / 1024 for p in points], label=_name(method), linewidth=1.2, **style
            )
            peaks = [(p["prepare_peak_bytes"], p["answer_peak_bytes"]) for p in points]
            if all(None not in peak for peak in peaks):
                right.plot(x, [max(peak) / 1024 for peak in peaks], label=_name(method), linewidth=1.2, **style)
        left.set(xscale="log", yscale="log", xlabel="document tokens", ylabel="KiB kept")
        right.set(xscale="log", yscale="log", xlabel="document tokens", ylabel="peak KiB")
        _legend(right)

    return _svg(draw, "memory") if _by_length(rows) else ""


def capacity(rows: Rows) -> str:
    chosen = [(m, s, [p for p in points if p.get("gap_closed") is not None]) for m, s, points in _by_length(rows)]
    chosen = [
        (m, s, points) for m, s, points in chosen if points and ("lora" in m or "distillation" in m or "warm" in m)
    ]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for method, style, points in chosen:
            x, y = [p["document_tokens"] for p in points], [p["gap_closed"] for p in points]
            axes.plot(x, y, label=_name(method), linewidth=1.2, **style)
        axes.set(xscale="log", xlabel="document tokens in one adapter", ylabel="share of the gap closed")
        _legend(axes)

    return _svg(draw, "capacity") if chosen else ""


def pareto(rows: Rows) -> str:
    chosen = [row for row in rows if row["task"] == "encyclopedia" and row.get("question_s") is not None]

    def draw(figure: Any) -> None:
        first = chosen[0]["set"]
        for axes, number in zip(figure.subplots(1, 2, sharey=True), (1, 32), strict=True):
            for row, style in ((r, _style(r["method"])) for r in chosen if r["set"] == first):
                x = 1000 * (row["question_s"] + (row["prepare_s"] or 0) / number)
                axes.plot([x], [row["exact_match"]], label=_name(row["method"]), **(style | {"linestyle": "none"}))
            axes.set(
                xscale="log",
                xlabel=f"ms per question, {number} asked",
                ylabel=f"exact match, {first}" if number == 1 else "",
                ylim=(-0.03, 1.03),
            )
        _legend(axes)

    return _svg(draw, "pareto") if chosen else ""


def curves(rows: Rows) -> str:
    chosen = [row for row in rows if row["task"] == "encyclopedia" and row.get("curve")]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        first = chosen[0]["set"]
        for row in (row for row in chosen if row["set"] == first):
            points = [p for p in row["curve"] if p["seconds"] is not None]
            # A logarithmic axis has no 0: the start without a generated adapter takes no time.
            x, y = [max(p["seconds"], 0.01) for p in points], [p["exact_match"] for p in points]
            axes.plot(x, y, label=_name(row["method"]), linewidth=1.2, **_style(row["method"]))
        for row in rows:
            if (row["task"], row["set"], row["method"]) == ("encyclopedia", first, "doc_to_lora"):
                axes.plot([row["prepare_s"]], [row["exact_match"]], label=_name("doc_to_lora"), **_style("doc_to_lora"))
        axes.set(xscale="log", xlabel="seconds for one document", ylabel=f"exact match, {first}", ylim=(-0.03, 1.03))
        _legend(axes)

    return _svg(draw, "curves") if chosen else ""


@cache
def break_even_surface(checkpoint: str) -> str:
    from benchmarks.cost import amortised

    model = cost_model(checkpoint)

    def draw(figure: Any) -> None:
        from matplotlib.colors import TwoSlopeNorm

        for axes, other in zip(figure.subplots(1, 2, sharey=True), ("full_context", "prefix_cache"), strict=True):
            ratios = [
                [
                    amortised(model.costs("doc_to_lora", length), number)
                    / amortised(model.costs(other, length), number)
                    for length in LENGTHS
                ]
                for number in QUESTIONS_PER_VERSION
            ]
            logs = [[math.log10(ratio) for ratio in line] for line in ratios]
            axes.imshow(logs, origin="lower", aspect="auto", cmap="RdBu_r", norm=TwoSlopeNorm(0, -1.5, 1.5), alpha=0.85)
            for i, line in enumerate(ratios):
                for j, ratio in enumerate(line):
                    axes.text(j, i, f"{ratio:.2g}", ha="center", va="center", fontsize=7, color="black")
            low, high = min(map(min, logs)), max(map(max, logs))
            if low < 0 < high:
                axes.contour(logs, levels=[0], colors="black", linewidths=1.5)
            axes.set_xticks(range(len(LENGTHS)), [f"{length:,}" for length in LENGTHS], fontsize=7)
            axes.set_yticks(range(len(QUESTIONS_PER_VERSION)), [f"{n:g}" for n in QUESTIONS_PER_VERSION])
            axes.set(xlabel="document tokens", title=f"against {_name(other)}")
            axes.grid(False)
        figure.axes[0].set_ylabel("questions per version of the document")

    return _svg(draw, "surface")


def cost_model(checkpoint: str) -> Any:
    """FLOPs by length of the checkpoint's model: counted on documents of one and three chunks, analytic elsewhere."""
    from benchmarks.cost import CostModel, ModelShape, flops_of
    from benchmarks.internalize_cost import make_document
    from hypernet.doc_to_lora import DocToLoRA

    model = DocToLoRA.from_pretrained(checkpoint).eval().requires_grad_(False)
    counted = []
    for number in (1, 3):
        document = make_document(model, number * model.max_chunk_tokens * 9 // 10)
        flops = flops_of(lambda document=document: model.internalize(document))
        counted.append((model.internalize(document).num_chunks, flops))
    (chunks, flops), (more_chunks, more_flops) = counted
    per_chunk = (more_flops - flops) / (more_chunks - chunks)
    return CostModel(
        shape=ModelShape.of(model.base_model),
        targets=model.hypernetwork.targets,
        rank_per_chunk=model.hypernetwork.rank,
        max_chunk_tokens=model.max_chunk_tokens,
        internalize_flops=(flops - chunks * per_chunk, per_chunk),
        question_tokens=12,
        answer_tokens=5,
    )


def _by_length(rows: Rows) -> list[tuple[str, dict, list[dict]]]:
    """(method, style, points by length) of the encyclopedia's sets with one document."""
    chosen = [row for row in rows if row["task"] == "encyclopedia" and "documents" not in row["set"]]
    result = []
    for method in dict.fromkeys(row["method"] for row in chosen):
        points = sorted((row for row in chosen if row["method"] == method), key=lambda row: row["document_tokens"])
        result.append((method, _style(method), points))
    return result


def _style(method: str) -> dict[str, Any]:
    from benchmarks.report import METHODS

    place = METHODS.index(method) if method in METHODS else len(METHODS)
    dashed = "--" if place >= len(_COLORS) else "-"
    return {
        "color": _COLORS[place % len(_COLORS)],
        "marker": _MARKERS[place % len(_MARKERS)],
        "linestyle": dashed,
        "markersize": 5,
    }


def _name(method: str) -> str:
    return method.replace("_", " ")


def _legend(axes: Any) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=8, frameon=False)


def _svg(draw: Callable[[Any], None], key: str) -> str:
    """The drawing as an <svg> element whose ids are its own and whose black is the page's text colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colors = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "axes.titlecolor")
    settings = dict.fromkeys(colors, _TEXT) | {
        "svg.fonttype": "none",
        "svg.hashsalt": key,
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "grid.color": _TEXT,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(settings):
        figure = pyplot.figure(figsize=(9.5, 4), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace(_TEXT, "currentColor")
    svg = re.sub(r'\bid="', f'id="{key}-', svg)
    svg = re.sub(r"url\(#", f"url(#{key}-", svg)
    return re.sub(r'(xlink:href|href)="#', rf'\1="#{key}-', svg)
