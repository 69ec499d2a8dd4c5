"""train.py as it is called: a run, a resumed one, both trainings in a row, and mistakes told in one line."""

import csv
import fcntl
import logging
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

import hypernet.training.build
from hypernet.base.base_model import fingerprint, load_base_model
from hypernet.doc_to_lora import DocToLoRA
from hypernet.training.build import encyclopedia_texts
from hypernet.training.run_state import SafetensorsCheckpointIO, find_checkpoint

SCRIPT = Path(__file__).parents[2] / "train.py"
STAGE = "[{steps: 3, batch_size: 2, facts_per_entity: [1, 2]}]"
SMALL = [
    *(f"task.stages={STAGE}", f"task.validation_stages={STAGE}", "checkpoint_every=1", "trainer.log_every_n_steps=1"),
    *("trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.val_check_interval=2"),
]
HYPERNETWORK = [f"task.hypernetwork.{key}" for key in ("rank=2", "aggregator.num_blocks=1", "aggregator.latent_dim=16")]
BASE_MODEL = [
    *("experiment=tiny_base_model", "task.vocab_size=500", "task.base_model.hidden_size=24"),
    *("task.base_model.intermediate_size=24", "task.base_model.num_hidden_layers=1"),
]


@pytest.fixture
def train(monkeypatch, tmp_path, capsys):
    """train(*arguments): runs train.py in this process, in an empty folder; returns what it printed."""
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    handlers, level, lightning_level = root.handlers[:], root.level, logging.getLogger("lightning.pytorch").level
    environment = dict(os.environ)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        printed = capsys.readouterr()
        return printed.out + printed.err

    yield run
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]  # PL_GLOBAL_SEED, HYDRA_FULL_ERROR
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("lightning.pytorch").setLevel(lightning_level)


@pytest.fixture
def small(tiny_base_model_folder):
    """Arguments of a training of the hypernetwork that takes a second."""
    return [*SMALL, *HYPERNETWORK, f"task.base_model={tiny_base_model_folder}", "name=small"]


def steps_logged(folder: Path) -> list[int]:
    (path,) = folder.rglob("metrics.csv")
    with path.open() as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row.get("train/loss")]


# Runs


def test_command_leaves_checkpoint_logs_and_configuration(commands, small, tmp_path):
    result = commands.run("train.py", [*small, "trainer.max_steps=2"], cwd=tmp_path)
    assert result.code == 0, result.stderr
    output = tmp_path / "outputs" / "small"
    assert sorted(path.name for path in output.iterdir()) == [
        ".hydra",
        "checkpoint",
        "checkpoints",
        "logs",
        "train.log",
    ]
    assert "max_steps: 2" in (output / ".hydra/config.yaml").read_text()
    assert steps_logged(output / "logs") == [0, 1]
    assert f"Checkpoint written to {Path('outputs/small/checkpoint')}" in (output / "train.log").read_text()
    model = DocToLoRA.from_pretrained(output / "checkpoint")
    assert model.generate(["Who?"], model.internalize("Norbach is a town."), max_new_tokens=2)


def test_train_resumes_where_the_last_run_stopped(train, small, tmp_path):
    train(*small, "trainer.max_steps=2")
    checkpoints = tmp_path / "outputs/small/checkpoints"
    saved = SafetensorsCheckpointIO().load_checkpoint(find_checkpoint("last", checkpoints))
    assert saved["global_step"] == 2
    train(*small, "trainer.max_steps=3", "ckpt_path=last")
    assert steps_logged(tmp_path / "outputs/small/logs") == [0, 1, 2]
    newest = max(checkpoints.iterdir(), key=lambda path: path.stat().st_mtime)
    assert SafetensorsCheckpointIO().load_checkpoint(newest)["global_step"] == 3


def test_same_seed_gives_the_same_model(train, small, tmp_path):
    prints = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(*small, "trainer.max_steps=2", f"name={name}", f"seed={seed}")
        model = DocToLoRA.from_pretrained(tmp_path / "outputs" / name / "checkpoint")
        prints.append(fingerprint(model.hypernetwork))
    assert prints[0] == prints[1] != prints[2]


def test_train_makes_base_model_and_its_hypernetwork(train, tmp_path, monkeypatch):
    few = lambda seed: encyclopedia_texts(seed=seed, num_articles=60)  # noqa: E731
    monkeypatch.setattr(hypernet.training.build, "encyclopedia_texts", few)
    printed = train(*SMALL, *BASE_MODEL, "trainer.max_steps=2")
    folder = Path("outputs/tiny_base_model/base_model")
    assert f"Base model written to {folder}" in printed
    assert load_base_model(folder)[0].config.hidden_size == 24
    one_layer = "task.context_encoder.concat_layer=-1"  # the base model has no other
    train(*SMALL, *HYPERNETWORK, f"task.base_model={folder}", one_layer, "trainer.max_steps=1")
    model = DocToLoRA.from_pretrained("outputs/encyclopedia_tiny/checkpoint")
    assert model.internalize("Norbach is a town.").num_chunks == 1


def test_bf16_trains_with_losses_near_those_of_float32(train, small, tmp_path):
    """bfloat16 rounds to 1 part in 256: within 1 %. B starts at zero, so what is not zero was learned."""
    for precision in ("32-true", "bf16-mixed"):
        train(*small, "experiment=tiny", "trainer.max_steps=3", f"trainer.precision={precision}", f"name={precision}")
    one, other = (tmp_path / "outputs" / name for name in ("32-true", "bf16-mixed"))
    for name in ("train/loss", "train/kl", "train/nll"):
        values = logged(other / "logs", name)
        assert len(values) == 3 and values == pytest.approx(logged(one / "logs", name), rel=0.01)
    model = DocToLoRA.from_pretrained(other / "checkpoint")
    assert all(B.abs().max() > 1e-4 for B in model.internalize("Norbach is a town.").B.values())
    assert {parameter.dtype for parameter in model.hypernetwork.parameters()} == {torch.float32}


def logged(folder: Path, name: str) -> list[float]:
    (path,) = folder.rglob("metrics.csv")
    with path.open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def test_two_processes_train_as_one_does(train, commands, small, tmp_path):
    """As a user starts them, with gloo; and with accumulated parts on top. Keys would compare fewer documents."""
    asked = "facts_per_entity: [1, 3], num_joined_documents: [1, 3], num_cross_document: 1"
    stages = f"task.stages=[{{steps: 3, batch_size: 5, {asked}}}]"
    arguments = [*small, "experiment=tiny", stages, "trainer.max_steps=3", "trainer.val_check_interval=6", "threads=1"]
    train(*arguments, "name=one")
    same = "+callbacks.same={_target_: tests.two_processes.SameWeights}"
    two = ["trainer.devices=2", "trainer.strategy=ddp", "trainer.accumulate_grad_batches=2", same, "name=two"]
    result = commands.run("train.py", [*arguments, *two], cwd=tmp_path)
    assert result.code == 0, result.stderr
    assert (tmp_path / "same_weights.txt").read_text() == "3 steps, 2 processes"
    one, both = (tmp_path / "outputs" / name for name in ("one", "two"))
    for name in ("train/loss", "train/kl", "train/locality_kl"):
        assert logged(both / "logs", name) == pytest.approx(logged(one / "logs", name), rel=1e-5, abs=1e-6)
    networks = [DocToLoRA.from_pretrained(folder / "checkpoint").hypernetwork for folder in (one, both)]
    for a, b in zip(*(network.parameters() for network in networks), strict=True):
        # Adam's first steps have the size of lr, whatever the gradient's; rounding can turn the smallest around.
        assert (a - b).abs().mean() < 1e-5
    states = SafetensorsCheckpointIO().load_checkpoint(find_checkpoint("last", both / "checkpoints"))["random_states"]
    assert len(states) == 2


def test_earlier_run_is_replaced_only_on_request(train, small, tmp_path):
    train(*small, "trainer.max_steps=2")
    folder = tmp_path / "outputs/small"

    def left() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    before = left()
    other = tmp_path / "other.safetensors"
    other.write_bytes(find_checkpoint("last", folder / "checkpoints").read_bytes())
    for more in ([], ["trainer.max_steps=1"], [f"ckpt_path={other}"], ["name=x", "output_dir=outputs/small"]):
        with pytest.raises(
            SystemExit, match="outputs/small holds an earlier run .*ckpt_path=last.*name=.*overwrite=true"
        ):
            train(*small, "trainer.max_steps=3", *more)
        assert left() == before
    with pytest.raises(SystemExit):
        train(*small, "trainer.max_steps=3", "overwrite=true", "optimizer.lr=abc")
    assert left() == before
    train(*small, "trainer.max_steps=1", "overwrite=true", "seed=1")
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000001.safetensors"]
    assert "seed: 1" in (folder / ".hydra/config.yaml").read_text()
    assert steps_logged(folder) == [0]
    assert (folder / "train.log").read_text().count("Checkpoint written to") == 1
    train(*small, "trainer.max_steps=2", "ckpt_path=auto", "seed=1")
    assert (folder / "train.log").read_text().count("Checkpoint written to") == 2


def test_second_run_in_a_folder_is_refused(train, small, tmp_path):
    folder = tmp_path / "shared"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "train.log").write_text("first")
    held = os.open(folder, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(SystemExit, match=f"Another run writes to {folder} now"):
        train(*small, "trainer.max_steps=1", f"output_dir={folder}")
    assert (folder / "train.log").read_text() == "first"
    os.close(held)  # as its end does
    train(*small, "trainer.max_steps=1", f"output_dir={folder}")
    assert "first" not in (folder / "train.log").read_text()


def test_run_is_not_mixed_into_a_folder_of_other_files(train, small, tmp_path):
    note = tmp_path / "mine/note.txt"
    note.parent.mkdir()
    note.write_text("mine")
    for more in ([], ["overwrite=true"], ["ckpt_path=auto"]):
        with pytest.raises(SystemExit, match="mine holds other files than a run's, such as note.txt.*output_dir="):
            train(*small, "trainer.max_steps=1", "output_dir=mine", *more)
    assert [path.name for path in note.parent.iterdir()] == ["note.txt"]
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed/train.log").touch()  # of a run that was killed at once
    train(*small, "trainer.max_steps=1", "output_dir=killed")
    (tmp_path / "killed/note.txt").touch()  # about the run that is there
    train(*small, "trainer.max_steps=1", "output_dir=killed", "overwrite=true")


def test_experiment_may_have_keys_of_its_own_that_are_used(train, small, tmp_path):
    (tmp_path / "experiment").mkdir()
    path = tmp_path / "experiment" / "mine.yaml"
    text = "# @package _global_\nfew: 1\nname: mine\ntrainer:\n  max_steps: %s\n"
    mine = ["--config-dir", str(tmp_path), *(a for a in small if not a.startswith("name=")), "experiment=mine"]
    path.write_text(text % 1)
    with pytest.raises(SystemExit, match="There is no setting 'few'"):
        train(*mine)
    path.write_text(text % "[")
    with pytest.raises(SystemExit, match="^train.py: while parsing a flow .*mine.yaml"):
        train(*mine)
    path.write_text(text % "${few}")
    train(*mine)
    train(*mine, "trainer.max_steps=2", "ckpt_path=last")  # nothing refers to it now
    assert (tmp_path / "outputs/mine/checkpoint").is_dir()


def test_sweep_gives_each_run_its_own_folder(train, small, tmp_path):
    train("--multirun", *small, "seed=1,2", "trainer.max_steps=1")
    sweep = tmp_path / "outputs/small/sweep"
    networks = [DocToLoRA.from_pretrained(sweep / str(i) / "checkpoint").hypernetwork for i in range(2)]
    assert fingerprint(networks[0]) != fingerprint(networks[1])
    for i, seed in enumerate((1, 2)):
        assert steps_logged(sweep / str(i) / "logs") == [0]
        checkpoint = SafetensorsCheckpointIO().load_checkpoint(find_checkpoint("last", sweep / str(i) / "checkpoints"))
        assert checkpoint["config"]["seed"] == seed
        assert checkpoint["config"]["output_dir"].endswith(f"sweep/{i}")


def test_failed_sweep_run_is_a_one_line_error(train, small, tmp_path):
    with pytest.raises(SystemExit) as exit:
        train("--multirun", *small, "trainer.max_steps=9,1")
    assert exit.value.code.startswith("train.py: max_steps is 9") and "\n" not in exit.value.code


@pytest.mark.story(19)
def test_sweep_runs_in_parallel_processes(commands, small, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs the extra sweep")
    sweep = ["--multirun", *small, "hydra/launcher=joblib", "seed=1,2", "trainer.max_steps=1"]
    result = commands.run("train.py", sweep, cwd=tmp_path)
    assert result.code == 0, result.stderr
    for i in range(2):
        assert steps_logged(tmp_path / "outputs/small/sweep" / str(i) / "logs") == [0]


def test_sweep_launchers_are_hydra_plugins():
    for name, plugin in (("joblib", "JoblibLauncher"), ("slurm", "SlurmLauncher")):
        with initialize_config_dir(str(SCRIPT.parent / "conf"), version_base="1.3"):
            cfg = compose("train", overrides=[f"hydra/launcher={name}"], return_hydra_config=True)
        assert cfg.hydra.launcher._target_.endswith(plugin)


# Mistakes


@pytest.mark.parametrize("start", ["\ufeff# @package _global_\n", ""], ids=["byte order mark", "no such line"])
def test_experiment_without_its_package_line_is_refused(train, small, tmp_path, start):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"{start}seed: 1\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="begin with the line '# @package _global_'"):
        train("--config-dir", str(tmp_path), *small, "experiment=mine")


@pytest.mark.parametrize(
    ("arguments", "hints"),
    [
        (["trainer.max_step=1"], ["trainer.max_step", "max_step"]),
        (["task.hypernetwork.rnk=1"], ["task.hypernetwork.rnk"]),
        (["experiment=tinny"], ["There is no experiment 'tinny'", "tiny_base_model"]),
        (["logger=tensorboard"], ["There is no logger 'tensorboard'. There are csv, wandb"]),
        (["task.objective.kl_weight=1"], ["no kl_weight any more; it is called kl.weight now"]),
        (["+task.objective.share_weight=1"], ["no share_weight any more; it is called attribution.weight now"]),
        (["task.objective.silence_weight=1"], ["no silence_weight any more: no experiment used it"]),
        (["task.objective.kl.wieght=1"], ["task.objective.kl.wieght"]),
        (["task.context_encoder.beside=-2"], ["is called task.context_encoder.concat_layer now"]),
        (["+task.context_encoder.beside=-2"], ["has no beside any more; it is called concat_layer now"]),
        (["+task.hypernetwork.rnk=1"], ["no setting 'task.hypernetwork.rnk'", "task.hypernetwork.rank"]),
        (["+task.hypernetwork.aggregator.blocks=1"], ["has no blocks; it has latent_dim"]),
        (["task.stages=[{step: 1}]"], ["no setting 'task.stages.0.step'", "task.stages.0.steps"]),
        (["task.target_modules=[downproj]"], ["No nn.Linear named 'downproj'", "down_proj"]),
        (["task.base_model=/nowhere"], ["No base model in /nowhere"]),
        (["task.init_from=/nowhere"], ["No checkpoint at /nowhere"]),
        (["experiment=niah_tiny_distractors"], ["task.init_from=outputs/niah_tiny/checkpoint", "=niah_tiny leaves"]),
        (["task.base_model=outputs/tiny_base_model/base_model"], ["experiment=tiny_base_model leaves. Run that first"]),
        (["task.base_model=outputs/mine/base_model"], ["No base model in outputs/mine/base_model"]),
        (["callbacks.compile.backend=indctor"], ["torch.compile has no backend 'indctor'"]),
        (["ckpt_path=last"], ["holds no checkpoint yet", "Leave ckpt_path out"]),
        (["ckpt_path=nowhere.safetensors"], ["No checkpoint nowhere.safetensors"]),
        (["trainer.max_steps=9"], ["max_steps is 9, but there are 3 batches"]),
        (["trainer.max_steps=1", "task.stages=???"], ["task.stages"]),
        (["on_nan=ignore"], ["on_nan should be one of stop, skip, got 'ignore'"]),
        (["trainer.accumulate_grad_batches=3", "trainer.max_steps=1"], ["2 documents cannot be split into 3 parts"]),
        (["callbacks.throughput.peak_tflops=guess"], ["peak_tflops must be a number"]),
        (["experiment=null"], ["experiment should be one of encyclopedia_tiny, ", "got null"]),
        (["optimizer.lr=abc"], ["optimizer.lr should be a number above 0, got 'abc'"]),
        (["optimizer.lr=0"], ["optimizer.lr should be a number above 0, got 0"]),
        (["optimizer.betas=[0.9]"], ["optimizer.betas should be two numbers from 0 to 1, got [0.9]"]),
        (["optimizer.warmup_steps=1.5"], ["optimizer.warmup_steps should be a whole number, at least 0, got 1.5"]),
        (["+optimizer.momentum=1"], ["no setting 'optimizer.momentum'. There are optimizer.lr, "]),
        (["trainer.max_steps=0"], ["trainer.max_steps should be a whole number, at least 1, got 0"]),
        (["trainer.max_steps=-1"], ["trainer.max_steps should be a whole number, at least 1, got -1"]),
        (["trainer.precision=8"], ["trainer.precision should be one of 64, 32, 16 or ", "got 8"]),
        (["trainer.accelerator=abacus"], ["The trainer cannot be made: ", "abacus"]),
        (["trainer.devices=0"], ["The trainer cannot be made: "]),
        (["trainer.devices=1000"], ["trainer.devices is 1000, but this CPU has ", " cores", "at most "]),
        (["+trainer.max_step=1"], ["no setting 'trainer.max_step'. There are trainer.accelerator, "]),
        (["threads=0"], ["threads should be a whole number, at least 1 or null, got 0"]),
        (["seed=x"], ["seed should be a whole number, at least 0 and below 2^32, got 'x'"]),
        (["seed=-1"], ["seed should be a whole number, at least 0 and below 2^32, got -1"]),
        (["checkpoint_every=0"], ["checkpoint_every should be a whole number, at least 1, got 0"]),
        (["num_workers=-1"], ["num_workers should be a whole number, at least 0, got -1"]),
        (["name=''"], ["name should be a text, got ''"]),
        (["name=../../x"], ["A name is part of a path and stays in its folder, but '../../x' does not"]),
        ([f"output_dir={SCRIPT}/x"], [f"{SCRIPT}/x cannot be written: {SCRIPT} is a file"]),
        (["overwrite=perhaps"], ["overwrite should be true or false, got 'perhaps'"]),
        (["+nonsense=1"], ["There is no setting 'nonsense'. There are name, seed, "]),
        (["+chekpoint_every=1"], ["There is no setting 'chekpoint_every'"]),
        (["task.max_chunk_tokens=few"], ["task.max_chunk_tokens should be a whole number, got 'few'"]),
        (["task.hypernetwork.rank=large"], ["task.hypernetwork.rank should be a whole number, got 'large'"]),
        (["task.objective.kl.weight=much"], ["task.objective.kl.weight should be a number, got 'much'"]),
        (["callbacks.non_finite.max_skipped=few"], ["callbacks.non_finite.max_skipped should be a whole number"]),
        (["+task.chunks=1"], ["no setting 'task.chunks'. There are task.base_model, "]),
        (["task.stages=[{steps: 1, batch_size: x}]"], ["task.stages.0.batch_size should be a whole number, got 'x'"]),
        (
            ["task.stages=[{steps: 1, num_entities: 3}]"],
            ["task.stages.0.num_entities should be a list of 2, each a whole"],
        ),
        (["task.stages=[{steps: 1, company: [1, 2]}]"], ["task.stages.0.company is called num_joined_documents now"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and "=" in value[0] else "",
)
def test_train_mistake_is_a_one_line_error(train, small, tmp_path, arguments, hints):
    with pytest.raises(SystemExit) as exit:
        train(*small, *arguments)
    message = str(exit.value.code)
    assert message.startswith("train.py: ") and "\n" not in message
    assert all(hint in message for hint in hints), message
    assert not list(tmp_path.iterdir())


def test_train_help_explains_settings_and_choices(train):
    printed = train("--help")
    assert "python train.py ckpt_path=last" in printed
    assert re.search(r"^ *encyclopedia_tiny +The shipped hypernetwork", printed, re.M)
    assert re.search(r"^ *checkpoint_every: 100 +# optimizer steps$", printed, re.M)
