"""train.py as it is called: a run, a resumed one, both trainings in a row, and mistakes told in one line."""

import csv
import logging
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import hypernet.training
from hypernet.base_model import fingerprint, load_base_model
from hypernet.checkpoint_io import SafetensorsCheckpointIO
from hypernet.doc_to_lora import DocToLoRA
from hypernet.training import encyclopedia_texts

SCRIPT = Path(__file__).parents[1] / "train.py"
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


def test_the_command_trains_and_leaves_a_checkpoint_logs_and_its_configuration(small, tmp_path):
    """In a process of its own, from another folder, as a user does."""
    command = [sys.executable, str(SCRIPT), *small, "trainer.max_steps=2"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
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


def test_a_run_goes_on_where_the_last_one_stopped(train, small, tmp_path):
    train(*small, "trainer.max_steps=2")
    checkpoints = tmp_path / "outputs/small/checkpoints"
    saved = SafetensorsCheckpointIO().load_checkpoint(checkpoints / "last.safetensors")
    assert saved["global_step"] == 2
    train(*small, "trainer.max_steps=3", "ckpt_path=last", "logger.name=again")
    assert steps_logged(tmp_path / "outputs/small/again") == [2]
    newest = max(checkpoints.iterdir(), key=lambda path: path.stat().st_mtime)
    assert SafetensorsCheckpointIO().load_checkpoint(newest)["global_step"] == 3


def test_the_same_seed_gives_the_same_model_and_another_one_another(train, small, tmp_path):
    prints = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(*small, "trainer.max_steps=2", f"name={name}", f"seed={seed}")
        model = DocToLoRA.from_pretrained(tmp_path / "outputs" / name / "checkpoint")
        prints.append(fingerprint(model.hypernetwork))
    assert prints[0] == prints[1] != prints[2]


def test_a_base_model_is_trained_and_a_hypernetwork_for_it(train, tmp_path, monkeypatch):
    few = lambda seed: encyclopedia_texts(seed=seed, num_articles=60)  # noqa: E731
    monkeypatch.setattr(hypernet.training, "encyclopedia_texts", few)
    printed = train(*SMALL, *BASE_MODEL, "trainer.max_steps=2")
    folder = Path("outputs/tiny_base_model/base_model")
    assert f"Base model written to {folder}" in printed
    assert load_base_model(folder)[0].config.hidden_size == 24
    train(*SMALL, *HYPERNETWORK, f"task.base_model={folder}", "trainer.max_steps=1")
    model = DocToLoRA.from_pretrained("outputs/tiny/checkpoint")
    assert model.internalize("Norbach is a town.").num_chunks == 1


def test_training_works_in_bf16(train, small):
    train(*small, "trainer.max_steps=1", "trainer.precision=bf16-mixed")


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "hints"),
    [
        (["trainer.max_step=1"], ["trainer.max_step", "max_step"]),
        (["task.hypernetwork.rnk=1"], ["task.hypernetwork.rnk"]),
        (["experiment=tinny"], ["experiment/tinny", "tiny_base_model"]),
        (["logger=tensorboard"], ["logger/tensorboard", "csv", "wandb"]),
        (["+task.hypernetwork.rnk=1"], ["unexpected keyword argument 'rnk'"]),
        (["+task.hypernetwork.aggregator.blocks=1"], ["has no blocks; it has latent_dim"]),
        (["task.stages=[{step: 1}]"], ["unexpected keyword argument 'step'"]),
        (["task.target_modules=[downproj]"], ["No nn.Linear named 'downproj'", "down_proj"]),
        (["task.base_model=/nowhere"], ["No base model in /nowhere"]),
        (["task.init_from=/nowhere"], ["No checkpoint at /nowhere"]),
        (["ckpt_path=last"], ["holds no checkpoint yet", "Leave ckpt_path out"]),
        (["ckpt_path=nowhere.safetensors"], ["No checkpoint nowhere.safetensors"]),
        (["trainer.max_steps=9"], ["max_steps is 9, but there are 3 batches"]),
        (["trainer.max_steps=1", "task.stages=???"], ["task.stages"]),
        (["experiment=null"], ["Config group override must be a string"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and "=" in value[0] else "",
)
def test_a_mistake_ends_the_run_with_one_line_that_names_it(train, small, tmp_path, arguments, hints):
    with pytest.raises(SystemExit) as exit:
        train(*small, *arguments)
    message = str(exit.value.code)
    assert message.startswith("train.py: ") and "\n" not in message
    assert all(hint in message for hint in hints), message
    assert not list(tmp_path.rglob("*.safetensors"))


def test_help_says_what_there_is(train, capsys):
    with pytest.raises(SystemExit) as exit:
        train("--help")
    assert not exit.value.code
    printed = capsys.readouterr().out
    assert "python train.py ckpt_path=last" in printed and "experiment: tiny" in printed
