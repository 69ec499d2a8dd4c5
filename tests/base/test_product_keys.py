"""The memory layer against a loop in float64 over all n² slots; the base model around it; files."""

import json
import math

import numpy as np
import pytest
import torch

from hypernet.base.base_model import build_base_model, load_base_model
from hypernet.base.product_keys import ProductKeyMemory, add_memory_layer, memory_layers
from tests.base.test_base_model import LLAMA

SIZES = {"num_keys": 5, "num_heads": 3, "top_k": 3, "key_dim": 6, "gain": 2.0}
IDS = torch.tensor([[3, 41, 7, 7, 19], [0, 1, 2, 3, 4]])


def memory_of(dim=7, seed=0, **changes):
    torch.manual_seed(seed)
    memory = ProductKeyMemory(dim, **{**SIZES, **changes})
    with torch.no_grad():
        memory.values.normal_()
        memory.norm.weight.normal_()
        memory.norm.bias.normal_()
    return memory


def by_hand(memory, x):
    """m(x) of one vector, every slot scored: output, slots of each head."""
    W, keys, values = (t.detach().double().numpy() for t in (memory.query.weight, memory.keys, memory.values))
    gain, bias = (t.detach().double().numpy() for t in (memory.norm.weight, memory.norm.bias))
    n, output, read = memory.num_keys, np.zeros(len(x)), []
    for head in range(memory.num_heads):
        q = W[head * len(gain) : (head + 1) * len(gain)] @ x
        q = (q - q.mean()) / math.sqrt(q.var() + 1e-5) * gain + bias
        half = len(q) // 2
        scores = [q[:half] @ keys[head, 0, slot // n] + q[half:] @ keys[head, 1, slot % n] for slot in range(n * n)]
        best = sorted(range(n * n), key=lambda slot: -scores[slot])[: memory.top_k]
        weights = np.exp([scores[slot] for slot in best])
        output += sum(w / weights.sum() * values[slot] for w, slot in zip(weights, best, strict=True))
        read.append(best)
    return memory.gain * output, read


@pytest.mark.parametrize(
    "changes", [{}, {"gain": 0.3}, {"top_k": 1}, {"top_k": 5, "num_heads": 1}, {"num_keys": 3, "key_dim": 2}]
)
def test_output_is_that_of_all_slots_scored_in_float64(changes):
    memory = memory_of(**changes)
    x = torch.randn(2, 4, 7)
    found, (slots, weights) = memory(x), memory.lookup(x)
    assert torch.allclose(weights.sum(-1), torch.ones(weights.shape[:-1]))
    for place in np.ndindex(2, 4):
        expected, read = by_hand(memory, x[place].double().numpy())
        np.testing.assert_allclose(found[place].detach().numpy(), expected, atol=1e-5)
        assert [sorted(head) for head in slots[place].tolist()] == [sorted(head) for head in read]


def test_every_gradient_is_that_of_finite_differences():
    memory = memory_of().double()
    names, tensors = zip(*memory.named_parameters(), strict=True)
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)

    def run(x, *tensors):
        return torch.func.functional_call(memory, dict(zip(names, tensors, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *tensors), eps=1e-7, atol=1e-5)


def test_values_that_no_token_reads_get_no_gradient():
    memory = memory_of()
    x = torch.randn(2, 7)
    memory(x).square().sum().backward()
    read = set(memory.lookup(x)[0].flatten().tolist())
    moved = set(memory.values.grad.abs().sum(1).nonzero().flatten().tolist())
    assert moved == read and len(read) < 25


def test_base_model_is_unchanged_at_the_start_and_learns():
    base_model = build_base_model(LLAMA)
    before = base_model(IDS).logits
    names = set(dict(base_model.named_parameters()))
    memory = add_memory_layer(base_model, {"layer": 0, **SIZES})
    assert torch.equal(base_model(IDS).logits, before)
    assert names < set(dict(base_model.named_parameters()))
    assert set(memory_layers(base_model)) == {"model.layers.0.mlp.memory"}
    base_model(IDS).logits.square().mean().backward()
    assert memory.values.grad.abs().max() > 0
    with torch.no_grad():
        memory.values.normal_()
    entered = []
    hook = memory.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    after = base_model(IDS).logits
    hook.remove()
    assert not torch.allclose(after, before) and entered[0].shape == (2, 5, 16)


def test_memory_for_an_mlp_is_all_that_the_block_adds():
    base_model = build_base_model({**LLAMA, "memory_layer": {"layer": 0, "replaces_mlp": True, **SIZES}})
    (memory,) = memory_layers(base_model).values()
    with torch.no_grad():
        memory.values.normal_()
        before = base_model(IDS).logits
        mlp = base_model.get_submodule("model.layers.0.mlp")
        x = torch.randn(2, 3, 16)
        assert torch.equal(mlp(x), memory(x))
        mlp.down_proj.weight.zero_()
        assert torch.equal(base_model(IDS).logits, before)
    base_model(IDS).logits.square().mean().backward()
    assert memory.values.grad is not None and mlp.up_proj.weight.grad is None


def test_seed_decides_queries_and_keys():
    first, again, other = (build_base_model({**LLAMA, "memory_layer": {"layer": 0}}, seed=s) for s in (1, 1, 2))
    pairs = zip(first.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    name = "model.layers.0.mlp.memory.keys"
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))


def with_memory(folder, tokenizer):
    base_model = build_base_model({**LLAMA, "vocab_size": len(tokenizer), "memory_layer": {"layer": 0, **SIZES}})
    with torch.no_grad():
        base_model.get_parameter("model.layers.0.mlp.memory.values").normal_()
    base_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return base_model


def test_memory_layer_comes_back_from_disk_in_silence(tmp_path, tiny_tokenizer, capfd):
    base_model = with_memory(tmp_path, tiny_tokenizer)
    capfd.readouterr()
    again, _ = load_base_model(tmp_path)
    assert torch.equal(again(IDS).logits, base_model(IDS).logits)
    assert not any(parameter.requires_grad for parameter in again.parameters()) and not again.training
    assert all(not module.training for module in again.modules())
    half, _ = load_base_model(tmp_path, dtype="bfloat16")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16} and half(
        IDS
    ).logits.isfinite().all()
    assert "UNEXPECTED" not in "".join(capfd.readouterr())


def test_missing_memory_tensors_are_named(tmp_path, tiny_tokenizer):
    with_memory(tmp_path, tiny_tokenizer)
    config = json.loads((tmp_path / "config.json").read_text())
    config["memory_layer"] |= {"num_keys": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json says memory_layer .*'num_keys': 4.*model.safetensors"):
        load_base_model(tmp_path)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"layer": 1}, "layer of the memory layer is 1. Give a block's number, 0 to 0"),
        ({}, "layer of the memory layer is None"),
        ({"layer": 0, "num_keys": 0}, "num_keys of the memory layer is 0"),
        ({"layer": 0, "num_keys": 4}, "top_k 8, num_keys 4.* Give a top_k up to num_keys"),
        ({"layer": 0, "gain": 0.0}, "gain of the memory layer is 0.0. Give a finite number above 0"),
        ({"layer": 0, "key_dim": 3}, "key_dim 3. .*an even key_dim"),
    ],
)
def test_wrong_memory_layer_is_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        add_memory_layer(build_base_model(LLAMA), settings)
