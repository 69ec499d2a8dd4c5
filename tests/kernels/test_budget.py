"""Every kernel cross-compiles for sm_80 and sm_90 on this machine and stays within the committed budget."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from hypernet.kernels.lora_delta.budget import BUDGET, CAPABILITIES, CASES, DTYPES, GATED_CASES, exceeded, main, sources

ROOT = Path(__file__).parents[2]
COMMITTED = json.loads(BUDGET.read_text(encoding="utf-8"))


def test_no_kernel_spills_registers_and_every_one_has_a_budget():
    gates = {"gate", "gate_backward"}
    kernels = {"shrink", "expand", "outer", "ordered_sum", "scale", "scale_sum"}
    summing = [case for case in CASES if case != "decode"]  # while decoding expand adds up the parts
    wanted = {(k, case) for k in kernels for case in CASES} | {(k, case) for k in gates for case in GATED_CASES}
    wanted |= {("sum_parts", case) for case in summing}
    names = {f"sm_{c} {d} {case} {k}_kernel" for c in CAPABILITIES for d in DTYPES for k, case in wanted}
    assert set(COMMITTED["kernels"]) == names
    for name, needs in COMMITTED["kernels"].items():
        # 99 KiB of shared memory is what every GPU from sm_86 on gives a program.
        assert needs["stack"] == 0 and needs["registers"] < 255 and needs["shared"] <= 99 * 1024, name


def test_16_bit_launches_multiply_in_16_bits():
    """The interpreter widens them; what the budget compiles must be what a GPU runs."""
    command = (
        "from hypernet.kernels.lora_delta import budget\n"
        "found = {(name, str(launch.constants['COMPUTE'])) for name, dtype in budget.DTYPES.items()"
        " for launch in budget.launches('rank 8', dtype) if 'COMPUTE' in launch.constants}\n"
        "print(sorted(found))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[('bf16', 'bf16'), ('fp32', 'fp32')]"


def test_kernel_over_budget_is_reported():
    found = {name: dict(needs) for name, needs in COMMITTED["kernels"].items()}
    assert exceeded(found, COMMITTED["kernels"]) == []
    found["sm_90 bf16 decode shrink_kernel"]["stack"] = 8
    found["sm_90 bf16 decode new_kernel"] = {"registers": 1, "stack": 0, "shared": 0}
    first, second = exceeded(found, COMMITTED["kernels"])
    assert first.startswith("sm_90 bf16 decode shrink_kernel needs") and second.endswith("its budget is None")


def test_budget_was_made_of_these_kernels():
    """What was compiled for it, all four pairs of a dtype and a GPU, is what is here."""
    assert COMMITTED["sources"] == sources(), "make a new one: python -m hypernet.kernels.lora_delta.budget --write"


# Without a cache each case takes 5 s of each pair; those of the story are held by the sources as well.
@pytest.mark.skipif(triton.__version__ != COMMITTED["triton"], reason=f"the budget is for Triton {COMMITTED['triton']}")
@pytest.mark.parametrize("cases", [["decode"], pytest.param([*CASES], marks=pytest.mark.story(40))])
def test_every_kernel_compiles_within_its_budget(cases):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    pairs = ["sm_80 fp32", "sm_90 bf16"]  # each dtype and each GPU
    names = [f"{pair} {case} " for pair in pairs for case in cases]
    command = [sys.executable, "-m", "hypernet.kernels.lora_delta.budget", *names]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("shrink_kernel") == 2 * len(cases)
    assert {line[:10] for line in result.stdout.splitlines()} == set(pairs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sm_70", "sm_80"], "budget: no kernel's name begins with 'sm_70'; try 'sm_90 bf16'."),
        (["--write", "sm_90"], "budget: --write makes the whole budget; leave out 'sm_90'."),
    ],
)
def test_budget_command_errors_are_one_line(arguments, message, monkeypatch):
    monkeypatch.setattr("sys.argv", ["budget", *arguments])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == message
