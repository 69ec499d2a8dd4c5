"""Measurements: every figure this project states comes from a command in here and its committed rows in results/."""

import os

# torch reads both when it is imported. Otherwise its profiler, which measures memory, prints two lines for each use and
# one where something is freed that was there before.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
