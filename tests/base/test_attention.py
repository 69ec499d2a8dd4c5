"""attend is torch's attention, in float32 on a CPU whatever the inputs' type or autocast."""

import pytest
import torch
import torch.nn.functional as F

from hypernet.base.attention import attend


def inputs(dtype):
    return [torch.randn(2, 3, tokens, 8).to(dtype).requires_grad_() for tokens in (5, 7, 7)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_equals_torch_attention(dtype):
    q, k, v = inputs(dtype)
    mask = torch.ones(5, 7, dtype=torch.bool).tril()
    assert torch.equal(attend(q, k, v, attn_mask=mask), F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def test_bf16_attention_computes_in_float32():
    q, k, v = inputs(torch.bfloat16)
    mixed = attend(q, k, v)
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    assert mixed.dtype == torch.bfloat16 and torch.equal(mixed, expected.bfloat16())
    assert all(grad.dtype == torch.bfloat16 for grad in torch.autograd.grad(mixed.sum(), (q, k, v)))


def test_attention_under_autocast_keeps_inputs_exact():
    q, k, v = inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = attend(q, k, v)
    assert mixed.dtype == torch.float32 and torch.equal(mixed, F.scaled_dot_product_attention(q, k, v))
