"""A small DocToLoRA with random weights, and the shipped one served by a process of its own."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="package")
def random_model(tiny_base_model_folder, tiny_tokenizer):
    import torch

    from hypernet.base.base_model import load_base_model
    from hypernet.doc_to_lora import DocToLoRA

    torch.manual_seed(3)
    model = DocToLoRA.build(
        base_model=load_base_model(tiny_base_model_folder)[0],
        tokenizer=tiny_tokenizer,
        target_modules=["down_proj"],
        hypernetwork={
            "rank": 2,
            "aggregator": {
                **{"name": "perceiver", "latent_dim": 16, "num_latents": 3, "num_blocks": 2},
                **{"num_heads": 2, "num_kv_heads": 1, "head_dim": 8},
            },
        },
        context_encoder={"kind": "per_layer_activations"},
        max_chunk_tokens=20,
        ridge=0.1,
    )
    with torch.no_grad():
        for parameter in model.hypernetwork.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@dataclass
class ServerProcess:
    """`hypernet <command>` in a process of its own, once it answers at `probe`."""

    command: list[str]
    probe: str = "/healthz"
    port: int = field(default_factory=free_port)

    def __enter__(self) -> "ServerProcess":
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "hypernet", *self.command, "--port", str(self.port)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        deadline = time.monotonic() + 120
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                httpx.get(f"{self.url}{self.probe}", timeout=5)
                return self
            except httpx.TransportError:
                time.sleep(0.1)
        self.process.kill()
        raise AssertionError(f"no server came up: {self.process.communicate()[0]}")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self, number: int = signal.SIGTERM) -> str:
        """What it printed."""
        self.process.send_signal(number)
        return self.process.communicate(timeout=60)[0]

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()
