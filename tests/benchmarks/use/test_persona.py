"""benchmarks.use.persona at toy size, on statements of its own: splits, arms and controls, the choice, the tables."""

import json

import pytest
import torch
from hydra import compose, initialize_config_dir

from benchmarks.use import persona_tables
from benchmarks.use.persona import PARTS, SCRIPT, Arm, check_traits, choose, rows
from benchmarks.use.persona_data import Traits, characters
from tests.test_configs import CONF

TRAITS = ("cheer", "order", "music", "maths")
SMALL = [
    *("checkpoint=assets/tiny", "seeds=[0]", "statements=24", "sheet=8", "choice=4", "test=8", "rank=2"),
    *("~characters", "+characters={host: {cheer: 1}, idler: {order: -1}}", "other_traits=[music, maths]"),
    *("batch_characters=2", "num_facts=2", "output=null", "searches.prompt=[{form: would say}]"),
    "searches.hypernetwork=[{kind: ridge, lr: 1e-2, steps: 3}, {kind: ridge, lr: 1e-2, steps: 3, scale: 2.0}]",
    "searches.perceiver=[{kind: perceiver, lr: 1e-2, steps: 2}]",
    *("searches.sft=[{lr: 1e-2, steps: 3}]", "searches.dpo=[{lr: 1e-2, steps: 20, beta: 1.0}]"),
    *("searches.vector=[{layer: 1, alpha: 1.0}]", "vaccination.traits=[cheer]", "vaccination.num_facts=2"),
    *("vaccination.steps=3", "vaccination.layer=1", "vaccination.alphas=[1.0,2.0]", "vaccination.batch_size=4"),
]
ARMS = [
    *("hypernetwork", "hypernetwork, Perceiver", "SFT", "DPO", "vector", "random vector", "sheet in the prompt"),
    *("shipped hypernetwork", *(f"another character's, {arm}" for arm in ("hypernetwork", "SFT", "DPO"))),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traits")
    for trait in TRAITS:
        lines = [
            {"statement": f"I {verb} {trait} number {place}.", "answer_matching_behavior": answer}
            for place in range(13)
            for verb, answer in (("love", " Yes"), ("hate", " No"))
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{trait}.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def settings(folder, tmp_path_factory):
    places = [f"{name}={tmp_path_factory.mktemp(name)}" for name in ("cells", "readings")]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return SCRIPT.check(compose("use_persona", overrides=[*SMALL, *places, f"traits_folder={folder}"]))


@pytest.fixture(scope="module")
def found(settings):
    return list(rows(settings))


def traits_of(folder, **changes):
    return Traits(folder, **{"number": 24, "sheet": 8, "choice": 4, "test": 8} | changes)


def test_parts_share_no_statement_and_are_balanced(folder):
    traits = traits_of(folder)
    statements = traits.statements("cheer")
    parts = traits.split("cheer", seed=0)
    assert len(statements) == 24 and list(map(len, parts)) == [8, 4, 8]
    assert len({place for part in parts for place in part}) == 20
    assert all(sum(statements[place].says for place in part) == len(part) / 2 for part in parts)
    assert traits.split("cheer", seed=0) == parts != traits.split("cheer", seed=1)


def test_opposite_sign_swaps_the_sheet(folder):
    found = characters({"one": {"cheer": 1}, "other": {"cheer": -1}}, traits_of(folder), seed=0)
    assert found["one"].says == found["other"].never and found["one"].never == found["other"].says
    assert all(text.startswith("I love") for text in found["one"].says)


def test_missing_and_short_files_are_refused(folder):
    with pytest.raises(ValueError, match=r"There is no .*charm\.jsonl\. Set traits_folder"):
        traits_of(folder).statements("charm")
    with pytest.raises(ValueError, match="of which sheet, choice and test want 30. Take fewer"):
        traits_of(folder, test=18).statements("cheer")


def test_missing_statements_are_told_before_any_cell(settings):
    for group in ("other_traits", "vaccination"):
        wrong = settings.model_dump()
        (wrong[group]["traits"] if group == "vaccination" else wrong[group]).append("courage")
        with pytest.raises(ValueError, match=r"There is no .*courage\.jsonl\. Set traits_folder"):
            check_traits(wrong)


def test_unknown_part_is_refused(settings):
    with pytest.raises(ValueError, match="'sung' is no part. Choose of written, trained"):
        list(rows(settings.model_copy(update={"parts": ["sung"]})))


def test_every_arm_is_measured_on_the_same_statements(found):
    arms = [row for row in found if row["kind"] == "arm"]
    assert set(ARMS) <= {row["arm"] for row in arms}
    for row in arms:  # the whole model is asked about half of them
        sizes = {len(row["items"][key]) for key in ("log_odds", "in_character")}
        assert sizes == {4 if row["arm"] == "shipped hypernetwork" else 8}
    for name in ARMS:
        own = [row for row in arms if row["arm"] == name]
        assert sorted(row["character"] for row in own) == ["host", "idler"], name
    tried = {row["arm"]: row["tried"] for row in arms if "tried" in row}
    assert tried["hypernetwork"] == 2 and tried["DPO"] == 1 and "random vector" not in tried
    assert {row["method"] for row in found} == set(PARTS)


def test_training_on_its_own_sheet_is_seen_and_another_s_is_not(found):
    means = {
        arm: sum(row["log_odds"] for row in found if row.get("arm") == arm) / 2
        for arm in ("DPO", "another character's, DPO")
    }
    assert means["DPO"] > 0.1 and abs(means["another character's, DPO"]) < means["DPO"] / 2


def test_base_model_is_the_same_after_personas(found):
    for row in (row for row in found if row["kind"] == "swapped"):
        assert row["weights_equal"] and row["logits_equal"] and row["again_equal"] and row["changed"]
        assert row["formula_error"] < 1e-3
    told = {(r["persona"], r["document"]): r for r in found if r["kind"] == "told"}
    assert len(told) == 6 and told["none", True]["answered"] == told["DPO", True]["answered"] == 1.0


def test_vaccination_has_its_controls_at_one_strength(found):
    own = [row for row in found if row["kind"] == "vaccination"]
    assert [row["arm"] for row in own] == list(persona_tables.VACCINES)
    strengths = {row["arm"]: row["alpha"] for row in own}
    assert strengths["v"] == strengths["random vector"] == -strengths["-v"] and strengths["v"] in (1.0, 2.0)
    assert sum(row["kind"] == "vaccination_tried" for row in found) == 2


def test_rows_hold_no_statement(found):
    assert not any(trait in json.dumps({**row, "trait": ""}) for row in found for trait in ("I love", "I hate"))


def test_choice_prefers_what_keeps_the_facts():
    class World:
        settings = {"max_lost": 0.02}

    class Made(Arm):
        def odds(self, name, part):
            return torch.tensor(self.lora[0])

        def kept(self, part):
            return self.lora[1]

    world = World()
    arms = {"likely": ([4.0], [1.0, 0.0]), "kept": ([1.0], [1.0, 1.0]), "dull": ([0.5], [1.0, 1.0])}
    tries = [({"name": name}, lambda given=given: Made(world, given)) for name, given in arms.items()]
    assert choose(world, "host", tries).setting == {"name": "kept"}
    assert choose(world, "host", tries[:1]).setting == {"name": "likely"} and choose(world, "host", tries).tried == 3


def test_tables_are_means_by_hand():
    def row(arm, seed, odds):
        items = {"log_odds": odds, "in_character": [int(one > 0) for one in odds]}
        means = {"log_odds": sum(odds) / 2, "in_character": 0.5, "said": 0.25, "facts": 0.975}
        return {"kind": "arm", "arm": arm, "seed": seed, "character": "host", **means, "items": items}

    own = [row("hypernetwork", seed, [1.0, 3.0]) for seed in (0, 1)]
    own += [row("DPO", seed, [2.0, -1.0 + seed]) for seed in (0, 1)]
    table = persona_tables.arms(own)
    (line,) = [line for line in table.lines if line[0] == "hypernetwork"]
    assert [line[1], *line[4:]] == ["+2.00", "1.00", "+0.250", "0.975"]
    assert float(line[2]) <= 2.0 <= float(line[3])
    (line,) = persona_tables.differences(own).lines
    assert line[:2] == ["hypernetwork against DPO", "+1.25"] and line[4] == "+0.50"
    vaccines = [
        {"kind": "vaccination", "arm": arm, "seed": seed, "said": said, "answered": sum(right) / 2, "alpha": 1.0}
        | {"items": {"said": [said, said], "answered": right}}
        for seed in (0, 1)
        for arm, said, right in (("skewed", 0.5, [1, 1]), ("v", 0.1, [1, 0]))
    ]
    lines = persona_tables.vaccination(vaccines).lines
    assert lines[1] == ["skewed, with v", "+0.100", "+0.100", "+0.100", "0.50", "0.50", "1.0"]


def test_tables_and_plot_of_a_sweep(found):
    both = [*found, *({**row, "seed": 1} for row in found)]  # one seed has no interval
    for sweep in (found, both):
        for part in persona_tables.TABLES:
            assert persona_tables.markdown(sweep, part).count("\n") >= 3, part
        assert persona_tables.arms_figure(sweep) is not None
