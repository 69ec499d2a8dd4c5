"""Runs of train.py that are killed, told to stop, or meet a full disk: what they leave and how they go on."""

import csv
import os
import random
import signal
from pathlib import Path
from typing import NamedTuple

import pytest

from hypernet.training.run_state import SafetensorsCheckpointIO, find_checkpoint
from tests.forked_commands import Commands, Finished

NUM_STEPS = 24
NUM_KILLS = int(os.environ.get("HYPERNET_NUM_KILLS", "6"))


@pytest.fixture(scope="module")
def arguments(tiny_base_model_folder):
    """Of a run of 24 quick steps with a checkpoint after each."""
    asked = "facts_per_entity: [1, 2], num_cross_document: 1, num_joined_documents: [1, 2]"
    stages = f"[{{steps: {NUM_STEPS}, batch_size: 2, {asked}}}]"
    return [
        *(f"task.stages={stages}", "task.validation_stages=[{steps: 1, batch_size: 2}]", "checkpoint_every=1"),
        *("trainer.log_every_n_steps=1", "trainer.val_check_interval=10", "trainer.enable_progress_bar=false"),
        *("trainer.accelerator=cpu", "trainer.precision=32-true", f"trainer.max_steps={NUM_STEPS}", "threads=1"),
        *("task.hypernetwork.rank=2", "task.hypernetwork.aggregator.num_blocks=1"),
        *("task.hypernetwork.aggregator.latent_dim=16", f"task.base_model={tiny_base_model_folder}"),
    ]


class Runs(NamedTuple):
    """Runs of train.py in one folder."""

    commands: Commands
    folder: Path

    def run(self, arguments: list[str], *, kill: dict | None = None) -> Finished:
        return self.commands.run("train.py", arguments, cwd=self.folder, kill=kill)


@pytest.fixture(scope="module")
def runs(commands, tmp_path_factory):
    return Runs(commands, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(runs, arguments):
    """The folder of an undisturbed run."""
    result = runs.run([*arguments, "output_dir=whole"])
    assert result.code == 0, result.output
    return runs.folder / "whole"


def losses(folder: Path) -> dict[int, str]:
    """step → the loss that the run logged for it, as it is written; the steps come once each, in their order."""
    (path,) = folder.rglob("metrics.csv")
    with path.open() as file:
        logged = [(int(row["step"]), row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]
    assert [step for step, _ in logged] == sorted({step for step, _ in logged})
    return dict(logged)


def weights(folder: Path) -> bytes:
    return (folder / "checkpoint" / "hypernetwork.safetensors").read_bytes()


def test_uninterrupted_run_logs_every_step(whole):
    assert sorted(losses(whole)) == list(range(NUM_STEPS))


def test_run_killed_again_and_again_is_the_undisturbed_one(runs, arguments, whole):
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    folder = runs.folder / "killed"
    checkpoints = folder / "checkpoints"
    command = [*arguments, "output_dir=killed", "ckpt_path=auto"]
    # One in the middle of writing a checkpoint, one while starting, the others some steps later at any point of a step.
    kills = [{"while_writing": True}, {"steps": 0, "seconds": rng.uniform(0, 0.3)}]
    kills += [{"steps": rng.randint(1, 2), "seconds": rng.uniform(0, 0.05)} for _ in range(NUM_KILLS - 2)]
    rng.shuffle(kills)
    checkpoints.mkdir(parents=True)
    (checkpoints / ".tmpKilled").touch()  # as safetensors leaves it when it is killed while it writes
    for kill in kills:
        result = runs.run(command, kill=kill | {"checkpoints": checkpoints})
        assert result.code == -signal.SIGKILL, (seed, result.output)
    result = runs.run([*arguments, "output_dir=killed", "ckpt_path=last"])
    assert result.code == 0, (seed, result.output)
    expected, found = losses(whole), losses(folder)
    # A kill between a checkpoint and its log line leaves that step out of the log, never another value in it.
    assert {step: found[step] for step in found} == {step: expected[step] for step in found}, seed
    assert len(found) >= NUM_STEPS - len(kills)
    assert weights(folder) == weights(whole), seed
    assert not list(checkpoints.glob(".*"))  # nothing half-written stays


@pytest.mark.parametrize("stage", ["build", "fit"])
def test_ctrl_c_before_the_first_step_leaves_no_folder(runs, arguments, stage):
    """While the model is built; and within Lightning, which by itself exits without a word."""
    callback = f"+callbacks.stop={{_target_: tests.two_processes.InterruptedIn, stage: {stage}}}"
    result = runs.run([*arguments, "output_dir=stopped/early", callback])
    assert result.code == 130 and result.stderr.splitlines()[-1] == "train.py: interrupted", result.output
    assert "Traceback" not in result.output and not (runs.folder / "stopped").exists()


def test_resume_skips_and_names_damaged_checkpoint(runs, arguments, whole):
    assert runs.run([*arguments, "output_dir=damaged", "trainer.max_steps=4"]).code == 0
    newest = find_checkpoint("last", runs.folder / "damaged" / "checkpoints")
    newest.write_bytes(newest.read_bytes()[:-100])
    result = runs.run([*arguments, "output_dir=damaged", "ckpt_path=last"])
    assert result.code == 0
    assert f"{newest.name} (SafetensorError" in result.output and "step-000003.safetensors" in result.output
    assert weights(runs.folder / "damaged") == weights(whole)


def test_run_killed_before_its_result_writes_it_when_resumed(runs, arguments, whole):
    checkpoint = find_checkpoint("last", whole / "checkpoints")
    (runs.folder / "late" / "checkpoints").mkdir(parents=True)
    (runs.folder / "late" / "checkpoints" / checkpoint.name).write_bytes(checkpoint.read_bytes())
    assert runs.run([*arguments, "output_dir=late", "ckpt_path=last"]).code == 0
    assert weights(runs.folder / "late") == weights(whole)


# Told to stop


def test_signals_end_the_run_with_a_checkpoint_of_its_step(runs, arguments, whole):
    """One after the other, each some steps after the run went on."""
    folder, done = runs.folder / "told", 0
    # Few regular checkpoints: the one that is found was written because of the signal.
    arguments = [*arguments, "output_dir=told", "checkpoint_every=1000", "ckpt_path=auto"]
    for told in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        kill = {"rows": 4, "signal": int(told), "log": str(folder)}
        result = runs.run(arguments, kill=kill)
        assert result.code == 128 + told, result.output
        assert f"{told.name}: stopping with a checkpoint" in result.output and "Traceback" not in result.output
        path = find_checkpoint("last", folder / "checkpoints")
        steps = SafetensorsCheckpointIO().load_checkpoint(path)["global_step"]
        assert done < steps < NUM_STEPS
        assert f"Stopped after step {steps}; go on with ckpt_path=last." in result.output
        assert sorted(losses(folder)) == list(range(steps))
        assert not (folder / "checkpoint").exists()
        done = steps
    assert runs.run(arguments).code == 0
    assert losses(folder) == losses(whole)
    assert weights(folder) == weights(whole)
