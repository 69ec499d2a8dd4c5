"""benchmarks/run.py: cells are there completely or not at all, skipped when they are, tried again when they failed."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from benchmarks.measuring import measure
from benchmarks.measuring.cells import Sweep, cell_path, error_path, identity_of, read_cells, write_cell, write_error
from benchmarks.measuring.measure import build_task
from benchmarks.methods.prompts import NoContext
from benchmarks.run import RENAMED, check
from benchmarks.tasks.base import Asked, Case

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf/benchmark"
FILES = sorted(path.relative_to(CONF).with_suffix("") for path in CONF.rglob("*.yaml"))
SMALL = ["task.num_cases=1", "num_timed=1", "num_profiled=0"]
ONE_SET = ["~task.sets", "+task.sets={one: {facts_per_entity: [2, 2]}}"]


def resolved(cfg: DictConfig) -> dict:
    """All settings but Hydra's own; fails if one is missing or refers to nothing."""
    own = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    return OmegaConf.to_container(own, resolve=True, throw_on_missing=True)


def run(monkeypatch, *arguments: str) -> int | str | None:
    """python -m benchmarks.run; gives what it exits with."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["benchmarks.run", *arguments])
    try:
        runpy.run_module("benchmarks.run", run_name="__main__")
    except SystemExit as stop:
        return stop.code
    return None


def test_cell_rows_explain_themselves_and_are_not_remeasured(monkeypatch, tmp_path) -> None:
    command = [f"output_dir={tmp_path}", "method=doc_to_lora", *ONE_SET, *SMALL]
    assert run(monkeypatch, *command) in (None, 0)
    (path,) = (tmp_path / "cells").glob("*.jsonl")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["kind"] for row in rows] == ["question", "question", "case", "summary"]
    assert all((row["task"], row["method"], row["seed"]) == ("encyclopedia", "doc_to_lora", 0) for row in rows)
    assert {"commit", "hardware", "versions", "date", "config"} <= set(rows[-1]["run"])
    assert rows[-1]["wall_s"] > 0 and rows[2]["question_s"] >= rows[2]["first_token_s"] > 0
    before = path.stat().st_mtime_ns
    assert run(monkeypatch, *command) in (None, 0)
    assert path.stat().st_mtime_ns == before


def test_failed_cell_says_so_in_one_line_and_is_retried(monkeypatch, tmp_path) -> None:
    squad = tmp_path / "squad.json"
    command = [f"output_dir={tmp_path}", "task=squad", "method=no_context", f"task.path={squad}", *SMALL]
    message = run(monkeypatch, *command)
    assert "squad/no_context/0 failed: ValueError: Cannot read questions from" in message
    assert "\n" not in message
    (error,) = (tmp_path / "cells").glob("*.error.json")
    assert "Traceback" in json.loads(error.read_text(encoding="utf-8"))["traceback"]
    paragraphs = [
        {"context": f"The well {i} is deep.", "qas": [{"question": "?", "answers": [{"text": "deep"}]}]} for i in (1, 2)
    ]
    squad.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}), encoding="utf-8")
    assert run(monkeypatch, *command) in (None, 0)
    assert not error.exists() and read_cells(tmp_path)[-1]["kind"] == "summary"


@pytest.mark.parametrize("sweep", [[], ["--multirun"]], ids=["cell", "sweep"])
def test_output_folder_that_is_a_file_is_one_line(monkeypatch, sweep, recwarn) -> None:
    message = run(monkeypatch, *sweep, "output_dir=README.md", "method=no_context", *SMALL)
    assert message == "benchmarks.run: README.md is a file. Name a folder."
    assert not [warning for warning in recwarn if "sys.modules" not in str(warning.message)]  # runpy's own


def test_sweep_ends_with_its_failed_cells(monkeypatch, tmp_path) -> None:
    sweep = ["--multirun", f"output_dir={tmp_path}", "task=encyclopedia", *ONE_SET, "seed=0", *SMALL]
    message = run(monkeypatch, *sweep, "method=no_context", "max_new_tokens=none,4")
    assert "1 cells failed: encyclopedia/no_context/0" in message
    assert len(list((tmp_path / "cells").glob("*.jsonl"))) == 1
    assert not (tmp_path / "sweep.json").exists()


def test_interrupted_cell_leaves_no_partial_file(tmp_path) -> None:
    path = cell_path(tmp_path, task="t", method="m", seed=0, identity="x")

    def rows():
        yield {"kind": "question"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_cell(path, rows())
    assert not list(path.parent.glob("*"))
    write_error(path, {"error": "no"})
    write_cell(path, [{"kind": "summary"}])
    assert not error_path(path).exists() and read_cells(tmp_path) == [{"kind": "summary"}]


def test_cell_id_depends_on_settings_and_checkpoint(tmp_path) -> None:
    (tmp_path / "config.yaml").write_text("fingerprint: a")
    first = identity_of({"lr": 1}, str(tmp_path))
    assert first == identity_of({"lr": 1}, str(tmp_path)) != identity_of({"lr": 2}, str(tmp_path))
    (tmp_path / "config.yaml").write_text("fingerprint: b")
    assert first != identity_of({"lr": 1}, str(tmp_path))


def test_sweep_progress_estimates_remaining_time() -> None:
    assert Sweep(10, 100.0).progress(3, 140.0) == "cell 4 of 10, 40 s so far, 1 min 00 s to go"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_benchmark_config_is_composed_and_built(path, make_doc_to_lora, tmp_path) -> None:
    group, _, option = str(path).partition("/")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(group if not option else "run", [f"{group}={option}"] if option else [], return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)  # for ${hydra:...}
    if group != "sweep":  # some refer to a setting of the methods that they name
        assert resolved(cfg)
    if option and group != "sweep":
        check(OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"]))
    if group == "task":
        if "times_asked" in cfg.task:  # of the shipped base model
            cfg.task.times_asked = None
        assert callable(build_task(cfg.task, make_doc_to_lora()).cases)
    elif group == "method" and option != "retrieval_dense":
        if option == "retrieval":
            pytest.importorskip("bm25s", reason="retrieval needs the extra [bench]")
        if "checkpoint" in cfg.method:  # what a training has left is not here
            cfg.method.checkpoint = str(tmp_path)
            make_doc_to_lora(hypernetwork={"aggregator": {"name": "outer_product"}}).save_pretrained(tmp_path)
        assert instantiate(cfg.method, _convert_="all")(model=make_doc_to_lora(), max_new_tokens=4).steps
    elif group == "sweep":
        names = {key: values.split(",") for key, values in cfg.hydra.sweeper.params.items() if key != "seed"}
        first = {key: values[0] for key, values in names.items()}
        for key, values in names.items():
            for value in values:
                chosen = [f"{k}={v}" for k, v in (first | {key: value}).items()]
                with initialize_config_dir(str(CONF), version_base="1.3"):
                    cell = compose("run", [f"sweep={option}", *chosen], return_hydra_config=True)
                HydraConfig.instance().set_config(cell)
                assert resolved(cell)["task"]["_target_"]


@pytest.mark.parametrize("path", sorted((CONF / "sweep").glob("*.yaml")), ids=lambda path: path.stem)
def test_sweep_header_has_command_hardware_and_time(path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# @package _global_\n")
    assert re.search(rf"^#\s+(command)?\s+python -m benchmarks.run sweep={path.stem}\b", text, re.MULTILINE)
    assert re.search(r"^#\s+hardware\s+\S", text, re.MULTILINE) and re.search(r"^#\s+time\s+\S", text, re.MULTILINE)


@pytest.mark.parametrize("path", sorted((CONF / "sweep").glob("*.yaml")), ids=lambda path: path.stem)
def test_sweep_config_lists_and_explains_controls(path) -> None:
    text = path.read_text(encoding="utf-8")
    assert re.search(r"^# Controls: \S", text, re.MULTILINE)
    # A header may give more methods in a command of their own.
    named = re.findall(r"^\s*method: (\S+)|^#.* method=(\S+)", text, re.MULTILINE)
    methods = {method for found in named for part in found for method in part.split(",")}
    if path.stem.startswith("memory"):
        assert {"no_context", "memory_oracle"} <= methods
    elif not path.stem.startswith("tune"):  # which chooses among settings of a method and makes no figure
        assert {"no_context", "full_context", "wrong_document", "doc_to_lora"} <= methods


@pytest.mark.story(15)
def test_sweep_prints_only_its_progress(tmp_path) -> None:
    """In a process of its own: what is imported first decides what is printed."""
    pytest.importorskip("bm25s", reason="retrieval needs the extra [bench]")
    sweep = [
        f"output_dir={tmp_path}",
        "task=encyclopedia",
        *ONE_SET,
        "task.num_cases=1",
        "num_timed=1",
        "num_profiled=1",
    ]
    command = [sys.executable, "-m", "benchmarks.run", "--multirun", "method=retrieval,doc_to_lora", *sweep]
    command.append("method_name=${hydra:runtime.choices.method}")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    lines = (done.stdout + done.stderr).splitlines()
    assert [re.sub(r", .* to go", "", line).split()[:5] for line in lines] == [
        ["[cell", "1", "of", "2]", "encyclopedia/retrieval/0"],
        ["[cell", "2", "of", "2]", "encyclopedia/doc_to_lora/0"],
    ]


def test_cells_of_one_task_and_seed_share_cases(monkeypatch) -> None:
    made = []

    class Counting:
        def cases(self, seed):
            made.append(seed)
            yield Case("set", "0", ("A.",), (Asked("B?", ("C",)),))

    monkeypatch.setattr(measure, "load_model", lambda checkpoint, device: None)
    monkeypatch.setattr(measure, "build_task", lambda settings, model: Counting())
    measure.load_cases.cache_clear()
    wanted = [('{"a": 1}', 0, "x", "cpu"), ('{"a": 1}', 0, "x", "cpu"), ('{"a": 1}', 1, "x", "cpu")]
    assert [len(measure.load_cases(*key)) for key in wanted] == [1, 1, 1] and made == [0, 1]
    measure.load_cases.cache_clear()


def test_case_rows_carry_case_attributes(make_doc_to_lora) -> None:
    case = Case("set", "0", ("Town A has 3 houses.",), (Asked("How many?", ("3",)),), attributes={"num_chunks": 4})
    method = NoContext(model=make_doc_to_lora(), max_new_tokens=3)
    rows = measure.run_cell([case], method, seed=0, num_timed=0, num_profiled=0)
    assert [(row["kind"], row["attributes"]) for row in rows] == [
        ("question", {"num_chunks": 4}),
        ("case", {"num_chunks": 4}),
    ]


def test_question_rows_carry_own_attributes(make_doc_to_lora) -> None:
    asked = tuple(Asked("How many?", ("3",), attributes={"times_asked": times}) for times in (300, 0))
    case = Case("set", "0", ("Town A has 3 houses.",), asked, attributes={"num_chunks": 4})
    method = NoContext(model=make_doc_to_lora(), max_new_tokens=3)
    rows = measure.run_cell([case], method, seed=0, num_timed=0, num_profiled=0)
    assert [row["attributes"] for row in rows] == [
        {"num_chunks": 4, "times_asked": 300},
        {"num_chunks": 4, "times_asked": 0},
        {"num_chunks": 4},
    ]


# Mistakes


@pytest.mark.parametrize("argument", ["method.gate=1", "+method.sharpness=0", "sweep=crowd"])
def test_renamed_benchmark_setting_is_refused_with_new_name(monkeypatch, argument) -> None:
    old = next(name for name in RENAMED if name in argument)
    message = f"benchmarks.run: There is no setting '{old}' any more: write {RENAMED[old]}."
    assert run(monkeypatch, "task=locality", argument).startswith(message)


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        (
            "task=encyclopaedia",
            "There is no task 'encyclopaedia'. There are 2wikimqa, capacity, .*updates; see --help.",
        ),
        ("method=doc2lora", "There is no method 'doc2lora'. There are .*doc_to_lora, "),
        ("sweep=small", "There is no sweep 'small'. There are .*tiny"),
        ("num_case=1", "There is no setting 'num_case'. There are task, method, checkpoint, "),
        ("+cases=1", "There is no setting 'cases'. There are task, method, checkpoint, "),
        ("task.num_case=1", "There is no setting 'task.num_case'"),
        ("+task.num_case=1", "There is no setting 'task.num_case'. There are .*task.num_cases"),
        ("+method.lr=1", "There is no setting 'method.lr'"),
        ("task.num_cases=many", "task.num_cases should be a whole number, got 'many'"),
        ("seed=x", "seed should be a whole number, at least 0, got 'x'"),
        ("seed=-1", "seed should be a whole number, at least 0, got -1"),
        ("max_new_tokens=0", "max_new_tokens should be a whole number, at least 1, got 0"),
        ("force=perhaps", "force should be true or false, got 'perhaps'"),
        ("device=gpu", "device should be cpu, cuda or auto, got 'gpu'"),
        ("threads=0", "threads should be a whole number, at least 1 or null, got 0"),
        ("task", "Cannot read the argument 'task'"),
        ("task=capacity,updates", "Several values need brackets: .*"),
    ],
)
def test_mistake_in_a_cells_settings_is_one_line(monkeypatch, tmp_path, argument, says) -> None:
    message = run(monkeypatch, f"output_dir={tmp_path / 'cells'}", argument)
    assert re.match(f"benchmarks.run: {says}", message) and "\n" not in message
    assert not list(tmp_path.iterdir())


def test_benchmark_help_explains_settings_and_choices(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "--help") is None
    printed = capsys.readouterr().out
    assert re.search(r"^ *max_new_tokens: 32 +# of an answer$", printed, re.MULTILINE)
    assert re.search(r"^ *no_context +The question alone: the floor$", printed, re.MULTILINE)
    assert re.search(r"^ *many_documents +Recall from 1 to 64 documents", printed, re.MULTILINE)
