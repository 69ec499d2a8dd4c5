"""Panels → SVG by matplotlib: for the page in the page's colours, or as a file that follows light and dark itself.

    panel = Panel("One chunk", [Series("LoRA", style_of("doc_to_lora"), [Point(64, 0.9)])], Axis("tokens"), MATCH)
    inline(panel, "length"), standalone([panel], legend)

Drawn for a phone's width; the page puts panels side by side. The same panel gives the same bytes.
"""

import html
import io
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import MarkerStyle
from matplotlib.patches import PathPatch
from matplotlib.transforms import Affine2D, ScaledTranslation

from benchmarks.report.rows import ADAPTER, METHODS, order, short

WIDTH, HEIGHT = 360, 264  # points; a phone shows one as about one pixel
# (light, dark): at least 3:1 against white and #15181c, distinct with colour-vision deficiency (after Tol's "muted").
PALETTE = {
    "text": ("#1a1c20", "#e6e8eb"),
    "soft": ("#5c626c", "#a2a9b3"),
    "line": ("#d5d9df", "#3a4048"),
    "page": ("#ffffff", "#15181c"),
    "gray": ("#71777f", "#a0a6ae"),
    "indigo": ("#332288", "#a99cf5"),
    "green": ("#117733", "#4fbf73"),
    "orange": ("#c94f00", "#ff8f45"),
    "olive": ("#77771f", "#cfcf5a"),
    "purple": ("#aa4499", "#e08ad6"),
    "wine": ("#882255", "#ea6f98"),
    "teal": ("#0f7f74", "#45c9bb"),
    "blue": ("#0072b2", "#58b4f0"),
}
NAMES = {light: name for name, (light, _) in PALETTE.items()}
LIGHT = {name: light for name, (light, _) in PALETTE.items()}


class Style(NamedTuple):
    """color: of PALETTE. marker, dashes: as matplotlib names them. filled: whether the marker is."""

    color: str
    marker: str
    dashes: str = "-"
    filled: bool = True


OTHER = Style("blue", "h", "-.", False)
# Of lines that are no methods: one adapter's ranks, say.
LINES = tuple(map(Style, ("orange", "blue", "green", "purple", "olive", "teal"), "os^Dvh"))


class Point(NamedTuple):
    """low, high: of its interval; None: none is drawn."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


class Series(NamedTuple):
    """joined: whether a line goes from point to point."""

    name: str
    style: Style
    points: Sequence[Point]
    joined: bool = True


class Axis(NamedTuple):
    """limits, ticks: None chooses them."""

    label: str
    log: bool = False
    limits: tuple[float, float] | None = None
    ticks: Sequence[float] | None = None


MATCH = Axis("exact match, with 95 % intervals", limits=(-0.04, 1.04), ticks=(0, 0.25, 0.5, 0.75, 1))


class Panel(NamedTuple):
    """groups: None draws y over x. Else their names, from the top: x is a point's group, and its value lies across."""

    title: str
    series: Sequence[Series]
    x: Axis
    y: Axis
    groups: Sequence[str] | None = None


class Ratios(NamedTuple):
    """A table of numbers on tinted cells: blue below 1, orange above, and a thick line between them.

    ratios: a list per row, the lowest row first. mark_after: columns after which a dashed line stands.
    """

    title: str
    ratios: Sequence[Sequence[float]]
    columns: Sequence[str]
    rows: Sequence[str]
    x_label: str
    y_label: str
    mark_after: int | None = None


Legend = Sequence[tuple[str, Style]]


def style_of(method: str) -> Style:
    look = METHODS.get(method)
    if look is None:
        return OTHER
    return Style(look["color"], look["marker"], look.get("dashes", "-"), not look.get("hollow", False))


def legend_order(methods: Iterable[str]) -> list[str]:
    return sorted(dict.fromkeys(methods), key=order)


def inline(panel: Panel | Ratios, place: str) -> str:
    """One panel for the page, whose custom properties give the colours.

    Args:
        place: on the page, for names that occur there once.
    """
    text = re.sub(r'<g id="(?!title:)[^"]*"', "<g", _svg([panel], salt=f"{place}/{panel.title}"))
    text = re.sub(r"\s*<defs>\s*<style.*?</defs>", "", text, count=1, flags=re.DOTALL)
    name = html.escape(panel.title, quote=True)
    return re.sub("^<svg ", f'<svg role="img" aria-label="{name}" ', text)


def standalone(panels: Sequence[Panel | Ratios], legend: Legend) -> str:
    """A file of panels side by side above their legend, in light or dark as its reader prefers."""
    rules = ["".join(f"--{name}:{pair[i]};" for name, pair in PALETTE.items()) for i in range(2)]
    style = f"<style>svg{{{rules[0]}}}@media (prefers-color-scheme:dark){{svg{{{rules[1]}}}}}</style>"
    text = re.sub(r"<svg [^>]*>", lambda found: found[0] + style, _svg(panels, salt=panels[0].title, legend=legend))
    return text + "\n"


def key_of(style: Style) -> str:
    """A legend's small picture of a line and its marker."""
    figure = _figure(34, 14)
    figure.add_artist(Line2D([0, 1], [0.5, 0.5], color=LIGHT[style.color], linestyle=style.dashes, linewidth=1.6))
    marker = MarkerStyle(style.marker)
    shape = marker.get_path().transformed(marker.get_transform() + Affine2D().scale(8).translate(17, 7))
    face = LIGHT[style.color if style.filled else "page"]
    figure.add_artist(PathPatch(shape, transform=None, facecolor=face, edgecolor=LIGHT[style.color], linewidth=1.2))
    text = re.sub(r'<g id="[^"]*"', "<g", _saved(figure, "key"))
    return re.sub(r"\s*<defs>.*?</defs>", "", text, flags=re.DOTALL).replace("<svg ", '<svg aria-hidden="true" ')


# Parts


def _svg(panels: Sequence[Panel | Ratios], *, salt: str, legend: Legend = ()) -> str:
    columns = max(1, min(len(legend), int(WIDTH * len(panels) // max([150, *(52 + 6.2 * len(n) for n, _ in legend)]))))
    foot = 20 * math.ceil(len(legend) / columns) + (8 if legend else 0)
    heights = [_height(panel) for panel in panels]
    figure = _figure(WIDTH * len(panels), max(heights) + foot)
    with matplotlib.rc_context(RC):
        for place, (panel, height) in enumerate(zip(panels, heights, strict=True)):
            _draw(figure, panel, place * WIDTH, height)
        if legend:
            handles = [
                Line2D([], [], **_look(style), linestyle=style.dashes, linewidth=1.6, label=name)
                for name, style in legend
            ]
            figure.legend(handles=handles, loc="lower center", ncols=columns, frameon=False, fontsize=11)
    if legend:
        figure.patch.set(facecolor=LIGHT["page"], alpha=1)
    return _saved(figure, salt)


RC = {
    "font.size": 11,
    "text.color": LIGHT["text"],
    "axes.edgecolor": LIGHT["soft"],
    "axes.labelcolor": LIGHT["soft"],
    "xtick.color": LIGHT["soft"],
    "ytick.color": LIGHT["soft"],
    "xtick.labelcolor": LIGHT["text"],
    "ytick.labelcolor": LIGHT["text"],
    "grid.color": LIGHT["line"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
}


def _height(panel: Panel | Ratios) -> float:
    if isinstance(panel, Ratios):
        return 90 + 22 * len(panel.rows)
    if panel.groups is None:
        return HEIGHT
    return 76 + len(panel.groups) * _group_height(panel)


def _group_height(panel: Panel) -> float:
    return 8 * len(panel.series) + (24 if any(panel.groups or ()) else 10)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width / 72, height / 72), facecolor="none")
    FigureCanvasSVG(figure)
    return figure


def _saved(figure: Figure, salt: str) -> str:
    """SVG without what matplotlib writes for programs, its colours named as the page's custom properties."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg ") :], flags=re.DOTALL).strip()
    text = re.sub(r'<svg ([^>]*?)height="[\d.]+pt"', r"<svg \1", text).replace(
        ' xmlns:xlink="http://www.w3.org/1999/xlink"', ""
    )
    text = re.sub(r'(<svg [^>]*?)width="[\d.]+pt"([^>]*?) version="1.1"', r"\1\2", text).replace("xlink:href", "href")
    text = re.sub(r'<g id="title:([^"]*)">', r"<g><title>\1</title>", text)
    text = re.sub(r"font: ([^;\"]*?)'[^;\"]*sans-serif", r"font: \1system-ui, sans-serif", text)
    text = re.sub(r"\n\s*", "\n", text)
    return re.sub("#[0-9a-f]{6}", lambda found: f"var(--{NAMES[found[0]]})" if found[0] in NAMES else found[0], text)


def _look(style: Style, *, size: float = 6) -> dict[str, Any]:
    face = LIGHT[style.color if style.filled else "page"]
    return {"color": LIGHT[style.color], "marker": style.marker, "markersize": size, "markerfacecolor": face}


def _draw(figure: Figure, panel: Panel | Ratios, left: float, height: float) -> None:
    total, whole = figure.get_size_inches() * 72
    margins = (46, 44, 12, 42) if isinstance(panel, Ratios) or panel.groups is None else (14, 44, 14, 30)
    inner = (
        left + margins[0],
        whole - height + margins[1],
        WIDTH - margins[0] - margins[2],
        height - margins[1] - margins[3],
    )
    box = [inner[0] / total, inner[1] / whole, inner[2] / total, inner[3] / whole]
    axes = figure.add_axes(box, facecolor="none")
    figure.text((left + 14) / total, 1 - 16 / whole, panel.title, fontsize=13, fontweight=600)
    if isinstance(panel, Ratios):
        _draw_ratios(axes, panel)
    elif panel.groups is None:
        _draw_lines(axes, panel)
    else:
        _draw_groups(axes, panel)
    if isinstance(panel, Ratios) or panel.groups is None:
        y_label = panel.y_label if isinstance(panel, Ratios) else panel.y.label
        figure.text((left + 14) / total, 1 - 33 / whole, y_label, color=LIGHT["soft"])


def _draw_lines(axes: Any, panel: Panel) -> None:
    series = [s for s in panel.series if s.points]
    step = min(3.5, 18 / max(1, len(series)))
    for number, one in enumerate(series):
        # Points of one place are moved apart by a few points, so that intervals do not hide each other.
        moved = (number - (len(series) - 1) / 2) * step if any(s.joined for s in series) else 0
        shift = axes.transData + ScaledTranslation(moved / 72, 0, axes.figure.dpi_scale_trans)
        x, y = [p.x for p in one.points], [p.y for p in one.points]
        drawn = axes.errorbar(
            *(x, y, _errors(one.points)),
            **_look(one.style),
            linestyle=one.style.dashes if one.joined else "none",
            linewidth=2.6 if one.style == style_of(ADAPTER) else 1.6,
            **{"elinewidth": 1.2, "transform": shift, "clip_on": False},
        )
        drawn.lines[0].set_gid("title:" + _said(one, panel.x))
    for axis, side, values in (
        (panel.x, axes.xaxis, [p.x for s in series for p in s.points]),
        (panel.y, axes.yaxis, [v for s in series for p in s.points for v in (p.y, p.low, p.high) if v is not None]),
    ):
        _scale(axes, axis, side, values)
    axes.set_xlabel(panel.x.label)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)


def _draw_groups(axes: Any, panel: Panel) -> None:
    groups, high, head = panel.groups or (), _group_height(panel), 16 if any(panel.groups or ()) else 4
    for number, one in enumerate(panel.series):
        for point in one.points:
            place = point.x * high + head + 8 * number + 4
            errors = (
                None if point.low is None or point.high is None else [[point.y - point.low], [point.high - point.y]]
            )
            drawn = axes.errorbar(
                *([point.y], [place]), xerr=errors, **_look(one.style), linestyle="none", elinewidth=1.4, clip_on=False
            )
            name = groups[int(point.x)]
            drawn.lines[0].set_gid(f"title:{f'{name}, ' if name else ''}{one.name}: {_value(point)}")
    for place, name in enumerate(groups):
        axes.text(0, place * high + 8, name, transform=axes.get_yaxis_transform(), va="center", fontsize=12)
    _scale(axes, panel.y, axes.xaxis, [])
    axes.set(ylim=(len(groups) * high, 0), yticks=[], xlabel=panel.y.label)
    axes.grid(axis="x")
    axes.set_axisbelow(True)


def _draw_ratios(axes: Any, panel: Ratios) -> None:
    tint = LinearSegmentedColormap.from_list("tint", ["#60a5dc", "#f6f6f6", "#f09650"])
    strengths = [[math.log(max(r, 1e-9)) / math.log(30) for r in line] for line in panel.ratios]
    axes.pcolormesh(strengths, cmap=tint, vmin=-1, vmax=1, edgecolor="none")
    for i, line in enumerate(panel.ratios):
        for j, ratio in enumerate(line):
            axes.text(j + 0.5, i + 0.48, _ratio(ratio), ha="center", va="center", fontsize=10, color="#111111")
            if j and (ratio < 1) != (line[j - 1] < 1):
                axes.plot([j, j], [i, i + 1], color="#111111", linewidth=2.5)
            if i and (ratio < 1) != (panel.ratios[i - 1][j] < 1):
                axes.plot([j, j + 1], [i, i], color="#111111", linewidth=2.5)
    if panel.mark_after:
        axes.axvline(panel.mark_after, color=LIGHT["text"], linewidth=1.5, linestyle="--", clip_on=False)
    axes.set(xticks=[j + 0.5 for j in range(len(panel.columns))], yticks=[i + 0.5 for i in range(len(panel.rows))])
    axes.set_xticklabels(panel.columns)
    axes.set_yticklabels(panel.rows)
    axes.set_xlabel(panel.x_label)
    axes.tick_params(length=0)


def _scale(axes: Any, axis: Axis, side: Any, values: Sequence[float]) -> None:
    """Limits with some room, and ticks whose labels do not touch."""
    values = [value for value in values if value > 0] if axis.log else list(values)
    low, high = axis.limits or (min(values, default=1), max(values, default=1))
    if axis.log:
        room = (high / low) ** 0.06 if high > low else 2
        low, high = low / room, high * room
    elif not axis.limits:
        room = (high - low) * 0.06 or 0.5
        low, high = low - room, high + room
    if axis.log:
        (axes.set_xscale if side is axes.xaxis else axes.set_yscale)("log")
    (axes.set_xlim if side is axes.xaxis else axes.set_ylim)(low, high)
    ticks = axis.ticks if axis.ticks is not None else _round_numbers(low, high) if axis.log else side.get_ticklocs()
    place = (lambda v: math.log(v / low) / math.log(high / low)) if axis.log else lambda v: (v - low) / (high - low)
    ticks, labels, free = [tick for tick in ticks if low <= tick <= high], [], -1.0
    for tick in ticks:
        half = 0.012 * len(short(tick)) if side is axes.xaxis else 0.0
        labels.append(short(tick) if place(tick) - half >= free else "")
        free = place(tick) + half + 0.01 if labels[-1] else free
    side.set_ticks(ticks, labels)
    side.set_ticks([], minor=True)


def _round_numbers(low: float, high: float) -> list[float]:
    decades = math.log10(high / low)
    digits, every = (1, 2, 5) if decades < 2.4 else (1,), max(1, math.ceil(decades / 6))
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [d * 10.0**e for e in exponents if e % every == 0 for d in digits]


def _errors(points: Sequence[Point]) -> list[list[float]]:
    return [
        [p.y - (p.y if p.low is None else p.low) for p in points],
        [(p.y if p.high is None else p.high) - p.y for p in points],
    ]


def _said(series: Series, x: Axis) -> str:
    return f"{series.name}: " + "; ".join(f"{x.label} {short(p.x)}, {_value(p)}" for p in series.points)


def _value(point: Point) -> str:
    interval = "" if point.low is None or point.high is None else f" ({point.low:.2f} to {point.high:.2f})"
    return (f"{point.y:.2f}" if abs(point.y) <= 1 else short(point.y)) + interval


def _ratio(ratio: float) -> str:
    if ratio >= 9.95:
        return f"{ratio:,.0f}"
    # Two digits after the point next to 1, so that which side it is on can be read.
    return f"{ratio:.1f}" if ratio >= 1.05 else f"{ratio:.2f}" if ratio >= 0.00995 else f"{ratio:.1g}"
