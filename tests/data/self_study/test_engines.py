"""Engines of self-study: what is missing is told."""

import sys

import pytest

from hypernet.data.self_study.engines import VllmEngine


def test_vllm_engine_without_vllm_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed, whether it is or not
    with pytest.raises(ValueError, match="engine=vllm needs vLLM, which is not installed: pip install vllm"):
        VllmEngine("any")
