"""Packed rows by blocks give the logits and gradients of a mask over the whole rows, and of one prompt at a time."""

import pytest
import torch

from hypernet.base.base_model import build_base_model, logits_at
from hypernet.base.packed_attention import NAME, RowBlocks, packed_logits, supports_packed_attention
from hypernet.base.packed_rows import Segment, pack_row, pad_rows

LLAMA = {
    "model_type": "llama",
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# Tokens of the prefix; then (tokens, does it see the prefix) of each segment. A long one is as a reordering.
ROWS = {
    "questions with and without the prefix": [(7, [(3, True), (5, False), (4, True), (17, True)]), (2, [(6, False)])],
    "no prefix at all": [(0, [(3, False), (9, False)]), (0, [(4, False)])],
    "a prefix alone": [(5, []), (1, [(2, True)])],
    "sees a prefix that is not there": [(0, [(3, True)]), (0, [(1, True), (2, False)])],
}


def make_rows(case):
    def ids(number):
        return torch.randint(1, 60, (number,)).tolist()

    rows = [
        pack_row(ids(prefix), [Segment(ids(size), min(2, size - 1), sees, 0) for size, sees in segments])
        for prefix, segments in ROWS[case]
    ]
    return pad_rows(rows, pad_id=0)


def dense_logits(model, rows, where):
    return logits_at(
        model,
        where,
        input_ids=rows.ids,
        position_ids=rows.positions,
        attention_mask=rows.attention_mask(torch.float32),
    )


@pytest.mark.parametrize("case", ROWS)
def test_packed_attention_equals_dense_row_mask(case):
    model, rows = build_base_model(LLAMA), make_rows(case)
    where = rows.segments >= 0  # every token, not only answers
    found, expected = packed_logits(model, rows, where), dense_logits(model, rows, where)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    weights = torch.randn_like(found)
    gradients = [torch.autograd.grad((y * weights).sum(), list(model.parameters())) for y in (found, expected)]
    for (name, _), one, other in zip(model.named_parameters(), *gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)


def test_packed_attention_needs_fewer_flops_than_row_mask():
    blocks = RowBlocks.of(make_rows("no prefix at all"))
    pairs = sum(group.mask.numel() for group in blocks.groups)
    assert blocks.num_prefix == 0 and pairs <= 2 * 4**2 + 9**2 < 2 * 12**2


def test_packed_attention_restores_model_attention():
    model, rows = build_base_model(LLAMA), make_rows("a prefix alone")
    before = model.config._attn_implementation
    packed_logits(model, rows, rows.target_kind >= 0)
    assert model.config._attn_implementation == before != NAME


@pytest.mark.parametrize(
    "settings",
    [
        {**LLAMA, "model_type": "gemma2", "head_dim": 8},  # soft caps and sliding windows
        {**LLAMA, "model_type": "mistral", "sliding_window": 8},
    ],
)
def test_packed_attention_falls_back_to_mask_for_other_models(settings):
    model, rows = build_base_model(settings), make_rows("questions with and without the prefix")
    assert not supports_packed_attention(model)
    where = rows.target_kind >= 0
    torch.testing.assert_close(packed_logits(model, rows, where), dense_logits(model, rows, where), rtol=0, atol=0)


def test_packed_attention_respects_chosen_implementation():
    model, rows = build_base_model(LLAMA), make_rows("questions with and without the prefix")
    assert supports_packed_attention(model)
    model.set_attn_implementation("eager")
    assert not supports_packed_attention(model)
    where = rows.target_kind >= 0
    found = packed_logits(model, rows, where)
    torch.testing.assert_close(found, dense_logits(model, rows, where), rtol=0, atol=0)


def test_packed_attention_uses_mask_when_checkpointing():
    """A checkpointed layer runs again in the backward pass, when the implementation is no longer set."""
    model, rows = build_base_model(LLAMA).train(), make_rows("questions with and without the prefix")
    plain = packed_logits(model, rows, rows.target_kind >= 0).sum()
    expected = torch.autograd.grad(plain, list(model.parameters()))
    assert supports_packed_attention(model)
    model.gradient_checkpointing_enable()
    assert not supports_packed_attention(model)
    found = torch.autograd.grad(packed_logits(model, rows, rows.target_kind >= 0).sum(), list(model.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
