"""Formats of other programs: the authors' published checkpoints, vLLM."""
