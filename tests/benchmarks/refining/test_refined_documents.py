"""python -m benchmarks.refining: a row for each method, budget and question; its table and its plot."""

import json
from types import SimpleNamespace

import pytest

from benchmarks.refining.__main__ import of_document
from benchmarks.refining.figures import NAMES, markdown, plot
from hypernet import refining
from hypernet.consolidation.editing.moments import KeyMoments
from tests.recited_model import DOCUMENT, recited_model

ASKED = [("Where was Velmar Tosk born?", ["Korvale"]), ("What is the capital of Norbach?", ["Ilda"])]


@pytest.fixture(scope="module")
def rows():
    model = recited_model()
    cfg = SimpleNamespace(
        seconds=[0.001, 30.0],
        steps=6,
        questions_per_chunk=1,
        most_lessons=3,
        wording=" Say it.",
        lr=0.01,
        cartridge_tokens=9,
        cartridge_lr=0.02,
        least_squares_layers=[4, 5],
        ridge=0.1,
        max_new_tokens=12,
    )
    words = DOCUMENT.split()
    moments = KeyMoments([" ".join(words[n:] + words[:n]) for n in range(len(words))])
    with pytest.MonkeyPatch.context() as patch:
        # The tiny base model writes no English questions; and no step is waited for.
        patch.setattr(refining, "_asked", lambda *_, **__: [(n, q) for n, (q, _) in enumerate(ASKED)])
        patch.setattr("benchmarks.refining.arms.time.process_time", iter(range(10**6)).__next__)
        made = list(of_document(model, cfg, DOCUMENT, ASKED, moments, seed=0))
    assert not model.base_model.get_submodule(model.hypernetwork.targets[0].paths[0])._forward_hooks.keys() - {
        hook.id for hook in model.injector._hooks
    }
    return [{"set": "paragraphs", "seed": 0, "document": 0, **row} for row in made]


def test_every_method_answers_every_question(rows):
    places = list(dict.fromkeys((row["method"], row["budget"]) for row in rows))
    assert [method for method, _ in places] == [
        *("no_context", "in_prompt", "kept_prefix", "closed_form", "adapter", "refined"),
        *("from_zero", "from_zero", "cartridge", "cartridge", "cartridge", "least_squares"),
    ]
    assert set(NAMES) == {method for method, _ in places}
    for place in places:
        own = [row for row in rows if (row["method"], row["budget"]) == place]
        assert [row["question"] for row in own] == [question for question, _ in ASKED]
    of = {place: next(row for row in rows if (row["method"], row["budget"]) == place) for place in places}
    assert of["refined", 0]["steps"] == 6 and of["refined", 0]["seconds"] > of["adapter", 0]["seconds"]
    for method in ("from_zero", "cartridge"):
        assert of[method, 0.001]["steps"] == 0 < of[method, 30.0]["steps"]
        assert of[method, 30.0]["seconds"] >= 30
    # The model was trained to say this very document's sentences.
    assert [row["contains"] for row in rows if row["method"] == "adapter"] == [1.0, 1.0]
    assert of["no_context", 0]["bytes"] == 0 < of["cartridge", 0]["bytes"] < of["kept_prefix", 0]["bytes"]
    assert of["in_prompt", 0]["bytes"] == len(DOCUMENT)


def test_the_table_has_means_over_documents_and_questions():
    def row(document, contains, seconds, name="paragraphs"):
        return {
            **{"set": name, "seed": 0, "document": document, "method": "refined", "budget": 0, "contains": contains},
            **{"seconds": seconds, "bytes": 2**20, "steps": 20},
        }

    rows = [row(0, 1.0, 2.0), row(0, 0.0, 2.0), row(0, 0.0, 2.0), row(1, 1.0, 4.0)]
    *_, line = markdown(rows).splitlines()
    assert line == "| generated adapter, refined | 3.0 | 1.00 | 20 | 0.500 | – |"
    *_, line = markdown([*rows, row(0, 1.0, 9.0, "notes")]).splitlines()
    assert line == "| generated adapter, refined | 5.0 | 1.00 | 20 | 0.500 | 1.000 |"


def test_the_plot_has_a_panel_for_each_set(rows):
    rows = [{**row, "document": number} for row in rows for number in range(2)]
    figure = plot([*rows, *({**row, "set": "notes"} for row in rows)])
    assert [panel.title for panel in figure.panels] == ["A paragraph of Wikipedia", "A note of an unseen kind"]
    points = {series.name: [point.x for point in series.points] for series in figure.panels[0].series}
    assert len(points[NAMES["cartridge"]]) == 3 and points[NAMES["cartridge"]] == sorted(points[NAMES["cartridge"]])
    assert points[NAMES["no_context"]] == [0.1]  # an axis of logarithms has no 0
    assert json.dumps(figure.panels[0].series[0].points)
