"""Host memory over steps of changing shapes, each case in a process of its own."""

import os
import subprocess
import sys

import pytest

from hypernet.training.host_memory import CACHE_LIMITS, MMAP_THRESHOLD

STEPS = """
import sys
if "flat" in sys.argv:
    from hypernet.training.host_memory import keep_flat
    keep_flat()
import torch
torch.set_num_threads(1)
weight = torch.randn(768, 288, dtype=torch.bfloat16)
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
def step(tokens):
    torch.nn.functional.linear(torch.ones(tokens, 288, dtype=torch.bfloat16), weight)
step(700)
before = resident()
for tokens in range(300, 700):
    step(tokens)
print(resident() - before)
"""


def run(script: str, *arguments: str, **variables: str) -> str:
    names = {*CACHE_LIMITS, "GLIBC_TUNABLES"}
    environment = {name: value for name, value in os.environ.items() if name not in names} | variables
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_new_shapes_keep_little_memory():
    assert int(run(STEPS, "flat")) < 0.5 * int(run(STEPS))  # measured .17


def test_what_the_environment_says_stays():
    script = (
        "import os, hypernet.training.host_memory as m; m.keep_flat(); print(*(os.environ[n] for n in m.CACHE_LIMITS))"
    )
    assert run(script).split() == list(CACHE_LIMITS.values())
    assert run(script, LRU_CACHE_CAPACITY="7").split() == ["7", CACHE_LIMITS["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]]


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
@pytest.mark.parametrize("tunables", [{}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1073741824"}])
def test_large_blocks_have_pages_of_their_own(tunables):
    """They are given back when they are freed, also between others that stay; unless the user has set glibc up."""
    script = f"""
import ctypes, hypernet.training.host_memory as m
m.keep_flat()
c = ctypes.CDLL(None)
c.malloc.restype = ctypes.c_void_p
block = c.malloc({MMAP_THRESHOLD} + 1)
heap = [line for line in open("/proc/self/maps") if line.rstrip().endswith("[heap]")][0].split()[0].split("-")
print(int(heap[0], 16) <= block < int(heap[1], 16))
"""
    assert run(script, **tunables).strip() == str(bool(tunables))
