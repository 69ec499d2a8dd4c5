"""Divided weights: two processes take the steps that one takes, and their checkpoints are everybody's."""

import csv

import pytest
import torch

from hypernet.doc_to_lora import DocToLoRA
from hypernet.training.run_state import SafetensorsCheckpointIO
from hypernet.training.sharding import whole

STAGE = "[{steps: 3, batch_size: 5, facts_per_entity: [1, 3], num_joined_documents: [1, 3], num_cross_document: 1}]"
SMALL = [
    *(f"task.stages={STAGE}", f"task.validation_stages={STAGE}", "checkpoint_every=1", "keep_checkpoints=9"),
    *("trainer.log_every_n_steps=1", "trainer.precision=32-true", "trainer.val_check_interval=2", "threads=1"),
    *("task.hypernetwork.rank=2", "task.hypernetwork.aggregator.num_blocks=1"),
    *("task.hypernetwork.aggregator.latent_dim=16", "trainer.enable_progress_bar=false"),
]
FSDP = ["trainer=fsdp", "+callbacks.divided={_target_: tests.two_processes.DividedWeights}"]
LOSSES = ("train/loss", "train/kl", "train/locality_kl")


@pytest.fixture
def train(commands, tmp_path, tiny_base_model_folder):
    """train(*arguments, name=...): the command, in two processes with trainer=fsdp; returns the run's folder."""

    def command(*given, name, accelerator="cpu"):
        arguments = [*SMALL, "experiment=tiny"]  # without Muon
        arguments += [f"task.base_model={tiny_base_model_folder}", f"trainer.accelerator={accelerator}"]
        processes = 2 if "trainer=fsdp" in given and accelerator == "cpu" else 1
        result = commands.run("train.py", [*arguments, *given, f"name={name}"], cwd=tmp_path, processes=processes)
        assert result.code == 0, result.output
        return tmp_path / "outputs" / name

    return command


def logged(folder, *names):
    """The values of all runs in this folder, by step."""
    found = {}
    for path in sorted(folder.rglob("metrics.csv")):
        with path.open() as file:
            for row in csv.DictReader(file):
                if row.get(names[0]):
                    found[int(row["step"])] = [float(row[name]) for name in names]
    return found


def checkpoint(folder, step):
    return SafetensorsCheckpointIO().load_checkpoint(folder / "checkpoints" / f"step-{step:06d}.safetensors")


@pytest.mark.story(19)
def test_two_processes_of_divided_weights_step_as_one(train, tmp_path):
    one = train("trainer.max_steps=3", name="one")
    parts = ["trainer.accumulate_grad_batches=2", "trainer.val_check_interval=4"]
    two = train("trainer.max_steps=3", *FSDP, *parts, name="two")
    assert (tmp_path / "divided_weights.txt").read_text() == "3 steps, 2 processes"
    expected, found = logged(one, *LOSSES), logged(two, *LOSSES)
    assert list(expected) == list(found) == [0, 1, 2]
    for step, losses in expected.items():
        assert found[step] == pytest.approx(losses, rel=1e-5, abs=1e-6), step
    networks = [DocToLoRA.from_pretrained(folder / "checkpoint").hypernetwork for folder in (one, two)]
    for a, b in zip(*(network.parameters() for network in networks), strict=True):
        # Adam's first steps have the size of lr, whatever the gradient's; rounding can turn the smallest around.
        assert (a - b).abs().mean() < 1e-5

    # Checkpoints hold whole tensors under the same names, so either kind of run goes on from the other's.
    a, b = checkpoint(one, 2), checkpoint(two, 2)
    assert {n: t.shape for n, t in a["state_dict"].items()} == {n: t.shape for n, t in b["state_dict"].items()}
    states = [saved["optimizer_states"][0]["state"] for saved in (a, b)]
    assert states[0].keys() == states[1].keys()
    for number, state in states[0].items():
        assert {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in states[1][number].items()}
        assert torch.allclose(state["exp_avg"], states[1][number]["exp_avg"], rtol=1e-3, atol=1e-6)
    for name, begun, arguments in (("from_two", two, []), ("from_one", one, FSDP)):
        go_on = f"ckpt_path={begun / 'checkpoints/step-000002.safetensors'}"
        folder = train("trainer.max_steps=3", go_on, *arguments, name=name)
        assert logged(folder, *LOSSES) == {2: pytest.approx(expected[2], rel=1e-5, abs=1e-6)}


def test_sharded_gradients_equal_whole_ones(commands, tmp_path, tiny_base_model_folder):
    """With activation checkpointing too. The base model's embeddings are divided where they train."""
    result = commands.run("tests.two_processes", [str(tiny_base_model_folder)], cwd=tmp_path)
    assert result.code == 0, result.output


def test_whole_returns_plain_tensors_unchanged():
    tensor = torch.ones(2)
    assert whole(tensor) is tensor


@pytest.mark.requires_gpu
def test_sharded_weights_train_on_a_gpu(train):
    folder = train("trainer.max_steps=2", "trainer=fsdp", "trainer.devices=1", name="gpu", accelerator="gpu")
    assert list(logged(folder, *LOSSES)) == [0, 1]
