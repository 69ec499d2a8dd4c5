"""Published checkpoints as our hypernetworks: every setting the format can express, and what does not fit.

What the authors' code computes is compared in test_parity.py.
"""

import re
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from hypernet.base.targets import LoRATarget
from hypernet.doc_to_lora import DocToLoRA
from hypernet.interop.checkpoints import open_checkpoint
from tests.interop.published.published_files import AsPickled, assert_same_adapters, published_content, refusal, save

ROOT = Path(__file__).parents[3]


# Settings


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 1},
        {"rank": 16, "scaling": 3.5},
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["v_proj", "up_proj", "o_proj"], "rank": 1},
        {"aggregator": {"num_self_attention_blocks": 2}},
        {"aggregator": {"num_blocks": 4, "share_blocks": True}},
        {"aggregator": {"num_blocks": 3, "num_self_attention_blocks": 2, "share_blocks": True}},
        {"aggregator": {"num_blocks": 1, "share_blocks": True}},
        {"aggregator": {"num_latents": 1, "latent_dim": 8, "num_heads": 3, "num_kv_heads": 3}},
        {"num_pre_head_blocks": 0},
        {"num_pre_head_blocks": 2, "pre_head_multiple": 3},
        {"context_encoder": {"kind": "early_exit", "layer_idx": 1}},
        {"context_encoder": {"kind": "early_exit", "layer_idx": 2}, "target_modules": ["q_proj", "k_proj"]},
        {"context_encoder": {"kind": "embed_only"}, "aggregator": {"share_blocks": True}},
    ],
    ids=str,
)
def test_published_checkpoint_settings_roundtrip(make, tmp_path, settings):
    model = make(**settings)
    path = save(published_content(model), tmp_path / "pytorch_model.bin")
    assert_same_adapters(model, DocToLoRA.from_pretrained(path))


@pytest.mark.parametrize("prefix", ["_orig_mod.", ""])
def test_published_reads_bfloat16_and_compiled_prefix(make, tmp_path, prefix):
    model = make()
    with torch.no_grad():
        for parameter in model.hypernetwork.parameters():
            parameter.copy_(parameter.bfloat16())
    content = OrderedDict(
        (prefix + key, value.bfloat16()) if isinstance(value, torch.Tensor) else (key, value)
        for key, value in published_content(model).items()
    )
    loaded = DocToLoRA.from_pretrained(save(content, tmp_path / "pytorch_model.bin"))
    assert {p.dtype for p in loaded.hypernetwork.parameters()} == {torch.float32}
    assert_same_adapters(model, loaded)


def test_published_reads_pre_head_blocks_shared_by_layers(make, tmp_path):
    model = make(num_pre_head_blocks=2)
    content = published_content(model, changes={"config": {"per_layer_processing": False}})
    network = model.hypernetwork
    with torch.no_grad():
        for block, ours, theirs in ((b, *pair) for b in (0, 1) for pair in ((0, 0), (1, 2), (3, 5), (4, 6))):
            for part in ("weight", "bias"):
                tensor = content.pop(f"layers.{block}.layers.{ours}.{part}")
                if ours in (1, 3):
                    first = (tensor[0] if part == "weight" else tensor[0, 0, 0, 0]).clone()
                    getattr(network.lora_head.layers[block].layers[ours], part).copy_(first.expand_as(tensor))
                    tensor = first.T.contiguous() if part == "weight" else first
                content[f"layers.{block}.mlp.{theirs}.{part}"] = tensor
    assert_same_adapters(model, DocToLoRA.from_pretrained(save(content, tmp_path / "pytorch_model.bin")))


def test_published_without_bias_block_adds_none(make, tmp_path):
    model = make()
    content = published_content(model, changes={"config": {"use_bias": False}})
    loaded = open_checkpoint(save(content, tmp_path / "pytorch_model.bin")).hypernetwork
    assert not loaded.bias_B["down_proj"].any() and model.hypernetwork.bias_B["down_proj"].any()


def test_early_exit_layer_may_be_null_or_negative(make, tmp_path):
    for recorded, layer_idx in ((None, 2), (-1, 1)):
        model = make(context_encoder={"kind": "early_exit", "layer_idx": 1})
        content = published_content(model, changes={"encoder": {"layer_idx": recorded}})
        path = save(content, tmp_path / "pytorch_model.bin")
        assert open_checkpoint(path).context_encoder == {"kind": "early_exit", "layer_idx": layer_idx}


def test_published_reads_older_module_names_and_ranges(make, tmp_path):
    model = make()
    content = published_content(
        model, changes={"peft": {"target_modules": ["down_proj"]}, "config": {"layer_indices": range(2)}}
    )
    fields = content["hypernet_config"].__dict__
    content["hypernet_config"] = AsPickled.of("ctx_to_lora.modeling_utils.HypernetConfig", fields)
    assert_same_adapters(model, DocToLoRA.from_pretrained(save(content, tmp_path / "pytorch_model.bin")))


def test_published_reads_peft_classes_without_importing(make, tmp_path):
    from peft import LoraConfig

    model = make()
    content = published_content(model)
    real = LoraConfig(r=4, lora_alpha=model.hypernetwork.scaling, target_modules=["down_proj"], task_type="CAUSAL_LM")
    content["hypernet_config"].lora_config = real
    AsPickled.modules = {name: module for name, module in AsPickled.modules.items() if not name.startswith("peft")}
    path = save(content, tmp_path / "pytorch_model.bin")
    code = (
        "import sys; from hypernet.interop.published import read_published; read_published(sys.argv[1]); "
        "assert not {'peft', 'ctx_to_lora'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, cwd=ROOT)
    assert_same_adapters(model, DocToLoRA.from_pretrained(path))


def test_loaded_parameters_share_no_memory_and_are_trainable(file):
    parameters = list(open_checkpoint(file).hypernetwork.parameters())
    assert len({p.untyped_storage().data_ptr() for p in parameters}) == len(parameters)
    assert all(p.requires_grad and p.is_leaf and p.is_contiguous() and not p.is_meta for p in parameters)


def test_a_four_bit_encoder_is_warned_of(make, tmp_path, caplog):
    content = published_content(make(), changes={"encoder": {"quantize_ctx_encoder": True}})
    open_checkpoint(save(content, tmp_path / "pytorch_model.bin"))
    assert "4-bit" in caplog.text


def test_published_target_paths_come_from_base_model(file):
    (target,) = open_checkpoint(file).hypernetwork.targets
    paths = tuple(f"model.layers.{i}.mlp.down_proj" for i in range(2))
    assert target == LoRATarget(name="down_proj", paths=paths, d_in=48, d_out=32)


# What does not fit


def test_published_refuses_another_base_model(file, tmp_path):
    for changes, said in (
        ({"num_hidden_layers": 3}, "with layers 2, hidden size 32, but .* has layers 3, hidden size 32"),
        ({"hidden_size": 16}, "with layers 2, hidden size 32, but .* has layers 2, hidden size 16"),
        ({"intermediate_size": 40}, r"with down_proj \[48 -> 32\], but .* has \[40 -> 32\]"),
    ):
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        AutoConfig.for_model("llama", **{**sizes, **changes}).save_pretrained(tmp_path / "other")
        message = refusal(file, base_model=tmp_path / "other")
        assert re.search(said, message) and "Give the base model it was trained with." in message


def test_published_missing_base_model_is_refused(file, tmp_path):
    message = refusal(file, base_model=tmp_path / "nowhere")
    assert "Cannot read the configuration of the base model" in message and str(tmp_path / "nowhere") in message


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft": {"r": 8}}, "says r = 8, but its tensors have 4"),
        ({"peft": {"target_modules": {"up_proj"}}}, r"says target_modules = \['up_proj'\], but .* \['down_proj'\]"),
        ({"peft": {"lora_alpha": "much"}}, "no number lora_alpha"),
        ({"config": {"latent_size": 3}}, "says latent_size = 3, but its tensors have 16"),
        ({"config": {"layer_indices": torch.tensor([1, 0])}}, r"says layer_indices = \[1, 0\]"),
        (
            {"config": {"feature_sizes": ({"down_proj": 1}, {"down_proj": 32})}},
            r"feature_sizes of down_proj = \(1, 32\)",
        ),
        ({"config": {"extra_modules": ["norm"]}}, "extra_modules"),
        ({"config": {"lora_config": None}}, "no lora_config or aggregator_config"),
        ({"config": {"num_pre_head_layers": torch.ones(3)}}, "cannot be understood|says num_pre_head_layers"),
        ({"aggregator": {"num_blocks": 9}}, "says num_blocks = 9, but its tensors have 2"),
        ({"aggregator": {"aggregator_type": "pooler"}}, "has the aggregator pooler; only perceiver"),
        ({"aggregator": {"shared_weights": True, "num_blocks": 3}}, "should share its blocks|says num_blocks"),
        ({"encoder": {"ctx_encoder_type": "bow"}}, "has the context encoder bow; there are per_layer_activations"),
        ({"encoder": {"ctx_encoder_type": "embed_only"}}, "for 2 feature maps, which embed_only does not give"),
        ({"encoder": {"ctx_encoder_model_name_or_path": "other/model"}}, "reads documents with other/model"),
        ({"encoder": {"ctx_encoder_last_layer": 1}}, "ctx_encoder_last_layer"),
    ],
    ids=str,
)
def test_configs_that_contradict_the_tensors_are_refused(make, tmp_path, changes, says):
    path = save(published_content(make(), changes=changes), tmp_path / "pytorch_model.bin")
    message = refusal(path)
    assert re.search(says, message) and str(path) in message


def test_published_refuses_shared_blocks_that_differ(make, tmp_path):
    model = make(aggregator={"num_blocks": 3})
    content = published_content(model, changes={"aggregator": {"shared_weights": True}})
    assert "should share its blocks (shared_weights), but" in refusal(save(content, tmp_path / "pytorch_model.bin"))


@pytest.mark.parametrize(
    ("key", "change", "says"),
    [
        ("head.weight", None, "lacks the tensor of lora_head.head.weight"),
        ("bias_A.down_proj", None, "has no bias_A.<target>"),
        ("bias_B.down_proj", lambda t: t[:, :, 0], "should have bias_B.down_proj with 3 axes"),
        ("scaler_A.down_proj", lambda t: t[:, :, :1], r"scaler_A.down_proj \[1, 2, 1, 1\] .* \[1, 2, 4, 1\] fits"),
        ("scaler_A.down_proj", lambda t: t.long(), "of torch.int64, but floating-point"),
        ("aggregator.perceiver.encoder.layers.1.mlp.up_proj.weight", None, "lacks the tensor of aggregator.encoder"),
        (
            "aggregator.perceiver.encoder.latents_q",
            lambda t: t[:0],
            "should have aggregator.perceiver.encoder.latents_q",
        ),
        ("aggregator.perceiver.decoder.latents_q", lambda t: t[:3], "has 3 output queries"),
        ("aggregator.perceiver.encoder.layers.0.self_attn.q_proj.weight", lambda t: t[:100], "query size 100"),
        ("aggregator.perceiver.encoder.layers.7.mlp.up_proj.weight", lambda _: torch.ones(3), "gaps"),
        ("extra_head.weight", lambda _: torch.ones(3), "also holds extra_head.weight"),
        ("note", lambda _: "text", "also holds note"),
        ("_orig_mod.head.weight", lambda _: torch.ones(3), "has head.weight twice"),
        ("hypernet_config", None, "has no hypernet_config, so it is not a Doc-to-LoRA checkpoint"),
        ("ctx_encoder_args", lambda _: {}, "has no ctx_encoder_args"),
        ("base_model_name_or_path", lambda _: 3, "has no base_model_name_or_path"),
    ],
)
def test_published_refuses_mismatched_tensors(make, tmp_path, key, change, says):
    content = published_content(make())
    value = content.pop(key, None)
    if change:
        content[key] = change(value).clone() if isinstance(value, torch.Tensor) else change(value)
    message = refusal(save(content, tmp_path / "pytorch_model.bin"))
    assert re.search(says, message) and str(tmp_path) in message
