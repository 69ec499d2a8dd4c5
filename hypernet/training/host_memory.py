"""Host memory that stays flat however the shapes of the steps change.

    keep_flat()
    import torch

A step has other numbers of tokens than the one before. Two things then grow on a CPU, for hours: oneDNN and torch's
layer above it keep what they prepared for each shape, 1,024 entries each; and glibc's heap falls into pieces between
which no large tensor fits. See docs/experiments/2026-11-29-training-memory.md.
"""

import ctypes
import os
import sys

# Entries of the two caches. A step of 30 equal blocks has about a dozen shapes, so they still serve all blocks.
CACHE_LIMITS = {"LRU_CACHE_CAPACITY": "16", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32"}
MMAP_THRESHOLD = 4 * 2**20  # bytes from which a block has pages of its own and gives them back
_M_MMAP_THRESHOLD = -3  # glibc's malloc.h


def keep_flat() -> None:
    """Limits both, before torch is imported. What the environment says already stays as it is."""
    for name, entries in CACHE_LIMITS.items():
        os.environ.setdefault(name, entries)
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        set_option = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if set_option is not None:
            set_option(_M_MMAP_THRESHOLD, MMAP_THRESHOLD)
