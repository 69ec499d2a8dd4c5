"""find_targets: by name, block by block; missing, narrower, fused, repeated and shared modules."""

import json

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig

from hypernet.base.base_model import build_base_model
from hypernet.base.targets import LayerTarget, LoRATarget, adapted_layers, find_blocks, find_targets

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def llama():
    return build_base_model({"model_type": "llama", **SIZES})


def linear(**sizes):
    return nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()})


class Decoder(nn.Module):
    """As much of a causal LM as `find_targets` looks at."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.config = PretrainedConfig(num_hidden_layers=len(blocks))
        self.layers = nn.ModuleList(blocks)

    def get_decoder(self) -> nn.Module:
        return self


def test_targets_are_sorted_with_one_path_per_layer():
    down, q = find_targets(llama(), ["q_proj", "down_proj", "q_proj"])
    assert down == LoRATarget("down_proj", ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"), 48, 32)
    assert q == LoRATarget("q_proj", ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"), 32, 32)
    assert list(q.modules()) == [LayerTarget(i, f"model.layers.{i}.self_attn.q_proj", 32, 32) for i in (0, 1)]


def test_find_targets_handles_uneven_widths_and_missing_modules():
    model = Decoder(linear(a=(3, 4), b=(4, 3)), linear(b=(5, 3)), linear(a=(3, 4), b=(2, 9)))
    a, b = find_targets(model, ["a", "b"])
    assert a == LoRATarget("a", ("layers.0.a", None, "layers.2.a"), 3, 4)
    assert b == LoRATarget("b", ("layers.0.b", "layers.1.b", "layers.2.b"), 5, 9, ((4, 3), (5, 3), (2, 9)))
    assert [place.layer for place in a.modules()] == [0, 2]
    assert [(place.d_in, place.d_out) for place in b.modules()] == [(4, 3), (5, 3), (2, 9)]


def test_find_targets_keeps_order_of_chosen_layers():
    model = Decoder(linear(a=(3, 4)), linear(b=(5, 3)), linear(a=(9, 4)), linear(a=(3, 4)))
    (a,) = find_targets(model, ["a"], layers=[1, 3])
    assert a == LoRATarget("a", (None, "layers.3.a"), 3, 4)
    assert [place.layer for place in a.modules()] == [1]
    assert find_targets(model, ["a"], layers=range(4)) == find_targets(model, ["a"])


@pytest.mark.parametrize(
    ("share", "layers"), [(0.5, [3, 4, 5]), (1.0, [0, 1, 2, 3, 4, 5]), (0.01, [5]), (0.7, [2, 3, 4, 5])]
)
def test_target_layer_share_selects_last_layers(share, layers):
    assert adapted_layers(Decoder(*[linear(a=(3, 4))] * 6), share) == layers


@pytest.mark.parametrize("layers", [[], [0, 2], [1, 0], [0, 0], [-1], 1, "0", 0.0, 1.5, ["0"]])
def test_find_targets_refuses_missing_layers(layers):
    with pytest.raises(ValueError, match="layers to adapt as an ascending list from 0 to 1, or the share .*, got"):
        find_targets(llama(), ["down_proj"], layers=layers)


def test_target_roundtrips_through_json():
    model = Decoder(linear(a=(3, 4), b=(4, 3)), linear(b=(5, 3)))
    for target in find_targets(model, ["a", "b"]):
        assert LoRATarget.of(json.loads(json.dumps(target.plain()))) == target
    uniform = find_targets(llama(), ["q_proj"])[0].plain()
    assert set(uniform) == {"name", "paths", "d_in", "d_out"}
    assert LoRATarget.of(uniform | {"widths": None}).widths is None


@pytest.mark.parametrize(
    "change, error",
    [
        ({"paths": 3}, TypeError),
        ({"d_in": "wide"}, ValueError),
        ({"widths": [[3, 4]]}, ValueError),
        ({"colour": "red"}, KeyError),
        ({"name": None, "d_out": None}, TypeError),
    ],
)
def test_target_refuses_invalid_fields(change, error):
    fields = find_targets(llama(), ["q_proj"])[0].plain()
    with pytest.raises(error):
        LoRATarget.of(fields | change)


shared = nn.Linear(3, 4)


@pytest.mark.parametrize(
    "model, names, message",
    [
        (
            llama(),
            ["down"],
            r"No nn.Linear named 'down' in the blocks of LlamaForCausalLM; they have \['down_proj', .*'v_proj'\]",
        ),
        (llama(), "down", "No nn.Linear named 'down'"),
        (llama(), ["norm"], "No nn.Linear named 'norm'"),
        (llama(), ["lm_head"], "No nn.Linear named 'lm_head' in the blocks"),
        (llama(), [], "No target modules given.*down_proj"),
        (
            Decoder(nn.ModuleDict({"self": linear(q=(3, 4)), "cross": linear(q=(3, 4))})),
            ["q"],
            r"Layer 0 has several modules named 'q', such as layers.0.self.q and layers.0.cross.q\. Set target_modules",
        ),
        (
            Decoder(nn.ModuleDict({"a": shared}), nn.ModuleDict({"a": shared})),
            ["a"],
            "layers.0.a and layers.1.a are one and the same module",
        ),
    ],
)
def test_missing_or_ambiguous_targets_are_refused(model, names, message):
    with pytest.raises(ValueError, match=message) as caught:
        find_targets(model, names)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "model_type, name, fused",
    [("phi3", "q_proj", "qkv_proj"), ("phi3", "up_proj", "gate_up_proj"), ("gpt_neox", "v_proj", "query_key_value")],
)
def test_find_targets_names_the_fused_projection(model_type, name, fused):
    sizes = {**SIZES, "bos_token_id": 1, "eos_token_id": 2}
    model = build_base_model({"model_type": model_type, **sizes})
    with pytest.raises(ValueError, match=f"named {name!r}.*It is part of {fused} here"):
        find_targets(model, [name])
    assert [target.name for target in find_targets(model, [fused])] == [fused]


def test_find_targets_refuses_non_linear_projections():
    model = build_base_model({"model_type": "gpt2", "vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4})
    with pytest.raises(ValueError, match="The blocks of GPT2LMHeadModel hold no nn.Linear.*Conv1D"):
        find_targets(model, ["c_proj"])


def test_find_targets_refuses_model_without_block_list():
    model = Decoder(linear(a=(3, 4)))
    model.config.num_hidden_layers = 2
    with pytest.raises(ValueError, match=r"Found no list of 2 blocks in Decoder, which has \['layers'\]"):
        find_blocks(model)


def test_find_targets_skips_the_vision_tower():
    text = {**SIZES, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    model = build_base_model({"model_type": "gemma3", "text_config": text, "vision_config": vision})
    assert any(path.endswith("q_proj") and "vision" in path for path, _ in model.named_modules())
    (target,) = find_targets(model, ["q_proj"])
    assert target.paths == tuple(f"model.language_model.layers.{i}.self_attn.q_proj" for i in range(2))
    assert all(isinstance(model.get_submodule(path), torch.nn.Linear) for path in target.paths)
