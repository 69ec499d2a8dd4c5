"""Published checkpoints: every setting the format can express, files that want to do harm, and damaged ones.

The files are written by torch.save from our own networks, with stand-ins for the authors' classes: the tensors under
their keys, the pickle as theirs. What the authors' code computes is compared in test_published_parity.py.
"""

import enum
import io
import os
import pickle
import re
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from transformers import AutoConfig

from hypernet.base.base_model import build_base_model
from hypernet.base.targets import LoRATarget
from hypernet.doc_to_lora import DocToLoRA
from hypernet.interop.checkpoints import PUBLISHED_MAX_CHUNK_TOKENS, open_checkpoint
from hypernet.interop.published import find_published, is_published, read_published
from hypernet.model import checkpoint as checkpoint_module
from hypernet.model.hypernetwork import HyperNetwork
from hypernet.model.perceiver import Perceiver
from tests.cli.command import hypernet

ROOT = Path(__file__).parents[2]
AGGREGATOR = {
    **{"name": "perceiver", "latent_dim": 16, "num_latents": 3, "num_blocks": 2},
    **{"num_heads": 2, "num_kv_heads": 1, "head_dim": 128, "mlp_multiple": 2, "projection_multiple": 3},
}


# Writing


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
    """torch.save, with the stand-ins' modules in force meanwhile."""
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
        "layer_idx": model.context_encoder.layer_idx,
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


@pytest.fixture
def make(make_doc_to_lora):
    """A model with random weights that the format can express; changes as those of DocToLoRA.build's hypernetwork."""

    def make(*, target_modules=("down_proj",), context_encoder=None, aggregator=None, **hypernetwork) -> DocToLoRA:
        return make_doc_to_lora(
            target_modules=list(target_modules),
            context_encoder=context_encoder or {"kind": "per_layer_activations"},
            hypernetwork={"rank": 4, "aggregator": {**AGGREGATOR, **(aggregator or {})}, **hypernetwork},
            max_chunk_tokens=PUBLISHED_MAX_CHUNK_TOKENS,
        )

    return make


@pytest.fixture
def file(make, tmp_path) -> Path:
    return save(published_content(make()), tmp_path / "pytorch_model.bin")


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
def test_any_setting_of_the_format_comes_back(make, tmp_path, settings):
    model = make(**settings)
    path = save(published_content(model), tmp_path / "pytorch_model.bin")
    assert_same_adapters(model, DocToLoRA.from_pretrained(path))


@pytest.mark.parametrize("prefix", ["_orig_mod.", ""])
def test_bfloat16_tensors_and_the_prefix_of_compiled_modules(make, tmp_path, prefix):
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


def test_pre_head_blocks_that_serve_all_layers(make, tmp_path):
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


def test_without_a_bias_block_nothing_is_added(make, tmp_path):
    model = make()
    content = published_content(model, changes={"config": {"use_bias": False}})
    loaded = open_checkpoint(save(content, tmp_path / "pytorch_model.bin")).hypernetwork
    assert not loaded.bias_B["down_proj"].any() and model.hypernetwork.bias_B["down_proj"].any()


def test_an_early_exit_without_a_layer_is_the_whole_model_and_a_negative_one_counts_from_its_end(make, tmp_path):
    for recorded, layer_idx in ((None, 2), (-1, 1)):
        model = make(context_encoder={"kind": "early_exit", "layer_idx": 1})
        content = published_content(model, changes={"encoder": {"layer_idx": recorded}})
        path = save(content, tmp_path / "pytorch_model.bin")
        assert open_checkpoint(path).context_encoder == {"kind": "early_exit", "layer_idx": layer_idx}


def test_the_older_name_of_a_module_lists_and_ranges_are_read(make, tmp_path):
    model = make()
    content = published_content(
        model, changes={"peft": {"target_modules": ["down_proj"]}, "config": {"layer_indices": range(2)}}
    )
    fields = content["hypernet_config"].__dict__
    content["hypernet_config"] = AsPickled.of("ctx_to_lora.modeling_utils.HypernetConfig", fields)
    assert_same_adapters(model, DocToLoRA.from_pretrained(save(content, tmp_path / "pytorch_model.bin")))


def test_real_peft_classes_are_read_without_importing_them(make, tmp_path):
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


def test_loaded_parameters_have_memory_of_their_own_and_can_be_trained(file):
    parameters = list(open_checkpoint(file).hypernetwork.parameters())
    assert len({p.untyped_storage().data_ptr() for p in parameters}) == len(parameters)
    assert all(p.requires_grad and p.is_leaf and p.is_contiguous() and not p.is_meta for p in parameters)


def test_a_four_bit_encoder_is_told(make, tmp_path, caplog):
    content = published_content(make(), changes={"encoder": {"quantize_ctx_encoder": True}})
    open_checkpoint(save(content, tmp_path / "pytorch_model.bin"))
    assert "4-bit" in caplog.text


def test_shared_blocks_compute_what_copies_of_them_compute():
    sizes = {"feature_dim": 7, "num_outputs": 2, "latent_dim": 6, "num_latents": 3, "num_blocks": 4}
    sizes |= {"num_heads": 2, "num_kv_heads": 1, "head_dim": 3, "num_self_attention_blocks": 2}
    shared, copied = Perceiver(**sizes, share_blocks=True), Perceiver(**sizes)
    # Cross- and self-attentions of the first block, then one cross-attention with the same self-attentions.
    places = [0, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2]
    assert shared.encoder.order == places and len(shared.encoder.layers) == 4
    state = {key: value for key, value in shared.state_dict().items() if not key.startswith("encoder.layers.")}
    for place, block in enumerate(places):
        layer = shared.encoder.layers[block].state_dict()
        state |= {f"encoder.layers.{place}.{key}": value for key, value in layer.items()}
    copied.load_state_dict(state)
    features, mask = torch.randn(2, 5, 7), torch.arange(5) < torch.tensor([[5], [2]])
    torch.testing.assert_close(shared(features, mask), copied(features, mask))


# Conversion


def convert(source: str | Path, output_dir: Path, *options: str | Path) -> int:
    """The exit status of the command."""
    return hypernet("checkpoint", "convert", "--source", source, "--output-dir", output_dir, *options)


def test_a_converted_checkpoint_is_the_same_model(file, tmp_path, capsys):
    assert convert(file, tmp_path / "out") == 0
    assert "rank 4, down_proj in 2 layers" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.yaml", "hypernetwork.safetensors"]
    assert "fingerprint: null" in (tmp_path / "out/config.yaml").read_text()
    converted = DocToLoRA.from_pretrained(tmp_path / "out")
    assert_same_adapters(DocToLoRA.from_pretrained(file), converted)
    adapter = converted.internalize("Norbach was founded by Ilda Renwick.")
    assert converted.generate(["Who founded Norbach?"], adapter, max_new_tokens=2)
    assert adapter.provenance["base_model"]["fingerprint"] == converted.base_model_fingerprint


def test_a_converted_checkpoint_with_shared_blocks(make, tmp_path):
    model = make(aggregator={"num_blocks": 3, "num_self_attention_blocks": 1, "share_blocks": True})
    path = save(published_content(model), tmp_path / "pytorch_model.bin")
    assert convert(path, tmp_path / "out") == 0
    assert_same_adapters(model, DocToLoRA.from_pretrained(tmp_path / "out"))


def test_a_conversion_needs_no_weights_of_the_base_model(file, tmp_path, tiny_base_model_folder):
    (tmp_path / "only").mkdir()
    (tmp_path / "only/config.json").write_bytes((tiny_base_model_folder / "config.json").read_bytes())
    arguments = ["--base-model", tmp_path / "only", "--max-chunk-tokens", "77"]
    assert convert(file, tmp_path / "out", *arguments) == 0
    assert open_checkpoint(tmp_path / "out").max_chunk_tokens == 77
    assert open_checkpoint(tmp_path / "out").base_model == str(tmp_path / "only")


def test_an_existing_output_stays_unless_overwrite_is_set(file, tmp_path, capsys):
    out = tmp_path / "out"
    assert convert(file, out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert convert(file, out, "--max-chunk-tokens", "5") == 1
    assert "exists and is not empty" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert convert(file, out, "--max-chunk-tokens", "5", "--overwrite") == 0
    assert open_checkpoint(out).max_chunk_tokens == 5
    (out / "notes.txt").write_text("mine")
    assert convert(file, out, "--overwrite") == 1
    assert "it also holds ['notes.txt']" in capsys.readouterr().err and (out / "notes.txt").exists()


@pytest.mark.parametrize("existing", [False, True])
def test_a_conversion_that_fails_leaves_everything_as_it_was(file, tmp_path, monkeypatch, capsys, existing):
    out = tmp_path / "out"
    if existing:
        assert convert(file, out, "--overwrite") == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()} if existing else None

    def full(*_, **__):
        raise OSError(28, "No space left on device", str(out))

    monkeypatch.setattr(checkpoint_module.yaml, "safe_dump", full)
    assert convert(file, out, "--overwrite") == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert (before is None and not out.exists()) or {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} <= {"pytorch_model.bin", "out"}


# Finding


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


def test_the_hub_path_reads_its_cache_and_takes_the_highest_checkpoint(make, file, tmp_path, monkeypatch):
    other = save(published_content(make(rank=2)), tmp_path / "other.bin")
    files = {
        "gemma_demo/checkpoint-9000/pytorch_model.bin": other,
        "gemma_demo/checkpoint-80000/pytorch_model.bin": file,
        "qwen_4b_d2l/checkpoint-20000/pytorch_model.bin": other,
    }
    cache = hub_cache(tmp_path / "hub", files)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    for name in (
        "gemma_demo",
        "gemma_demo/",
        "gemma_demo/checkpoint-80000",
        "gemma_demo/checkpoint-80000/pytorch_model.bin",
    ):
        source = f"hub:SakanaAI/doc-to-lora/{name}"
        assert is_published(source)
        assert open_checkpoint(source).hypernetwork.rank == 4
    assert_same_adapters(
        DocToLoRA.from_pretrained("hub:SakanaAI/doc-to-lora/gemma_demo"), DocToLoRA.from_pretrained(file)
    )
    assert "in its folders gemma_demo, qwen_4b_d2l. Name one" in refusal("hub:SakanaAI/doc-to-lora")
    assert "There is no pytorch_model.bin in hub:SakanaAI/doc-to-lora/none" in refusal("hub:SakanaAI/doc-to-lora/none")


def test_the_hub_without_network_or_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert "Cannot get SakanaAI/doc-to-lora from the hub" in refusal("hub:SakanaAI/doc-to-lora/gemma_demo")


@pytest.mark.parametrize("source", ["hub:", "hub:SakanaAI", "hub:a/../../b", "hub:a/b/../c", "hub:a b/c", "hub:/a/b"])
def test_names_that_no_hub_has(source):
    assert "names nothing on the hub. Write hub:owner/repository/name" in refusal(source)


def test_a_folder_with_the_file_with_checkpoints_and_with_models(file, tmp_path):
    numbered = tmp_path / "runs/gemma/checkpoint-100/pytorch_model.bin"
    numbered.parent.mkdir(parents=True)
    numbered.write_bytes(file.read_bytes())
    assert find_published(tmp_path) == file
    assert find_published(tmp_path / "runs/gemma") == numbered
    assert "runs holds checkpoints in its folders gemma. Name one:" in refusal(tmp_path / "runs")
    (tmp_path / "empty").mkdir()
    assert not is_published(tmp_path / "empty")
    assert "config.yaml is missing" in refusal(tmp_path / "empty")


# What does not fit


def test_another_base_model_is_refused_with_both_numbers(file, tmp_path):
    for changes, said in (
        ({"num_hidden_layers": 3}, "with layers 2, hidden size 32, but .* has layers 3, hidden size 32"),
        ({"hidden_size": 16}, "with layers 2, hidden size 32, but .* has layers 2, hidden size 16"),
        ({"intermediate_size": 40}, r"with down_proj \[48 -> 32\], but .* has \[40 -> 32\]"),
    ):
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        AutoConfig.for_model("llama", **{**sizes, **changes}).save_pretrained(tmp_path / "other")
        message = refusal(file, base_model=tmp_path / "other")
        assert re.search(said, message) and "Give the base model it was trained with." in message


def test_another_base_model_of_a_converted_checkpoint_is_refused(file, tmp_path, tiny_tokenizer):
    assert convert(file, tmp_path / "out") == 0
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    base_model = build_base_model({"model_type": "llama", **sizes, "vocab_size": len(tiny_tokenizer)})
    base_model.save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="reads 2 feature maps of width 32 .* gives 3 of width 32"):
        DocToLoRA.from_pretrained(tmp_path / "out", base_model=tmp_path / "other")


def test_a_base_model_that_is_nowhere(file, tmp_path):
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
def test_records_that_say_something_else_than_the_tensors_or_cannot_be_expressed(make, tmp_path, changes, says):
    path = save(published_content(make(), changes=changes), tmp_path / "pytorch_model.bin")
    message = refusal(path)
    assert re.search(says, message) and str(path) in message


def test_blocks_that_should_be_shared_but_differ(make, tmp_path):
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
def test_tensors_that_do_not_fit(make, tmp_path, key, change, says):
    content = published_content(make())
    value = content.pop(key, None)
    if change:
        content[key] = change(value).clone() if isinstance(value, torch.Tensor) else change(value)
    message = refusal(save(content, tmp_path / "pytorch_model.bin"))
    assert re.search(says, message) and str(tmp_path) in message


def test_other_files_are_told_apart(tmp_path):
    def wrong(content: bytes) -> str:
        (tmp_path / "pytorch_model.bin").write_bytes(content)
        return refusal(tmp_path / "pytorch_model.bin")

    legacy, zipped = io.BytesIO(), io.BytesIO()
    torch.save({"a": torch.ones(3)}, legacy, _use_new_zipfile_serialization=False)
    zipfile.ZipFile(zipped, "w").writestr("a/b", "c")
    assert "a file of torch before 1.6" in wrong(legacy.getvalue())
    assert "a bare pickle" in wrong(pickle.dumps({"a": 1}))
    assert "is a safetensors file" in wrong(b'\x10\x00\x00\x00\x00\x00\x00\x00{"a":{"dtype":"F32"}}')
    assert "is a Git LFS pointer" in wrong(b"version https://git-lfs.github.com/spec/v1\noid sha256:00")
    assert "is empty" in wrong(b"")
    assert "is not a zip file" in wrong(b"<!DOCTYPE html>")
    torch.save([1, 2], tmp_path / "list.bin")
    assert "does not hold a dict of tensors" in refusal(tmp_path / "list.bin")
    assert "not one that torch.save wrote" in wrong(zipped.getvalue())
    assert "there is no such folder" in refusal(tmp_path / "nothing.bin")


# Harm


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


def global_(name: str) -> bytes:
    module, _, name = name.rpartition(".")
    return f"c{module}\n{name}\n".encode()


HYPERNET = global_("ctx_to_lora.modeling.hypernet.HypernetConfig")
REBUILD = global_("torch._utils._rebuild_tensor_v2")
FLOATS = b"(X\x07\x00\x00\x00storage" + global_("torch.FloatStorage") + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"


@pytest.mark.parametrize(
    ("program", "named"),
    [
        (global_("os.system") + b"X\x0c\x00\x00\x00touch DAMAGE\x85R.", "os.system"),
        (b"(X\x0c\x00\x00\x00touch DAMAGEios\nsystem\n.", "instruction b'i'"),  # INST
        (b"(" + global_("os.system") + b"X\x0c\x00\x00\x00touch DAMAGEo.", "os.system"),  # OBJ
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch DAMAGE\x85R.", "os.system"),  # STACK_GLOBAL
        (b"\x80\x02\x82\x01.", "instruction"),  # EXT1
        (b"\x80\x02I1\n.", "instruction"),
        (b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.", "instruction"),  # BYTEARRAY8 of 2^63 bytes
        (global_("builtins.eval") + b"X\x01\x00\x00\x001\x85R.", "builtins.eval"),
        (global_("__builtin__.getattr") + b".", "__builtin__.getattr"),
        (global_("builtins.__import__") + b".", "builtins.__import__"),
        (global_("torch._utils.torch.os.system") + b".", "torch._utils.torch.os.system"),
        (global_("torch.load") + b".", "torch.load"),
        (global_("ctx_to_lora.modeling.hypernet.HyperLoRA") + b".", "HyperLoRA"),
        (b"\x80\x04\x8c\x05torch\x8c\x10_utils.os.system\x93.", "torch._utils.os.system"),
        # Allowed names in use for something else.
        (HYPERNET + b")R.", "calls HypernetConfig"),
        (HYPERNET + b"K\x01\x85\x81.", "makes an object of HypernetConfig"),
        (global_("collections.OrderedDict") + b")\x81.", "makes an object"),
        (global_("collections.OrderedDict") + b"]\x85R.", "damaged"),
        (REBUILD + b"}X\x01\x00\x00\x00aK\x01sb.", "sets the state"),
        (HYPERNET + b"}X\x01\x00\x00\x00aK\x01sb.", "sets the state of HypernetConfig"),
        (HYPERNET + b")\x81]b.", "sets the state"),
        (HYPERNET + b")\x81)R.", "calls HypernetConfig"),
        (global_("__builtin__.set") + b"]K\x01a\x85R.", "set of something else than texts"),
        (b"}(K\x01K\x01K\x02K\x02u.", "other keys than texts"),
        (b"})K\x01s.", "other keys than texts"),
        (b"(X\x06\x00\x00\x00modulecos\nsystem\ntQ.", "os.system"),
        (b"(X\x06\x00\x00\x00moduleK\x01K\x01K\x01K\x01tQ.", "something else than a storage"),
        # Tensors that are none.
        (REBUILD + b"(" + FLOATS + b"K\x00K\x05\x85K\x01\x85\x89Nt" + b"R.", "beyond its 4 stored"),
        (REBUILD + b"(" + FLOATS + b"K\x01K\x04\x85K\x01\x85\x89Nt" + b"R.", "beyond its 4 stored"),
        (REBUILD + b"(" + FLOATS + b"K\x00K\x02\x85K\x04\x85\x89Nt" + b"R.", "beyond its 4 stored"),
        (REBUILD + b"(" + FLOATS + b"K\x00J\xff\xff\xff\xff\x85K\x01\x85\x89Nt" + b"R.", "none can be"),
        (REBUILD + b"(" + FLOATS + b"J\xff\xff\xff\xffK\x02\x85K\x01\x85\x89Nt" + b"R.", "none can be"),
        (REBUILD + b"(" + FLOATS + b"K\x00J\xff\xff\xff\x7f\x85K\x00\x85\x89Nt" + b"R.", "none can be"),
        (REBUILD + b"(" + FLOATS + b"K\x00K\x02\x85K\x01K\x01\x86\x89Nt" + b"R.", "none can be"),
        (REBUILD + b"(K\x01K\x00K\x02\x85K\x01\x85\x89Nt" + b"R.", "none can be"),
        (FLOATS.replace(b"K\x04tQ", b"K\x05tQ") + b".", "has 16 bytes for 5 numbers"),
        (FLOATS.replace(b"X\x01\x00\x00\x000", b"X\x0a\x00\x00\x00../../x/yz") + b".", "damaged"),
        (b")" + b"\x85" * 400_000 + b".", "does not hold a dict"),
        (b"}" + b")" + b"\x85" * 400_000 + b"K\x01s.", "other keys than texts"),
        (b"\x8b\x00\xff\x00\x00" + b"." * 99, "instruction"),
        (b"", "damaged"),
        (b"N", "damaged"),
        (b"\x80\x63.", "damaged"),
        (b"0.", "instruction"),
        (b"}(K\x01u.", "damaged|other keys"),
        (b"K\x01K\x02a.", "damaged"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_pickle_that_wants_anything_else_is_refused_by_name(tmp_path, monkeypatch, program, named):
    monkeypatch.chdir(tmp_path)
    path = with_pickle(tmp_path / "pytorch_model.bin", program, storages={"0": b"\0" * 16})
    message = refusal(path)
    assert re.search(named, message) and str(path) in message
    assert [p.name for p in tmp_path.iterdir()] == ["pytorch_model.bin"]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("place", ["config", "peft", "encoder", "tensor", "key"])
def test_harm_that_hides_inside_a_complete_checkpoint_is_refused(make, tmp_path, place, protocol):
    made = tmp_path / "DAMAGE"
    harm = Calls(os.mkdir, str(made))
    changes = {place: {"extra": [harm]}} if place in ("config", "peft", "encoder") else {}
    content = published_content(make(), changes=changes)
    if place == "tensor":
        content["head.weight"] = harm
    if place == "key":
        content[Calls(str, "x")] = 1
    kept = dict(sys.modules)
    sys.modules.update(AsPickled.modules)
    try:
        torch.save(content, tmp_path / "pytorch_model.bin", pickle_protocol=protocol)
    finally:
        for name in AsPickled.modules:
            sys.modules.pop(name)
        sys.modules.update(kept)
        AsPickled.modules.clear()
    message = refusal(tmp_path / "pytorch_model.bin")
    assert re.search(r"it asks for (posix|nt)\.mkdir|it asks for (__builtin__|builtins)\.(str|unicode)", message)
    assert "Nothing of it was executed. Get the file from its authors." in message
    assert not made.exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_that_torch_may_have_used_is_read(make, tmp_path, protocol, monkeypatch):
    monkeypatch.setattr(torch.serialization, "DEFAULT_PROTOCOL", protocol)
    model = make()
    content = published_content(model)
    save_with = torch.save
    monkeypatch.setattr(torch, "save", lambda c, p: save_with(c, p, pickle_protocol=protocol))
    assert_same_adapters(model, DocToLoRA.from_pretrained(save(content, tmp_path / "pytorch_model.bin")))


def test_compressed_and_oversized_entries_are_refused(tmp_path):
    bomb = with_pickle(tmp_path / "bomb.bin", b"N" * 10**8, compress=True)
    assert bomb.stat().st_size < 10**6
    assert "its entry data.pkl is compressed" in refusal(bomb)
    assert "its entry data.pkl has 5000000 bytes" in refusal(with_pickle(tmp_path / "large.bin", b"N" * 5_000_000))


def test_one_storage_under_many_names_is_not_multiplied(make, tmp_path):
    model = make(num_pre_head_blocks=30)
    content = published_content(model)
    block = {key: value for key, value in content.items() if key.startswith("layers.0.")}
    large = torch.zeros(sum(value.numel() for value in block.values()))
    for key, value in list(content.items()):
        if key.startswith("layers."):
            content[key] = large[: value.numel()].view(value.shape)
    assert "describes more numbers than it holds" in refusal(save(content, tmp_path / "pytorch_model.bin"))


# Damage


def outcome(path: Path, content: bytes, intact: dict[str, torch.Tensor]) -> str:
    """Reads the damaged file: refused in one line, or exactly the intact tensors."""
    path.write_bytes(content)
    try:
        published = read_published(path)
    except ValueError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        return "refused"
    assert published.weights.keys() == intact.keys()
    assert all(torch.equal(published.weights[name], tensor) for name, tensor in intact.items())
    return "intact"


@pytest.fixture
def small(make, tmp_path) -> Path:
    model = make(aggregator={"latent_dim": 8, "num_blocks": 1, "num_heads": 1, "num_latents": 1}, rank=1)
    return save(published_content(model), tmp_path / "small.bin")


def test_a_file_that_is_cut_off_anywhere_is_refused(small, tmp_path):
    content, intact = small.read_bytes(), read_published(small).weights
    ends = [
        *range(0, 100, 9),
        *range(100, len(content), len(content) // 60),
        *range(len(content) - 60, len(content), 3),
    ]
    assert {outcome(tmp_path / "cut.bin", content[:end], intact) for end in ends} == {"refused"}


def test_a_file_with_a_flipped_bit_is_refused_or_read_as_it_was(small, tmp_path):
    content, intact = small.read_bytes(), read_published(small).weights
    directory = zipfile.ZipFile(small).start_dir
    generator = torch.Generator().manual_seed(0)

    def places(start: int, end: int, count: int) -> list[int]:
        return torch.randint(8 * start, 8 * end, (count,), generator=generator).tolist()

    program = zipfile.ZipFile(small).getinfo("small/data.pkl").file_size
    chosen = [*places(0, program, 80), *places(program, directory, 120), *places(directory, len(content), 150)]
    outcomes = []
    for bit in chosen:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        outcomes.append(outcome(tmp_path / "flipped.bin", bytes(damaged), intact))
    assert outcomes.count("refused") > len(outcomes) // 2


def test_a_changed_pickle_with_a_right_checksum_does_no_harm(small, tmp_path):
    """What no checksum can notice: a flipped bit of the pickle in a zip that is made anew."""
    archive = zipfile.ZipFile(small)
    entries = {info.filename: archive.read(info) for info in archive.infolist()}
    program = entries["small/data.pkl"]
    generator = torch.Generator().manual_seed(1)
    for bit in torch.randint(0, 8 * len(program), (150,), generator=generator).tolist():
        damaged = bytearray(program)
        damaged[bit // 8] ^= 1 << bit % 8
        with zipfile.ZipFile(tmp_path / "changed.bin", "w") as changed:
            for name, content in entries.items():
                changed.writestr(name, bytes(damaged) if name == "small/data.pkl" else content)
        try:
            read_published(tmp_path / "changed.bin")
        except ValueError as error:
            assert "\n" not in str(error)


# The commands


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_the_command_converts_from_the_hubs_cache(file, tmp_path):
    cache = hub_cache(tmp_path / "hub", {"gemma_demo/checkpoint-80000/pytorch_model.bin": file})
    arguments = ("--source", "hub:SakanaAI/doc-to-lora/gemma_demo", "--output-dir", str(tmp_path / "out"))
    result = run("-m", "hypernet", "checkpoint", "convert", *arguments, HF_HUB_CACHE=str(cache), HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    assert open_checkpoint(tmp_path / "out").hypernetwork.rank == 4


def test_the_command_refuses_harm_in_one_line(commands, tmp_path):
    program = pickle.dumps({"a": Calls(os.mkdir, str(tmp_path / "DAMAGE"))}, protocol=2)
    path = with_pickle(tmp_path / "pytorch_model.bin", program)
    arguments = ["checkpoint", "convert", "--source", str(path), "--output-dir", str(tmp_path / "out")]
    result = commands.run("hypernet", arguments, cwd=ROOT)
    assert result.code == 1 and "it asks for posix.mkdir" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr and not result.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pytorch_model.bin"]


def test_generate_adapter_takes_a_published_file(commands, file, tmp_path):
    document = tmp_path / "document.txt"
    document.write_text("Norbach was founded by Ilda Renwick.")
    arguments = [f"document={document}", f"output_dir={tmp_path / 'adapter'}", f"checkpoint={file}", "device=cpu"]
    result = commands.run("generate_adapter.py", arguments, cwd=ROOT)
    assert result.code == 0, result.stderr
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()


def test_the_names_of_targets_come_from_the_base_model(file):
    (target,) = open_checkpoint(file).hypernetwork.targets
    paths = tuple(f"model.layers.{i}.mlp.down_proj" for i in range(2))
    assert target == LoRATarget(name="down_proj", paths=paths, d_in=48, d_out=32)
