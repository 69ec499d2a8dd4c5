"""benchmarks.use.private: canaries of members and others never meet, one arm at each epsilon, tables by hand."""

import pytest
from hydra import compose, initialize_config_dir

from benchmarks.forgetting import protocol
from benchmarks.forgetting.protocol import new_numbers
from benchmarks.use import pooling_tables
from benchmarks.use.private import SCRIPT, accountant_of, arm_name, draw_pool, rows
from tests.test_configs import CONF

SMALL = [
    *("seeds=[0,1]", "num_users=4", "num_common=3", "pooled.rounds=2", "pooled.rank=4", "num_adapters=2"),
    *("num_masked=3", "accountant=renyi", "learning_rates=[1.0,2.0]", "delta=0.01", "epsilons=[null,2.0]"),
    *("mechanisms=[dp_sgd]", "output=null"),
]


@pytest.fixture
def settings(tmp_path):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return SCRIPT.check(compose("use_private", overrides=[*SMALL, f"cells={tmp_path}"]))


@pytest.fixture
def common(settings):
    return settings.model_dump(exclude={"seeds", "cells", "output", "learning_rates"})


def test_nobody_s_canaries_are_in_no_lesson(common):
    pool = draw_pool(0, {**common, "num_users": 20})
    asked = {lesson.question for lessons in pool.lessons.values() for lesson in lessons}
    members = {question for one in pool.members for question in one.training[:3]}
    others = {question for one in pool.others for question in one.training[:3]}
    assert members <= asked and not others & asked and len(members) == len(others) == 60
    assert len(pool.lessons) == 20 and {len(lessons) for lessons in pool.lessons.values()} == {3 * 3}
    assert not {one.asked for one in pool.common} & asked


def test_each_user_has_its_canary_alone(common):
    pool = draw_pool(1, {**common, "num_users": 6})
    for canary, (name, lessons) in zip(pool.members, sorted(pool.lessons.items()), strict=True):
        own = [lesson.answer for lesson in lessons if canary.subject in lesson.question]
        assert own == [canary.answer] * 3, name
    assert draw_pool(1, {**common, "num_users": 6}) == pool


def test_rows_are_one_for_each_arm_and_seed(settings):
    found = list(rows(settings))
    weights = [row for row in found if row["kind"] == "weights"]
    assert len([row for row in weights if row["seed"] == 0]) == 2 * 2 and len(weights) == 4 + 2
    for arm in ("dp_sgd/inf", "dp_sgd/2"):
        tried, taken = (
            [r for r in weights if arm_name(r["mechanism"], r["epsilon"]) == arm and r["seed"] == seed]
            for seed in (0, 1)
        )
        assert [row["lr"] for row in taken] == [max(tried, key=lambda row: row["log_p"])["lr"]]
    private = [row for row in weights if row["epsilon"] is not None]
    assert all(row["spent"] <= 2.0 and row["noise"] > 0 for row in private)
    assert [row["auc"] for row in found if row["kind"] == "before"] == [0.5, 0.5]
    assert all(row["differing"] == 0 for row in found if row["kind"] == "masks")
    own = [row for row in found if row["kind"] == "adapters" and row["release"] == "own"]
    assert all(row["gain_members"] > row["gain_others"] for row in own)
    assert len([row for row in found if row["kind"] == "adapters"]) == 2 * 3
    for part in ("private", "private_attacks", "private_adapters"):
        assert pooling_tables.markdown(found, part).count("\n") >= 2


def test_unknown_accountant_and_too_many_users_are_refused(common, monkeypatch):
    with pytest.raises(ValueError, match="Choose opacus or renyi"):
        accountant_of("dice")
    monkeypatch.setattr(protocol, "new_numbers", lambda seed, number: new_numbers(seed, 7))
    with pytest.raises(ValueError, match="There are 7 canaries for 4 users and as many others. Take fewer users"):
        draw_pool(0, common)


def test_tables_take_the_first_seeds_rate_and_mean_the_seeds():
    def row(seed, lr, log_p, members):
        items = {"members": members, "others": [0.0, 1.0], "common": [1.0], "after": [*members, 0.0, 1.0]}
        named = {"kind": "weights", "mechanism": "dp_sgd", "epsilon": 8.0, "seed": seed, "lr": lr, "log_p": log_p}
        gains = {"gain_members": sum(members) / 2, "gain_others": 0.5}
        auc = sum((m > o) + 0.5 * (m == o) for m in members for o in (0.0, 1.0)) / 4
        return {**named, "exact_match": log_p / 4, "auc": 0.5, "auc_likelihood": auc, **gains, "items": items}

    own = [row(0, 1.0, 2.0, [2.0, 2.0]), row(0, 3.0, 1.0, [0.0, 0.0]), row(1, 1.0, 4.0, [1.0, 0.0])]
    before = {**row(0, None, 0.0, [0.0, 1.0]), "kind": "before", "epsilon": None}
    line = pooling_tables.private([before, *own]).lines[1]
    assert line[:5] == ["sampled users, noise by round", "8", "0.75", "3.0", "0.75"]
    assert float(line[5]) <= 0.75 <= float(line[6])
