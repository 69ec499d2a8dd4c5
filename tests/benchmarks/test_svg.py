"""benchmarks/svg.py: drawings that are well formed, stay inside their frame and can be read."""

import itertools
import re
from xml.etree import ElementTree

import pytest

from benchmarks.summary import METHODS
from benchmarks.svg import (
    LINES,
    OTHER,
    PALETTE,
    STYLES,
    WIDTH,
    Axis,
    Point,
    Series,
    chart,
    dots,
    heatmap,
    short,
    standalone,
    style_of,
)

MATCH = Axis("exact match", limits=(0, 1))


def contrast(one: str, other: str) -> float:
    """WCAG 2.1's contrast ratio of two colours."""

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dim = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def texts(svg: str) -> list[tuple[float, float, float, str, str]]:
    """(x, y, font size, anchor, text) of each."""
    found = []
    for element in ElementTree.fromstring(svg).iter():
        if element.tag.endswith("text"):
            place = (float(element.get(key)) for key in ("x", "y", "font-size"))
            found.append((*place, element.get("text-anchor", "start"), element.text))
    return found


def boxes(svg: str) -> list[tuple[float, float, float, float]]:
    """left, top, right, bottom, a character being 0.58 of the font's size wide."""
    result = []
    for x, y, size, anchor, text in texts(svg):
        wide = 0.58 * size * len(text)
        left = x - {"start": 0, "middle": wide / 2, "end": wide}[anchor]
        result.append((left, y - 0.75 * size, left + wide, y + 0.2 * size))
    return result


def assert_legible(svg: str, width: float = WIDTH) -> None:
    assert all(size >= 11 for _, _, size, _, _ in texts(svg))
    own = boxes(svg)
    assert all(left >= 0 and right <= width for left, _, right, _ in own)
    for a, b in itertools.combinations(own, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], "two labels overlap"


@pytest.mark.parametrize(
    "name", ["text", "soft", *(name for name in PALETTE if name not in ("page", "line", "text", "soft"))]
)
def test_colours_can_be_seen_on_light_and_dark(name) -> None:
    for color, page in zip(PALETTE[name], PALETTE["page"], strict=True):
        assert contrast(color, page) >= (4.5 if name in ("text", "soft") else 3)


def test_every_method_has_a_look_of_its_own_without_colour() -> None:
    shown = [style_of(method) for method in METHODS]
    assert set(STYLES) == set(METHODS)
    assert (
        len({style[1:] for style in shown} | {OTHER[1:]}) >= len(shown) - 1
    )  # two pairs of methods never share a panel
    assert len({style[1] for style in LINES}) == len(LINES)


@pytest.mark.parametrize("ends", [(1, 128), (60, 836), (5, 8), (0.001, 40000), (3, 3)])
def test_ticks_are_round_inside_and_never_touch(ends) -> None:
    points = [Point(x, 0.5, 0.4, 0.6) for x in ends]
    for log in (True, False):
        svg = chart("A panel", [Series("doc_to_lora", points)], x=Axis("tokens", log=log), y=MATCH)
        assert_legible(svg)
        assert len([t for t in texts(svg) if t[3] == "middle"]) >= 2  # a tick and the axis's name


def test_a_point_s_interval_and_value_can_be_read_without_the_picture() -> None:
    svg = chart("A panel", [Series("doc_to_lora", [Point(64, 0.5, 0.25, 0.75)])], x=Axis("tokens"), y=MATCH)
    assert "<title>Doc-to-LoRA: 64 tokens: 0.5 (0.25 to 0.75)</title>" in svg
    assert 'role="img" aria-label="A panel"' in svg


def test_points_of_lines_are_moved_apart_and_single_points_are_not() -> None:
    series = [Series(m, [Point(1, 0.5), Point(2, 0.5)]) for m in ("full_context", "doc_to_lora")]
    places = lambda svg: re.findall(r"translate\(([\d.]+)", svg)  # noqa: E731
    joined = places(chart("t", series, x=Axis("x"), y=MATCH))
    apart = places(chart("t", [s._replace(joined=False) for s in series], x=Axis("x"), y=MATCH))
    assert len(set(joined)) == 4 and len(set(apart)) == 2


def test_a_chart_without_points_is_refused() -> None:
    with pytest.raises(ValueError, match="leave it out"):
        chart("Empty", [Series("doc_to_lora", [])], x=Axis("x"), y=MATCH)


def test_dots_keep_their_labels_apart() -> None:
    own = [("no_context", 0.0, (0.0, 0.0)), ("doc_to_lora", 0.5, (0.2, 0.8)), ("full_context", 1.0, None)]
    svg = dots("A task", [("one <set>", own), ("another", own)], x=MATCH._replace(ticks=(0, 0.5, 1)))
    assert_legible(svg)
    assert "one &lt;set&gt;, Doc-to-LoRA: 0.50 (0.20 to 0.80)" in svg


def test_a_heatmap_draws_the_line_where_ratios_cross_1() -> None:
    settings = {"columns": ["64", "8,192"], "rows": ["0.5", "1,000"], "x_label": "tokens", "y_label": "questions"}
    svg = heatmap("Against", [[2.0, 0.5], [0.25, 0.003]], **settings)
    assert_legible(svg)
    edges = re.search(r'<path d="([^"]*)" stroke="#111"', svg)[1]
    assert edges.count("M") == 2  # right of the first column below, under its upper cell
    assert [t for *_, t in texts(svg) if t in ("2.0", "0.50", "0.25", "0.003")] == ["2.0", "0.50", "0.25", "0.003"]
    assert re.search(r'<path d="" stroke="#111"', heatmap("Against", [[2.0, 3.0], [4.0, 5.0]], **settings))


def test_cells_are_light_enough_for_their_dark_numbers() -> None:
    settings = {"columns": ["64"] * 4, "rows": ["1"], "x_label": "tokens", "y_label": "questions"}
    svg = heatmap("Against", [[0.0001, 0.9, 1.1, 10000.0]], **settings)
    assert all(contrast("#111111", color) >= 4.5 for color in re.findall(r'fill="(#\w{6})"', svg))


def test_long_names_in_a_legend_do_not_run_into_one_another() -> None:
    names = [f"distillation, the same questions, rank {rank}" for rank in (4, 8, 16)]
    panel = chart("Facts", [Series("doc_to_lora", [Point(1, 0.5)])], x=Axis("x"), y=MATCH)
    svg = standalone([panel, panel], [(name, style_of("doc_to_lora")) for name in names])
    (first, row), (second, same), (third, below) = ((x, y) for x, y, _, _, text in texts(svg) if text in names)
    assert row == same < below and second - first > 6.5 * len(names[0]) and third == first


def test_a_file_of_its_own_has_its_colours_and_legend() -> None:
    panel = chart("A panel", [Series("doc_to_lora", [Point(1, 0.5)])], x=Axis("x"), y=MATCH)
    svg = standalone([panel, panel], [("Doc-to-LoRA", style_of("doc_to_lora"))])
    assert "var(" not in svg and 'xmlns="http://www.w3.org/2000/svg"' in svg
    assert [t for *_, t in texts(svg) if t == "Doc-to-LoRA"]
    assert f'viewBox="0 0 {2 * WIDTH} ' in svg


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.00123, "0.00123"), (9.996, "10"), (99.99, "100"), (1234.5, "1,234"), (-250.0, "-250")],
)
def test_numbers_are_short(value, text) -> None:
    assert short(value) == text


def test_fewer_digits_keep_the_whole_number() -> None:
    assert [short(v, digits=2) for v in (2.89, 9.96, 67.3, 383.0)] == ["2.9", "10", "67", "383"]
