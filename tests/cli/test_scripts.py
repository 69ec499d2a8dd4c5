"""Script: what a Hydra command says of mistakes, and its help; on a command of this file's own."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from hypernet.cli.errors import BROKEN_PIPE
from hypernet.cli.scripts import Script, check_targets, help_of
from hypernet.cli.settings import Count, Settings

ROOT = Path(__file__).parents[2]


class Trial(Settings):
    runs: Count
    model: dict


SCRIPT = Script("trial", Trial, renamed={"rounds": "runs", "model=old": "model=new"}, less="Lower runs.")
NO_NAMES = ("[1]", "[]", "[[tiny]]", "{a:1}", "null", "1.5", "true", "[new,1]")
CONFIG = """\
# python trial.py: a trial
defaults:
  - model: tiny
  - _self_

runs: 3          # of each

hydra:
  run: {dir: .}
  output_subdir: null
  job_logging: {root: {handlers: [console]}}
  help:
    template: |
      A trial.

      $CONFIG

      $APP_CONFIG_GROUPS
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The YAML of the command, with a group to choose from; HYDRA_FULL_ERROR is taken back."""
    (tmp_path / "model").mkdir()
    for name, text in {
        "tiny": "# @package _global_.model\n# A small one: told in\n# two lines. And more.\nrank: 1\n",
        "new": "rank: 2\n",
    }.items():
        (tmp_path / "model" / f"{name}.yaml").write_text(text)
    (tmp_path / "trial.yaml").write_text(CONFIG)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "trial.yaml"


def run(config, monkeypatch, *arguments, task=lambda trial: None):
    """The command; what it exits with."""
    monkeypatch.setattr(sys, "argv", ["trial", *arguments])
    main = hydra.main(config_path=str(config.parent), config_name="trial", version_base="1.3")(SCRIPT(task))
    try:
        SCRIPT.run(main, config)
    except SystemExit as stop:
        return stop.code
    return None


def test_task_gets_checked_settings(config, monkeypatch):
    seen = []
    assert run(config, monkeypatch, "runs=2", "model=new", task=seen.append) is None
    assert seen == [Trial(runs=2, model={"rank": 2})]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["runs=x"], "runs should be a whole number, at least 1, got 'x'."),
        (["rnus=1"], "There is no setting 'rnus'. There are runs, model; see --help."),
        (["+rnus=1"], "There is no setting 'rnus'. There are runs, model; see --help."),
        (["model.rnk=1"], "There is no setting 'model.rnk'; see --help."),
        (["rounds=1"], "There is no setting 'rounds' any more: write runs. See --help."),
        (["+rounds=1"], "There is no setting 'rounds' any more: write runs. See --help."),
        (["model=old"], "There is no setting 'model=old' any more: write model=new. See --help."),
        (["model=large"], "There is no model 'large'. There are new, tiny; see --help."),
        *(([f"model={other}"], f"model should be one of new, tiny, got {other}; see --help.") for other in NO_NAMES),
        (["--runs", "3"], "Settings have no dashes: write runs=... instead of --runs."),
        (["--bogus=1"], "There is no option --bogus=1. Settings are key=value, without dashes; see --help."),
        (["-x", "runs=1"], "There is no option -x. "),
        (["--cfg", "no"], "Argument --cfg/-c: invalid choice: 'no'"),
        (["runs"], "Cannot read the argument 'runs'. "),
        (["runs=1,2"], "Several values need brackets: 'runs=[1,2]'. "),
        (["runs=${nothing}"], "Interpolation key 'nothing' not found"),
        (["runs=???"], "Missing mandatory value: runs"),
    ],
)
def test_mistake_in_an_argument_is_one_line(config, monkeypatch, arguments, says):
    message = run(config, monkeypatch, *arguments)
    assert message.startswith(f"trial: {says}") and "\n" not in message


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("a\nb"), "trial: a b"),
        (MemoryError(), "trial: Out of memory. Lower runs."),
        (OSError("no"), "trial: no"),
    ],
)
def test_mistake_within_the_task_is_one_line(config, monkeypatch, capsys, error, says):
    def task(trial):
        raise error

    assert run(config, monkeypatch, task=task) == says
    assert not capsys.readouterr().err


def test_warning_within_the_task_is_one_line(config, monkeypatch, capsys):
    def task(trial):
        for text in ("wide\nline", "other", "other"):
            warnings.warn(text, stacklevel=1)

    shown = warnings.showwarning
    assert run(config, monkeypatch, task=task) is None
    assert capsys.readouterr().err == "trial: warning: wide line\ntrial: warning: other\n"
    assert warnings.showwarning is shown


def test_interrupted_task_says_so(config, monkeypatch, capsys):
    def task(trial):
        raise KeyboardInterrupt

    assert run(config, monkeypatch, task=task) == 130
    assert capsys.readouterr().err == "trial: interrupted\n"


def test_mistake_of_ours_keeps_its_traceback(config, monkeypatch):
    def task(trial):
        raise TypeError("ours")

    with pytest.raises(TypeError, match="ours"):
        run(config, monkeypatch, task=task)


def test_sweep_goes_on_past_a_wrong_run(config, monkeypatch):
    seen = []
    sweep = ["--multirun", "hydra.sweep.dir=.", "hydra.sweep.subdir=.", "runs=0,2"]
    message = run(config, monkeypatch, *sweep, task=seen.append)
    assert message.startswith("trial: runs should be") and "\n" not in message
    assert [trial.runs for trial in seen] == [2]


def test_help_is_the_comments_of_the_yaml(config, monkeypatch, capsys):
    assert run(config, monkeypatch, "--help") is None
    printed = capsys.readouterr().out
    assert printed == help_of(config) + "\n"
    assert "runs: 3          # of each" in printed and "defaults" not in printed and "hydra" not in printed
    assert re.search(r"^model=\n  new *\n  tiny  A small one: told in two lines$", printed, re.MULTILINE)


def test_targets_are_checked_by_their_signatures():
    fine = {"a": [{"_target_": "fractions.Fraction", "_partial_": True}], "b": None, "c": {"_target_": "tests.x.y"}}
    with pytest.raises(ValueError, match="^c._target_ should be a class or a function, got 'tests.x.y'.$"):
        check_targets(fine)
    term = {"_target_": "hypernet.training.losses.KeyContrast", "weight": "much"}
    with pytest.raises(ValueError, match="^a.0.weight should be a number, got 'much'.$"):
        check_targets({"a": [term]})
    check_targets(OmegaConf.to_container(OmegaConf.create({"a": [{**term, "weight": 1}]})))


def test_reader_who_leaves_early_sees_no_mistake():
    command = [sys.executable, "generate_adapter.py", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        process.stdout.close()  # as `| head -0` does
        assert process.stderr.read() == b""
    assert process.returncode == BROKEN_PIPE
