"""Settings: what is refused, and the line that says which one and what was wanted."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import pytest
import torch
from pydantic import Field

from hypernet.cli.settings import (
    Above0,
    AtLeast0,
    Count,
    Device,
    Name,
    Number,
    Open,
    OutputFile,
    OutputFolder,
    Settings,
    Share,
    Text,
    Texts,
    arguments_of,
    checked,
    choose_device,
)


class Inner(Settings):
    lr: Above0
    share: Share = 0.5


class Trial(Settings):
    runs: Count = 1
    seed: Number = 0
    kind: Literal["a", "b"] = "a"
    rank: Count | None = None
    sizes: list[Count] = [1]
    pause_s: AtLeast0 = 0.0
    name: Text = "x"
    files: Texts = Field(default=["x"], examples=["[a,b]"])
    device: Device = "auto"
    output: OutputFile | None = None
    output_dir: OutputFolder = "outputs"
    path: Name = "x"
    on: bool = True
    scale: float | list[float] = 1.0
    inner: Inner = Inner(lr=1)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"runs": 0}, "runs should be a whole number, at least 1, got 0."),
        ({"runs": 2.0}, "runs should be a whole number, at least 1, got 2.0."),
        ({"runs": True}, "runs should be a whole number, at least 1, got True."),
        ({"runs": None}, "runs should be a whole number, at least 1, got None."),
        ({"seed": -1}, "seed should be a whole number, at least 0, got -1."),
        ({"kind": "c"}, "kind should be one of a, b, got 'c'."),
        ({"rank": "x"}, "rank should be a whole number, at least 1 or null, got 'x'."),
        ({"sizes": [3, 0]}, "sizes should be a list, each a whole number, at least 1, got [3, 0]."),
        ({"sizes": 3}, "sizes should be a list, each a whole number, at least 1, got 3."),
        ({"pause_s": float("nan")}, "pause_s should be a number, at least 0, got nan."),
        ({"pause_s": float("inf")}, "pause_s should be a number, at least 0, got inf."),
        ({"name": ""}, "name should be a text, got ''."),
        ({"files": {"a": 1}}, "files should be a text or a list of texts, got {'a': 1}. Write 'files=[a,b]'."),
        ({"device": "gpu"}, "device should be cpu, cuda or auto, got 'gpu'."),
        ({"on": "yes"}, "on should be true or false, got 'yes'."),
        ({"scale": "x"}, "scale should be a number or a list, each a number, got 'x'."),
        ({"inner": {"lr": "x"}}, "inner.lr should be a number above 0, got 'x'."),
        ({"inner": {"lr": 1, "share": 1.5}}, "inner.share should be a number from 0 to 1, got 1.5."),
        ({"inner": {}}, "inner.lr should be a number above 0, got None."),
        ({"inner": 3}, "inner should be settings of its own, got 3."),
        ({"inner": {"lr": 1, "x": 1}}, "There is no setting 'inner.x'. There are inner.lr, inner.share; see --help."),
        ({"run": 1}, "There is no setting 'run'. There are runs, seed, kind, "),
    ],
)
def test_wrong_setting_is_one_line_with_its_place(values, says):
    with pytest.raises(ValueError) as error:
        checked(Trial, values)
    assert str(error.value).startswith(says) and "\n" not in str(error.value)


def test_right_settings_are_kept_as_given():
    trial = checked(Trial, {"runs": 3, "files": "a.txt", "scale": 2, "inner": {"lr": 1}, "rank": None})
    assert (trial.runs, trial.files, trial.scale, trial.inner.lr, trial.rank) == (3, ["a.txt"], 2, 1, None)


def test_settings_below_a_place_are_named_with_it():
    with pytest.raises(ValueError, match="^task.inner.lr should be"):
        checked(Trial, {"inner": {"lr": 0}}, place="task")


@pytest.mark.parametrize(
    ("setting", "says"),
    [("output", "cannot be written"), ("output_dir", "is a file. Name a folder"), ("path", "stays in its folder")],
)
def test_path_is_checked_before_the_work(tmp_path, setting, says):
    (tmp_path / "file").touch()
    value = str(tmp_path / ("file/rows.jsonl" if setting == "output" else "file"))
    with pytest.raises(ValueError, match=says):
        checked(Trial, {setting: value})


# What a function takes


class Stage(NamedTuple):
    steps: int
    sizes: tuple[int, int] = (1, 2)


class Made:
    def __init__(self, model: torch.nn.Module, *, rank: int = 8, source: str | Mapping[str, float] = "x") -> None: ...


def for_type_checkers(run: "OnlyThere | None" = None, rank: int = 8) -> None: ...  # noqa: F821


def with_others(rank: int, **others: Any) -> None: ...


@pytest.mark.parametrize(
    ("target", "values", "says"),
    [
        (Made, {"rank": "x"}, "at.rank should be a whole number, got 'x'."),
        (Made, {"source": 3}, "at.source should be a text or settings of its own, got 3."),
        (Made, {"rnk": 3}, "There is no setting 'at.rnk'. There are at.model, at.rank, at.source; see --help."),
        (Stage, {"steps": "x"}, "at.steps should be a whole number, got 'x'."),
        (Stage, {"sizes": [1]}, r"at.sizes should be a list of 2, each a whole number, got [1]."),
        (Stage, {"sizes": 1}, r"at.sizes should be a list of 2, each a whole number, got 1."),
        (with_others, {"rank": None}, "at.rank should be a whole number, got None."),
    ],
)
def test_signature_is_the_schema_of_a_call(target, values, says):
    with pytest.raises(ValueError) as error:
        checked(arguments_of(target), values, place="at")
    assert str(error.value) == says


def test_signature_leaves_unchecked_what_yaml_cannot_give():
    checked(arguments_of(Made), {"model": {"_target_": "x"}, "source": {"a": 1}})
    checked(arguments_of(with_others), {"rank": 1, "other": object()})
    checked(arguments_of(Stage), {"sizes": [1, 2]})
    checked(arguments_of(for_type_checkers), {"run": 3})
    with pytest.raises(ValueError, match="There is no setting 'rnk'"):
        checked(arguments_of(for_type_checkers), {"rnk": 3})
    assert issubclass(arguments_of(with_others), Open)


@pytest.mark.parametrize(
    ("kind", "wanted", "wrong"),
    [
        (int | None, "a whole number or null", "x"),
        (Sequence[float], "a list, each a number", 3),
        (tuple[int, ...], "a list, each a whole number", 3),
        (Annotated[float, Field(gt=0)] | None, None, -1),  # of no plain type: for the function itself
    ],
)
def test_types_of_a_signature_are_told_in_words(kind, wanted, wrong):
    def take(value=None) -> None: ...

    take.__annotations__["value"] = kind
    if wanted is None:
        checked(arguments_of(take), {"value": wrong})
    else:
        with pytest.raises(ValueError, match=f"^value should be {wanted}, got"):
            checked(arguments_of(take), {"value": wrong})


def test_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="device is cuda:1, but torch .* finds 0 CUDA GPUs. Set device=cpu"):
        choose_device("cuda:1")
