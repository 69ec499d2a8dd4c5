"""benchmarks/report/plots.py: drawings that are well formed, deterministic, and follow light and dark."""

import re
from xml.etree import ElementTree

import pytest

from benchmarks.report.names import METHODS
from benchmarks.report.plots import (
    MATCH,
    OTHER,
    PALETTE,
    Axis,
    Panel,
    Point,
    Ratios,
    Series,
    Style,
    inline,
    key_of,
    standalone,
    style_of,
)

ORANGE, BLUE = style_of("doc_to_lora"), Style("blue", "s", "--", False)


def lines(**more) -> Panel:
    series = [
        Series("Doc-to-LoRA", ORANGE, [Point(64, 0.9, (0.8, 1.0)), Point(128, 0.5)]),
        Series("A & B", BLUE, [Point(64, 0.1), Point(128, 0.2, (0.1, 0.3))]),
    ]
    return Panel("Accuracy <1>", series, Axis("tokens", log=True), MATCH)._replace(**more)


def groups() -> Panel:
    series = [Series("ours", ORANGE, [Point(0, 0.5, (0.25, 0.75)), Point(1, 1.0)])]
    return Panel("Sets", series, Axis(""), MATCH, groups=("first", "second"))


def ratios(**more) -> Ratios:
    table = Ratios("Costs", [[2.0, 0.5], [0.996, 123.4]], ["64", "128"], ["1", "10"], Axis("tokens"), Axis("asked"))
    return table._replace(**more)


def luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("panel", [lines(), groups(), ratios(mark_after=1)])
def test_a_panel_is_well_formed_and_the_same_each_time(panel) -> None:
    text = inline(panel, "here")
    ElementTree.fromstring(text)
    assert text == inline(panel, "here") and standalone([panel], []) == standalone([panel], [])


@pytest.mark.parametrize("panel", [lines(), groups()])
def test_a_panel_has_no_colours_but_the_page_s(panel) -> None:
    assert not re.findall(r"#[0-9a-fA-F]{3,6}\b(?![\"'])", re.sub(r'href="#[^"]*"', "", inline(panel, "here")))


def test_two_panels_of_a_page_share_no_ids() -> None:
    found = [re.findall(r' id="([^"]*)"', inline(lines(), place)) for place in ("one", "two")]
    assert found[0] and not set(found[0]) & set(found[1])


def test_hovering_says_points_and_intervals() -> None:
    text = inline(lines(), "here")
    assert "<title>Doc-to-LoRA: tokens 64, 0.90 (0.80 to 1.00); tokens 128, 0.50</title>" in text
    assert "A &amp; B: tokens 64, 0.10" in text
    assert "<title>first, ours: 0.50 (0.25 to 0.75)</title>" in inline(groups(), "here")


def test_names_are_escaped_and_described() -> None:
    assert 'role="img" aria-label="Accuracy &lt;1&gt;"' in inline(lines(), "here")


@pytest.mark.parametrize("values", [[64], [1e-3, 1e4], [5, 5.001]])
def test_a_logarithmic_axis_of_any_width_has_a_tick(values) -> None:
    panel = lines(series=[Series("ours", ORANGE, [Point(v, 0.5) for v in values])])
    text = inline(panel._replace(x=Axis("tokens", log=True, ticks=values)), "here")
    assert f">{values[0]:g}</text>" in text


def test_labels_of_ticks_that_would_touch_are_left_out() -> None:
    points = [Point(value, 0.5) for value in (1, 100, 101)]
    axis = Axis("tokens", log=True, ticks=[1, 100, 101])
    text = inline(lines(series=[Series("ours", ORANGE, points)], x=axis), "here")
    assert ">100</text>" in text and ">101</text>" not in text


def test_a_ratio_next_to_one_shows_on_which_side_it_is() -> None:
    text = inline(ratios(), "here")
    assert all(f">{cell}</text>" in text for cell in ("2.0", "0.50", "1.00", "123"))


def test_a_file_has_both_palettes_a_size_and_a_legend() -> None:
    text = standalone([lines(), groups()], [("Doc-to-LoRA", ORANGE), ("A & B", BLUE)])
    ElementTree.fromstring(text)
    assert text.startswith('<svg xmlns="http://www.w3.org/2000/svg" width="720" height="')
    assert "prefers-color-scheme:dark" in text and all(dark in text for _, dark in PALETTE.values())
    assert "A &amp; B</text>" in text and "http" not in text.replace("http://www.w3.org/2000/svg", "")


def test_a_legend_key_has_no_ids_to_clash() -> None:
    for method in METHODS:
        text = key_of(style_of(method))
        ElementTree.fromstring(text)
        assert " id=" not in text and f"var(--{METHODS[method]['color']})" in text


def test_checkpoints_and_unknown_methods_have_a_look() -> None:
    assert style_of("wrong_document_rank4") == style_of("wrong_document_seed1") == style_of("wrong_document")
    assert style_of("my_method") == OTHER


@pytest.mark.parametrize("name", [name for name in PALETTE if name not in ("line", "page")])
def test_colours_stand_out_from_the_page_in_light_and_dark(name) -> None:
    for side in (0, 1):
        page, color = luminance(PALETTE["page"][side]), luminance(PALETTE[name][side])
        assert (max(page, color) + 0.05) / (min(page, color) + 0.05) >= 3
