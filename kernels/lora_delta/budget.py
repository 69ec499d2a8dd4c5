"""What the kernels need of a GPU, found out without one: registers, stack, shared memory, by cross-compiling them.

    python -m hypernet.kernels.lora_delta.budget               # compiles, prints a table, fails beyond the budget
    python -m hypernet.kernels.lora_delta.budget "sm_90 bf16"  # only kernels whose names begin so; more can be given
    python -m hypernet.kernels.lora_delta.budget --write       # makes what it finds the new budget, in budget.json

The launches are those of the op itself: it runs on tensors without memory, and each launch is recorded instead of done.
A register more than 255 is impossible and a stack means spilled registers: both cost more than they look.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import kernels
from .plan import Plan

BUDGET = Path(__file__).with_name("budget.json")
CAPABILITIES = (80, 90)
# name: tokens per segment, segments, slots per segment and rank of a slot; gemma-2-2b's down_proj, a bias slot shared.
CASES = {"decode": (1, 16, 8, 8), "rank 8": (512, 8, 1, 8), "rank 64": (512, 8, 8, 8), "rank 256": (512, 8, 32, 8)}
GATED_CASES = ("decode", "rank 64")  # with more slots the tiles are the same
SOURCES = ("kernels.py", "plan.py")
D_IN, D_OUT = 9216, 2304
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64"}


class _Launch:
    """One recorded launch: `kernel[grid](*arguments, **constants)`."""

    def __init__(self, kernel: triton.JITFunction, arguments: tuple, constants: dict[str, Any]) -> None:
        self.kernel = kernel
        self.options = {key: constants.pop(key) for key in ("num_warps", "num_stages") if key in constants}
        names = kernel.arg_names
        self.signature, self.attributes = dict.fromkeys(constants, "constexpr"), {}
        self.constants = constants
        for i, (name, value) in enumerate(zip(names, arguments, strict=False)):
            special = not kernel.params[i].do_not_specialize
            if isinstance(value, torch.Tensor):
                self.signature[name] = _TYPES[value.dtype]
                self.attributes[(i,)] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                self.signature[name] = "fp32"
            elif special and value == 1:
                self.signature[name], self.constants = "constexpr", {**self.constants, name: 1}
            else:
                self.signature[name] = "i64" if abs(value) >= 2**31 else "i32"
                if special and value % 16 == 0:
                    self.attributes[(i,)] = [["tt.divisibility", 16]]
        self.signature = {name: self.signature[name] for name in names}

    def compile(self, capability: int) -> dict[str, int]:
        constants = {(self.kernel.arg_names.index(name),): value for name, value in self.constants.items()}
        source = ASTSource(self.kernel, self.signature, constexprs=constants, attrs=self.attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=self.options)
        return {**_usage(compiled.asm["cubin"]), "shared": compiled.metadata.shared}


class _Recorder:
    def __init__(self, kernel: triton.JITFunction, launches: list[_Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple):
        return lambda *arguments, **constants: self.launches.append(_Launch(self.kernel, arguments, constants))


@contextmanager
def _recording() -> Iterator[list[_Launch]]:
    launches: list[_Launch] = []
    originals = {name: value for name, value in vars(kernels).items() if name.endswith("_kernel")}
    vars(kernels).update({name: _Recorder(kernel, launches) for name, kernel in originals.items()})
    try:
        yield launches
    finally:
        vars(kernels).update(originals)


def launches(case: str, dtype: torch.dtype) -> list[_Launch]:
    """All launches of forward and backward, with a scale per slot and without one but gated."""
    tokens, segments, chunks, rank = CASES[case]
    slots = [[*range(i * chunks, (i + 1) * chunks), segments * chunks] for i in range(segments)]
    num_slots = segments * chunks + 1
    plan = Plan.from_lists([tokens] * segments, slots, num_slots=num_slots)
    new = lambda *shape, dtype=dtype: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
    T = tokens * segments
    base, x, A, B = new(T, D_OUT), new(T, D_IN), new(num_slots, rank, D_IN), new(num_slots, rank, D_OUT)
    scale, table = new(num_slots, dtype=torch.float32), new(len(plan.table), dtype=torch.int64)
    S = new(kernels.num_parts(T, D_IN), len(plan.pairs) * rank, dtype=torch.float32)
    with _recording() as found:
        for given, gate in ((scale, 0.0), (None, 1.5))[: 2 if case in GATED_CASES else 1]:
            needs = (True, True, True, given is not None)
            kernels.forward(base, x, A, B, given, 1.5, gate, table, S, plan.sizes)
            kernels.backward(base, x, S, A, B, given, 1.5, gate, table, plan.sizes, needs)
    return found


def measure(beginnings: tuple[str, ...] = ("",)) -> dict[str, dict[str, int]]:
    """{"sm_90 bf16 decode shrink_kernel": {"registers": ..., "stack": ..., "shared": ...}}; the most of equal names.

    beginnings: only kernels whose names begin with one of these are compiled.
    """
    result: dict[str, dict[str, int]] = {}
    seen: dict[str, dict[str, int]] = {}
    for type_name, dtype in DTYPES.items():
        for case in CASES:
            for launch in launches(case, dtype):
                for capability in CAPABILITIES:
                    name = f"sm_{capability} {type_name} {case} {launch.kernel.__name__}"
                    if not name.startswith(beginnings):
                        continue
                    key = repr(
                        (launch.kernel.__name__, launch.signature, launch.constants, launch.attributes, capability)
                    )
                    if key not in seen:
                        seen[key] = launch.compile(capability)
                    most = result.setdefault(name, dict(seen[key]))
                    result[name] = {what: max(most[what], number) for what, number in seen[key].items()}
    return result


def sources() -> str:
    """SHA-256 of the files that decide what is compiled: while it is that of budget.json, so are the needs."""
    return hashlib.sha256(b"".join(Path(__file__).with_name(name).read_bytes() for name in SOURCES)).hexdigest()


def exceeded(found: dict[str, dict[str, int]], budget: dict[str, dict[str, int]]) -> list[str]:
    """One line for each kernel that needs more than its budget, or has none."""
    lines = []
    for name, needs in found.items():
        allowed = budget.get(name)
        if allowed is None or any(needs[what] > allowed[what] for what in needs):
            lines.append(f"{name} needs {needs}, its budget is {allowed}")
    return lines


def _usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        text = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    (registers,), (stack,) = re.findall(r"REG:(\d+)", text), re.findall(r"STACK:(\d+)", text)
    return {"registers": int(registers), "stack": int(stack)}


def main() -> None:
    write, beginnings = "--write" in sys.argv[1:], tuple(given for given in sys.argv[1:] if given != "--write")
    budget = json.loads(BUDGET.read_text(encoding="utf-8"))
    if write and beginnings:
        sys.exit(f"budget: --write makes the whole budget; leave out {', '.join(map(repr, beginnings))}.")
    if unknown := [one for one in beginnings if not any(name.startswith(one) for name in budget["kernels"])]:
        sys.exit(f"budget: no kernel's name begins with {', '.join(map(repr, unknown))}; try 'sm_90 bf16'.")
    if kernels.interpreted():
        sys.exit("budget: the kernels are interpreted; unset TRITON_INTERPRET and run again.")
    found = measure(beginnings or ("",))
    for name, needs in found.items():
        print(f"{name:45}", *(f"{what} {number:6}" for what, number in needs.items()))
    if write:
        temporary = BUDGET.with_name(f".{BUDGET.name}.{os.getpid()}")
        text = json.dumps({"triton": triton.__version__, "sources": sources(), "kernels": found}, indent=1)
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(BUDGET)
    elif budget["triton"] != triton.__version__:
        sys.exit(f"budget: it is for Triton {budget['triton']}, this is {triton.__version__}; --write makes a new one.")
    elif lines := exceeded(found, budget["kernels"]):
        sys.exit("\n".join(lines))


if __name__ == "__main__":
    main()
