"""benchmarks/report/own_documents.py: shares, intervals and the plot, of rows made by hand."""

import pytest

from benchmarks.report.own_documents import NAMES, SETS, interval, markdown, of, plot


def rows_of(name: str, method: str, *contains: float) -> list[dict]:
    return [
        {
            "set": name,
            "method": method,
            "seed": n % 2,
            "document": n // 2,
            "question": str(n),
            "contains": c,
            "f1": c / 2,
        }
        for n, c in enumerate(contains)
    ]


@pytest.fixture
def rows() -> list[dict]:
    found = [row for name in SETS for method in NAMES for row in rows_of(name, method, 0.0, 1.0, 1.0, 1.0)]
    found += rows_of("2 paragraphs", "adapter", 1.0, 0.0, 1.0, 1.0) + rows_of("article's first 1", "adapter", 1.0, 1.0)
    found += rows_of("article's first 4", "adapter", 1.0, 0.0)
    lost = {"log_prob_lost": 0.01}
    found += [{**row, **lost} for m in ("no_context", "adapter") for row in rows_of("unrelated", m, 1.0, 0.0)]
    found += [{"set": "continued", "seed": 0, "document": n, **lost} for n in range(3)]
    for method in ("no_context", "adapter", "in_prompt"):
        found += [{**row, "true_answer": 0.0} for row in rows_of("conflicts", method, 1.0, 0.0)]
    times = {"tokens": 900, "chunks": 40, "load_s": 1.0, "internalize_s": 2.0}
    return [*found, {"set": "seconds", **times, "adapter_token_s": 0.03, "no_context_token_s": 0.02}]


def test_every_method_has_its_share_and_interval(rows):
    lines = markdown(rows, "methods").splitlines()
    assert len(lines) == 2 + len(SETS) * len(NAMES)
    low, high = interval(of(rows, "paragraphs"))
    assert lines[2] == f"| a paragraph of Wikipedia | no context | 4 | 0.75 | {low:.2f} | {high:.2f} | 0.38 |"
    assert 0 <= low < 0.75 < high <= 1


def test_several_documents_are_relative_to_one(rows):
    lines = markdown(rows, "several").splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == [
        "2 paragraphs",
        "an article's first paragraph",
        "article's first 4",
    ]
    assert [line.split(" | ")[-1].strip("| ") for line in lines[2:]] == ["1.00", "1.00", "0.50"]


def test_readme_other_questions_and_seconds(rows):
    assert markdown(rows, "readme").splitlines()[2] == "| a paragraph of Wikipedia | 0.75 | 0.75 | 0.75 | 0.75 |"
    assert "| nats a token lost of how a text goes on | 3 | 0.010 |" in markdown(rows, "others")
    assert "| a token of a warm answer, relative to no adapter | 1.50 |" in markdown(rows, "seconds")


def test_plot_has_a_point_for_each_set_and_method(rows):
    figure = plot(rows)
    (panel,) = figure.panels
    assert [len(series.points) for series in panel.series] == [2] * 4
    assert plot([]) is None
