"""Files as the authors would save them of our own networks, with stand-ins for their classes, and files of harm.

The tensors stand under their keys, the pickle is as theirs.
"""

import enum
import os
import re
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from hypernet.doc_to_lora import DocToLoRA
from hypernet.interop.checkpoints import open_checkpoint
from hypernet.model.hypernetwork import HyperNetwork


class AsPickled:
    """An object of a class of that module and name, without importing it; with `value` a member of an enumeration."""

    modules: dict[str, types.ModuleType] = {}

    @classmethod
    def of(cls, name: str, fields: dict | None = None, *, value: str | None = None):
        module, _, name = name.rpartition(".")
        for end in (i for i, letter in enumerate(f"{module}.") if letter == "."):
            cls.modules.setdefault(module[:end], types.ModuleType(module[:end]))
        if value is None:
            kind = type(name, (), {"__module__": module})
            made = kind()
            made.__dict__.update(fields or {})
        else:
            kind = enum.Enum(name, {value.upper(): value}, module=module, type=str)
            made = kind(value)
        setattr(cls.modules[module], name, kind)
        return made


def save(content, path: Path) -> Path:
    """torch.save, with the stand-ins' modules importable meanwhile."""
    kept = {name: sys.modules.get(name) for name in AsPickled.modules}
    sys.modules.update(AsPickled.modules)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, path)
    finally:
        for name, module in kept.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module
        AsPickled.modules.clear()
    return path


def published_tensors(hypernetwork: HyperNetwork) -> "OrderedDict[str, torch.Tensor]":
    """The state dict under the published keys; a shared block under each of its places."""
    places: dict[int, list[int]] = {}
    for place, block in enumerate(hypernetwork.aggregator.encoder.order):
        places.setdefault(block, []).append(place)
    tensors = OrderedDict()
    for name, tensor in hypernetwork.state_dict().items():
        part, _, key = name.partition(".")
        key = "aggregator.perceiver." + key if part == "aggregator" else key
        if match := re.match(r"(aggregator\.perceiver\.encoder\.layers\.)(\d+)(\..*)", key):
            tensors |= {f"{match[1]}{place}{match[3]}": tensor for place in places[int(match[2])]}
        else:
            tensors[key] = tensor
    return tensors


def published_content(model: DocToLoRA, *, changes: dict | None = None) -> OrderedDict:
    """What the authors would save of this model; `changes`: record name to fields that are set otherwise."""
    network, changes = model.hypernetwork, changes or {}
    sizes = network.config["aggregator"]
    names = [target.name for target in network.targets]
    kind = model.context_encoder.kind
    peft = {
        "peft_type": AsPickled.of("peft.utils.peft_types.PeftType", value="LORA"),
        "r": network.rank,
        "target_modules": set(names),
        "lora_alpha": network.scaling,
        "runtime_config": AsPickled.of("peft.tuners.lora.config.LoraRuntimeConfig", {"ephemeral_gpu_offload": False}),
    }
    aggregator = {
        "aggregator_type": AsPickled.of("ctx_to_lora.modeling.aggregator.AGGREGATOR_TYPE", value="perceiver"),
        "num_layers": network.num_layers,
        "num_modules": len(names),
        "feature_size": network.feature_dim,
        "pooling_type": "mean",
        "n_latent_queries": sizes["num_latents"],
        "num_blocks": sizes["num_blocks"],
        "num_self_attn_per_block": sizes["num_self_attention_blocks"],
        "shared_weights": sizes["share_blocks"],
        "layer_to_layer_ctx_encoder": kind == "per_layer_activations",
    }
    config = {
        "latent_size": sizes["latent_dim"],
        "use_bias": True,
        "num_pre_head_layers": network.config["num_pre_head_blocks"],
        "extra_modules": None,
        "layer_indices": torch.arange(network.num_layers),
        "feature_sizes": ({t.name: t.d_in for t in network.targets}, {t.name: t.d_out for t in network.targets}),
    }
    encoder = {
        "ctx_encoder_model_name_or_path": None,
        "ctx_encoder_type": AsPickled.of("ctx_to_lora.modeling.ctx_encoder.CTX_ENCODER_TYPE", value=kind),
        "layer_idx": model.context_encoder.settings.get("layer_idx"),
        "quantize_ctx_encoder": False,
        "ctx_encoder_last_layer": None,
    }
    peft |= changes.get("peft", {})
    aggregator |= changes.get("aggregator", {})
    config |= {
        "lora_config": AsPickled.of("peft.tuners.lora.config.LoraConfig", peft),
        "aggregator_config": AsPickled.of("ctx_to_lora.modeling.aggregator.AggregatorConfig", aggregator),
    } | changes.get("config", {})
    encoder |= changes.get("encoder", {})
    content = published_tensors(network)
    content["base_model_name_or_path"] = model.base_model_source
    content["hypernet_config"] = AsPickled.of("ctx_to_lora.modeling.hypernet.HypernetConfig", config)
    content["ctx_encoder_args"] = AsPickled.of("ctx_to_lora.configs.CtxEncoderArguments", encoder)
    return content


def assert_same_adapters(model: DocToLoRA, other: DocToLoRA) -> None:
    ids = torch.randint(5, 500, (3, 11))
    mask = torch.arange(11) < torch.tensor([[11], [4], [1]])
    with torch.no_grad():
        for ours, theirs in zip(model.adapt(ids, mask), other.adapt(ids, mask), strict=True):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) and ours[name].any() for name in ours)
    for bias in ("bias_A", "bias_B"):
        ours, theirs = getattr(model.hypernetwork, bias), getattr(other.hypernetwork, bias)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())
    assert model.hypernetwork.config == other.hypernetwork.config
    assert model.context_encoder.settings == other.context_encoder.settings
    assert model.max_chunk_tokens == other.max_chunk_tokens


def refusal(source, **arguments) -> str:
    with pytest.raises(ValueError) as error:
        open_checkpoint(source, **arguments)
    message = str(error.value)
    assert "\n" not in message
    return message


def hub_cache(folder: Path, files: dict[str, Path]) -> Path:
    """A folder laid out like the hub's cache, with this repository in it."""
    repository, commit = folder / "models--SakanaAI--doc-to-lora", "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    (repository / "blobs").mkdir()
    for i, (name, source) in enumerate(files.items()):
        (repository / f"blobs/{i:064d}").write_bytes(source.read_bytes())
        link = repository / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(repository / f"blobs/{i:064d}", link.parent))
    return folder


def with_pickle(path: Path, program: bytes, *, storages: dict[str, bytes] | None = None, compress=False) -> Path:
    method = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", program)
        for key, content in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", content)
    return path


class Calls:
    """Pickles to a call of a function with these arguments."""

    def __init__(self, function, *arguments):
        self.called = function, arguments

    def __reduce__(self):
        return self.called
