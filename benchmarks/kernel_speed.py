"""Speed and memory of `lora_delta` and its alternatives, in one run: `python -m benchmarks.kernel_speed`

Every row holds one method, shape and direction: milliseconds (p20, p50, p80), GB/s and TFLOP/s of the necessary bytes
and operations, the share of the floor that the same run measured for this machine, and the peak of extra memory.
Arguments rotate between copies, so that no cache holds them. No speed is printed while the op's tests fail.
"""

import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import hydra
import torch
from pydantic import Field
from torch import Tensor

from benchmarks.measuring.peak import peak_bytes
from hypernet.cli.scripts import Script
from hypernet.cli.settings import Above0, AtLeast0, Count, Device, Number, OutputFile, Settings, choose_device

log = logging.getLogger(__name__)
ROOT = Path(__file__).parent.parent

# hidden size and MLP size
MODELS = {
    "qwen2.5-0.5b": (896, 4864),
    "gemma-2-2b": (2304, 9216),
    "qwen3-4b": (2560, 9728),
    "mistral-7b": (4096, 14336),
}
DIRECTIONS = ("forward", "backward", "both")
CHUNK_RANK = 8  # of a slot; an adapter of rank 64 is seven slots of its own and the one that all share


class Case(NamedTuple):
    """One shape: T tokens in equal segments, one adapter each."""

    model: str
    module: str
    num_tokens: int
    rank: int
    num_adapters: int

    @classmethod
    def of(cls, row: dict) -> "Case":
        """That a row was measured on."""
        return cls(*(row[key] for key in cls._fields))

    @property
    def dims(self) -> tuple[int, int]:
        """d_in, d_out."""
        hidden, wide = MODELS[self.model]
        return (wide, hidden) if self.module == "down_proj" else (hidden, wide)

    @property
    def lengths(self) -> list[int]:
        even, rest = divmod(self.num_tokens, self.num_adapters)
        return [even + (i < rest) for i in range(self.num_adapters)]

    @property
    def slots(self) -> list[list[int]]:
        """The bias slot comes last and is shared, as in a Doc-to-LoRA adapter; rank 8 leaves no room for it."""
        own = max(self.rank // CHUNK_RANK - 1, 1)
        shared = [self.num_adapters * own] if self.rank > CHUNK_RANK else []
        return [[*range(i * own, (i + 1) * own), *shared] for i in range(self.num_adapters)]


class Inputs(NamedTuple):
    base: Tensor
    x: Tensor
    A: Tensor
    B: Tensor


def make_inputs(case: Case, *, device: str, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    (d_in, d_out), num_slots = case.dims, 1 + max(slot for ids in case.slots for slot in ids)

    def normal(*shape: int, scale: float = 1.0, needs_grad: bool = False) -> Tensor:
        tensor = torch.randn(shape, generator=generator, device=device).mul_(scale).to(dtype)
        return tensor.requires_grad_(needs_grad)

    return Inputs(
        base=normal(case.num_tokens, d_out),
        x=normal(case.num_tokens, d_in, needs_grad=True),
        A=normal(num_slots, CHUNK_RANK, d_in, scale=d_in**-0.5, needs_grad=True),
        B=normal(num_slots, CHUNK_RANK, d_out, needs_grad=True),
    )


# The methods. Each takes a case once and gives the function that is timed: Inputs -> y [T, d_out].

SCALING = 2 * CHUNK_RANK**1.5


def ours(case: Case, device: str) -> Callable[[Inputs], Tensor]:
    from hypernet.kernels.lora_delta import Plan, lora_delta

    num_slots = 1 + max(slot for ids in case.slots for slot in ids)
    plan = Plan.from_lists(case.lengths, case.slots, num_slots=num_slots, device=device)
    return lambda i: lora_delta(i.base, i.x, i.A, i.B, plan, scaling=SCALING)


def _combined(case: Case, device: str) -> Callable[[Tensor], Tensor]:
    """Pool [slots, R, d] → one block per adapter, [G, rank, d], copied together."""
    index = torch.tensor(case.slots, device=device)
    return lambda pool: pool[index.flatten()].view(len(index), -1, pool.shape[-1])


def repeat_per_token(case: Case, device: str) -> Callable[[Inputs], Tensor]:
    """A and B repeated for every token, then einsum: how the reference implementation of Doc-to-LoRA applies them."""
    combine, lengths = _combined(case, device), torch.tensor(case.lengths, device=device)

    def apply(i: Inputs) -> Tensor:
        A = combine(i.A).repeat_interleave(lengths, dim=0, output_size=case.num_tokens)
        B = combine(i.B).repeat_interleave(lengths, dim=0, output_size=case.num_tokens)
        S = torch.einsum("td,trd->tr", i.x, A)
        return i.base + SCALING * torch.einsum("tr,trd->td", S, B)

    return apply


def loop_of_addmm(case: Case, device: str) -> Callable[[Inputs], Tensor]:
    """Two products per segment."""
    index = [torch.tensor(ids, device=device) for ids in case.slots]

    def apply(i: Inputs) -> Tensor:
        parts = zip(i.base.split(case.lengths), i.x.split(case.lengths), index, strict=True)
        return torch.cat(
            [torch.addmm(b, x @ i.A[ids].flatten(0, 1).T, i.B[ids].flatten(0, 1), alpha=SCALING) for b, x, ids in parts]
        )

    return apply


def padded_bmm(case: Case, device: str) -> Callable[[Inputs], Tensor]:
    """All segments padded to the longest, one batched product each way."""
    combine, longest = _combined(case, device), max(case.lengths)
    where = torch.cat([torch.arange(n) + g * longest for g, n in enumerate(case.lengths)]).to(device)

    def apply(i: Inputs) -> Tensor:
        x = i.x.new_zeros(case.num_adapters * longest, i.x.shape[1]).index_copy(0, where, i.x)
        S = torch.bmm(x.view(case.num_adapters, longest, -1), combine(i.A).mT)
        delta = torch.bmm(S, combine(i.B)).flatten(0, 1).index_select(0, where)
        return torch.add(i.base, delta, alpha=SCALING)

    return apply


def grouped_mm(case: Case, device: str) -> Callable[[Inputs], Tensor]:
    """torch.nn.functional.grouped_mm over the segments."""
    combine = _combined(case, device)
    ends = torch.tensor(case.lengths, device=device).cumsum(0).to(torch.int32)

    def apply(i: Inputs) -> Tensor:
        S = torch.nn.functional.grouped_mm(i.x, combine(i.A).mT.contiguous(), offs=ends)
        return torch.add(i.base, torch.nn.functional.grouped_mm(S, combine(i.B), offs=ends), alpha=SCALING)

    return apply


METHODS = {f.__name__: f for f in (ours, repeat_per_token, loop_of_addmm, padded_bmm, grouped_mm)}


def legal(method: str, case: Case, *, dtype: torch.dtype, device: str, memory_limit: float) -> bool:
    """grouped_mm wants bf16 on a GPU; what would not fit into the memory limit (bytes) is left out."""
    if method == "grouped_mm":
        return dtype == torch.bfloat16 and device == "cuda" and min(case.lengths) > 0
    if method == "repeat_per_token":
        # A and B per token, and in the backward pass their gradients.
        return 2 * case.num_tokens * case.rank * sum(case.dims) * dtype.itemsize < memory_limit
    return True


# Measuring


def timed(
    function: Callable[[Inputs], Tensor], copies: Sequence[Inputs], direction: str, *, device: str, budget_s: float
) -> list[float]:
    """Seconds of single runs, at least 5, as many as fit into the budget."""
    times: list[float] = []
    started = time.perf_counter()
    runs = 0
    while runs < 2 + 5 or (time.perf_counter() - started < budget_s and runs < 200):
        inputs = copies[runs % len(copies)]
        leaves = [inputs.x, inputs.A, inputs.B]
        with torch.set_grad_enabled(direction != "forward"):
            y = function(inputs) if direction == "backward" else None
        dy = inputs.base if direction != "forward" else None
        if device == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
        before = time.perf_counter()
        with torch.set_grad_enabled(direction != "forward"):
            y = function(inputs) if y is None else y
            if direction != "forward":
                torch.autograd.grad(y, leaves, dy)
        if device == "cuda":
            end.record()
            torch.cuda.synchronize()
            elapsed = begin.elapsed_time(end) / 1000
        else:
            elapsed = time.perf_counter() - before
        del y
        runs += 1
        if runs > 2:  # the first two warm up
            times.append(elapsed)
    return times


def peak_extra_bytes(function: Callable[[Inputs], Tensor], inputs: Inputs, direction: str, *, device: str) -> int:
    """Most memory held at a time beyond the arguments."""

    def run() -> None:
        with torch.set_grad_enabled(direction != "forward"):
            y = function(inputs)
        if direction != "forward":
            torch.autograd.grad(y, [inputs.x, inputs.A, inputs.B], inputs.base)

    run()
    return peak_bytes(run, device=device)


def measured_machine(device: str, dtype: torch.dtype) -> Any:
    """Copy and matmul rate of this machine, the roofs of every floor of the run."""
    from hypernet.kernels.lora_delta.cost import Machine

    def best(function: Callable[[], object]) -> float:
        times = []
        for _ in range(10):
            if device == "cuda":
                torch.cuda.synchronize()
            before = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - before)
        return sorted(times)[2]

    size, side = (2**30, 8192) if device == "cuda" else (2**27, 2048)
    source, target = torch.ones(2, size // 4, device=device)
    copy_s = best(lambda: target.copy_(source))
    left, right = torch.randn(2, side, side, device=device).to(dtype)
    matmul_s = best(lambda: left @ right)
    launch_s = best(lambda: source[:1].add_(0)) if device == "cpu" else 5e-6
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return Machine(name, 2 * source.nbytes / copy_s, 2 * side**3 / matmul_s, launch_s)


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {f"p{q}_ms": 1000 * ordered[min(len(ordered) * q // 100, len(ordered) - 1)] for q in (20, 50, 80)}


def floor_of(case: Case, direction: str, element_bytes: int) -> Any:
    from hypernet.kernels.lora_delta.cost import Floor, delta_backward_floor, delta_floor

    d_in, d_out = case.dims
    sizes = {**case._asdict(), "d_in": d_in, "d_out": d_out, "element_bytes": element_bytes}
    sizes = {key: size for key, size in sizes.items() if key not in ("model", "module")}
    forward, backward = delta_floor(**sizes), delta_backward_floor(**sizes)
    both = Floor(*(a + b for a, b in zip(forward, backward, strict=True)))
    return {"forward": forward, "backward": backward, "both": both}[direction]


def cases(cfg: "KernelSettings") -> Iterator[Case]:
    for model in cfg.models:
        for module in cfg.modules:
            for tokens in cfg.tokens:
                for rank in cfg.ranks:
                    for adapters in cfg.adapters:
                        if adapters <= tokens:
                            yield Case(model, module, tokens, rank, adapters)


def measure(case: Case, cfg: "KernelSettings", machine: Any, *, device: str, dtype: torch.dtype) -> list[dict]:
    """Rows of all methods and directions of one case, and of the three ways of applying the adapters."""
    generator = torch.Generator(device).manual_seed(cfg.seed)
    first = make_inputs(case, device=device, dtype=dtype, generator=generator)
    own_bytes = sum(tensor.nbytes for tensor in first)
    num_copies = min(8, 1 + int(cfg.rotate_mib * 2**20 // own_bytes))
    copies = [
        first,
        *(Inputs(*(t.detach().clone().requires_grad_(t.requires_grad) for t in first)) for _ in range(num_copies - 1)),
    ]
    rows = []
    for name in cfg.methods:
        if not legal(name, case, dtype=dtype, device=device, memory_limit=cfg.memory_limit_gib * 2**30):
            continue
        function = METHODS[name](case, device)
        for direction in DIRECTIONS:
            floor = floor_of(case, direction, dtype.itemsize)
            times = timed(function, copies, direction, device=device, budget_s=cfg.budget_s)
            quantiles = percentiles(times)
            seconds = quantiles["p50_ms"] / 1000
            rows.append(
                {
                    "kind": "delta",
                    "method": name,
                    **case._asdict(),
                    "direction": direction,
                    "dtype": str(dtype).removeprefix("torch."),
                    **quantiles,
                    "runs": len(times),
                    "gb_per_s": floor.num_bytes / seconds / 1e9,
                    "tflop_per_s": floor.flops / seconds / 1e12,
                    "floor_share": floor.seconds(machine) / seconds,
                    "necessary_mib": floor.num_bytes / 2**20,
                    "peak_extra_mib": peak_extra_bytes(function, first, direction, device=device) / 2**20,
                }
            )
    return rows + strategies(case, cfg, machine, copies, device=device, dtype=dtype)


def strategies(
    case: Case, cfg: "KernelSettings", machine: Any, copies: Sequence[Inputs], *, device: str, dtype: torch.dtype
) -> list[dict]:
    """The layer with its adapters applied in each of the three ways, and what the cost model says."""
    from hypernet.kernels.lora_delta.cost import application_cost

    d_in, d_out = case.dims
    weight = torch.randn(d_out, d_in, device=device).mul_(d_in**-0.5).to(dtype)
    delta = ours(case, device)
    index = torch.tensor(case.slots[0], device=device)

    def apart(i: Inputs) -> Tensor:
        return delta(i._replace(base=i.x @ weight.T))

    def delta_first(i: Inputs) -> Tensor:
        return delta(i._replace(base=torch.zeros_like(i.base))).addmm_(i.x, weight.T)

    def merge(i: Inputs) -> Tensor:
        return i.x @ torch.addmm(weight, i.B[index].flatten(0, 1).T, i.A[index].flatten(0, 1), alpha=SCALING).T

    ways = {"apart": apart, "delta first": delta_first} | ({"merge": merge} if case.num_adapters == 1 else {})
    sizes = {key: size for key, size in case._asdict().items() if key not in ("model", "module")}
    model = application_cost(**sizes, d_in=d_in, d_out=d_out, element_bytes=dtype.itemsize, machine=machine)
    rows = []
    for name, way in ways.items():
        times = timed(way, copies, "forward", device=device, budget_s=cfg.budget_s)
        rows.append(
            {
                "kind": "application",
                "method": name,
                **case._asdict(),
                "dtype": str(dtype).removeprefix("torch."),
                **percentiles(times),
                "model_ms": 1000 * getattr(model, name.replace(" ", "_")),
                "model_says": model.cheapest,
            }
        )
    return rows


def tests_pass() -> bool:
    """The op's own tests, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "tests/kernels/test_lora_delta.py"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        log.error("%s", (result.stdout + result.stderr)[-3000:])
    return result.returncode == 0


def markdown(rows: Sequence[dict]) -> str:
    """A table for each shape: every method's time, also as a multiple of ours, and its memory."""
    from benchmarks.report.names import short
    from benchmarks.report.tables import Table

    rows = [row for row in rows if row["kind"] == "delta"]
    ours_ms = {(Case.of(row), row["direction"]): row["p50_ms"] for row in rows if row["method"] == "ours"}
    cells = {
        "rank": lambda row: str(row["rank"]),
        "direction": lambda row: row["direction"],
        "method": lambda row: row["method"].replace("_", " "),
        "ms": lambda row: short(row["p50_ms"]),
        "time / ours": lambda row: short(row["p50_ms"] / ours_ms[Case.of(row), row["direction"]], digits=2),
        "share of the floor, %": lambda row: f"{100 * row['floor_share']:.0f}",
        "peak, MiB": lambda row: short(row["peak_extra_mib"]),
    }
    parts = []
    shape = lambda row: Case.of(row)._replace(rank=0)  # noqa: E731
    for place in dict.fromkeys(map(shape, rows)):
        chosen = [row for row in rows if shape(row) == place and (Case.of(row), row["direction"]) in ours_ms]
        chosen.sort(key=lambda row: (row["rank"], DIRECTIONS.index(row["direction"])))
        caption = f"{place.model}, {place.module}, {place.num_tokens} tokens, {place.num_adapters} adapters:"
        parts += [caption, Table.of("", chosen, cells).markdown()]
    return "\n\n".join(parts)


def roofline(rows: Sequence[dict], path: Path) -> None:
    """Achieved TFLOP/s over operations per byte, one colour per method, below the machine's two roofs."""
    from benchmarks.report.plots import LINES, Axis, Panel, Point, Series, Style, standalone

    machine = rows[0]["machine"]
    rows = [row for row in rows if row["kind"] == "delta"]
    series = []
    for style, method in zip(LINES, dict.fromkeys(row["method"] for row in rows), strict=False):
        chosen = [row for row in rows if row["method"] == method]
        points = [Point(row["tflop_per_s"] * 1e3 / row["gb_per_s"], row["tflop_per_s"]) for row in chosen]
        series.append(Series(method.replace("_", " "), style, points, joined=False))
    ridge = machine["flops_per_s"] / machine["bytes_per_s"]
    ends = [point.x for one in series for point in one.points]
    roof = [
        Point(x, min(machine["flops_per_s"], machine["bytes_per_s"] * x) / 1e12)
        for x in sorted({min(*ends, ridge), ridge, max(*ends, ridge)})
    ]
    series.append(Series(f"{machine['name']}, measured roofs", Style("text", ""), roof))
    x = Axis("necessary operations per necessary byte", log=True)
    panel = Panel("lora_delta and its alternatives", series, x, Axis("TFLOP/s", log=True))
    path.write_text(standalone([panel], [(one.name, one.style) for one in series]), encoding="utf-8")


class KernelSettings(Settings):
    models: list[Literal[tuple(MODELS)]]
    modules: list[Literal["down_proj", "up_proj"]]
    tokens: list[Count]
    ranks: list[Annotated[int, Field(multiple_of=CHUNK_RANK, gt=0, description=f"a multiple of {CHUNK_RANK}")]]
    adapters: list[Count]
    methods: list[Literal[tuple(METHODS)]]
    device: Device
    dtype: Literal["float32", "bfloat16", "float16"] | None
    threads: Count | None
    budget_s: AtLeast0
    rotate_mib: AtLeast0
    memory_limit_gib: Above0
    verify: bool
    seed: Number
    output: OutputFile | None
    plot_only: bool


SCRIPT = Script("benchmarks.kernel_speed", KernelSettings)


@hydra.main(config_path="../conf", config_name="kernel_speed", version_base="1.3")
@SCRIPT
def main(cfg: KernelSettings) -> None:
    from tqdm import tqdm

    from benchmarks.measuring.rows import describe_run, read_measured, write_rows

    if cfg.plot_only:
        roofline(*read_measured(cfg.output))
        return
    device = choose_device(cfg.device)
    dtype = getattr(torch, cfg.dtype or ("bfloat16" if device == "cuda" else "float32"))
    if cfg.verify and not tests_pass():
        raise ValueError("The tests of lora_delta fail, so no speed is printed. Run make test.")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    machine = measured_machine(device, dtype)
    log.info(
        "%s: copies at %.3g GB/s, products at %.3g TFLOP/s",
        machine.name,
        machine.bytes_per_s / 1e9,
        machine.flops_per_s / 1e12,
    )
    rows: list[dict] = []
    run = describe_run(cfg.model_dump())
    for case in tqdm(list(cases(cfg)), desc="shapes", file=sys.stderr):
        for row in measure(case, cfg, machine, device=device, dtype=dtype):
            rows.append({**row, "machine": machine._asdict()})
        if cfg.output:  # after every shape: a run cut short keeps what it has
            write_rows(cfg.output, rows, run=run)
    print(markdown(rows))
    for case in dict.fromkeys(map(Case.of, rows)):
        ways = {row["method"]: row for row in rows if row["kind"] == "application" and Case.of(row) == case}
        measured = min(ways, key=lambda name: ways[name]["p50_ms"])
        figures = ", ".join(
            f"{name} {row['p50_ms']:.3g} ms (model {row['model_ms']:.3g})" for name, row in ways.items()
        )
        print(f"{case}: {figures}; measured {measured}, model {next(iter(ways.values()))['model_says']}")


if __name__ == "__main__":
    SCRIPT.run(main, ROOT / "conf/kernel_speed.yaml")
