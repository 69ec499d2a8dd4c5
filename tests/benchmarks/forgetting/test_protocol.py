"""The protocol on the shipped model: what is learned, when it ends, what is counted, what is asked."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from benchmarks.forgetting import frontier, spurious, tasks
from benchmarks.forgetting.protocol import (
    Known,
    Limits,
    Recipe,
    Sizes,
    State,
    answer_rows,
    changed,
    hidden_states,
    learn,
    load,
    new_facts,
    new_numbers,
    other_known,
    rightly,
    scores,
    snapshot,
)
from hypernet.consolidation.moves import ChosenRows, Everything
from hypernet.consolidation.weights import MovedWeights
from hypernet.data.encyclopedia import background_questions
from hypernet.text.matching import exact_match

ROOT = Path(__file__).parents[3]
SMALL = Sizes(num_background=6, num_in_context=3, num_unknown=3, num_texts=1, num_windows=2)


@pytest.fixture(scope="module")
def model():
    return load(str(ROOT / "assets/tiny"))


def settings(script, name, *overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return script.check(compose(name, overrides=[f"checkpoint={ROOT / 'assets/tiny'}", *overrides]))


def test_no_wording_is_trained_on_and_asked():
    for one in (*new_facts(0, 8), *new_facts(1, 3, kind="town"), *new_numbers(0, 3)):
        assert one.check not in one.training and one.asked not in one.training and one.check != one.asked
        assert all(one.subject in text for text in (*one.training, one.check, one.asked)) and one.answer in one.text
    assert len({one.subject for one in new_numbers(0, 9)}) == 9


def test_measured_background_is_never_trained_on():
    measured = {one.question for one in Known.draw(Sizes(), seed=3).sets["background"]}
    measured |= {one.question for one in spurious.old_facts(3, 96)}
    assert not measured & {question for question, _ in other_known(3, 96)}
    assert not measured & {one.question for one in spurious.probed_facts(3, 960)}


def test_untold_facts_are_of_entities_that_no_model_saw():
    seen = {question.text for question in background_questions()}
    untold = spurious.untold_facts(0, 30)
    assert not seen & {one.question for one in untold} and len({one.question for one in untold}) == 30


def test_learning_ends_at_the_target_and_not_at_a_step(model):
    told, before = new_facts(0, 3), snapshot(model)
    learned = learn(model, told, Recipe(Everything(), 1e-3), seed=0, limits=Limits(every=1, max_steps=60))
    assert learned.reached and learned.checked == 1.0 and learned.steps < 60
    earlier = Limits(every=learned.steps - 1, max_steps=learned.steps - 1)
    short = learn(model, told, Recipe(Everything(), 1e-3), seed=0, limits=earlier)
    assert not short.reached and short.steps == learned.steps - 1 and short.checked < 1
    assert sum(scores(model, learned.state, told)) >= 2 and not sum(scores(model, State(), told))
    assert all(torch.equal(before[name], value) for name, value in model.base_model.named_parameters())


def test_learning_ends_halfway_where_nothing_is_answered(model):
    limits = Limits(every=1, max_steps=8)
    learned = learn(model, new_facts(0, 3), Recipe(Everything(), 1e-9), seed=0, limits=limits)
    assert learned.steps == 4 and learned.checked == 0 and not learned.reached


def test_changed_rows_are_counted_from_the_tensors(model):
    before = snapshot(model)
    limits = Limits(max_steps=2, every=2)
    learned = learn(model, new_facts(0, 3), Recipe(ChosenRows(num_rows=5), 1e-2), seed=0, limits=limits)
    row = changed(model, learned.weights, before)
    assert row["changed_rows"] == 6 * 5 and row["frozen_difference"] == 0
    total = sum(value.numel() for value in before.values())
    assert row["changed_share"] == pytest.approx(6 * 5 * 128 / total, rel=0.02)
    name = "model.layers.0.mlp.up_proj.weight"
    stale = {**before, name: before[name] + 0.5}
    assert changed(model, learned.weights, stale)["frozen_difference"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="The base model has no parameter 'other'"):
        changed(model, MovedWeights({"other": torch.zeros(1)}), before)


def test_greedy_check_agrees_with_generation(model):
    asked = background_questions(held_out=True)[:20:2]
    right = [one.answer for one in asked]
    wrong = right[1:] + right[:1]
    for answers in (right, wrong):
        found = rightly(model, State(), answer_rows(model, [one.text for one in asked], answers))
        written = model.generate([one.text for one in asked])
        assert found == [bool(exact_match(text, (own,))) for text, own in zip(written, answers, strict=True)]
    broken = {name: value * float("nan") for name, value in list(snapshot(model).items())[:1]}
    assert rightly(model, State(broken), answer_rows(model, [asked[0].text], right[:1])) is None


def test_known_measures_the_base_model_as_it_is(model, tmp_path):
    text = tmp_path / "wiki.txt"
    text.write_text("\n".join(f"{place} The river is high at this time of the year. " * 30 for place in range(4)))
    row = Known.draw(SMALL._replace(wikitext=str(text)), seed=0).measure(model, State())
    assert row["background"] == row["abstention"] == 1 and row["kl"] == pytest.approx(0, abs=1e-6)
    assert {name: len(values) for name, values in row["items"].items()} == {
        **{"background": 6, "in_context": 3, "abstention": 3, "kl": 1, "wikitext_nats": 2}
    }
    assert row["perplexity"] == pytest.approx(torch.tensor(row["wikitext_nats"]).exp().item(), rel=1e-4)
    halved = {name: value / 2 for name, value in snapshot(model).items() if "down_proj" in name}
    assert Known.draw(SMALL, seed=0).measure(model, State(halved))["kl"] > 0.01


def test_missing_files_are_said(tmp_path):
    skipped = Known.draw(SMALL._replace(wikitext=str(tmp_path / "none.txt")), seed=0).skipped
    assert skipped == {"wikitext": f"there is no file {tmp_path / 'none.txt'}", "nq_open": "no file is given"}


def test_hidden_states_are_those_of_each_prompt_alone(model):
    questions = ["Who taught Fenda Elfax?", "What is the capital of France, if anybody knows?"]
    together = hidden_states(model, State(), questions)
    for question, states in zip(questions, together, strict=True):
        ids = torch.tensor(model.layout.prompt_ids(model.tokenizer, [question], [None]))
        alone = model.base_model(ids, output_hidden_states=True).hidden_states
        torch.testing.assert_close(states[:-1], torch.cat([h[0, -1:] for h in alone[1:-1]]), rtol=1e-4, atol=1e-4)


def test_frontier_tries_slots_at_rates_of_their_own(tmp_path):
    given = (f"cells={tmp_path}", "output=null", "bases.slots_kl=some/folder", "methods=[slots_kl]")
    cfg = settings(frontier.SCRIPT, "forgetting_frontier", *given)
    rates = [cell.settings["lr"] for cell in frontier.cells_of(cfg, 0) if "lr" in cell.settings]
    assert rates == cfg.other_learning_rates["slots_kl"] != cfg.learning_rates


def test_frontier_refuses_rates_of_no_method():
    cfg = settings(frontier.SCRIPT, "forgetting_frontier", "output=null")
    with pytest.raises(ValueError, match="other_learning_rates has no method 'lora_9' to give rates to"):
        frontier.check(cfg.model_copy(update={"other_learning_rates": {"lora_9": [1e-3]}}))


def test_frontier_tries_every_method_at_every_rate(tmp_path):
    cfg = settings(frontier.SCRIPT, "forgetting_frontier", f"cells={tmp_path}", "output=null")
    cells = frontier.cells_of(cfg, 1)
    trained = [cell for cell in cells if "lr" in cell.settings and cell.method != frontier.GENERATED]
    names = set(frontier.arms_of(None, cfg.variants)) - {frontier.GENERATED, *cfg.bases}
    assert {cell.method for cell in trained} == names
    assert len(trained) == len(names) * len(cfg.learning_rates)
    slots = ["slots_kl", "slots_kl_384", "slots_random", "slots_random_384", "slots_tfidf"]
    assert [row["method"] for row in frontier.skipped(cfg)] == ["everything_with_slots", *slots]
    assert len({cell.path(tmp_path) for cell in cells}) == len(cells) == len(set(map(str, cells)))
    taken = dict.fromkeys([*names, frontier.GENERATED], 3.0)
    for cell in frontier.cells_of(cfg, 1, taken):
        if "lr" in cell.settings:
            assert cell.settings["lr"] in (cfg.learning_rates if cell.method in cfg.curves else [3.0])


def test_other_seeds_take_the_rate_of_the_searching_one(tmp_path, monkeypatch):
    asked = []

    def measured(cells, _measure, **_more):
        for cell in cells:
            lr = cell.settings.get("lr")
            asked.append((cell.method, cell.seed, lr))
            row = {"method": cell.method, "seed": cell.seed, "lr": lr, "items": {"background": [float(lr == 5e-4)]}}
            if lr is not None:
                yield {"kind": "learned", "reached": lr != 2e-3, "checked": 1.0, **row}

    monkeypatch.setattr(frontier, "run_cells", measured)
    given = ["seeds=[4,5,6]", "searching=[5]", "methods=[osf]", "learning_rates=[2e-3,5e-4,1e-4]", "output=null"]
    list(frontier.rows(settings(frontier.SCRIPT, "forgetting_frontier", f"cells={tmp_path}", *given)))
    tried = [(seed, lr) for method, seed, lr in asked if method == "osf"]
    assert tried == [(5, 2e-3), (5, 5e-4), (5, 1e-4), (4, 5e-4), (6, 5e-4)]


def test_wrong_methods_are_one_line():
    with pytest.raises(ValueError, match="There is a method 'everything' already"):
        frontier.arms_of(None, {"everything": {"moves": "lora_8"}})
    with pytest.raises(ValueError, match="There is no method 'every': choose of everything, "):
        frontier.arms_of(["every"], {})
    with pytest.raises(ValueError, match="mine has no part 'move': give moves"):
        frontier.parts_by_name({"move": "lora_8"}, "mine")
    with pytest.raises(ValueError, match="mine needs moves, and start=adapters or none"):
        frontier.parts_by_name({"moves": "lora_8", "start": "anything"}, "mine")
    for chosen, wrong in (({"lora_8": {"ranks": 3}}, "'ranks'"), ({"lora_8": 3}, "{'lora_8': 3}")):
        with pytest.raises(ValueError, match=f"The moves lora_8 has no setting {wrong}; there are rank"):
            frontier.parts_by_name({"moves": chosen}, "mine")
    assert frontier.parts_by_name({"moves": {"lora_8": {"rank": 3}}}, "mine")["moves"]["rank"] == 3
    cfg = settings(tasks.SCRIPT, "forgetting_tasks", "methods=[nothing]", "output=null")
    with pytest.raises(ValueError, match="There is no method 'nothing': choose of lora, expert_per_task"):
        tasks.cells_of(cfg)
    cfg = settings(spurious.SCRIPT, "forgetting_spurious", "+methods.mine={moves: lora_8}", "output=null")
    with pytest.raises(ValueError, match="methods.mine.lr should be a number above 0, got None"):
        spurious.cells_of(cfg)


@pytest.mark.story(20)
def test_smoke_of_all_three(tmp_path):
    small = [
        "seeds=[0]",
        "num_facts=2",
        "max_steps=6",
        "num_replayed=4",
        f"cells={tmp_path}",
        "output=null",
        "workers=1",
    ]
    known = [f"known.{name}={getattr(SMALL, name)}" for name in ("num_background", "num_in_context", "num_unknown")]
    given = ["methods=[rows_tfidf,kept]", "learning_rates=[1e-3]", "known.num_texts=1", "known.wikitext=null"]
    cfg = settings(frontier.SCRIPT, "forgetting_frontier", *small, *known, *given)
    cfg = cfg.model_copy(update={"variants": {"kept": {"moves": "lora_2", "rehearsal": "replay"}}})
    rows = list(frontier.rows(cfg))
    assert [row["kind"] for row in rows] == ["before", "adapter", "learned", "learned"]
    assert rows[0]["new"] == 0 and rows[1]["new"] == 1 and rows[2]["frozen_difference"] == 0
    assert list(frontier.rows(cfg)) == rows
    cfg = settings(
        spurious.SCRIPT,
        "forgetting_spurious",
        *small,
        "num_old=4",
        "num_probed=30",
        "samples=[0,3]",
        "recovery_steps=2",
    )
    cfg = cfg.model_copy(update={"methods": {"lora_8": cfg.methods["lora_8"]}})
    rows = list(spurious.rows(cfg))
    assert [row.get("k") for row in rows] == [None, 0, 3]
    assert rows[0]["old"] == 1 and rows[0]["untold"] == 0 and 0 < rows[0]["chance"] < 0.6
    given = ["methods=[expert_per_task,on_top_replay,adapter_bank]", "num_background=4", "learning_rates=[3e-3]"]
    given += ["max_steps=2"]  # five tasks each: what is tested is the matrix, not what is learned
    cfg = settings(tasks.SCRIPT, "forgetting_tasks", *small, *given)
    rows = [row for row in tasks.rows(cfg) if row["kind"] == "sequence"]
    assert [len(row["matrix"]) for row in rows] == [5, 5, 5]
    assert all(row["final_average"] == pytest.approx(sum(row["matrix"][-1]) / 5) for row in rows)
