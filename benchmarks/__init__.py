"""Measurements: every figure this project states comes from a command in here and its committed rows in results/."""
