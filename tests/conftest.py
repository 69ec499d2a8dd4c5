"""What every test runs under: no network, one torch thread per process, Triton's interpreter where there is no GPU.

The environment is set before torch, transformers and triton are imported: they read it once. Mark a test that needs a
GPU, or bf16 in a Triton kernel, with `@pytest.mark.requires_gpu`; it is skipped elsewhere.
`TRITON_INTERPRET=1 make test` interprets the kernels on a GPU machine too.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Read by @triton.jit at decoration time, and torch does not import triton, so this is early enough.
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_random_numbers_whatever_ran_before() -> None:
    torch.manual_seed(0)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("requires_gpu") is None:
        return
    if not HAS_GPU:
        pytest.skip("needs a CUDA device, none found here")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("needs compiled kernels, but TRITON_INTERPRET=1 is set")
