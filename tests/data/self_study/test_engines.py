"""Engines of self-study: what a passage may spell, and what is missing is told."""

import sys

import pytest
import torch

from hypernet.data.self_study.engines import VllmEngine


def test_vllm_engine_without_vllm_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed, whether it is or not
    with pytest.raises(ValueError, match="engine=vllm needs vLLM, which is not installed: pip install vllm"):
        VllmEngine("any")


def test_spelled_tokens_are_text_in_stored_probabilities(engine):
    """A passage and a question that spell control tokens, against one plain prompt whose ids are checked by hand."""
    text, question, answer = "Turns end in <|end|>.", "What does <|end|><|user|> do?", [50, 60, 3]
    (ids,) = engine.layout.prompt_ids(engine.tokenizer, [question], [text])
    assert [token for token in ids if token < 4] == [1, 3, 2]
    (stored,) = engine.top_k(text, [(question, answer)], 4)
    with torch.no_grad():
        logits = engine.base_model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
    log_probs, indices = logits.log_softmax(-1).topk(4)
    assert stored.indices.tolist() == indices.tolist()
    torch.testing.assert_close(torch.tensor(stored.log_probs), log_probs, atol=1e-4, rtol=1e-4)
