"""What it costs to turn a document into an adapter, by its length: `python -m benchmarks.internalize_cost`

Two ways in one run: ours (`DocToLoRA.internalize`: batches under a token budget, features layer by layer) and
everything at once (all chunks in one batch, all layers' features together, the reference's batched way). Rows hold
seconds (p20, p50, p80), the peak of memory beyond the model, the adapter's bytes, and the floor: the time that the same
products take at this machine's measured matmul rate. Further rows: the seconds to save, load and inject an adapter, and
to swap one.
"""

import gc
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import hydra
import torch

from benchmarks.measuring.peak import peak_bytes
from hypernet.cli.scripts import Script
from hypernet.cli.settings import AtLeast0, Count, Device, OutputFile, Settings, choose_device

if TYPE_CHECKING:
    from hypernet.doc_to_lora import DocToLoRA

log = logging.getLogger(__name__)
ROOT = Path(__file__).parent.parent

# google/gemma-2-2b-it's sizes, and the paper's hypernetwork for it: 309,456,384 parameters.
GEMMA_2_2B = {
    "model_type": "gemma2",
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "max_position_embeddings": 8192,
}
PAPER_HYPERNETWORK = {
    "rank": 8,
    "aggregator": {"name": "perceiver", "latent_dim": 512, "num_latents": 8, "num_blocks": 8},
}


def build_model(name: str, *, device: str, max_chunk_tokens: int | None) -> "DocToLoRA":
    """The shipped tiny model, or a model of gemma-2-2b's shape with random weights in bfloat16."""
    from hypernet.base.base_model import build_base_model, freeze, load_base_model
    from hypernet.doc_to_lora import DocToLoRA

    if name == "tiny":
        model = DocToLoRA.from_pretrained(ROOT / "assets/tiny", device=device)
        model.max_chunk_tokens = max_chunk_tokens or model.max_chunk_tokens
        return model.eval().requires_grad_(False)
    # Random weights: the tokenizer need only give token ids that the model has.
    _, tokenizer = load_base_model(ROOT / "assets/tiny/base_model")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            base_model = freeze(build_base_model({**GEMMA_2_2B, "pad_token_id": 0}))
            model = DocToLoRA.build(
                base_model=base_model,
                tokenizer=tokenizer,
                target_modules=["down_proj"],
                hypernetwork=PAPER_HYPERNETWORK,
                context_encoder={"kind": "per_layer_activations"},
                max_chunk_tokens=max_chunk_tokens or 1024,
                base_model_source="random",
            )
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def make_document(model: "DocToLoRA", num_tokens: int) -> str:
    """Held-out articles one after the other, cut to at most this many tokens of the model's tokenizer."""
    from hypernet.data.encyclopedia import Encyclopedia

    encyclopedia, texts, count, index = Encyclopedia("test"), [], 0, 10**6
    encode = lambda text: model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # noqa: E731
    while count < num_tokens:
        texts.append(encyclopedia.record(index, num_entities=2, num_facts=10, num_distractors=2).document)
        count += len(encode(texts[-1])) + 1
        index += 1
    return model.tokenizer.decode(encode("\n".join(texts))[:num_tokens])


def ours(model: "DocToLoRA", document: str, *, max_batch_tokens: int) -> Any:
    return model.internalize(document, max_batch_tokens=max_batch_tokens)


def at_once(model: "DocToLoRA", document: str, *, max_batch_tokens: int) -> Any:
    """All chunks and layers together, as one batch."""
    chunks = model.chunk(document)
    with torch.no_grad():
        return model.adapt(chunks.ids.to(model.device), chunks.mask.to(model.device))


METHODS: dict[str, Callable[..., Any]] = {f.__name__: f for f in (ours, at_once)}
LABELS = {"ours": "ours: streamed, batched", "at_once": "all layers and chunks at once"}


# Measuring


def seconds_of(run: Callable[[], Any], *, device: str) -> float:
    times: list[float] = []
    _timed(times, run, device=device)
    return times[0]


def _timed(times: list[float], run: Callable[[], Any], *, device: str) -> Any:
    """What `run` returns; its seconds are appended to `times`."""
    _synchronize(device)
    before = time.perf_counter()
    result = run()
    _synchronize(device)
    times.append(time.perf_counter() - before)
    return result


def process_bytes(run: Callable[[], Any]) -> int | None:
    """Growth of the whole process's resident memory at the worst moment; None where Linux's /proc is missing."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # starts the process's high-water mark anew
    resident = _kib(status, "VmRSS")
    run()
    return 1024 * (_kib(status, "VmHWM") - resident)


def matmul_rate(device: str, dtype: torch.dtype, *, side: int | None = None) -> float:
    """FLOP/s of a large product in the hypernetwork's type: the best of ten.

    Args:
        side: rows and columns of both factors; None: 8192 on a GPU, 2048 on a CPU.
    """
    side = side or (8192 if device == "cuda" else 2048)
    left, right = torch.randn(2, side, side, device=device).to(dtype)
    return 2 * side**3 / min(seconds_of(lambda: left @ right, device=device) for _ in range(10))


def flops_of(run: Callable[[], Any]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _kib(status: Path, field: str) -> int:
    (line,) = [line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith(field + ":")]
    return int(line.split()[1])


def _quantiles(seconds: Sequence[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    pick = lambda share: ordered[min(int(len(ordered) * share), len(ordered) - 1)]  # noqa: E731
    return {"p20_s": pick(0.2), "p50_s": statistics.median(ordered), "p80_s": pick(0.8), "runs": len(ordered)}


def length_rows(model: "DocToLoRA", cfg: "CostSettings", *, device: str, rate: float) -> Iterator[dict]:
    """Rows of both methods, length by length; their runs take turns, so that a busy machine disturbs both."""
    for num_tokens in cfg.tokens:
        document = make_document(model, num_tokens)
        runs = {
            name: partial(METHODS[name], model, document, max_batch_tokens=cfg.max_batch_tokens) for name in cfg.methods
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        failed = set()
        started = time.perf_counter()
        while not all(len(t) >= cfg.runs for t in times.values()) or (
            time.perf_counter() - started < cfg.budget_s and len(next(iter(times.values()))) < 20 * cfg.runs
        ):
            for name in runs.keys() - failed:
                try:
                    times[name].append(seconds_of(runs[name], device=device))
                except torch.OutOfMemoryError:
                    failed.add(name)
                    times[name] = [float("nan")] * cfg.runs
            if failed == runs.keys():
                break
        adapter = model.internalize(document, max_batch_tokens=cfg.max_batch_tokens)
        for name, run in runs.items():
            row = {"kind": "length", "method": name, "tokens": num_tokens, "chunks": adapter.num_chunks}
            row |= {"max_chunk_tokens": model.max_chunk_tokens, "out_of_memory": name in failed}
            if name not in failed:
                process = process_bytes(run) if device == "cpu" else None
                peak = peak_bytes(run, device=device)
                flops = flops_of(run)
                row |= _quantiles(times[name]) | {
                    "peak_mib": peak / 2**20,
                    "peak_without_adapter_mib": (peak - adapter.num_bytes) / 2**20,
                    "process_mib": process and process / 2**20,
                    "flops": flops,
                    "floor_s": flops / rate,
                }
            yield row | {"adapter_mib": adapter.num_bytes / 2**20}


def adapter_rows(model: "DocToLoRA", cfg: "CostSettings", *, device: str) -> Iterator[dict]:
    """Seconds to save, load and inject adapters of so many chunks, and to swap one that is loaded for another."""
    from hypernet.adapters.adapter import LoRAAdapter

    for num_chunks in cfg.adapter_chunks:
        document = make_document(model, num_chunks * model.max_chunk_tokens)
        adapter = model.internalize(document, max_batch_tokens=cfg.max_batch_tokens).to("cpu")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "adapter"
            adapter.save(path)  # imports what saving needs
            steps: dict[str, list[float]] = {"save_s": [], "load_s": [], "inject_s": [], "swap_s": []}
            other = model.injector.pool(adapter)
            for _ in range(cfg.runs * 3):
                _timed(steps["save_s"], partial(adapter.save, path, overwrite=True), device=device)
                loaded = _timed(steps["load_s"], partial(LoRAAdapter.load, path), device=device)
                pool = _timed(steps["inject_s"], partial(model.injector.pool, loaded), device=device)
                with model.injector.using(other):
                    swapped = model.injector.using(pool)
                    _timed(steps["swap_s"], swapped.__enter__, device=device)
                    swapped.__exit__(None, None, None)
        row = {"kind": "adapter", "chunks": adapter.num_chunks, "rank": adapter.rank}
        row |= {"adapter_mib": adapter.num_bytes / 2**20, "runs": cfg.runs * 3}
        yield row | {name: statistics.median(values) for name, values in steps.items()}


# What people see


def markdown(rows: Sequence[dict]) -> str:
    """Seconds by length, memory by length, then the adapters; the other way as a multiple of ours."""
    by_length: dict[int, dict[str, dict]] = {}
    for row in rows:
        if row["kind"] == "length":
            by_length.setdefault(row["tokens"], {})[row["method"]] = row

    def ratio(methods: dict[str, dict], key: str) -> str:
        own, other = methods["ours"], methods.get("at_once")
        if other is None:
            return "–"
        return "out of memory" if other["out_of_memory"] else f"{other[key] / own[key]:.2f}"

    times = [
        "| tokens | chunks | ours, s | 20th percentile | 80th percentile | at once / ours | ours / floor |",
        f"|{' ---: |' * 7}",
    ]
    memory = ["| tokens | ours, MiB without the adapter | at once / ours | adapter, MiB |", f"|{' ---: |' * 4}"]
    for tokens, methods in by_length.items():
        own = methods["ours"]
        times.append(
            f"| {tokens:,} | {own['chunks']:,} | {own['p50_s']:.3g} | {own['p20_s']:.3g} | {own['p80_s']:.3g} | "
            f"{ratio(methods, 'p50_s')} | {own['p50_s'] / own['floor_s']:.1f} |"
        )
        memory.append(
            f"| {tokens:,} | {own['peak_without_adapter_mib']:.1f} | {ratio(methods, 'peak_without_adapter_mib')} | "
            f"{own['adapter_mib']:.2f} |"
        )
    lines = [*times, "", *memory]
    adapters = [row for row in rows if row["kind"] == "adapter"]
    if adapters:
        lines += ["", "| adapter of chunks | rank | MiB | save, ms | load, ms | inject, ms | swap, ms |"]
        lines.append(f"|{' ---: |' * 7}")
        for row in adapters:
            steps = " | ".join(f"{1000 * row[name]:.3g}" for name in ("save_s", "load_s", "inject_s", "swap_s"))
            lines.append(f"| {row['chunks']} | {row['rank']:,} | {row['adapter_mib']:.2f} | {steps} |")
    return "\n".join(lines)


def plot(rows: Sequence[dict], path: Path) -> None:
    """Seconds and memory over the document's length, both ways, with the floor and the adapter's own bytes."""
    from benchmarks.report.plots import LINES, Axis, Panel, Point, Series, Style, standalone

    lengths = [row for row in rows if row["kind"] == "length" and not row["out_of_memory"]]
    own = [row for row in lengths if row["method"] == "ours"]
    seconds, memory = [], []
    for style, (method, label) in zip(LINES, LABELS.items(), strict=False):
        chosen = [row for row in lengths if row["method"] == method]
        times = [Point(row["tokens"], row["p50_s"], (row["p20_s"], row["p80_s"])) for row in chosen]
        seconds.append(Series(label, style, times))
        memory.append(Series(label, style, [Point(row["tokens"], row["peak_without_adapter_mib"]) for row in chosen]))
    gray = Style("gray", "o", ":", False), Style("gray", "s", ":", False)
    seconds.append(Series("matmul floor", gray[0], [Point(row["tokens"], row["floor_s"]) for row in own]))
    memory.append(Series("the adapter itself", gray[1], [Point(row["tokens"], row["adapter_mib"]) for row in own]))
    x = Axis("document tokens", log=True)
    panels = [
        Panel(
            "Time to internalize",
            [s for s in seconds if s.points],
            x,
            Axis("seconds, 20th to 80th percentile", log=True),
        ),
        Panel("Peak memory", [s for s in memory if s.points], x, Axis("MiB on top of model and adapter", log=True)),
    ]
    legend = [(one.name, one.style) for one in (*seconds, memory[-1])]
    path.write_text(standalone(panels, legend), encoding="utf-8")


class CostSettings(Settings):
    model: Literal["tiny", "gemma-2-2b"]
    tokens: list[Count]
    methods: list[Literal["ours", "at_once"]]
    max_chunk_tokens: Count | None
    max_batch_tokens: Count
    adapter_chunks: list[Count]
    runs: Count
    budget_s: AtLeast0
    device: Device
    threads: Count | None
    output: OutputFile | None
    plot_only: bool


SCRIPT = Script("benchmarks.internalize_cost", CostSettings)


@hydra.main(config_path="../conf", config_name="internalize_cost", version_base="1.3")
@SCRIPT
def main(cfg: CostSettings) -> None:
    from tqdm import tqdm

    from benchmarks.measuring.rows import describe_run, read_measured, write_rows

    if cfg.plot_only:
        plot(*read_measured(cfg.output))
        return
    device = choose_device(cfg.device)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    model = build_model(cfg.model, device=device, max_chunk_tokens=cfg.max_chunk_tokens)
    dtype = next(model.hypernetwork.parameters()).dtype
    rate = matmul_rate(device, dtype)
    log.info("%s on %s: products at %.3g TFLOP/s", cfg.model, device, rate / 1e12)
    model.internalize(make_document(model, 256))  # the first run of everything is slow
    rows: list[dict] = []
    run = describe_run(cfg.model_dump())
    total = len(cfg.tokens) * len(cfg.methods) + len(cfg.adapter_chunks)
    with tqdm(total=total, desc="internalize_cost", unit="row", file=sys.stderr) as bar:
        for source in (length_rows(model, cfg, device=device, rate=rate), adapter_rows(model, cfg, device=device)):
            for row in source:
                rows.append(
                    {**row, "model": cfg.model, "device": device, "dtype": str(dtype), "matmul_flops_per_s": rate}
                )
                if cfg.output:  # after every row: a run cut short keeps what it has
                    write_rows(cfg.output, rows, run=run)
                bar.update()
    print(markdown(rows))


if __name__ == "__main__":
    SCRIPT.run(main, ROOT / "conf/internalize_cost.yaml")
