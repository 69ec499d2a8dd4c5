"""Training checkpoints: nested values come back exactly, nothing is pickled, a crash leaves no file."""

import json
import math
import os
import pickle
from collections import OrderedDict, namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import hypernet.checkpoint_io
import hypernet.files
from hypernet.checkpoint_io import SafetensorsCheckpointIO, find_checkpoint

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
def test_values_come_back_exactly(tmp_path, value):
    assert same(round_trip(value, tmp_path), value)


def test_tensors_in_places_of_equal_names_do_not_replace_each_other(tmp_path):
    value = {"a/b": torch.tensor(1), "a": {"b": torch.tensor(2)}, 1: torch.tensor(3), "1": torch.tensor(4)}
    assert same(round_trip(value, tmp_path), value)


def test_tied_weights_and_views_are_saved_as_what_they_show(tmp_path):
    weight = torch.arange(12.0).view(3, 4)
    got = round_trip({"one": weight, "two": weight, "row": weight[1], "every other": weight[:, ::2]}, tmp_path)
    assert same(got, {"one": weight, "two": weight, "row": weight[1].clone(), "every other": weight[:, ::2].clone()})


def test_parameters_and_ordered_containers_become_plain_ones(tmp_path):
    Pair = namedtuple("Pair", "first second")
    value = OrderedDict(weight=nn.Parameter(torch.ones(2)), pair=Pair(1, 2), path=Path("a/b"))
    expected = {"weight": torch.ones(2), "pair": (1, 2), "path": str(Path("a/b"))}
    assert same(round_trip(value, tmp_path), expected)


def test_an_optimizer_goes_on_as_if_it_had_not_been_saved(tmp_path):
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


def test_the_file_is_safetensors_with_json_and_no_pickle(tmp_path):
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
def test_another_type_is_refused_with_its_name_and_place(tmp_path, value, name):
    with pytest.raises(TypeError, match=rf"holds a {name} at /callbacks/mine/1"):
        IO.save_checkpoint({"callbacks": {"mine": [0, value]}}, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_key_of_another_type_is_refused(tmp_path):
    with pytest.raises(TypeError, match="at /state"):
        IO.save_checkpoint({"state": {frozenset(): 1}}, tmp_path / "a.safetensors")


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "cut off", "text", "torch.save", "other safetensors"])
def test_what_is_no_checkpoint_is_refused_in_one_line_with_its_path(tmp_path, kind):
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
            hypernet.files.save_file({"w": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="Cannot resume from .*Give a checkpoint that train.py wrote") as error:
        IO.load_checkpoint(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


class Crash(BaseException):
    """Like a kill: nothing that catches Exception sees it."""


@pytest.mark.parametrize("existing", [True, False])
def test_a_crash_while_saving_leaves_the_older_file_or_none(tmp_path, monkeypatch, existing):
    path = tmp_path / "a.safetensors"
    if existing:
        IO.save_checkpoint({"step": 1}, path)

    def crash(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise Crash

    monkeypatch.setattr(hypernet.files, "save_file", crash)
    with pytest.raises(Crash):
        IO.save_checkpoint({"step": 2}, path)
    assert [file.name for file in tmp_path.iterdir()] == (["a.safetensors"] if existing else [])
    if existing:
        assert IO.load_checkpoint(path) == {"step": 1}


def test_remove_takes_the_file_away_and_does_not_mind_if_it_is_gone(tmp_path):
    IO.save_checkpoint({"step": 1}, tmp_path / "a.safetensors")
    IO.remove_checkpoint(tmp_path / "a.safetensors")
    IO.remove_checkpoint(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_last_is_the_newest_checkpoint_whatever_its_name(tmp_path):
    for age, name in enumerate(["b.safetensors", "c.safetensors", "a.safetensors", "newest.txt"]):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1000 - age, 1000 - age) if name != "newest.txt" else None)
    (tmp_path / ".b.safetensors.0123abc").touch()  # what a killed run may leave
    assert find_checkpoint("last", tmp_path) == tmp_path / "b.safetensors"
    os.utime(tmp_path / "c.safetensors", (2000, 2000))
    assert find_checkpoint("last", str(tmp_path)) == tmp_path / "c.safetensors"


def test_a_named_checkpoint_is_taken_and_none_stays_none(tmp_path):
    (tmp_path / "a.safetensors").touch()
    assert find_checkpoint(str(tmp_path / "a.safetensors"), "elsewhere") == tmp_path / "a.safetensors"
    assert find_checkpoint(None, tmp_path) is None


@pytest.mark.parametrize("name", ["last", "nowhere/a.safetensors"])
def test_a_checkpoint_that_is_not_there_is_said_so_with_what_to_do(tmp_path, name):
    with pytest.raises(ValueError, match="ckpt_path") as error:
        find_checkpoint(name, tmp_path / "never made")
    assert "\n" not in str(error.value)
