"""merging: merged weights answer like the injector's, come back as they were, and what cannot be merged is refused."""

import copy

import pytest
import torch
from torch import nn

from hypernet.adapters.composition import compress, pad
from hypernet.adapters.injection import LoRAInjector
from hypernet.adapters.merging import merge, merged, unmerge
from hypernet.base.targets import find_targets
from tests.adapters.test_adapter import assert_one_line_value_error, make_adapter, make_base_model
from tests.adapters.test_composition import UNEVEN, deltas, uneven_adapter

IDS = torch.arange(2, 16).view(2, 7)
NAMES = ["q_proj", "down_proj", "up_proj"]


@pytest.fixture
def base_model():
    model = make_base_model()
    for parameter in model.parameters():
        # The default init is so small that an adapter's effect would drown in the tolerance.
        parameter.data.mul_(4 if parameter.ndim > 1 else 1)
    return model


@pytest.fixture
def adapter(base_model):
    return make_adapter(find_targets(base_model, NAMES), 3, scaling=2.0)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def uneven_model():
    model = nn.Module()
    model.a = nn.ModuleList(nn.Module() for _ in range(3))
    for target in UNEVEN:
        for module in target.modules():
            setattr(model.a[module.layer], target.name, nn.Linear(module.d_in, module.d_out))
    return model


@pytest.mark.parametrize("num_chunks", [0, 1, 5])
def test_merged_logits_equal_injected_logits(base_model, num_chunks):
    adapter = make_adapter(find_targets(base_model, NAMES), num_chunks, scaling=2.0)
    plain = logits(base_model)
    injector = LoRAInjector(base_model, adapter.targets)
    with injector.using(adapter):
        injected = logits(base_model)
    merge(base_model, adapter)
    torch.testing.assert_close(logits(base_model), injected, rtol=0, atol=1e-4)
    assert (injected - plain).abs().max() > 0.05


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_low_precision_merge_is_exact_to_rounding(base_model, dtype, tolerance):
    adapter = make_adapter(find_targets(base_model, NAMES), 2, scaling=2.0, dtype=dtype)
    reference = copy.deepcopy(base_model.to(dtype)).float()
    merge(reference, adapter)
    merge(base_model, adapter)
    for target in adapter.targets:
        for path in target.paths:
            # Summed in float32 and rounded once: bit-identical to rounding the float32 result.
            exact = reference.get_submodule(path).weight
            assert torch.equal(base_model.get_submodule(path).weight, exact.to(dtype))
    relative = (logits(base_model) - logits(reference)).norm() / logits(reference).norm()
    assert relative < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_unmerge_restores_to_rounding_and_merged_to_the_bit(base_model, adapter, dtype):
    base_model.to(dtype)
    before = state(base_model)
    with merged(base_model, adapter):
        inside = state(base_model)
    after = state(base_model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    merge(base_model, adapter)
    assert all(torch.equal(base_model.state_dict()[name], inside[name]) for name in inside)
    unmerge(base_model, adapter)
    changed = {name for name in before if not torch.equal(inside[name], before[name])}
    assert changed == {f"{path}.weight" for target in adapter.targets for path in target.paths}
    for name, weight in base_model.state_dict().items():
        # Two roundings of numbers no larger than the larger of the two.
        largest = torch.maximum(inside[name].abs(), before[name].abs()).double()
        assert ((weight - before[name]).abs().double() <= 2 * torch.finfo(dtype).eps * largest + 1e-12).all()


def test_merge_handles_uneven_widths_and_missing_modules():
    model, adapter = uneven_model(), uneven_adapter(2)
    before = state(model)
    merge(model, adapter)
    expected = deltas(adapter)
    for path, delta in expected.items():
        weight = model.state_dict()[f"{path}.weight"].double() - before[f"{path}.weight"].double()
        torch.testing.assert_close(weight, delta, rtol=1e-4, atol=1e-5)
    assert {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])} == {
        f"{p}.weight" for p in expected
    }


def test_merge_accepts_compressed_and_padded_adapters(base_model, adapter):
    with merged(base_model, adapter):
        expected = logits(base_model)
    for other in (pad(adapter, 20), compress(adapter, adapter.rank)[0]):
        with merged(base_model, other):
            torch.testing.assert_close(logits(base_model), expected, rtol=0, atol=1e-3)


def test_merge_records_no_autograd_graph(base_model, adapter):
    merge(base_model, adapter)
    weight = base_model.get_submodule(adapter.targets[0].paths[0]).weight
    assert weight.requires_grad and weight.is_leaf
    base_model(IDS).logits.sum().backward()


def test_merged_restores_weights_after_error(base_model, adapter):
    before = state(base_model)
    with pytest.raises(RuntimeError, match="inside"), merged(base_model, adapter):
        raise RuntimeError("inside")
    assert all(torch.equal(base_model.state_dict()[name], before[name]) for name in before)
    merge(base_model, adapter)  # and it counts as not merged


def test_double_merge_and_unmatched_unmerge_are_refused(base_model, adapter):
    assert_one_line_value_error(lambda: unmerge(base_model, adapter), "not merged into the base model, 0 others")
    merge(base_model, adapter)
    same = adapter.to(dtype=torch.float64).to(dtype=torch.float32)
    assert_one_line_value_error(lambda: merge(base_model, same), "merged into the base model already")
    other = make_adapter(adapter.targets, 1, seed=7, scaling=2.0)
    assert_one_line_value_error(lambda: merge(base_model, other), r"same hypernetwork \(generator-1\).*bias block")
    assert_one_line_value_error(lambda: unmerge(base_model, other), "not merged into the base model, 1 others")
    foreign = make_adapter(adapter.targets, 1, seed=7, scaling=2.0, generator="generator-2")
    merge(base_model, foreign)
    assert_one_line_value_error(lambda: merge(copy.deepcopy(base_model), adapter), "already")  # copies know
    unmerge(base_model, same)
    unmerge(base_model, foreign)


def test_adapters_without_bias_block_merge_in_turn(base_model, adapter):
    a, b = (make_adapter(adapter.targets, n, seed=n, bias=False, scaling=2.0) for n in (1, 2))
    expected = copy.deepcopy(base_model)
    merge(expected, a + b)
    merge(base_model, a)
    merge(base_model, b)
    torch.testing.assert_close(logits(base_model), logits(expected), rtol=0, atol=1e-4)
    assert_one_line_value_error(lambda: merge(base_model, b), "This adapter is merged")


def broken(model, adapter, how):
    path = adapter.targets[0].paths[1]
    parent, name = model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
    layer = getattr(parent, name)
    if how == "tied":
        model.get_submodule(adapter.targets[0].paths[0]).weight = layer.weight
    elif how == "shared memory":
        model.register_buffer("spare", layer.weight.data[3:5])
    elif how == "meta":
        layer.weight = nn.Parameter(layer.weight.to("meta"))
    elif how == "int8":
        layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    elif how == "float8":
        layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    elif how == "parametrised":
        nn.utils.parametrizations.weight_norm(layer)
    elif how == "missing":
        delattr(parent, name)
    elif how == "no linear":
        setattr(parent, name, nn.Identity())
    elif how == "shape":
        setattr(parent, name, nn.Linear(5, 6))
    elif how == "overflow":
        layer.weight.data[0, 0] = torch.inf
    elif how == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(layer, Int8WeightOnlyConfig())


@pytest.mark.parametrize(
    "how, message",
    [
        ("tied", "shares its memory with model.layers"),
        ("shared memory", "shares its memory with spare"),
        ("meta", "on the meta device"),
        ("int8", "quantised or not a plain parameter .*int8"),
        ("float8", "quantised or not a plain parameter .*float8"),
        ("torchao", "quantised or not a plain parameter"),
        ("parametrised", "quantised or not a plain parameter"),
        ("missing", "has no module 'model.layers.1.mlp.down_proj'"),
        ("no linear", "to be an nn.Linear, got Identity"),
        ("shape", r"of shape \[32, 48\], got \[6, 5\]"),
        ("overflow", "would not be finite in torch.float32"),
    ],
)
def test_refused_merge_leaves_model_unchanged(base_model, adapter, how, message):
    broken(base_model, adapter, how)
    untouched = base_model.model.layers[0].mlp.down_proj.weight.clone()
    assert_one_line_value_error(lambda: merge(base_model, adapter), message)
    torch.testing.assert_close(base_model.model.layers[0].mlp.down_proj.weight, untouched)
    assert_one_line_value_error(lambda: unmerge(base_model, adapter), f"{message}|not merged")


def test_views_of_one_buffer_are_merged_like_separate_weights():
    model, adapter = uneven_model(), uneven_adapter(1)
    plain = state(model)
    flat = torch.zeros(1000)
    start = 0
    for parameter in model.parameters():
        view = flat[start : start + parameter.numel()].view_as(parameter)
        parameter.data = view.copy_(parameter.data)
        start += parameter.numel()
    merge(model, adapter)
    by_module = deltas(adapter)
    for name, tensor in model.state_dict().items():
        delta = by_module.pop(name.removesuffix(".weight"), None)
        expected = plain[name] if delta is None else (plain[name] + delta).float()
        assert delta is None or delta.any()
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-5)
        assert tensor.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
    assert not by_module and not flat[start:].any()
