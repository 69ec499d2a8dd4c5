"""benchmarks/kernel_speed.py: the methods compute the same, rows say what was measured, red tests print no speed."""

import json
from typing import Literal

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from pydantic import create_model

from benchmarks import kernel_speed
from benchmarks.kernel_speed import METHODS, Case, cases, floor_of, legal, make_inputs, markdown, measure
from hypernet.kernels.lora_delta.cost import Machine

MACHINE = Machine("made up", 1e9, 1e9, 1e-6)
SETTINGS = {
    "models": ["tiny"],
    "modules": ["down_proj", "up_proj"],
    "tokens": [3, 20],
    "ranks": [8, 24],
    "adapters": [1, 4],
    "methods": list(METHODS),
    "budget_s": 0.0,
    "rotate_mib": 1,
    "memory_limit_gib": 1,
    "seed": 0,
}


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
    monkeypatch.setitem(kernel_speed.MODELS, "tiny", (12, 40))
    settings = create_model("Tiny", __base__=kernel_speed.KernelSettings, models=(list[Literal["tiny"]], ...))
    monkeypatch.setattr(kernel_speed.SCRIPT, "settings", settings)


def test_kernel_cases_are_all_combinations_with_enough_tokens():
    found = list(cases(OmegaConf.create(SETTINGS)))
    assert len(found) == len(set(found)) == 2 * 2 * (1 + 2)  # three tokens do not make four segments
    case = Case("tiny", "down_proj", 18, 24, 4)
    assert case.dims == (40, 12) and case._replace(module="up_proj").dims == (12, 40)
    assert case.lengths == [5, 5, 4, 4]
    assert case.slots == [[0, 1, 8], [2, 3, 8], [4, 5, 8], [6, 7, 8]]  # the bias slot is shared
    assert case._replace(rank=8).slots == [[0], [1], [2], [3]]


@pytest.mark.parametrize("method", ["repeat_per_token", "loop_of_addmm", "padded_bmm"])
@pytest.mark.parametrize("case", [Case("tiny", "down_proj", 18, 24, 4), Case("tiny", "up_proj", 7, 8, 1)])
def test_every_kernel_alternative_computes_the_same(method, case):
    inputs = make_inputs(case, device="cpu", dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    results = []
    for name in ("ours", method):
        y = METHODS[name](case, "cpu")(inputs)
        results.append((y, *torch.autograd.grad(y, [inputs.x, inputs.A, inputs.B], inputs.base)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)  # gradients of some tens


def test_kernel_speed_rows_make_comparison_table():
    case = Case("tiny", "down_proj", 20, 24, 4)
    rows = measure(case, OmegaConf.create(SETTINGS), MACHINE, device="cpu", dtype=torch.float32)
    rows = json.loads(json.dumps(rows))
    deltas = [row for row in rows if row["kind"] == "delta"]
    assert {row["method"] for row in deltas} == set(METHODS) - {"grouped_mm"}  # which needs bf16 on a GPU
    assert {row["direction"] for row in deltas} == {"forward", "backward", "both"}
    for row in deltas:
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["runs"] >= 5
        floor = floor_of(case, row["direction"], 4)
        assert row["floor_share"] == pytest.approx(floor.seconds(MACHINE) * 1000 / row["p50_ms"])
        assert row["gb_per_s"] == pytest.approx(floor.num_bytes / row["p50_ms"] / 1e6)
    peak = {row["method"]: row["peak_extra_mib"] for row in deltas if row["direction"] == "both"}
    # A and B for every token: 20 · 24 · 52 · 4 bytes, and as much for their gradients, not all of it at one time.
    assert peak["repeat_per_token"] * 2**20 > 20 * 24 * 52 * 4
    assert 0 < peak["ours"] < peak["repeat_per_token"] / 2
    assert {row["method"] for row in rows if row["kind"] == "application"} == {"apart", "delta first"}
    table = markdown(rows)
    assert table.startswith("tiny, down_proj, 20 tokens, 4 adapters:") and "| 24 | both | ours |" in table
    assert table.count("\n") == 3 + 3 * len(set(METHODS) - {"grouped_mm"})


def test_kernel_methods_beyond_memory_limit_are_skipped():
    case = Case("gemma-2-2b", "down_proj", 4096, 64, 8)
    assert not legal("repeat_per_token", case, dtype=torch.bfloat16, device="cpu", memory_limit=2**33)
    assert legal("repeat_per_token", case, dtype=torch.bfloat16, device="cpu", memory_limit=2**34)
    assert legal("ours", case, dtype=torch.bfloat16, device="cpu", memory_limit=0)


def run(*overrides: str) -> None:
    """The command's task with these settings."""
    with initialize_config_dir(str(kernel_speed.ROOT / "conf"), version_base="1.3"):
        cfg = compose("kernel_speed", overrides=list(overrides))
    kernel_speed.main.__wrapped__(cfg)


def test_kernel_speed_prints_nothing_while_tests_fail(monkeypatch, capsys):
    monkeypatch.setattr(kernel_speed, "tests_pass", lambda: False)
    with pytest.raises(SystemExit, match="The tests of lora_delta fail, so no speed is printed"):
        run("models=[tiny]", "output=null")
    assert "|" not in capsys.readouterr().out


def test_kernel_speed_command_writes_rows_and_table(tmp_path, capsys):
    settings = ["models=[tiny]", "tokens=[9]", "ranks=[16]", "adapters=[1]", "budget_s=0", "verify=false", "device=cpu"]
    run(*settings, f"output={tmp_path / 'rows.jsonl'}", "rotate_mib=1")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["method"] for row in rows if row["kind"] == "application"} == {"apart", "delta first", "merge"}
    assert all(row["machine"]["bytes_per_s"] > 0 and row["run"]["versions"]["torch"] for row in rows)
    printed = capsys.readouterr().out
    assert "| 16 | forward | ours |" in printed and "merge" in printed


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("models=[gpt-9]", "models should be a list, each one of qwen2.5-0.5b, gemma-2-2b, .*, got .*gpt-9"),
        ("methods=[ours,magic]", "methods should be a list, each one of ours, .*, got .*magic"),
        ("ranks=[12]", r"ranks should be a list, each a multiple of 8, got \[12\]"),
        ("tokens=128", "tokens should be a list, each a whole number, at least 1, got 128"),
        ("dtype=float8", "dtype should be one of float32, bfloat16, float16 or null, got 'float8'"),
        ("output=benchmarks", "benchmarks is a folder. Name a file."),
        ("output=README.md/rows.jsonl", "README.md is a file. Name another one."),
    ],
)
def test_unknown_kernel_settings_are_refused_with_known_ones(setting, says, monkeypatch):
    monkeypatch.chdir(kernel_speed.ROOT)
    monkeypatch.setattr(kernel_speed.SCRIPT, "settings", kernel_speed.KernelSettings)
    with pytest.raises(SystemExit, match=f"^benchmarks.kernel_speed: .*{says}"):
        run(setting)


@pytest.mark.parametrize("output", ["null", "nowhere.jsonl", "README.md"])
def test_plot_without_rows_is_a_one_line_error(output):
    with pytest.raises(SystemExit, match=r"Cannot read rows from output=.*Name the file that has them\."):
        run("models=[tiny]", "plot_only=true", f"output={output}")


def test_roofline_plot_is_drawn_from_rows(tmp_path):
    pytest.importorskip("matplotlib", reason="the plot needs the extra [bench]")
    case = Case("tiny", "down_proj", 20, 24, 4)
    rows = measure(case, OmegaConf.create(SETTINGS), MACHINE, device="cpu", dtype=torch.float32)
    kernel_speed.roofline([{**row, "machine": MACHINE._asdict()} for row in rows], tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert text.startswith("<svg ") and "TFLOP/s" in text and "made up, measured roofs" in text
