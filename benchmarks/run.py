"""One cell of the benchmark, a task answered by a method at a seed; or a sweep of them: `python -m benchmarks.run`

    python -m benchmarks.run task=encyclopedia method=doc_to_lora
    python -m benchmarks.run --multirun task=encyclopedia,locality method=doc_to_lora,full_context seed=0,1,2
    python -m benchmarks.run sweep=tiny

Rows go to <output_dir>/cells, one file per cell: one row per question, one per case with its costs, one summary. A cell
that is there is skipped, one that failed is tried again. `python -m benchmarks.report` makes tables and plots of them.
"""

import logging
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from hypernet.cli.scripts import Script, check_targets, plain
from hypernet.cli.settings import Count, Device, Name, Number, OutputFolder, Settings, Text

log = logging.getLogger(__name__)
# What a cell's answers do not depend on.
NOT_IDENTITY = ("output_dir", "force", "device", "threads", "num_timed", "num_profiled")

# Settings and sweeps of version 0.1; Hydra has never heard of them.
RENAMED = {
    "method.gate": "method.gate_power",
    "method.sharpness": "method.weight_power",
    "sweep=crowd": "sweep=many_documents",
}


class CellSettings(Settings):
    task: dict[str, Any]
    method: dict[str, Any]
    checkpoint: Text
    seed: Number
    max_new_tokens: Count
    num_timed: Number
    num_profiled: Number
    task_name: Name
    method_name: Name
    output_dir: OutputFolder
    force: bool
    device: Device
    threads: Count | None


SCRIPT = Script("benchmarks.run", CellSettings, renamed=RENAMED)


def check(cfg: DictConfig) -> None:
    """Raises ValueError of one line if a setting, also one of the task or the method, cannot be."""
    settings = SCRIPT.check(cfg)
    check_targets({"task": settings.task, "method": settings.method})


@hydra.main(config_path="../conf/benchmark", config_name="run", version_base="1.3")
def main(cfg: DictConfig) -> None:
    with SCRIPT.errors():
        measure_cell(cfg)


def measure_cell(cfg: DictConfig) -> None:
    """Writes the cell's rows, unless it is there; one of a sweep that fails leaves a note and does not end the others.

    Raises:
        ValueError: a setting cannot be; nothing has been written then.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from benchmarks.measuring.cells import Sweep, cell_path, identity_of, write_cell, write_error

    multirun = HydraConfig.get().mode == RunMode.MULTIRUN
    if not multirun:
        check(cfg)
    config = plain(cfg)
    relevant = {key: value for key, value in config.items() if key not in NOT_IDENTITY}
    identity = identity_of(relevant, cfg.checkpoint)
    names = {"task": cfg.task_name, "method": cfg.method_name, "seed": cfg.seed}
    path = cell_path(cfg.output_dir, **names, identity=identity)
    label = "/".join(map(str, names.values()))
    if path.is_file() and not cfg.force:
        outcome = "is there, skipped"
    else:
        try:
            from benchmarks.measuring.measure import measure

            check(cfg)
            rows = measure(cfg, config)
            rows[-1]["overrides"] = list(HydraConfig.get().overrides.task)
        except Exception as error:  # whatever it was, the other cells go on; the row says it and the cell is retried
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            write_error(path, {**names, "identity": identity, "error": reason, "traceback": traceback.format_exc()})
            if not multirun:
                sys.exit(f"benchmarks.run: {label} failed: {reason}")
            outcome = f"failed: {reason}"
        else:
            write_cell(path, [{**names, "identity": identity, **row} for row in rows])
            scores = [f"{name} {values['exact_match']:.3f}" for name, values in rows[-1]["sets"].items()]
            outcome = f"{rows[-1]['wall_s']:.1f} s, exact match: {', '.join(scores)}"
    sweep = Sweep.of(cfg.output_dir) if multirun else None
    progress = f"[{sweep.progress(HydraConfig.get().job.num, time.time())}] " if sweep else ""
    log.info("%s%s %s", progress, label, outcome)


if __name__ == "__main__":
    SCRIPT.run(main, Path(__file__).parents[1] / "conf/benchmark/run.yaml")
