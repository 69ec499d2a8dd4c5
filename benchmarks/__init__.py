"""Measurements: every figure this project states comes from a command in here and its committed rows in results/."""

import os

# torch reads it when it is imported; its profiler, which measures memory, prints two lines for each use otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
