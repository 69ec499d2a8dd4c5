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
from matplotlib.ticker import LogLocator
from matplotlib.transforms import Affine2D, ScaledTranslation

from benchmarks.report.names import ADAPTER, METHODS, TEXTS, order, short

WIDTH, HEIGHT = 360, 264  # points; a phone shows one as about one pixel
PALETTE: dict[str, tuple[str, str]] = {name: tuple(pair) for name, pair in TEXTS["palette"].items()}  # (light, dark)
NAMES = {light: name for name, (light, _) in PALETTE.items()}
LIGHT = {name: light for name, (light, _) in PALETTE.items()}
RC = {
    "font.size": 11,
    **dict.fromkeys(("text.color", "xtick.labelcolor", "ytick.labelcolor"), LIGHT["text"]),
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), LIGHT["soft"]),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.spines.left"), False),
    **{"grid.color": LIGHT["line"], "axes.axisbelow": True, "svg.fonttype": "none"},
}


class Style(NamedTuple):
    """color: of PALETTE. marker, dashes: as matplotlib names them. filled: whether the marker is."""

    color: str
    marker: str
    dashes: str = "-"
    filled: bool = True


OTHER = Style("blue", "h", "-.", False)
# Of lines that are no methods: one adapter's ranks, say.
LINES = tuple(map(Style, ("orange", "blue", "green", "purple", "olive", "teal"), "os^Dvh"))
Legend = Sequence[tuple[str, Style]]


class Point(NamedTuple):
    x: float
    y: float
    interval: Sequence[float] | None = None


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
    """Lines, or dots under the names of their groups.

    groups: None draws y over x. Else from the top; a point's x is its group, and its y lies across.
    """

    title: str
    series: Sequence[Series]
    x: Axis
    y: Axis
    groups: Sequence[str] | None = None


class Ratios(NamedTuple):
    """Numbers on tinted cells: blue below 1, orange above, and a thick line between them.

    ratios: a list per row, the lowest row first. mark_after: columns after which a dashed line stands.
    """

    title: str
    ratios: Sequence[Sequence[float]]
    columns: Sequence[str]
    rows: Sequence[str]
    x: Axis
    y: Axis
    mark_after: int | None = None


def style_of(method: str) -> Style:
    """Of one checkpoint of several, the method's own."""
    if (look := METHODS.get(re.sub(r"_(seed|rank)\d+$", "", method))) is None:
        return OTHER
    return Style(look["color"], look["marker"], look.get("dashes", "-"), not look.get("hollow", False))


def legend_order(methods: Iterable[str]) -> list[str]:
    return sorted(dict.fromkeys(methods), key=order)


def inline(panel: Panel | Ratios, place: str) -> str:
    """One panel for the page, whose custom properties give the colours.

    Args:
        place: on the page, for names that occur there once.
    """
    text = _svg([panel], salt=f"{place}/{panel.title}")
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(panel.title, quote=True)}" ', 1)


def standalone(panels: Sequence[Panel | Ratios], legend: Legend) -> str:
    """A file of panels side by side above their legend, in light or dark as its reader prefers."""
    rules = ["".join(f"--{name}:{pair[i]};" for name, pair in PALETTE.items()) for i in range(2)]
    style = f"<style>svg{{{rules[0]}}}@media (prefers-color-scheme:dark){{svg{{{rules[1]}}}}}</style>"
    text = _svg(panels, salt=panels[0].title, legend=legend)
    return re.sub(r'viewBox="0 0 (\S+) (\S+)">', rf'width="\1" height="\2" \g<0>{style}', text, count=1) + "\n"


def key_of(style: Style) -> str:
    """A legend's small picture of a line and its marker."""
    figure, color = _figure(34, 14), LIGHT[style.color]
    figure.add_artist(Line2D([0, 1], [0.5, 0.5], color=color, linestyle=style.dashes, linewidth=1.6))
    marker, face = MarkerStyle(style.marker), LIGHT[style.color if style.filled else "page"]
    shape = marker.get_path().transformed(marker.get_transform() + Affine2D().scale(8).translate(17, 7))
    figure.add_artist(PathPatch(shape, transform=None, facecolor=face, edgecolor=color, linewidth=1.2))
    return _saved(figure, "key").replace("<svg ", '<svg aria-hidden="true" ', 1)


# Parts


def _svg(panels: Sequence[Panel | Ratios], *, salt: str, legend: Legend = ()) -> str:
    wide, high = WIDTH * len(panels), max(map(_height, panels))
    columns = max(1, min(len(legend), int(wide // max([150, *(52 + 6.2 * len(name) for name, _ in legend)]))))
    foot = 20 * math.ceil(len(legend) / columns) + 8 if legend else 0
    figure = _figure(wide, high + foot)
    with matplotlib.rc_context(RC):
        for place, panel in enumerate(panels):
            _draw(figure, panel, place * WIDTH)
        if legend:
            figure.patch.set(facecolor=LIGHT["page"], alpha=1)
            handles = [Line2D([], [], **_look(style), ls=style.dashes, lw=1.6, label=name) for name, style in legend]
            figure.legend(handles=handles, loc="lower center", ncols=columns, frameon=False)
    return _saved(figure, salt)


def _height(panel: Panel | Ratios) -> float:
    if isinstance(panel, Ratios):
        return 90 + 22 * len(panel.rows)
    return HEIGHT if panel.groups is None else 76 + len(panel.groups) * _group_height(panel)


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
    width, height = figure.get_size_inches() * 72
    opened = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}">'
    text = re.sub(r"^.*?<svg [^>]*>\s*<metadata>.*?</metadata>\s*<defs>.*?</defs>", opened, file.getvalue(), flags=re.S)
    text = re.sub(r'<g id="title:([^"]*)">', r"<g><title>\1</title>", text)
    text = re.sub(r'<g id="[^"]*"', "<g", text).replace("xlink:href", "href")
    text = re.sub(r"font: ([^;\"]*?)'[^;\"]*sans-serif", r"font: \1system-ui, sans-serif", text)
    text = re.sub(r"\n\s*", "\n", text.strip())
    return re.sub("#[0-9a-f]{6}", lambda found: f"var(--{NAMES[found[0]]})" if found[0] in NAMES else found[0], text)


def _look(style: Style) -> dict[str, Any]:
    face = LIGHT[style.color if style.filled else "page"]
    return {"color": LIGHT[style.color], "marker": style.marker, "markersize": 6, "markerfacecolor": face}


def _draw(figure: Figure, panel: Panel | Ratios, start: float) -> None:
    groups = isinstance(panel, Panel) and panel.groups is not None
    left, top, right, bottom = (14, 30, 14, 44) if groups else (46, 42, 12, 44)
    wide, high = figure.get_size_inches() * 72
    inner = high - _height(panel) + bottom, _height(panel) - bottom - top
    place = (start + left) / wide, inner[0] / high, (WIDTH - left - right) / wide, inner[1] / high
    axes = figure.add_axes(place, facecolor="none")
    figure.text((start + 14) / wide, 1 - 16 / high, panel.title, fontsize=13, fontweight="bold")
    if not groups:
        figure.text((start + 14) / wide, 1 - 33 / high, panel.y.label, color=LIGHT["soft"])
    axes.set_xlabel((panel.y if groups else panel.x).label)
    (_draw_ratios if isinstance(panel, Ratios) else _draw_groups if groups else _draw_lines)(axes, panel)


def _draw_lines(axes: Any, panel: Panel) -> None:
    lines = [one for one in panel.series if one.joined]
    for one in panel.series:
        # Lines' points of one place are moved apart by a few points, so that intervals do not hide each other.
        place = lines.index(one) - (len(lines) - 1) / 2 if one.joined else 0
        moved = place * min(3.5, 18 / max(1, len(lines)))
        shift = axes.transData + ScaledTranslation(moved / 72, 0, axes.figure.dpi_scale_trans)
        line = {"ls": one.style.dashes if one.joined else "none", "lw": 2.6 if one.style == style_of(ADAPTER) else 1.6}
        x, y = [point.x for point in one.points], [point.y for point in one.points]
        more = {"elinewidth": 1.2, "transform": shift, "clip_on": False}
        drawn = axes.errorbar(x, y, _errors(one.points), **_look(one.style), **line, **more)
        said = "; ".join(f"{panel.x.label} {short(point.x)}, {_value(point)}" for point in one.points)
        drawn.lines[0].set_gid(f"title:{one.name}: {said}")
    points = [point for one in panel.series for point in one.points]
    _scale(axes.xaxis, panel.x, [point.x for point in points])
    _scale(axes.yaxis, panel.y, [value for point in points for value in (point.y, *(point.interval or ()))])
    axes.grid(axis="y")
    axes.tick_params(axis="y", length=0)


def _draw_groups(axes: Any, panel: Panel) -> None:
    names, high = panel.groups or (), _group_height(panel)
    head = 20 if any(names) else 8
    for number, one in enumerate(panel.series):
        for point in one.points:
            place, name = point.x * high + head + 8 * number, names[int(point.x)]
            more = {"ls": "none", "elinewidth": 1.4, "clip_on": False}
            drawn = axes.errorbar([point.y], [place], xerr=_errors([point]), **_look(one.style), **more)
            drawn.lines[0].set_gid(f"title:{f'{name}, ' if name else ''}{one.name}: {_value(point)}")
    for place, name in enumerate(names):
        axes.text(0, place * high + 8, name, transform=axes.get_yaxis_transform(), va="center", fontsize=12)
    _scale(axes.xaxis, panel.y, [])
    axes.set(ylim=(len(names) * high, 0), yticks=[])
    axes.grid(axis="x")


def _draw_ratios(axes: Any, panel: Ratios) -> None:
    tint = LinearSegmentedColormap.from_list("tint", ["#60a5dc", "#f6f6f6", "#f09650"])
    strengths = [[math.log(max(ratio, 1e-9)) / math.log(30) for ratio in line] for line in panel.ratios]
    axes.pcolormesh(strengths, cmap=tint, vmin=-1, vmax=1)
    for i, line in enumerate(panel.ratios):
        for j, ratio in enumerate(line):
            axes.text(j + 0.5, i + 0.48, _ratio(ratio), ha="center", va="center", fontsize=10, color="#111111")
            if j and (ratio < 1) != (line[j - 1] < 1):
                axes.plot([j, j], [i, i + 1], color="#111111", linewidth=2.5)
            if i and (ratio < 1) != (panel.ratios[i - 1][j] < 1):
                axes.plot([j, j + 1], [i, i], color="#111111", linewidth=2.5)
    if panel.mark_after:
        axes.axvline(panel.mark_after, color="#111111", linewidth=1.5, linestyle="--", clip_on=False)
    axes.set_xticks([j + 0.5 for j in range(len(panel.columns))], panel.columns)
    axes.set_yticks([i + 0.5 for i in range(len(panel.rows))], panel.rows)
    axes.tick_params(length=0)


def _scale(side: Any, axis: Axis, values: Sequence[float]) -> None:
    """Limits with some room, and ticks whose labels do not touch."""
    values = [value for value in values if value > 0 or not axis.log]
    low, high = axis.limits or (min(values), max(values))
    if axis.log:
        room = (high / low) ** 0.06 if high > low else 2
        low, high = low / room, high * room
        ticks = LogLocator(subs=(1, 2, 5) if high / low < 250 else (1,), numticks=7).tick_values(low, high)
        side.axes.set(**{f"{side.axis_name}scale": "log"})
    else:
        room = 0 if axis.limits else (high - low) * 0.06 or 0.5
        low, high = low - room, high + room
        ticks = side.get_ticklocs()
    side.axes.set(**{f"{side.axis_name}lim": (low, high)})
    place = (
        (lambda tick: math.log(tick / low) / math.log(high / low)) if axis.log else lambda t: (t - low) / (high - low)
    )
    ticks = [tick for tick in (ticks if axis.ticks is None else axis.ticks) if low <= tick <= high]
    labels, free = [], -1.0
    for tick in ticks:
        half = 0.012 * len(short(tick)) if side.axis_name == "x" else 0.0
        labels.append(short(tick) if place(tick) - half >= free else "")
        free = place(tick) + half + 0.01 if labels[-1] else free
    side.set_ticks(ticks, labels)
    side.set_ticks([], minor=True)


def _errors(points: Sequence[Point]) -> list[list[float]]:
    ends = [(point.y - low, high - point.y) for point in points for low, high in [point.interval or (point.y, point.y)]]
    return [[max(0.0, end[side]) for end in ends] for side in (0, 1)]


def _value(point: Point) -> str:
    interval = f" ({point.interval[0]:.2f} to {point.interval[1]:.2f})" if point.interval else ""
    return (f"{point.y:.2f}" if abs(point.y) <= 1 else short(point.y)) + interval


def _ratio(ratio: float) -> str:
    if ratio >= 9.95:
        return f"{ratio:,.0f}"
    # Two digits after the point next to 1, so that which side it is on can be read.
    return f"{ratio:.1f}" if ratio >= 1.05 else f"{ratio:.2f}" if ratio >= 0.00995 else f"{ratio:.1g}"
