"""benchmarks/measuring/cost.py: FLOPs from shapes are those that torch counts; break-even from hand-made costs."""

import copy
import math

import numpy as np
import pytest
import torch

from benchmarks.internalize_cost import flops_of as torch_flops_of
from benchmarks.internalize_cost import make_document
from benchmarks.measuring.cost import (
    CostModel,
    Line,
    Measured,
    ModelShape,
    SecondsModel,
    adapter_flops,
    amortised,
    break_evens,
    flops_of,
)
from benchmarks.measuring.decoding import Prefix, greedy
from hypernet.adapters.break_even import Costs, break_even


@pytest.fixture(autouse=True)
def positions_without_a_matrix_product(monkeypatch):
    """transformers 5.17 multiplies positions with frequencies by one, which torch counts; 5.23 does not."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = (position_ids[..., None].float() * self.inv_freq).repeat(1, 1, 2)
        return tuple((f(angles) * self.attention_scaling).to(x.dtype) for f in (torch.cos, torch.sin))

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaRotaryEmbedding.forward", forward)


@pytest.mark.parametrize("new", [1, 7, 37])
def test_forward_flops_equal_torch_counter(tiny_base_model, new) -> None:
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


def test_generation_flops_equal_decoding_loop(tiny_base_model, tiny_tokenizer) -> None:
    generated = []
    prompt = [list(range(5, 25))]
    counted = flops_of(lambda: generated.append(greedy(tiny_base_model, tiny_tokenizer, prompt, max_new_tokens=6)))
    shape = ModelShape.of(tiny_base_model)
    assert shape.generation_flops(20, answer=generated[0].num_tokens[0]) == counted


def test_adapter_flops_equal_what_an_adapter_adds(make_doc_to_lora) -> None:
    model = make_doc_to_lora()
    adapter = model.internalize("One sentence here. " * 20)
    x = torch.randn(11, 48)
    blocks = adapter.concatenated()["down_proj"]  # lora_delta is opaque to the counter, so its products are written out
    counted = torch_flops_of(lambda: [(x @ A.T) @ B for A, B in zip(*blocks, strict=True)])
    assert counted == adapter_flops(adapter.targets, adapter.rank, 11)


def test_break_even_is_where_totals_cross() -> None:
    own, other = Costs(prepare=100, question=2), Costs(prepare=10, question=5)
    assert break_even(own, other) == 30
    assert 100 + 30 * 2 == 10 + 30 * 5
    assert break_even(other, own) == math.inf
    assert break_even(Costs(1, 1), Costs(5, 2)) == 0
    pairs = [(100, 2, 10, 5), (10, 5, 100, 2), (1, 1, 5, 2), (1, 1, 5, 1), (5, 1, 1, 1), (1, 1, 1, 1)]
    columns = [np.array(column, dtype=float) for column in zip(*pairs, strict=True)]
    alone = [break_even(Costs(*pair[:2]), Costs(*pair[2:])) for pair in pairs]
    assert break_evens(Costs(*columns[:2]), Costs(*columns[2:])).tolist() == alone
    assert amortised(own, 30) == pytest.approx(amortised(other, 30))


def test_costs_are_those_that_torch_counts_for_each_method(make_doc_to_lora) -> None:
    doc_to_lora = make_doc_to_lora().requires_grad_(False)
    model = CostModel.of(doc_to_lora)._replace(question_tokens=9, answer_tokens=4, retrieved_tokens=30)
    base_model, tokenizer = doc_to_lora.base_model, copy.deepcopy(doc_to_lora.tokenizer)  # all tests share it
    tokenizer.eos_token_id = base_model.generation_config.eos_token_id = None  # all answers have the same length

    def counted(prompt: int, past: int = 0) -> int:
        prefix = Prefix.of(base_model, range(5, 5 + past)) if past else None
        ids = [list(range(5, 5 + prompt))]
        return flops_of(lambda: greedy(base_model, tokenizer, ids, max_new_tokens=4, prefix=prefix))

    for length in (20, 57):
        assert model.costs("full_context", length) == (0, counted(length + 9))
        read = flops_of(lambda n=length: Prefix.of(base_model, range(5, 5 + n)))
        assert model.costs("prefix_cache", length) == (read, counted(9, past=length))
        assert model.costs("retrieval", length) == (0, counted(min(length, 30) + 9))
        rank = model.num_chunks(length) * doc_to_lora.hypernetwork.rank + doc_to_lora.hypernetwork.bias_rank
        extra = adapter_flops(model.targets, rank, 9 + 3)
        assert model.costs("doc_to_lora", length).question == counted(9) + extra
    with pytest.raises(ValueError, match="no_context.*doc_to_lora, full_context"):
        model.costs("no_context", 20)


@pytest.mark.parametrize("num_tokens", [12, 55, 130])
def test_internalize_flops_are_linear_in_document_length(make_doc_to_lora, num_tokens) -> None:
    doc_to_lora = make_doc_to_lora().requires_grad_(False)
    document = make_document(doc_to_lora, num_tokens)
    counted = flops_of(lambda: doc_to_lora.internalize(document))
    chunks = doc_to_lora.internalize(document).num_chunks
    per_chunk, per_token = CostModel.of(doc_to_lora).internalize_flops
    # Within a tenth: what chunks are padded to, and attention within them, is not foretold.
    assert per_chunk * chunks + per_token * num_tokens == pytest.approx(counted, rel=0.1)


def test_line_fit_recovers_nonnegative_coefficients() -> None:
    exact = Line.fitted([(x, 2 + 3 * x) for x in (1, 5, 40)])
    assert exact == pytest.approx((2, 3)) and exact.at(10) == pytest.approx(32)
    assert Line.fitted([(1, 10), (2, 5)]).slope == 0
    through_zero = Line.fitted([(1, 1), (10, 20)])
    assert through_zero.fixed == 0 and 1 < through_zero.slope < 2
    assert Line.fitted([(3, 7)]) == (7, 0)
    with pytest.raises(ValueError, match="seconds above 0"):
        Line.fitted([(1, 0.0)])


def test_fitted_seconds_are_the_measured_ones_on_a_line(cost_model) -> None:
    def measured(method: str, length: int) -> Measured:
        work = cost_model.phases(method, length)
        return Measured(method, length, 0.1 + 1e-6 * (work.prepare or length), 1e-6 * work.first_token, 0.02)

    points = [measured(method, length) for method in ("doc_to_lora", "retrieval") for length in (50, 200, 500)]
    seconds = SecondsModel.fitted(cost_model._replace(retrieved_tokens=96), points)
    for point in points[:3]:
        costs = seconds.costs(point.method, point.num_tokens)
        assert costs.prepare == pytest.approx(point.prepare_s)
        assert costs.question == pytest.approx(point.first_token_s + 4 * 0.02, rel=1e-6)
    assert seconds.costs("retrieval", 1000).prepare == pytest.approx(0.101)  # over tokens: an index takes no FLOPs
    with pytest.raises(KeyError):
        seconds.costs("full_context", 100)
