"""benchmarks/gpu.sh: what it would run composes, and without a GPU it says so in one line."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks/gpu.sh"


def test_gpu_script_passes_existing_settings() -> None:
    text = SCRIPT.read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r'"\$python" -m benchmarks\.(\w+) (.*)', text)
    assert [name for name, _ in found] == ["training_speed", "training_speed", "kernel_speed", "internalize_cost"]
    for name, arguments in found:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose(name, overrides=shlex.split(arguments.replace("$out", "folder")))
        assert cfg.output.startswith("folder/") and "gemma-2-2b" in str(cfg)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it takes many minutes")
def test_gpu_script_without_gpu_fails_with_one_line(tmp_path) -> None:
    done = subprocess.run(
        ["bash", str(SCRIPT), str(tmp_path / "out")],
        **{"capture_output": True, "text": True, "env": {**os.environ, "PYTHON": sys.executable}},
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "gpu.sh: torch sees no CUDA device here.\n"
