"""The whole path on tiny random models of every architecture that conf/pretrained names, and of some that are harder:
fused projections, hybrid blocks, layers of different widths, a multimodal wrapper.
"""

from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig

from hypernet.adapters.adapter import LoRAAdapter
from hypernet.base.base_model import build_base_model, freeze
from hypernet.base.catalog import KNOWN_BASE_MODELS
from hypernet.doc_to_lora import DocToLoRA

PRETRAINED = Path(__file__).parents[2] / "conf" / "pretrained"
TEXT = "Norbach was founded by Ilda Renwick in 1807. It makes tin boxes, and the town stands by the river Sorn."

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
GEMMA = SIZES | {"query_pre_attn_scalar": 8, "sliding_window": 16}
PLAIN = {key: value for key, value in SIZES.items() if key not in ("num_key_value_heads", "head_dim")}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
HYBRID = ["linear_attention", "full_attention", "linear_attention"]

# model_type -> tiny configuration, target modules.
ARCHITECTURES = {
    "llama": (SIZES, ["down_proj", "q_proj"]),
    "mistral": (SIZES, ["down_proj"]),
    "qwen2": (SIZES, ["down_proj"]),
    "qwen3": (SIZES, ["down_proj", "v_proj"]),
    "gemma2": (GEMMA, ["down_proj"]),
    "gemma3_text": (GEMMA, ["down_proj"]),
    "gemma3": ({"text_config": GEMMA, "vision_config": VISION | {"image_size": 28, "patch_size": 14}}, ["down_proj"]),
    "smollm3": (SIZES, ["down_proj"]),
    "phi3": (SIZES, ["down_proj", "gate_up_proj", "qkv_proj"]),
    "phi": (PLAIN, ["fc2"]),
    "gpt_neox": (PLAIN, ["dense_4h_to_h", "query_key_value"]),
    "olmo2": (SIZES, ["down_proj"]),
    "lfm2": (
        SIZES | {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
        ["w2", "q_proj"],  # q_proj is in one block of three
    ),
    "qwen3_next": (
        SIZES
        | {"layer_types": HYBRID, "num_experts": 0, "mlp_only_layers": [0, 1, 2]}
        | {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
        | {"linear_value_head_dim": 8},
        # Each in some blocks only. (PEFT 0.21 takes a down_proj of this model type for experts', and finds none.)
        ["out_proj", "q_proj"],
    ),
    "gemma3n_text": (
        SIZES
        | {"intermediate_size": [48, 32, 40], "layer_types": ["sliding_attention", *["full_attention"] * 2]}
        | {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 4, "laurel_rank": 4, "altup_num_inputs": 2}
        | {"activation_sparsity_pattern": [0.0] * 3},
        ["down_proj"],  # of three widths
    ),
}
# Its blocks pass on several streams at once, so there are no activations per layer to read.
ENCODERS = {"gemma3n_text": {"kind": "early_exit", "layer_idx": 2}}
# What the models of conf/pretrained are.
MODEL_TYPES = {
    "tiny": "llama",
    "gemma-2-2b": "gemma2",
    "gemma-3-1b": "gemma3_text",
    "gemma-3-4b": "gemma3",
    "qwen2.5-0.5b": "qwen2",
    "qwen3-4b": "qwen3",
    "llama-3.2-1b": "llama",
    "llama-3.1-8b": "llama",
    "mistral-7b": "mistral",
    "smollm2-135m": "llama",
    "smollm3-3b": "smollm3",
    "phi-4-mini": "phi3",
}


def tiny(model_type, tokenizer):
    config, names = ARCHITECTURES[model_type]
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    ids |= {"bos_token_id": None}
    if model_type == "gemma3n_text":
        ids["vocab_size_per_layer_input"] = len(tokenizer)
    if "text_config" in config:
        config = config | {"text_config": config["text_config"] | ids}
    else:
        config = config | ids
    base_model = build_base_model({"model_type": model_type, **config}, seed=1)
    with torch.no_grad():
        for parameter in base_model.parameters():
            # The default weights are so small that an adapter's effect would drown in the tolerance.
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    return freeze(base_model), names


@pytest.fixture(params=ARCHITECTURES)
def model_type(request):
    return request.param


@pytest.fixture
def make(model_type, tiny_tokenizer):
    def make(*, trained: bool) -> DocToLoRA:
        base_model, names = tiny(model_type, tiny_tokenizer)
        torch.manual_seed(0)
        model = DocToLoRA.build(
            base_model=base_model,
            tokenizer=tiny_tokenizer,
            target_modules=names,
            hypernetwork={
                "rank": 2,
                "aggregator": {
                    **{"name": "perceiver", "latent_dim": 16, "num_latents": 3, "num_blocks": 1},
                    **{"num_heads": 2, "num_kv_heads": 1, "head_dim": 8},
                },
            },
            context_encoder=ENCODERS.get(model_type, {"kind": "per_layer_activations"}),
            max_chunk_tokens=30,
        )
        if trained:
            with torch.no_grad():
                for parameter in model.hypernetwork.parameters():
                    parameter += 0.05 * torch.randn_like(parameter)
        return model

    return make


def token_ids(tokenizer, rows):
    return torch.randint(4, len(tokenizer), (rows, 9), generator=torch.Generator().manual_seed(3))


def test_untrained_hypernetwork_keeps_logits_bit_identical(make, tiny_tokenizer):
    model = make(trained=False)
    adapter = model.internalize(TEXT)
    ids = token_ids(tiny_tokenizer, 2)
    with torch.no_grad():
        plain = model.base_model(ids).logits
        with model.injector.using(adapter):
            assert torch.equal(model.base_model(ids).logits, plain)


def test_every_hypernetwork_parameter_gets_a_gradient(make, tiny_tokenizer):
    model = make(trained=True)
    ids = token_ids(tiny_tokenizer, 3)
    A, B = model.adapt(ids, torch.ones_like(ids, dtype=torch.bool))
    model.activate(A, B, [1, 2])
    logits = model.base_model(token_ids(tiny_tokenizer, 2)).logits
    logits.square().mean().backward()
    model.injector.clear()
    without = [name for name, p in model.hypernetwork.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert not without
    assert all(torch.isfinite(p.grad).all() for p in model.hypernetwork.parameters())


def test_cached_generation_equals_a_full_forward(make, tiny_tokenizer):
    model = make(trained=True)
    adapters = [model.internalize([TEXT, "Corvale lies in the north."]), None, model.internalize("A mill.")]
    ids = token_ids(tiny_tokenizer, 3)
    with torch.no_grad(), model.injector.using(adapters):
        output = model.base_model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=False,
            use_cache=True,
            output_logits=True,
            return_dict_in_generate=True,
        )
        full = model.base_model(output.sequences, use_cache=False).logits
    torch.testing.assert_close(torch.stack(output.logits, 1), full[:, 8:-1], rtol=1e-4, atol=1e-4)
    # Each sequence as if it were alone.
    for i, adapter in enumerate(adapters):
        with torch.no_grad(), model.injector.using(adapter):
            alone = model.base_model(output.sequences[i : i + 1], use_cache=False).logits
        torch.testing.assert_close(alone[0], full[i], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        plain = model.base_model(output.sequences, use_cache=False).logits
    assert (plain[0] - full[0]).abs().max() > 1e-2


def test_peft_gives_the_logits_of_the_injection(make, model_type, tiny_tokenizer, tmp_path):
    from peft import PeftModel

    model = make(trained=True)
    adapter = model.internalize(TEXT)
    adapter.save(tmp_path / "adapter")
    again = LoRAAdapter.load(tmp_path / "adapter", base_model_fingerprint=model.base_model_fingerprint)
    assert again.targets == adapter.targets
    for field in ("A", "B", "bias_A", "bias_B"):
        for name, tensor in getattr(adapter, field).items():
            assert torch.equal(getattr(again, field)[name], tensor)
    ids = token_ids(tiny_tokenizer, 2)
    with torch.no_grad():
        with model.injector.using(again):
            injected = model.base_model(ids).logits
        plain = model.base_model(ids).logits
        peft_model = PeftModel.from_pretrained(tiny(model_type, tiny_tokenizer)[0], tmp_path / "adapter")
        torch.testing.assert_close(peft_model(input_ids=ids).logits, injected, rtol=1e-4, atol=1e-4)
    assert (injected - plain).abs().max() > 1e-2


def test_missing_modules_and_widths_are_not_stored_or_counted(tiny_tokenizer, tmp_path):
    """Bytes are those of the files, whatever the shapes in memory."""
    from safetensors.torch import load_file

    for model_type in ("gemma3n_text", "lfm2"):
        base_model, names = tiny(model_type, tiny_tokenizer)
        model = DocToLoRA.build(
            base_model=base_model,
            tokenizer=tiny_tokenizer,
            target_modules=names,
            hypernetwork={"rank": 2, "aggregator": {"name": "mean_pool", "latent_dim": 8}},
            context_encoder={"kind": "embed_only"},
            max_chunk_tokens=30,
        )
        adapter = model.internalize(TEXT)
        adapter.save(tmp_path / model_type)
        stored = load_file(tmp_path / model_type / "adapter_model.safetensors")
        assert adapter.num_bytes == sum(tensor.nbytes for tensor in stored.values())
        for target in adapter.targets:
            A = adapter.A[target.name]
            assert not any(A[:, layer].any() for layer, path in enumerate(target.paths) if path is None)


@pytest.mark.parametrize("path", sorted(PRETRAINED.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configured_base_model_is_a_tested_architecture(path, tiny_tokenizer):
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    model_type = MODEL_TYPES[path.stem]
    config, names = ARCHITECTURES[model_type]
    assert set(settings["target_modules"]) <= set(names)
    is_known = settings["base_model"] in KNOWN_BASE_MODELS
    assert is_known or settings["base_model"].count("/") in (1, 2)
    assert settings["dtype"] in (None, "bfloat16")
    assert AutoConfig.for_model(model_type).model_type == model_type


def test_activations_of_blocks_with_other_outputs_are_refused(tiny_tokenizer):
    from hypernet.model.context_encoder import PerLayerActivations

    base_model, _ = tiny("gemma3n_text", tiny_tokenizer)
    ids = token_ids(tiny_tokenizer, 2)
    with pytest.raises(ValueError, match=r"takes states \[2, 2, 9, 32\], not \[C, T, D=32\].*early_exit"):
        PerLayerActivations(base_model)(ids, torch.ones_like(ids))
