"""benchmarks.memory.store: facts that can be found, and rows of a small run."""

import random
import re
import runpy
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from benchmarks.memory.store import kill_writers, markdown, measure, random_schedules, user_facts

CONF = Path(__file__).parents[3] / "conf"


def test_each_question_has_one_memory_of_its_user():
    first, second = user_facts(num_users=2, memories_per_user=20)
    assert len(set(first.sentences)) == len(first.questions) == 20
    assert not set(first.sentences) & set(second.sentences)


def test_small_run_measures_every_row(tmp_path):
    sizes = ["num_users=3", "memories_per_user=20", "num_searches=30", f"memory.folder={tmp_path / 'memory'}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        rows = {row["kind"]: row for row in measure(compose("memory_store", [*sizes, "memory.model=null"]))}
    assert set(rows) == {"ingest", "first_searches", "search", "profile", "delete_all", "purge"}
    assert rows["search"]["recall_at_5"] > 0.8 > 0.1 > rows["search"]["recall_in_anothers_memory"]
    assert rows["search"]["wrong_user_hits"] == 0 and rows["ingest"]["memories"] == 60
    kills = kill_writers(tmp_path / "killed", num_kills=2, rng=random.Random(0))
    schedules = {"kind": "schedules", **random_schedules(tmp_path / "drawn", num_schedules=2, rng=random.Random(0))}
    table = markdown([*rows.values(), {"kind": "kills", **kills}, schedules])
    assert f"| Recall@5 of 30 searches | {rows['search']['recall_at_5']:.2f} |" in table
    assert f"| lost of {kills['acknowledged']} writes, 2 writers killed with kill -9 | {kills['lost']} |" in table
    assert f"| wrong answers after 2 random schedules | {schedules['wrong']} |" in table


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("output=README.md/x", "README.md/x cannot be written: README.md is a file. Name another one."),
        ("num_users=1", "num_users should be a whole number, at least 2, got 1."),
        ("memory.model=[a]", "memory.model should be a text or null, got ['a']."),
    ],
)
def test_mistake_in_a_setting_is_one_line(monkeypatch, argument, says):
    monkeypatch.chdir(CONF.parent)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["benchmarks.memory.store", argument])
    with pytest.raises(SystemExit, match=re.escape(f"benchmarks.memory.store: {says}")):
        runpy.run_module("benchmarks.memory.store", run_name="__main__")
