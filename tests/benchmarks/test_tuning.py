"""benchmarks/tuning.py: the best of equally many settings per method, on the validation split, from made rows."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.measuring.cells import cell_path, write_cell
from benchmarks.tuning import chosen, markdown, tried

ROOT = Path(__file__).parents[2]
METHODS = ROOT / "conf/benchmark/method"
CHOSEN = ROOT / "benchmarks/results/tuning.jsonl"


def cell(method, setting, scores, *, split="validation", seed=0) -> list[dict]:
    """scores: step → exact match of each question; the log-likelihood is ten times that, so that it says the same."""
    ((key, value),) = setting.items()
    own = {"task": "encyclopedia_validation", "method": f"{method}_{value}", "seed": seed}
    rows = [
        own
        | {"kind": "question", "set": "one", "case": "0", "number": number, "step": step}
        | {"exact_match": float(score), "token_f1": float(score), "log_likelihood": 10.0 * score}
        for step, column in scores.items()
        for number, score in enumerate(column)
    ]
    run = {
        "commit": "abc",
        "hardware": "2 CPU cores",
        "threads": 1,
        "python": "3",
        "versions": {},
        "date": "2026-01-01",
    }
    run["config"] = {"task": {"split": split}, "method": {key: value, "_target_": "x"}}
    overrides = [f"method={method}", f"method.{key}={value}", "sweep=tune"]
    return [*rows, own | {"kind": "summary", "run": run, "overrides": overrides}]


def made() -> list[dict]:
    return [
        *cell("text_lora", {"lr": 0.001}, {0: [0, 0, 0, 0], 40: [0, 1, 0, 0], 80: [1, 1, 0, 0]}),
        *cell("text_lora", {"lr": 0.01}, {0: [0, 0, 0, 0], 40: [1, 1, 1, 0], 80: [1, 1, 0, 0]}),
        *cell("text_lora", {"lr": 0.1}, {0: [0, 0, 0, 0], 40: [0, 0, 0, 0], 80: [0, 0, 0, 0]}),
        *cell("retrieval", {"num_chunks": 1}, {None: [1, 0, 0, 0]}),
        *cell("retrieval", {"num_chunks": 3}, {None: [1, 1, 1, 0]}),
        *cell("retrieval", {"num_chunks": 5}, {None: [1, 1, 1, 1]}),
    ]


def test_best_setting_and_step_are_chosen_and_edges_named() -> None:
    rows = tried(made())
    assert len(rows) == 3 * 3 + 3 and all(row["questions"] == 4 for row in rows)
    lora, retrieval = chosen(rows)
    assert (lora["setting"], lora["step"], lora["exact_match"], lora["edge"]) == ({"lr": 0.01}, 40, 0.75, [])
    assert (retrieval["setting"], retrieval["step"], retrieval["edge"]) == ({"num_chunks": 5}, None, ["num_chunks"])
    assert (lora["settings"], lora["worst"]) == (3, 0.0) and (retrieval["settings"], retrieval["worst"]) == (3, 0.25)
    lines = markdown(rows).splitlines()
    assert lines[2] == "| text lora | lr 0.001, 0.01, 0.1 | lr 0.01 | 40 | 0.750 | 0.000 | 4 | – |"
    assert lines[3] == "| retrieval | num_chunks 1, 3, 5 | num_chunks 5 | – | 1.000 | 0.250 | 4 | num_chunks |"
    assert len({line.count("|") for line in lines}) == 1


def test_tuning_pools_seeds_of_one_setting() -> None:
    rows = cell("text_lora", {"lr": 0.01}, {40: [1, 1]}) + cell("text_lora", {"lr": 0.01}, {40: [0, 1]}, seed=1)
    (row,) = tried(rows)
    assert (row["questions"], row["seeds"], row["exact_match"]) == (4, 2, 0.75)


def test_ties_go_to_the_likelihood_then_to_the_fewest_steps() -> None:
    rows = cell("text_lora", {"lr": 0.01}, {10: [1, 0], 40: [1, 0], 80: [1, 0]})
    assert chosen(tried(rows))[0]["step"] == 10
    for row in rows:
        if row.get("step") == 40:
            row["log_likelihood"] += 1
    assert chosen(tried(rows))[0]["step"] == 40


def test_tuning_refuses_uneven_budget_or_other_split() -> None:
    with pytest.raises(ValueError, match="same number of settings .* text_lora 3, retrieval 2. Run the missing cells"):
        tried([row for row in made() if row["method"] != "retrieval_5"])
    with pytest.raises(
        ValueError, match="cell of text_lora_0.1 is of the split test, and settings are chosen on task.split"
    ):
        tried(cell("text_lora", {"lr": 0.1}, {0: [1]}, split="test"))
    rows = cell("no_context", {"lr": 0.1}, {None: [1]})
    rows[-1]["overrides"] = ["method=no_context"]
    with pytest.raises(ValueError, match="names no setting, as method.lr=0.01 does"):
        tried(rows)


def test_tuning_command_prints_table_and_writes_rows(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.chdir(ROOT)
    output = tmp_path / "tuning.jsonl"
    monkeypatch.setattr(sys, "argv", ["benchmarks.tuning", f"input_dir={tmp_path}", f"output={output}"])
    monkeypatch.delitem(sys.modules, "benchmarks.tuning")  # runpy warns of a module that is there already
    with pytest.raises(SystemExit, match="benchmarks.tuning: No finished cells"):
        runpy.run_module("benchmarks.tuning", run_name="__main__")
    for summary in (row for row in made() if row["kind"] == "summary"):
        mine = [row for row in made() if row["method"] == summary["method"]]
        path = cell_path(tmp_path, task=summary["task"], method=summary["method"], seed=0, identity="x")
        write_cell(path, mine)
    monkeypatch.delitem(sys.modules, "benchmarks.tuning", raising=False)
    runpy.run_module("benchmarks.tuning", run_name="__main__")
    assert "| text lora |" in capsys.readouterr().out
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [row["kind"] for row in rows] == ["chosen"] * 2 + ["tried"] * 12
    assert all(row["run"]["commits"] == ["abc"] for row in rows)


def test_method_configs_use_the_tuned_settings() -> None:
    rows = [json.loads(line) for line in CHOSEN.read_text(encoding="utf-8").splitlines()]
    for row in (row for row in rows if row["kind"] == "chosen"):
        settings = yaml.safe_load((METHODS / f"{row['method']}.yaml").read_text(encoding="utf-8"))
        for key, value in row["setting"].items():
            assert float(settings[key]) == value, f"{row['method']}: {key}"
        if row["step"] is not None:
            assert max(settings["record_at"]) == row["step"], f"{row['method']}: record_at"
