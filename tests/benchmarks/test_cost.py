"""benchmarks/cost.py: FLOPs from shapes are those that torch counts; break-even from hand-made costs."""

import math

import pytest
import torch

from benchmarks.cost import Costs, ModelShape, adapter_flops, amortised, break_even, flops_of
from benchmarks.decoding import Prefix, greedy
from benchmarks.internalize_cost import flops_of as torch_flops_of


@pytest.mark.parametrize("new", [1, 7, 37])
def test_forward_flops_are_those_that_torch_counts(tiny_base_model, new) -> None:
    ids = torch.arange(new)[None] + 5
    shape = ModelShape.of(tiny_base_model)
    counted = flops_of(lambda: tiny_base_model(input_ids=ids, use_cache=False, logits_to_keep=1))
    assert shape.forward_flops(new) == counted
    # Torch's own counter knows attention where it is written out as products.
    tiny_base_model.set_attn_implementation("eager")
    run = lambda: tiny_base_model(input_ids=ids, use_cache=False, logits_to_keep=1)  # noqa: E731
    assert shape.forward_flops(new) == torch_flops_of(run)
    prefix = Prefix.of(tiny_base_model, range(5, 18))
    with_cache = lambda: tiny_base_model(  # noqa: E731
        input_ids=ids, past_key_values=prefix.repeated(1, tiny_base_model.config), logits_to_keep=1
    )
    assert shape.forward_flops(new, past=13) == flops_of(with_cache)


def test_generation_flops_are_those_of_the_decoding_loop(tiny_base_model, tiny_tokenizer) -> None:
    generated = []
    prompt = [list(range(5, 25))]
    counted = flops_of(lambda: generated.append(greedy(tiny_base_model, tiny_tokenizer, prompt, max_new_tokens=6)))
    shape = ModelShape.of(tiny_base_model)
    assert shape.generation_flops(20, answer=generated[0].num_tokens[0]) == counted


def test_adapter_flops_are_those_that_an_adapter_adds(make_doc_to_lora) -> None:
    model = make_doc_to_lora()
    adapter = model.internalize("One sentence here. " * 20)
    x = torch.randn(11, 48)
    blocks = adapter.concatenated()["down_proj"]  # lora_delta is opaque to the counter, so its products are written out
    counted = torch_flops_of(lambda: [(x @ A.T) @ B for A, B in zip(*blocks, strict=True)])
    assert counted == adapter_flops(adapter.targets, adapter.rank, 11)


def test_break_even_is_where_the_totals_cross() -> None:
    own, other = Costs(prepare=100, question=2), Costs(prepare=10, question=5)
    assert break_even(own, other) == 30
    assert 100 + 30 * 2 == 10 + 30 * 5
    assert break_even(other, own) == math.inf
    assert break_even(Costs(1, 1), Costs(5, 2)) == 0
    assert amortised(own, 30) == pytest.approx(amortised(other, 30))
