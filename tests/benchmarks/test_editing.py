"""benchmarks.forgetting.editing: what is shown and asked never meet, cells are skipped, controls are what they say."""

import json
import math

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from benchmarks.forgetting import editing_tables
from benchmarks.forgetting.editing import (
    ARMS,
    SCRIPT,
    cell_of,
    evenly,
    measure,
    sequences,
    summaries,
)
from benchmarks.forgetting.editing_arms import Asked, Learned, draw, known
from benchmarks.report.plots import standalone
from hypernet.consolidation.editing.moments import KeyMoments
from hypernet.consolidation.questions import TRAINING
from hypernet.doc_to_lora import DocToLoRA
from hypernet.text.matching import exact_match
from tests.test_configs import CONF, ROOT

SMOKE = [
    *("seeds=[0]", "sizes=[1,2]", "num_sequences={1:2}", "num_neighbours=1", "num_decoys=1", "num_articles=4"),
    *("max_steps=2", "batch_size=4", "rehearsal.number=4", "+rehearsal.num_texts=0", "output=null"),
    *(f"editors.{name}.search.steps=2" for name in ("rome", "rome_bounded", "memit", "memit_at_once", "alphaedit")),
]


def settings(tmp_path, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        folders = [f"output_dir={tmp_path}/cells", f"moments_dir={tmp_path}/moments"]
        return SCRIPT.check(compose("forgetting_editing", overrides=[*SMOKE, *folders, *overrides]))


@pytest.fixture(scope="module")
def tiny():
    return DocToLoRA.from_pretrained("assets/tiny").float().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def statements():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return dict(compose("forgetting_editing").statements)


def test_facts_have_four_questions_with_their_subject(statements):
    facts = known(statements)
    assert len(facts) == 1400
    for one in facts:
        assert len(one.questions) == 4 and all(one.subject in text for text in one.questions)
        assert one.sentence.count("{v}") == 1 and one.subject in one.sentence
    with pytest.raises(ValueError, match="no sentence for capital. Give one with {s} and {v}"):
        known({name: text for name, text in statements.items() if name != "capital"})


def test_changes_are_known_and_their_values_are_others(tiny, statements):
    sizes = {"seed": 3, "statements": statements, "num_neighbours": 2, "num_decoys": 3}
    changes = draw(tiny, 6, **sizes)
    assert changes == draw(tiny, 6, **sizes) != draw(tiny, 6, **{**sizes, "seed": 4})
    facts = known(statements)
    edited = {change.known for change in changes}
    answers = tiny.generate([change.edit.question for change in changes])
    for change, answer in zip(changes, answers, strict=True):
        assert exact_match(answer, change.known.answer)
        (likelihood,) = tiny.log_likelihoods([change.edit.question], [change.known.answer])
        assert likelihood >= math.log(0.5)
        of_relation = {one.answer for one in facts if one.relation == change.known.relation}
        assert change.answer in of_relation - {change.known.answer}
        assert all(one.relation == change.known.relation and one not in edited for one in change.neighbours)
        assert all(one.subject == change.known.subject and one not in edited for one in change.others)
        having = {one.subject for one in facts if one.relation == change.known.relation and one.answer == change.answer}
        assert not having & set(change.decoys) and change.known.subject not in change.decoys
        relation = change.known.relation.replace("_", " ")
        shown = {text.format(relation=relation, subject=change.known.subject) for text in TRAINING}
        assert change.paraphrases and not set(change.paraphrases) & {*shown, change.edit.question}
        assert change.answer in change.statement and change.answer in change.reverse


def test_too_many_facts_are_refused(make_doc_to_lora, statements):
    with pytest.raises(ValueError, match="The base model knows 0 of 1400 facts. Set sizes to at most that"):
        draw(make_doc_to_lora(), 1, seed=0, statements=statements, num_neighbours=1, num_decoys=1, min_p=1.0)


def test_answers_are_those_of_greedy_decoding(tiny, statements):
    changes = draw(tiny, 3, seed=5, statements=statements, num_neighbours=1, num_decoys=1)
    asked = [Asked(one.edit.question, value, one) for one in changes for value in (one.known.answer, one.answer)]
    for learned in (Learned(), Learned(in_prompt=True)):
        documents = [one.change.statement if learned.in_prompt else None for one in asked]
        written = tiny.generate([one.question for one in asked], documents=documents)
        found = learned.answers(tiny, asked)
        assert [hit for hit, _ in found] == [text == one.answer for text, one in zip(written, asked, strict=True)]
        expected = tiny.log_likelihoods(
            [one.question for one in asked], [one.answer for one in asked], documents=documents
        )
        torch.testing.assert_close(torch.tensor([p for _, p in found]), torch.tensor(expected), atol=1e-4, rtol=0)
    assert [hit for hit, _ in Learned().answers(tiny, asked)] == [True, False] * 3


def test_sequences_share_no_edit_but_with_the_longest():
    found = sequences(list(range(20)), [8, 1, 16], {1: 3, 8: 3})
    assert found == [(list(range(20)), [1, 8, 16]), ([1], [1]), ([2], [1]), (list(range(8, 16)), [8])]
    assert evenly(5, 8) == list(range(5)) and evenly(256, 3) == [0, 128, 255] and evenly(9, 1) == [0]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    cfg = settings(tmp_path_factory.mktemp("editing"))
    return cfg, list(measure(cfg))


@pytest.mark.story(13)
def test_every_arm_is_measured_and_undone(measured):
    cfg, rows = measured
    summary = [row for row in rows if row["kind"] == "summary"]
    assert {(row["arm"], row["n"]) for row in summary} == {(arm, n) for arm in ARMS for n in (1, 2)}
    assert all(row["undone"] for row in summary)
    of = {(row["arm"], row["n"]): row for row in summary}
    assert of["no_edit", 2]["reliability"]["mean"] == 0 and of["no_edit", 2]["neighbourhood"]["mean"] == 1
    assert of["no_edit", 2]["total_norm"] == of["adapter", 2]["total_norm"] == 0 < of["rome", 2]["total_norm"]
    assert of["rome", 1]["facts"] == 2 and of["rome", 2]["sequences"] == 1
    for part in editing_tables.TABLES:
        assert editing_tables.markdown(rows, part).count("\n") >= len(ARMS)
    assert standalone((figure := editing_tables.edits_figure(rows)).panels, figure.legend).startswith("<")
    assert editing_tables.edits_figure([]) is None


def test_cells_that_are_there_are_skipped(measured, monkeypatch):
    cfg, rows = measured
    monkeypatch.setattr("benchmarks.forgetting.editing.Bench", None)  # nothing may be measured
    again = list(measure(cfg))
    assert all(row["was_there"] for row in again if row["kind"] == "cell")
    assert [row for row in again if row["kind"] == "summary"] == [row for row in rows if row["kind"] == "summary"]
    # An arm's cell does not depend on another's settings, nor on the seeds and arms that are asked for.
    other = cfg.model_copy(update={"seeds": [0, 1], "arms": ["rome"], "threads": 2})
    assert cell_of(other, "rome", 0) == cell_of(cfg, "rome", 0) != cell_of(cfg, "memit", 0)
    assert cell_of(cfg.model_copy(update={"num_decoys": 2}), "rome", 0) != cell_of(cfg, "rome", 0)


def test_random_control_is_as_large_as_each_of_rome_s_changes(measured):
    cfg, _ = measured

    def norms(arm):
        lines = cell_of(cfg, arm, 0).read_text(encoding="utf-8").splitlines()
        return [row["norms"] for row in map(json.loads, lines) if row["kind"] == "sequence"]

    assert norms("random_rank_one") == norms("rome") and [len(one) for one in norms("rome")] == [1, 2, 1]
    single = [json.loads(line) for line in cell_of(cfg, "random_rank_one", 0).read_text(encoding="utf-8").splitlines()]
    first = next(row for row in single if row["kind"] == "sequence")
    assert first["total_norm"] == pytest.approx(next(iter(first["norms"][0].values())), rel=1e-4)


def test_random_control_without_rome_is_refused(tmp_path):
    with pytest.raises(ValueError, match="random_rank_one makes changes as large as ROME's. Put rome before it"):
        list(measure(settings(tmp_path, "arms=[random_rank_one]")))


def test_unknown_arm_is_told_in_a_line(commands, tmp_path):
    arguments = ["arms=[rime]", "output=null", f"output_dir={tmp_path}/cells"]
    done = commands.run("benchmarks.forgetting.editing", arguments, cwd=ROOT)
    assert done.code == 1 and "There is no arm 'rime': choose of no_edit, in_prompt" in done.stderr
    assert "Traceback" not in done.stderr


def test_summaries_pair_the_same_facts():
    fact = {"kind": "fact", "seed": 0, "n": 1, "sequence": 0}
    done = {"kind": "sequence", "seed": 0, "n": 1, "sequence": 0, "undone": True, "total_norm": 0.0, "processor_s": 1.0}
    cells = []
    for arm, scores in (("adapter", [1.0, 0.0, 1.0, 1.0]), ("rome", [1.0, 1.0, 1.0, 1.0])):
        cells += [{**fact, "arm": arm, "place": place, "reliability": score} for place, score in enumerate(scores)]
        cells.append({**done, "arm": arm})
    ours, other = summaries(cells)
    assert ours["reliability"]["mean"] == 0.75 and "minus_adapter" not in ours["reliability"]
    assert other["reliability"]["minus_adapter"]["mean"] == 0.25 and "paraphrase" not in other
    low, high = other["reliability"]["minus_adapter"]["interval"]
    assert 0 <= low <= 0.25 <= high <= 0.75
    table = editing_tables.markdown([ours, other], "against_adapter")
    assert "| ROME | +0.25 |" in table and "| – | – | – |" in table


def test_editors_of_the_settings_are_built(tmp_path):
    cfg = settings(tmp_path)
    moments = KeyMoments(["A text."])
    kinds = {n: type(instantiate(one, _convert_="all")(moments=moments)).__name__ for n, one in cfg.editors.items()}
    assert kinds == {
        "rome": "Rome",
        "rome_bounded": "Rome",
        "memit": "Memit",
        "memit_at_once": "Memit",
        "alphaedit": "AlphaEdit",
    }
