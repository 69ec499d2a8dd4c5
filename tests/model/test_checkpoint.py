"""Checkpoint folders: exact round trips, refusals in one line, and what a crash while saving leaves behind."""

import copy
import json
import os
import shutil
import struct

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import hypernet.io.files
import hypernet.model.checkpoint
from hypernet.base.base_model import fingerprint
from hypernet.base.targets import LoRATarget
from hypernet.doc_to_lora import DocToLoRA
from hypernet.model.checkpoint import is_checkpoint, load_checkpoint, save_checkpoint
from hypernet.model.hypernetwork import HyperNetwork

DOCUMENT = "Norbach was founded by Ilda Renwick. It makes tin boxes. It has 312 workers."


SIZES = {
    "perceiver": {
        **{"latent_dim": 8, "num_latents": 3, "num_blocks": 2},
        **{"num_heads": 2, "num_kv_heads": 1, "head_dim": 4},
    },
    "outer_product": {"inner_dim": 6},
}


@pytest.fixture
def hypernetwork(request):
    targets = [LoRATarget("down_proj", ("layers.0.mlp.down_proj", "layers.1.mlp.down_proj"), 7, 5)]
    name = getattr(request, "param", "perceiver")
    hypernetwork = HyperNetwork(
        targets=targets, feature_dim=5, num_maps=2, rank=2, aggregator={"name": name, **SIZES[name]}
    )
    for parameter in hypernetwork.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return hypernetwork


def save(hypernetwork, folder, **settings):
    save_checkpoint(
        folder,
        hypernetwork=hypernetwork,
        base_model="some/model",
        base_model_fingerprint="f" * 64,
        context_encoder={"kind": "early_exit", "layer_idx": 1},
        max_chunk_tokens=33,
        **settings,
    )


@pytest.fixture
def folder(tmp_path, hypernetwork):
    save(hypernetwork, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def refusal(folder) -> str:
    with pytest.raises(ValueError) as error:
        load_checkpoint(folder)
    message = str(error.value)
    assert "\n" not in message and str(folder) in message
    return message


# Round trips


@pytest.mark.parametrize("hypernetwork", SIZES, indirect=True)
def test_checkpoint_roundtrip_is_exact(folder, hypernetwork):
    checkpoint = load_checkpoint(folder)
    assert checkpoint.hypernetwork.config == hypernetwork.config
    assert checkpoint.hypernetwork.targets == hypernetwork.targets
    state = checkpoint.hypernetwork.state_dict()
    assert list(state) == list(hypernetwork.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in hypernetwork.state_dict().items())
    assert (checkpoint.base_model, checkpoint.base_model_fingerprint) == ("some/model", "f" * 64)
    assert checkpoint.context_encoder == {"kind": "early_exit", "layer_idx": 1}
    assert checkpoint.max_chunk_tokens == 33 and checkpoint.fingerprint == fingerprint(hypernetwork)


@pytest.mark.parametrize("hypernetwork", SIZES, indirect=True)
def test_a_loaded_hypernetwork_computes_the_same_and_trains(folder, hypernetwork):
    features, mask = torch.randn(3, 2, 6, 5), torch.ones(3, 6, dtype=torch.bool)
    loaded = load_checkpoint(folder).hypernetwork
    for got, expected in zip(loaded(features, mask), hypernetwork(features, mask), strict=True):
        assert torch.equal(got["down_proj"], expected["down_proj"])
    assert all(p.requires_grad and p.is_leaf and not p.is_meta for p in loaded.parameters())


def test_the_folder_holds_readable_yaml_and_safetensors(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "hypernetwork.safetensors"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["hypernetwork"]["rank"] == 2
    if os.name == "posix":
        assert {path.stat().st_mode & 0o444 for path in folder.iterdir()} == {0o444}


def test_checkpoint_save_replaces_older_one(folder, hypernetwork):
    for parameter in hypernetwork.parameters():
        parameter.data += 1
    save(hypernetwork, folder)
    assert load_checkpoint(folder).fingerprint == fingerprint(hypernetwork)
    assert len(list(folder.iterdir())) == 2


def in_shards(hypernetwork, folder) -> list[str]:
    largest = max(tensor.nbytes for tensor in hypernetwork.state_dict().values())
    save(hypernetwork, folder, max_shard_mb=1.5 * largest / 10**6)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 1 and all(path.stat().st_size < 1.5 * largest + 4096 for path in files)
    return [path.name for path in files]


def test_weights_in_several_files_load_as_from_one(folder, hypernetwork):
    before = load_checkpoint(folder)
    in_shards(hypernetwork, folder)
    assert not (folder / "hypernetwork.safetensors").exists()
    after = load_checkpoint(folder)
    assert after.fingerprint == before.fingerprint and is_checkpoint(folder)
    for name, tensor in before.hypernetwork.state_dict().items():
        assert torch.equal(after.hypernetwork.state_dict()[name], tensor)
    index = json.loads((folder / "hypernetwork.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == before.hypernetwork.state_dict().keys()
    save(hypernetwork, folder)  # and back to one file
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "hypernetwork.safetensors"]


def test_a_tensor_comes_from_the_file_that_the_index_names(folder, hypernetwork):
    first, *_, last = in_shards(hypernetwork, folder)
    stale = load_file(folder / last)
    name = next(name for name in load_file(folder / first))
    save_file({**stale, name: torch.full_like(hypernetwork.state_dict()[name], 7)}, folder / last)
    loaded = load_checkpoint(folder).hypernetwork.state_dict()
    assert torch.equal(loaded[name], hypernetwork.state_dict()[name])


def test_small_weights_stay_in_one_file(folder, hypernetwork):
    save(hypernetwork, folder, max_shard_mb=1000)
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "hypernetwork.safetensors"]


def test_a_missing_or_changed_shard_is_refused(folder, hypernetwork):
    first, second, *_ = in_shards(hypernetwork, folder)
    content = (folder / second).read_bytes()
    (folder / second).unlink()
    assert f"{second} is missing" in refusal(folder)
    (folder / second).write_bytes(content[: len(content) // 2])
    assert f"{second} cannot be read" in refusal(folder)
    (folder / second).write_bytes((folder / first).read_bytes())
    assert "is not what config.yaml was written for (fingerprint). Copy all again." in refusal(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../b.safetensors"}}'])
def test_damaged_index_of_shards_is_refused(folder, hypernetwork, text):
    in_shards(hypernetwork, folder)
    (folder / "hypernetwork.safetensors.index.json").write_text(text)
    assert "hypernetwork.safetensors.index.json is damaged" in refusal(folder)


def test_tilde_in_path_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load_checkpoint("~/checkpoint").max_chunk_tokens == 33


# With the base model: DocToLoRA


def test_checkpoint_with_base_model_answers_as_before(tmp_path, monkeypatch, make_doc_to_lora):
    model = make_doc_to_lora()
    model.save_pretrained(tmp_path / "here", include_base_model=True)
    (tmp_path / "here").rename(tmp_path / "there")  # the folder can be moved
    again = DocToLoRA.from_pretrained(tmp_path / "there")
    questions = ["Who founded Norbach?", "How many workers does Norbach have?"]
    adapters = [m.internalize(DOCUMENT) for m in (model, again)]
    assert model.generate(questions, adapters[0]) == again.generate(questions, adapters[1])
    assert adapters[0].provenance["generator"] == adapters[1].provenance["generator"]
    # An adapter of the saved model is one of the loaded model, and the other way round.
    assert again.generate(questions, adapters[0]) == model.generate(questions, adapters[1])


def test_checkpoint_without_base_model_names_its_source(tmp_path, make_doc_to_lora, tiny_base_model_folder):
    model = make_doc_to_lora()
    model.save_pretrained(tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint" / "base_model").exists()
    again = DocToLoRA.from_pretrained(tmp_path / "checkpoint")
    assert again.base_model_source == str(tiny_base_model_folder)
    assert again.base_model_fingerprint == model.base_model_fingerprint


@pytest.mark.parametrize("content", ["db: {host: x}\n", "format_version: 1\n", "- 1\n", "", "[\n"])
def test_config_of_something_else_is_not_replaced(tmp_path, make_doc_to_lora, content):
    """config.yaml is a name that others use; other files stay, as transformers and PEFT leave them."""
    (tmp_path / "config.yaml").write_text(content)
    (tmp_path / "notes.txt").touch()
    for include_base_model in (False, True):
        with pytest.raises(ValueError, match="config.yaml is not a checkpoint's, and is not replaced. Name another"):
            make_doc_to_lora().save_pretrained(tmp_path, include_base_model=include_base_model)
    assert (tmp_path / "config.yaml").read_text() == content
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "notes.txt"}


def test_checkpoint_is_replaced_and_other_files_stay(tmp_path, make_doc_to_lora):
    (tmp_path / "notes.txt").touch()
    for seed in (1, 2):
        model = make_doc_to_lora(seed=seed)
        model.save_pretrained(tmp_path)
        assert load_checkpoint(tmp_path).fingerprint == fingerprint(model.hypernetwork, exact=True)
    (tmp_path / "hypernetwork.safetensors").unlink()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").exists()


def test_checkpoint_goes_to_the_home_folder_and_not_into_a_file(tmp_path, make_doc_to_lora, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    make_doc_to_lora().save_pretrained("~/one", include_base_model=True)
    assert DocToLoRA.from_pretrained(tmp_path / "one")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file. Name a folder"):
        make_doc_to_lora().save_pretrained(tmp_path / "file")


def test_checkpoint_refuses_another_base_model(tmp_path, make_doc_to_lora):
    model = make_doc_to_lora()
    model.save_pretrained(tmp_path / "checkpoint")
    with torch.no_grad():
        model.base_model.lm_head.weight[3, 3] += 1
    other = tmp_path / "other"
    model.base_model.save_pretrained(other)
    model.tokenizer.save_pretrained(other)
    with pytest.raises(ValueError) as error:
        DocToLoRA.from_pretrained(tmp_path / "checkpoint", base_model=other)
    message = str(error.value)
    assert "\n" not in message and "Give the base model it was trained with." in message
    for part in (model.base_model_source, str(other), model.base_model_fingerprint[:12]):
        assert part in message
    assert fingerprint(model.base_model)[:12] in message


def test_checkpoint_loads_with_base_model_of_another_dtype(tmp_path, make_doc_to_lora):
    model = make_doc_to_lora()
    model.save_pretrained(tmp_path / "checkpoint")
    half = DocToLoRA.from_pretrained(tmp_path / "checkpoint", dtype="bfloat16")
    assert half.base_model.dtype == torch.bfloat16
    assert {p.dtype for p in half.hypernetwork.parameters()} == {torch.float32}
    assert half.generate(["Who founded Norbach?"], half.internalize(DOCUMENT), max_new_tokens=3)


def test_without_a_fingerprint_any_fitting_base_model_is_taken(tmp_path, make_doc_to_lora):
    model = make_doc_to_lora()
    model.base_model_fingerprint = None
    model.save_pretrained(tmp_path / "checkpoint")
    assert load_checkpoint(tmp_path / "checkpoint").base_model_fingerprint is None
    with torch.no_grad():
        model.base_model.lm_head.weight[3, 3] += 1
    model.base_model.save_pretrained(tmp_path / "other")
    model.tokenizer.save_pretrained(tmp_path / "other")
    again = DocToLoRA.from_pretrained(tmp_path / "checkpoint", base_model=tmp_path / "other")
    # Adapters and what is saved from now on name the base model that was taken.
    assert again.base_model_fingerprint == fingerprint(model.base_model)
    assert again.internalize(DOCUMENT).provenance["base_model"]["fingerprint"] == again.base_model_fingerprint
    again.save_pretrained(tmp_path / "again")
    assert load_checkpoint(tmp_path / "again").base_model_fingerprint == again.base_model_fingerprint


# What cannot be loaded


def test_missing_checkpoint_folder_is_named(tmp_path):
    assert "there is no such folder. Give a folder that holds config.yaml" in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.yaml", "hypernetwork.safetensors"])
def test_missing_checkpoint_file_is_named(folder, name):
    (folder / name).unlink()
    assert f"{name} is missing. Copy or train it again." in refusal(folder)


@pytest.mark.parametrize("size", [0, 5, 300, -1])
def test_truncated_checkpoint_weights_are_refused(folder, size):
    path = folder / "hypernetwork.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert "cut off. Copy it again." in refusal(folder)


@pytest.mark.parametrize("place", [0.3, 0.9, 1.0])
def test_changed_weight_bit_is_detected(folder, place):
    path = folder / "hypernetwork.safetensors"
    content = bytearray(path.read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    content[header + round(place * (len(content) - header - 1))] ^= 1
    path.write_bytes(content)
    assert "is not what config.yaml was written for (fingerprint). Copy both again." in refusal(folder)


def test_changed_value_of_large_matrix_is_detected(tmp_path):
    """The base model's fingerprint samples large matrices; the weights here are all checked."""
    targets = [LoRATarget("down_proj", ("layers.0.mlp.down_proj",), 9000, 9000)]
    aggregator = {"name": "mean_pool", "latent_dim": 64}
    large = HyperNetwork(targets=targets, feature_dim=4, num_maps=1, rank=1, aggregator=aggregator)
    save(large, tmp_path)
    path = tmp_path / "hypernetwork.safetensors"
    weights = load_file(path)
    assert weights["lora_head.head.weight"].numel() > 2**20
    weights["lora_head.head.weight"].view(-1)[7] += 1
    save_file(weights, path)
    assert "is not what config.yaml was written for (fingerprint)" in refusal(tmp_path)


def test_weights_of_another_checkpoint_are_refused(folder, tmp_path, hypernetwork):
    for parameter in hypernetwork.parameters():
        parameter.data += 1
    save(hypernetwork, tmp_path / "other")
    shutil.copy(tmp_path / "other" / "hypernetwork.safetensors", folder)
    assert "is not what config.yaml was written for (fingerprint)" in refusal(folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "- a\n- b",
        "just words",
        "format_version: 1",
        "a: b: c",
        b"\xff\xfe\x00",
        "format_version: 1\nbase_model: x",
    ],
)
def test_damaged_checkpoint_config_is_refused(folder, text):
    (folder / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert "config.yaml is damaged" in (message := refusal(folder)) and "Copy it again." in message


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_checkpoint_config_may_have_a_byte_order_mark(folder, encoding):
    path = folder / "config.yaml"
    path.write_text(path.read_text(encoding="utf-8"), encoding=encoding)
    assert load_checkpoint(folder).max_chunk_tokens == 33


def test_other_checkpoint_format_version_is_named(folder):
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("format_version: 1", "format_version: 2"))
    assert "has checkpoint format 2, this version reads format 1. Use the version that wrote it." in refusal(folder)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["rank"], 3),
        (["feature_dim"], 6),
        (["num_maps"], 7),
        (["aggregator", "num_blocks"], 3),
        (["aggregator", "name"], "perciever"),
        (["aggregator", "num_latent"], 3),
        (["targets", 0, "d_in"], 8),
        (["targets", 0, "depth"], 8),
        (["ranks"], 3),
    ],
    ids=lambda value: "".join(map(str, value)) if isinstance(value, list) else str(value),
)
def test_config_that_mismatches_weights_is_refused(folder, keys, value):
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text())
    entry = config["hypernetwork"]
    for key in keys[:-1]:
        entry = entry[key]
    entry[keys[-1]] = value
    path.write_text(yaml.safe_dump(config))
    assert "does not describe the weights next to it" in refusal(folder)


def paths_of(tree, path=()):
    if path:
        yield path
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in children:
        yield from paths_of(child, (*path, key))


def test_any_damaged_config_entry_is_refused_in_one_line(folder):
    path = folder / "config.yaml"
    original = yaml.safe_load(path.read_text())
    harmless = {"fingerprint", "source", "kind", "layer_idx", "max_chunk_tokens", "scaling", "name", "paths", 0, 1}
    for place in paths_of(original):
        for value in (None, "x", 0, [3], {"a": 1}):
            config = copy.deepcopy(original)
            entry = config
            for key in place[:-1]:
                entry = entry[key]
            if entry[place[-1]] == value:
                continue
            entry[place[-1]] = value
            path.write_text(yaml.safe_dump(config))
            try:
                load_checkpoint(folder)
            except ValueError as error:
                assert "\n" not in str(error) and str(folder) in str(error), (place, value)
            else:
                default = value is None and place[-1] in ("num_pre_head_blocks", "pre_head_multiple")
                assert default or place[-1] in harmless or place[0] == "context_encoder", (place, value)


# What is in a checkpoint is never executed


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir", "!!python/name:os.mkdir"]
)
def test_checkpoint_config_cannot_execute_code(folder, tmp_path, tag):
    made = tmp_path / "made"
    path = folder / "config.yaml"
    path.write_text(path.read_text() + f"extra: {tag} [{made}]\n")
    assert "config.yaml is damaged (ConstructorError" in refusal(folder)
    assert not made.exists()


def test_pickle_in_place_of_weights_is_not_read(folder, hypernetwork):
    torch.save(hypernetwork.state_dict(), folder / "hypernetwork.safetensors")
    assert "cannot be read" in refusal(folder)


# Crashes


class Crash(BaseException):
    """Like a kill: nothing that catches Exception sees it."""


@pytest.mark.parametrize("existing", [True, False], ids=["over an older one", "into a new folder"])
@pytest.mark.parametrize("step", ["before the weights", "halfway into the weights", "before the config"])
def test_a_crash_while_saving_leaves_nothing_wrong_that_loads(tmp_path, hypernetwork, monkeypatch, step, existing):
    folder = tmp_path / "checkpoint"
    if existing:
        save(hypernetwork, folder)
    for parameter in hypernetwork.parameters():
        parameter.data += 1

    def crash(weights=None, path=None, **_):
        if step == "halfway into the weights":
            path.write_bytes(b"half")
        raise Crash

    if step == "before the config":
        monkeypatch.setattr(hypernet.model.checkpoint.yaml, "safe_dump", crash)
    else:
        monkeypatch.setattr("safetensors.torch.save_file", crash)
    with pytest.raises(Crash):
        save(hypernetwork, folder)
    monkeypatch.undo()
    assert "config.yaml is missing" in refusal(folder)
    assert {path.name for path in folder.iterdir()} <= {"hypernetwork.safetensors"}
    save(hypernetwork, folder)  # and it can be saved again
    assert load_checkpoint(folder).fingerprint == fingerprint(hypernetwork)


def test_a_checkpoint_without_its_base_model_is_refused(tmp_path, make_doc_to_lora):
    make_doc_to_lora().save_pretrained(tmp_path / "checkpoint", include_base_model=True)
    shutil.rmtree(tmp_path / "checkpoint/base_model")
    assert "base_model/config.json is missing. Copy it again." in refusal(tmp_path / "checkpoint")


def test_beside_of_version_0_1_is_read_as_concat_layer(folder):
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["context_encoder"] = {"kind": "per_layer_activations", "beside": 4}
    path.write_text(yaml.safe_dump(config))
    assert load_checkpoint(folder).context_encoder == {"kind": "per_layer_activations", "concat_layer": 4}


def test_unknown_context_encoder_key_is_refused(folder):
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["context_encoder"]["depth"] = 3
    path.write_text(yaml.safe_dump(config))
    assert "context_encoder has no depth" in refusal(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_takes_half_the_bytes_and_loads_in_full(hypernetwork, tmp_path, dtype):
    settings = {"base_model": "x", "base_model_fingerprint": None, "context_encoder": {}, "max_chunk_tokens": 8}
    for name, of in (("full", None), ("half", dtype)):
        save_checkpoint(tmp_path / name, hypernetwork=hypernetwork, dtype=of, **settings)
    sizes = [(tmp_path / name / "hypernetwork.safetensors").stat().st_size for name in ("full", "half")]
    count = sum(tensor.numel() for tensor in hypernetwork.state_dict().values())
    assert sizes[0] - sizes[1] >= 1.9 * count
    loaded = load_checkpoint(tmp_path / "half").hypernetwork.state_dict()
    for name, tensor in hypernetwork.state_dict().items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], tensor.to(dtype).float())
