"""Charts as SVG text, drawn for a phone's width and put side by side on a wider page.

    svg = chart("One chunk", [Series("doc_to_lora", [Point(64, 0.9)])], x=Axis("tokens", log=True), y=Axis("..."))

Colours are the page's custom properties, so one drawing serves light and dark; every method has a marker of its own.
`standalone` gives a drawing a palette, a legend and a background, for a file.
"""

import html
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from benchmarks.summary import name_of, order

WIDTH, HEIGHT = 360, 264  # units; a phone shows one unit as about one pixel
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 40, 44
FONT = 'font-family="system-ui, sans-serif"'
# Units that a character of a tick takes: ticks whose numbers would touch lose them.
CHARACTER = 6.4

# (light, dark): 3:1 at least against white and #15181c, told apart with colour-vision deficiency (after Tol's "muted").
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
Style = tuple[str, str, str, bool]  # colour, marker, dashes, whether the marker is filled
Styles = dict[str, Style]
STYLES: Styles = {
    "no_context": ("gray", "circle", "2 3", False),
    "full_context": ("text", "square", "", True),
    "prefix_cache": ("indigo", "square", "6 3", False),
    "retrieval": ("green", "up", "", True),
    "retrieval_dense": ("teal", "down", "", True),
    "doc_to_lora": ("orange", "circle", "", True),
    "doc_to_lora_gated": ("orange", "square", "", False),
    "doc_to_lora_routed": ("orange", "up", "6 3", True),
    "doc_to_lora_in_prompt": ("olive", "diamond", "", True),
    "outer_product": ("orange", "hexagon", "6 3", False),
    "wrong_document": ("purple", "cross", "2 3", True),
    "random_adapter": ("wine", "plus", "2 3", True),
    "text_lora": ("teal", "down", "", True),
    "distillation_oracle": ("blue", "left", "", True),
    "distillation_generated": ("indigo", "right", "", True),
    "warm_start_oracle": ("blue", "left", "6 3", False),
    "warm_start_generated": ("indigo", "right", "6 3", False),
}
OTHER = ("blue", "hexagon", "8 2 2 2", False)
# Of lines that are no methods: one adapter's ranks, say.
LINES = (
    ("orange", "circle", "", True),
    ("blue", "square", "", True),
    ("green", "up", "", True),
    ("purple", "diamond", "", True),
    ("olive", "down", "", True),
    ("teal", "hexagon", "", True),
)


class Point(NamedTuple):
    """low, high: of its interval; None: none is drawn."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


class Series(NamedTuple):
    """key: a method, or a name that `styles` has. joined: whether a line goes from point to point."""

    key: str
    points: Sequence[Point]
    joined: bool = True


class Axis(NamedTuple):
    """limits: None takes them from the points. ticks: values that are named; None chooses them."""

    label: str
    log: bool = False
    limits: tuple[float, float] | None = None
    ticks: Sequence[float] | None = None


def style_of(key: str, styles: Styles | None = None) -> Style:
    return (styles or {}).get(key) or STYLES.get(key, OTHER)


def chart(title: str, series: Sequence[Series], *, x: Axis, y: Axis, styles: Styles | None = None) -> str:
    """Lines, or points, with their intervals; lines' points of one place are moved apart by a few units.

    Raises:
        ValueError: no points.
    """
    series = [s for s in series if s.points]
    if not series:
        raise ValueError(f"Chart {title!r} has no points; leave it out.")
    points = [point for s in series for point in s.points]
    x = _fitted(x, [p.x for p in points])
    y = _fitted(y, [v for p in points for v in (p.y, p.low, p.high) if v is not None])
    across = _place(x, LEFT + 10, WIDTH - RIGHT - 10)
    up = _place(y, HEIGHT - BOTTOM, TOP)
    parts = [*_frame(title, x, y, across, up)]
    step = min(3.5, 18 / len(series))
    joined_at_all = any(s.joined for s in series)
    for number, (key, own, joined) in enumerate(series):
        color, marker, dashes, filled = style_of(key, styles)
        moved = (number - (len(series) - 1) / 2) * step if joined_at_all else 0
        places = [(across(p.x) + moved, up(p.y)) for p in own]
        drawn = []
        if joined and len(places) > 1:
            line = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
            dash = f' stroke-dasharray="{dashes}"' if dashes else ""
            width = 2.6 if key == "doc_to_lora" else 1.6
            drawn.append(f'<polyline points="{line}" fill="none" stroke-width="{width}"{dash}/>')
        for (a, _), point in zip(places, own, strict=True):
            if point.low is not None and point.high is not None and point.high > point.low:
                drawn.append(f'<path d="M{a:.1f} {up(point.low):.1f}V{up(point.high):.1f}" stroke-width="1.2"/>')
        drawn += [_marker(marker, a, b, filled) for a, b in places]
        label = f"{_label(key, styles)}: " + "; ".join(_said(p, x, y) for p in own)
        parts.append(
            f'<g stroke="var(--{color})" color="var(--{color})"><title>{_safe(label)}</title>{"".join(drawn)}</g>'
        )
    return _svg(title, HEIGHT, parts)


def dots(
    title: str, lines: Sequence[tuple[str, Sequence[tuple[str, float, Sequence[float] | None]]]], *, x: Axis
) -> str:
    """Under each name, which may be empty, a line for each method's value and interval.

    Args:
        lines: (name, (method, value, interval)).
    """
    x = _fitted(x, [value for _, own in lines for _, value, _ in own])
    across = _place(x, 14, WIDTH - 14)
    apart = 9
    parts, top = [_text(14, 16, title, size=13, weight=600)], 24.0
    bottoms = []
    for name, own in lines:
        if name:
            parts.append(_text(14, top + 14, name, size=12))
        for number, (key, value, interval) in enumerate(own):
            color, marker, _, filled = style_of(key)
            height = top + 25 + number * apart
            label = f"{name}, {name_of(key)}: {value:.2f}"
            drawn = ""
            if interval and interval[1] > interval[0]:
                label += f" ({interval[0]:.2f} to {interval[1]:.2f})"
                drawn = (
                    f'<path d="M{across(interval[0]):.1f} {height:.1f}H{across(interval[1]):.1f}" stroke-width="1.4"/>'
                )
            drawn += _marker(marker, across(value), height, filled)
            parts.append(f'<g stroke="var(--{color})" color="var(--{color})"><title>{_safe(label)}</title>{drawn}</g>')
        bottoms.append((top + 20, top + 28 + (len(own) - 1) * apart))
        top += 36 + len(own) * apart
    grid = [
        f'<path d="M{across(tick):.1f} {a:.1f}V{b:.1f}" stroke="var(--line)"/>' for tick in x.ticks for a, b in bottoms
    ]
    parts[1:1] = grid
    parts += [_text(across(tick), top + 6, short(tick), anchor="middle", soft=True) for tick in x.ticks]
    parts.append(_text(WIDTH / 2, top + 24, x.label, anchor="middle", size=12, soft=True))
    return _svg(title, math.ceil(top + 32), parts)


def heatmap(
    title: str,
    ratios: Sequence[Sequence[float]],
    *,
    columns: Sequence[str],
    rows: Sequence[str],
    x_label: str,
    y_label: str,
    mark_after: int | None = None,
) -> str:
    """Ratios as numbers in tinted cells: blue below 1, orange above, with a thick line between the two.

    Args:
        ratios: one list per row, the lowest row first.
        mark_after: number of columns after which a dashed line stands.
    """
    left, top, wide, high = 44, 46, (WIDTH - 44 - 8) / len(columns), 22
    parts = [_text(14, 16, title, size=13, weight=600), _text(14, 34, y_label, soft=True)]
    cell = lambda i, j: (left + j * wide, top + (len(rows) - 1 - i) * high)  # noqa: E731
    for i, line in enumerate(ratios):
        parts.append(_text(left - 6, cell(i, 0)[1] + high / 2 + 4, rows[i], anchor="end"))
        for j, ratio in enumerate(line):
            a, b = cell(i, j)
            parts.append(
                f'<rect x="{a:.1f}" y="{b:.1f}" width="{wide:.1f}" height="{high}" fill="{_tint(ratio)}"/>'
                f'<text x="{a + wide / 2:.1f}" y="{b + high / 2 + 4:.1f}" text-anchor="middle" font-size="11" '
                f'fill="#111">{_ratio(ratio)}</text>'
            )
    edges = []
    for i, line in enumerate(ratios):
        for j, ratio in enumerate(line):
            a, b = cell(i, j)
            if j and (ratio < 1) != (line[j - 1] < 1):
                edges.append(f"M{a:.1f} {b:.1f}v{high}")
            if i and (ratio < 1) != (ratios[i - 1][j] < 1):
                edges.append(f"M{a:.1f} {b + high:.1f}h{wide:.1f}")
    bottom = top + len(rows) * high
    parts.append(f'<path d="{"".join(edges)}" stroke="#111" stroke-width="2.5" stroke-linecap="square" fill="none"/>')
    if mark_after:
        parts.append(
            f'<path d="M{left + mark_after * wide:.1f} {top - 6}V{bottom + 6}" stroke="var(--text)" stroke-width="1.5" '
            'stroke-dasharray="4 3"/>'
        )
    parts += [_text(left + (j + 0.5) * wide, bottom + 16, name, anchor="middle") for j, name in enumerate(columns)]
    parts.append(_text(left + len(columns) * wide / 2, bottom + 34, x_label, anchor="middle", size=12, soft=True))
    return _svg(title, bottom + 42, parts)


def key_of(key: str) -> str:
    """A legend's little picture of a line and its marker."""
    return key_of_line(style_of(key))


def key_of_line(style: Style) -> str:
    return f'<svg width="34" height="14" viewBox="0 0 34 14" aria-hidden="true">{_sample(style, 17, 7)}</svg>'


def standalone(panels: Sequence[str], legend: Sequence[tuple[str, Style]]) -> str:
    """Panels side by side above their legend, (name, style), as a file in light colours on a background of its own."""
    inner = [panel[panel.index(">") + 1 : panel.rindex("</svg>")] for panel in panels]
    heights = [float(panel.split('viewBox="0 0 ')[1].split('"')[0].split()[1]) for panel in panels]
    width, height = WIDTH * len(panels), max(heights)
    # A letter is about 6.6 wide, a little picture and the space behind a name 60 together.
    column = max(230, 60 + 6.6 * max((len(name) for name, _ in legend), default=0))
    per_row = max(1, int(WIDTH * len(panels) // column))
    parts = [f'<g transform="translate({i * WIDTH} 0)">{part}</g>' for i, part in enumerate(inner)]
    for number, (name, style) in enumerate(legend):
        a, b = 14 + number % per_row * column, height + 14 + number // per_row * 20
        parts.append(_sample(style, a + 17, b))
        parts.append(_text(a + 40, b + 4, name, size=12))
    height += 20 * math.ceil(len(legend) / per_row) + 12
    colored = re.sub(r"var\(--(\w+)\)", lambda match: PALETTE[match[1]][0], "".join(parts))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:g}" width="{width}" height="{height:g}" '
        f'{FONT}><rect width="100%" height="100%" fill="{PALETTE["page"][0]}"/>{colored}</svg>\n'
    )


def legend_order(keys: Iterable[str]) -> list[str]:
    return sorted(dict.fromkeys(keys), key=order)


def short(value: float, *, digits: int = 3) -> str:
    """So many digits that count, or the whole number where that is longer, with thousands told apart."""
    if value == 0:
        return "0"
    whole = abs(value) >= 10 ** (digits - 1) - 0.5 * 10 ** (1 - digits)
    return f"{value:,.0f}" if whole else f"{value:.{digits}g}"


# Parts


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{_safe(title)}" {FONT}>{"".join(parts)}</svg>'


def _frame(title: str, x: Axis, y: Axis, across: Callable, up: Callable) -> list[str]:
    bottom = HEIGHT - BOTTOM
    parts = [_text(14, 16, title, size=13, weight=600), _text(14, 32, y.label, soft=True)]
    for tick in y.ticks:
        parts.append(f'<path d="M{LEFT} {up(tick):.1f}H{WIDTH - RIGHT}" stroke="var(--line)"/>')
        parts.append(_text(LEFT - 6, up(tick) + 4, short(tick), anchor="end"))
    free = 0.0
    for tick in x.ticks:
        parts.append(f'<path d="M{across(tick):.1f} {bottom}v5" stroke="var(--soft)"/>')
        half = CHARACTER * len(short(tick)) / 2
        if across(tick) - half >= free:
            parts.append(_text(across(tick), bottom + 18, short(tick), anchor="middle"))
            free = across(tick) + half + 4
    parts.append(f'<path d="M{LEFT} {bottom}H{WIDTH - RIGHT}" stroke="var(--soft)"/>')
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x.label, anchor="middle", size=12, soft=True))
    return parts


def _text(
    a: float, b: float, text: str, *, size: int = 11, anchor: str = "start", weight: int = 400, soft: bool = False
) -> str:
    bold = f' font-weight="{weight}"' if weight != 400 else ""
    placed = f' text-anchor="{anchor}"' if anchor != "start" else ""
    color = "soft" if soft else "text"
    return f'<text x="{a:.1f}" y="{b:.1f}" font-size="{size}"{placed}{bold} fill="var(--{color})">{_safe(text)}</text>'


_SHAPES = {
    "circle": "M-4.2 0a4.2 4.2 0 1 0 8.4 0a4.2 4.2 0 1 0 -8.4 0z",
    "square": "M-3.8 -3.8h7.6v7.6h-7.6z",
    "diamond": "M0 -5.2L5.2 0L0 5.2L-5.2 0z",
    "up": "M0 -4.8L4.8 3.6H-4.8z",
    "down": "M0 4.8L4.8 -3.6H-4.8z",
    "left": "M-4.8 0L3.6 -4.8V4.8z",
    "right": "M4.8 0L-3.6 -4.8V4.8z",
    "hexagon": "M-4.6 0L-2.3 -4H2.3L4.6 0L2.3 4H-2.3z",
    "cross": "M-3.6 -3.6L3.6 3.6M-3.6 3.6L3.6 -3.6",
    "plus": "M-4.8 0H4.8M0 -4.8V4.8",
}


def _marker(name: str, a: float, b: float, filled: bool) -> str:
    fill = "none" if name in ("cross", "plus") else "currentColor" if filled else "var(--page)"
    width = 2 if name in ("cross", "plus") else 1.6
    return f'<path transform="translate({a:.1f} {b:.1f})" d="{_SHAPES[name]}" fill="{fill}" stroke-width="{width}"/>'


def _sample(style: Style, a: float, b: float) -> str:
    color, marker, dashes, filled = style
    dash = f' stroke-dasharray="{dashes}"' if dashes else ""
    line = f'<path d="M{a - 16} {b}h32" stroke-width="1.6" fill="none"{dash}/>'
    return f'<g stroke="var(--{color})" color="var(--{color})">{line}{_marker(marker, a, b, filled)}</g>'


def _said(point: Point, x: Axis, y: Axis) -> str:
    interval = f" ({short(point.low)} to {short(point.high)})" if None not in (point.low, point.high) else ""
    return f"{short(point.x)} {x.label}: {short(point.y)}{interval}"


def _label(key: str, styles: Styles | None) -> str:
    return key if styles and key in styles else name_of(key)


def _safe(text: str) -> str:
    return html.escape(text, quote=True)


def _fitted(axis: Axis, values: Sequence[float]) -> Axis:
    """With limits and ticks; a logarithmic axis begins at its smallest value above 0."""
    if axis.log:
        values = [value for value in values if value > 0]
    low, high = axis.limits or (min(values, default=1.0), max(values, default=1.0))
    if low == high:
        low, high = (low / 2, high * 2) if axis.log else (low - 0.5, high + 0.5)
    elif axis.log and not axis.limits:
        room = (high / low) ** 0.04
        low, high = low / room, high * room
    ticks = axis.ticks if axis.ticks is not None else _ticks(low, high, log=axis.log)
    return axis._replace(limits=(low, high), ticks=[tick for tick in ticks if low <= tick <= high])


def _ticks(low: float, high: float, *, log: bool) -> list[float]:
    """Round numbers from low to high, about four to seven."""
    if not log:
        size = 10 ** math.floor(math.log10((high - low) / 4))
        step = next(size * k for k in (1, 2, 2.5, 5, 10) if (high - low) / (size * k) <= 6)
        first = math.ceil(low / step)
        return [round(step * i, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]
    decades = math.log10(high / low)
    digits = (1, 2, 5) if decades < 2.4 else (1,)
    every = max(1, math.ceil(decades / 6))
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [d * 10.0**e for e in exponents if e % every == 0 for d in digits]
    return [tick for tick in ticks if low <= tick <= high]


def _place(axis: Axis, start: float, end: float) -> Callable[[float], float]:
    """Value → units; what lies outside a logarithmic axis' reach is put on its edge."""
    low, high = axis.limits
    if axis.log:
        scale = math.log(high / low)
        return lambda value: start + (end - start) * (math.log(max(value, low) / low) / scale)
    return lambda value: start + (end - start) * (value - low) / (high - low)


def _tint(ratio: float) -> str:
    """Blue below 1, orange above; strongest from a factor of 30 on. Light enough for dark text."""
    strength = min(1.0, abs(math.log(ratio)) / math.log(30)) if ratio > 0 else 1.0
    end = (96, 165, 220) if ratio < 1 else (240, 150, 80)
    return "#" + "".join(f"{round(246 + (c - 246) * strength):02x}" for c in end)


def _ratio(ratio: float) -> str:
    if ratio >= 9.95:
        return f"{ratio:,.0f}"
    # Two digits after the point next to 1, so that which side it is on can be read.
    return f"{ratio:.1f}" if ratio >= 1.05 else f"{ratio:.2f}" if ratio >= 0.00995 else f"{ratio:.1g}"
