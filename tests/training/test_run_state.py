"""Training checkpoints: nested values come back exactly, nothing is pickled, a crash leaves no file."""

import errno
import json
import math
import os
import pickle
import random
import resource
from collections import OrderedDict, namedtuple
from contextlib import contextmanager
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from hypernet.base.packed_rows import Segment, pack_row, pad_rows
from hypernet.data.datamodule import BatchDataModule
from hypernet.data.splitting import StepPart
from hypernet.training.run_state import RunCheckpoint, SafetensorsCheckpointIO, find_checkpoint

IO = SafetensorsCheckpointIO()


def same(left, right) -> bool:
    """Equal in value and in type, tensors bit for bit."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and bytes_of(left) == bytes_of(right)
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right or (left != left and right != right)


def bytes_of(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).tolist() if tensor.numel() else []


def round_trip(value, folder):
    IO.save_checkpoint({"value": value}, folder / "a.safetensors")
    return IO.load_checkpoint(folder / "a.safetensors")["value"]


@pytest.mark.parametrize(
    "value",
    [
        {"nested": [{"deep": (1, [2.5, None], {"x": torch.arange(3)})}], 0: {"step": torch.tensor(4.0)}, 1: {}},
        (torch.randn(2, 3, dtype=torch.bfloat16), torch.zeros(0, 4), torch.tensor(True), torch.tensor(7)),
        [math.inf, -math.inf, math.nan, 0.1 + 0.2, -0.0, 1e300, 10**40, -1],
        {1: "int", "1": "str", 1.5: "float", False: None} | {None: (), "": []},
        {"bits": torch.tensor([math.nan, -0.0, math.inf])},
        ['ü \n " 灯 \x00', True, False, None],
        {"tensor": {"dict": [["list", {"tuple": 3}]]}},
        torch.randn(4, 6).t(),
        [],
        (),
    ],
    ids=range(10),
)
def test_run_state_roundtrip_is_exact(tmp_path, value):
    assert same(round_trip(value, tmp_path), value)


def test_tensors_in_places_of_equal_names_stay_apart(tmp_path):
    value = {"a/b": torch.tensor(1), "a": {"b": torch.tensor(2)}, 1: torch.tensor(3), "1": torch.tensor(4)}
    assert same(round_trip(value, tmp_path), value)


def test_tied_weights_and_views_are_saved_by_value(tmp_path):
    weight = torch.arange(12.0).view(3, 4)
    got = round_trip({"one": weight, "two": weight, "row": weight[1], "every other": weight[:, ::2]}, tmp_path)
    assert same(got, {"one": weight, "two": weight, "row": weight[1].clone(), "every other": weight[:, ::2].clone()})


def test_parameters_and_ordered_dicts_become_plain(tmp_path):
    Pair = namedtuple("Pair", "first second")
    value = OrderedDict(weight=nn.Parameter(torch.ones(2)), pair=Pair(1, 2), path=Path("a/b"))
    expected = {"weight": torch.ones(2), "pair": (1, 2), "path": str(Path("a/b"))}
    assert same(round_trip(value, tmp_path), expected)


def test_saved_optimizer_resumes_unchanged(tmp_path):
    def step(optimizer, parameter):
        optimizer.zero_grad()
        (parameter * torch.arange(3)).square().sum().backward()
        optimizer.step()

    straight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([straight], lr=0.1)
    step(optimizer, straight)
    saved = round_trip({"optimizer": optimizer.state_dict(), "weight": straight}, tmp_path)
    resumed = nn.Parameter(saved["weight"])
    other = torch.optim.AdamW([resumed], lr=5.0)
    other.load_state_dict(saved["optimizer"])
    for _ in range(2):
        step(optimizer, straight)
        step(other, resumed)
    assert torch.equal(straight, resumed)


def test_run_checkpoint_is_safetensors_with_json(tmp_path):
    IO.save_checkpoint({"weights": {"w": torch.ones(3)}, "epoch": 2}, tmp_path / "new" / "a.safetensors")
    path = tmp_path / "new" / "a.safetensors"
    with safe_open(path, framework="pt") as file:
        assert [file.get_tensor(name).tolist() for name in file.keys()] == [[1, 1, 1]]  # noqa: SIM118
        assert json.loads(file.metadata()["checkpoint"])
    content = path.read_bytes()
    assert b"\x80\x02" not in content[8:] and b"PK\x03\x04" not in content
    with pytest.raises(pickle.UnpicklingError):
        pickle.loads(content)


@pytest.mark.parametrize(
    ("value", "name"),
    [({1, 2}, "set"), (len, "builtin_function_or_method"), (Exception("x"), "Exception"), (b"x", "bytes")],
)
def test_run_state_refuses_other_types_with_their_place(tmp_path, value, name):
    with pytest.raises(TypeError, match=rf"holds a {name} at /callbacks/mine/1"):
        IO.save_checkpoint({"callbacks": {"mine": [0, value]}}, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_run_state_refuses_keys_of_other_types(tmp_path):
    with pytest.raises(TypeError, match="at /state"):
        IO.save_checkpoint({"state": {frozenset(): 1}}, tmp_path / "a.safetensors")


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "cut off", "text", "torch.save", "other safetensors"])
def test_what_is_no_checkpoint_is_refused_with_its_path(tmp_path, kind):
    path = tmp_path / "a.safetensors"
    IO.save_checkpoint({"w": torch.ones(300)}, path)
    match kind:
        case "missing":
            path.unlink()
        case "folder":
            path.unlink()
            path.mkdir()
        case "empty":
            path.write_bytes(b"")
        case "cut off":
            path.write_bytes(path.read_bytes()[:-1])
        case "text":
            path.write_text("not a checkpoint\n" * 9)
        case "torch.save":
            torch.save({"w": torch.ones(3)}, path)
        case "other safetensors":
            safetensors.torch.save_file({"w": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="Cannot resume from .*Give a checkpoint that train.py wrote") as error:
        IO.load_checkpoint(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


class Crash(BaseException):
    """Like a kill: nothing that catches Exception sees it."""


@pytest.mark.parametrize("existing", [True, False])
def test_crash_while_saving_leaves_older_file_or_none(tmp_path, monkeypatch, existing):
    path = tmp_path / "a.safetensors"
    if existing:
        IO.save_checkpoint({"step": 1}, path)

    def crash(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise Crash

    monkeypatch.setattr(safetensors.torch, "save_file", crash)
    with pytest.raises(Crash):
        IO.save_checkpoint({"step": 2}, path)
    assert [file.name for file in tmp_path.iterdir()] == (["a.safetensors"] if existing else [])
    if existing:
        assert IO.load_checkpoint(path) == {"step": 1}


def test_remove_does_not_mind_a_file_that_is_gone(tmp_path):
    IO.save_checkpoint({"step": 1}, tmp_path / "a.safetensors")
    IO.remove_checkpoint(tmp_path / "a.safetensors")
    IO.remove_checkpoint(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_last_finds_the_newest_checkpoint_by_time(tmp_path):
    for age, name in enumerate(["b", "c", "a"]):
        IO.save_checkpoint({"step": 1}, tmp_path / f"{name}.safetensors")
        os.utime(tmp_path / f"{name}.safetensors", (1000 - age, 1000 - age))
    (tmp_path / "newest.txt").touch()
    (tmp_path / ".b.safetensors.0123abc").touch()  # what a killed run may leave
    assert find_checkpoint("last", tmp_path) == tmp_path / "b.safetensors"
    os.utime(tmp_path / "c.safetensors", (2000, 2000))
    assert find_checkpoint("last", str(tmp_path)) == tmp_path / "c.safetensors"


@pytest.mark.parametrize("name", ["last", "auto"])
def test_damaged_checkpoints_are_passed_over_with_a_warning(tmp_path, caplog, name):
    for age in range(3):
        path = tmp_path / f"step-{age}.safetensors"
        IO.save_checkpoint({"weights": torch.ones(300)}, path)
        os.utime(path, (1000 + age, 1000 + age))
    (tmp_path / "step-2.safetensors").write_bytes(b"")
    path = tmp_path / "step-1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    os.utime(path, (1001, 1001))
    assert find_checkpoint(name, tmp_path) == tmp_path / "step-0.safetensors"
    (message,) = said(caplog)
    assert message.index("step-2.safetensors") < message.index("step-1.safetensors") < message.index("the older")
    (tmp_path / "step-0.safetensors").write_text("no")
    with pytest.raises(ValueError, match="no checkpoint in .* can be read: .*step-2.*Put one back") as error:
        find_checkpoint(name, tmp_path)
    assert "\n" not in str(error.value)


def test_auto_starts_anew_without_checkpoints(tmp_path):
    assert find_checkpoint("auto", tmp_path / "never made") is None
    IO.save_checkpoint({"step": 1}, tmp_path / "a.safetensors")
    assert find_checkpoint("auto", tmp_path) == tmp_path / "a.safetensors"


def test_find_checkpoint_accepts_path_or_none(tmp_path):
    (tmp_path / "a.safetensors").touch()
    assert find_checkpoint(str(tmp_path / "a.safetensors"), "elsewhere") == tmp_path / "a.safetensors"
    assert find_checkpoint(None, tmp_path) is None


@pytest.mark.parametrize("name", ["last", "nowhere/a.safetensors"])
def test_missing_checkpoint_is_refused_with_what_to_do(tmp_path, name):
    with pytest.raises(ValueError, match="ckpt_path") as error:
        find_checkpoint(name, tmp_path / "never made")
    assert "\n" not in str(error.value)


# A run's checkpoints


class Noise(L.LightningModule):
    """Its weight is what every kind of random number made of it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def training_step(self, batch, batch_idx):
        noise = torch.tensor([random.gauss(0, 1), np.random.standard_normal(), torch.randn(1).item()])
        return (self.weight * noise).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def fit(folder, steps, *, ckpt_path=None, every=1, keep=2, config=None, callbacks=(), **settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    saving = RunCheckpoint(folder, every_n_train_steps=every, keep=keep, config=config)
    trainer = L.Trainer(max_steps=steps, callbacks=[*callbacks, saving], plugins=[IO], **quiet, **settings)
    module = Noise()
    data = BatchDataModule(train=list(range(20)))
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module.weight.detach()


def seed(number):
    for start in (random.seed, np.random.seed, torch.manual_seed):
        start(number)


def test_resume_restores_random_state(tmp_path):
    seed(1)
    whole = fit(tmp_path / "whole", 5)
    seed(1)
    fit(tmp_path / "parts", 3)
    seed(2)
    resumed = fit(tmp_path / "parts", 5, ckpt_path=find_checkpoint("last", tmp_path / "parts"))
    assert torch.equal(resumed, whole)


def test_newest_are_kept_and_half_written_ones_removed(tmp_path):
    (tmp_path / ".step-000001.safetensors.0123abc").touch()
    (tmp_path / "other.safetensors").touch()
    fit(tmp_path, 7, every=2, keep=3)
    names = ["other.safetensors", "step-000004.safetensors", "step-000006.safetensors", "step-000007.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_checkpoints_stand_between_optimizer_steps(tmp_path):
    class Splits(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            assert StepPart.of(batch).num_parts == 2

    rows = pad_rows([pack_row([], [Segment([1, 2, 3], 1, False, 0)])] * 2, pad_id=0)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    callbacks = [Splits(), RunCheckpoint(tmp_path, every_n_train_steps=1)]
    trainer = L.Trainer(max_steps=3, accumulate_grad_batches=2, callbacks=callbacks, plugins=[IO], **quiet)
    trainer.fit(Noise(), BatchDataModule(train=[rows] * 5))
    path = find_checkpoint("last", tmp_path)
    progress = IO.load_checkpoint(path)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
    assert path.name == "step-000003.safetensors" and progress["ready"] == 6


def test_configuration_is_saved_and_a_difference_is_named(tmp_path, caplog):
    fit(tmp_path, 1, config={"optimizer": {"lr": 0.1, "betas": [1, 2]}, "seed": 0, "name": "a"})
    path = find_checkpoint("last", tmp_path)
    assert IO.load_checkpoint(path)["config"]["optimizer"] == {"lr": 0.1, "betas": [1, 2]}
    fit(tmp_path, 2, config={"optimizer": {"lr": 0.1, "betas": [1, 2]}, "seed": 0, "name": "b"}, ckpt_path=path)
    assert not said(caplog)
    fit(tmp_path, 3, config={"optimizer": {"lr": 0.2, "betas": [1, 2]}, "extra": 1}, ckpt_path=path)
    expected = "extra (was None, is 1); optimizer.lr (was 0.1, is 0.2); seed (was 0, is None)"
    assert said(caplog) == [f"This run goes on with other settings than it began with: {expected}"]


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "hypernet.training.run_state"]


@pytest.mark.parametrize(("every", "keep"), [(0, 2), (1, 0)])
def test_run_checkpoint_refuses_impossible_intervals(tmp_path, every, keep):
    with pytest.raises(ValueError, match="must be at least 1"):
        RunCheckpoint(tmp_path, every_n_train_steps=every, keep=keep)


@contextmanager
def full_disk(monkeypatch, kind):
    """Writing fails after some bytes, as on a full disk, or by a real limit of the system."""
    if kind == "limit":
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        return

    def fail(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", fail)
        yield


@pytest.mark.parametrize("kind", ["full", "limit"])
def test_full_disk_ends_the_run_and_leaves_older_checkpoints(tmp_path, monkeypatch, kind):
    fit(tmp_path, 2)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) == 2
    with pytest.raises(OSError) as error, full_disk(monkeypatch, kind):
        fit(tmp_path, 4, ckpt_path=find_checkpoint("last", tmp_path))
    assert error.value.errno == (errno.ENOSPC if kind == "full" else errno.EFBIG)
    message = str(error.value)
    assert "Cannot write the checkpoint of step 3" in message and "ckpt_path=last" in message and "\n" not in message
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
