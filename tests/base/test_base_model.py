"""The base model: loading, building from a configuration, fingerprints, greedy batches."""

import copy
import hashlib
import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedTokenizerFast

from hypernet.base.base_model import build_base_model, fingerprint, freeze, load_base_model
from hypernet.base.generation import generate_text

LLAMA = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


# Loading


def test_loaded_base_model_is_frozen_and_of_the_stored_type(tiny_base_model_folder):
    base_model, tokenizer = load_base_model(tiny_base_model_folder)
    assert not any(module.training for module in base_model.modules())
    assert not any(parameter.requires_grad for parameter in base_model.parameters())
    assert {parameter.dtype for parameter in base_model.parameters()} == {torch.float32}
    assert tokenizer("Norbach")["input_ids"] and tokenizer.chat_template


def test_base_model_dtype_and_attention_can_be_chosen(tiny_base_model_folder):
    base_model, _ = load_base_model(str(tiny_base_model_folder), dtype="bfloat16", attention="eager")
    assert {parameter.dtype for parameter in base_model.parameters()} == {torch.bfloat16}
    assert base_model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"attention": "blah"}, "attention should be one of eager, .*sdpa.* or None, got 'blah'."),
        ({"attention": "Sdpa"}, "attention should be one of eager, .*, got 'Sdpa'."),
        ({"attention": "kernels-community/any"}, "attention should be one of eager, "),
        ({"dtype": "float8"}, "dtype should be one of float32, bfloat16, float16, float64 or None, got 'float8'."),
        ({"dtype": "bf16"}, "dtype should be one of float32, .*, got 'bf16'."),
        ({"dtype": torch.int8}, "dtype should be one of float32, .*, got torch.int8."),
        ({"device": "gpu"}, "device should be one of torch's, such as cpu or cuda:0, got 'gpu'."),
        ({"device": None}, "device should be one of torch's, such as cpu or cuda:0, got None."),
    ],
)
def test_unknown_kind_of_loading_is_refused_with_the_known_ones(tiny_base_model_folder, settings, says):
    with pytest.raises(ValueError, match=f"^{says}") as error:
        load_base_model(tiny_base_model_folder, **settings)
    assert "\n" not in str(error.value)


def test_attention_that_is_not_installed_is_named(tiny_base_model_folder):
    with pytest.raises(ValueError, match="whether this machine and model have attention=flash_attention_2.$"):
        load_base_model(tiny_base_model_folder, attention="flash_attention_2")


def test_base_model_keeps_stored_dtype(tmp_path, tiny_base_model, tiny_tokenizer):
    tiny_base_model.to(torch.bfloat16).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    assert load_base_model(tmp_path)[0].dtype == torch.bfloat16


def test_tilde_in_path_is_expanded(tmp_path, monkeypatch, tiny_base_model_folder):
    monkeypatch.setenv("HOME", str(tiny_base_model_folder.parent))
    base_model, _ = load_base_model(f"~/{tiny_base_model_folder.name}")
    assert fingerprint(base_model) == fingerprint(load_base_model(tiny_base_model_folder)[0])


def test_tokenizer_without_pad_token_pads_with_eos(tmp_path, tiny_base_model, tiny_tokenizer):
    """As those of Llama 3 and Mistral; batches need some token to pad with."""
    tiny_base_model.save_pretrained(tmp_path)
    without_padding = copy.deepcopy(tiny_tokenizer)
    without_padding.pad_token = None
    without_padding.save_pretrained(tmp_path)
    base_model, tokenizer = load_base_model(tmp_path)
    assert tokenizer.pad_token == tokenizer.eos_token == "<|end|>"
    prompts = tokenizer(["Norbach", "Who founded Norbach Works?"])["input_ids"]
    assert generate_text(base_model, tokenizer, prompts, max_new_tokens=3) == [
        generate_text(base_model, tokenizer, [prompt], max_new_tokens=3)[0] for prompt in prompts
    ]


@pytest.mark.parametrize(
    ("added", "names", "expected"),
    [
        (["[PAD]"], {"pad_token": "[PAD]"}, "<|end|>"),
        (["[PAD]", "[EOS]"], {"pad_token": "[PAD]", "eos_token": "[EOS]"}, "<|end|>"),
        ([], {"pad_token": None, "eos_token": None}, "<|end|>"),
        ([], {"pad_token": "<|user|>"}, "<|user|>"),
    ],
    ids=["beyond the embedding", "end token too", "neither", "known"],
)
def test_padding_is_a_token_that_the_base_model_knows(
    tmp_path, tiny_base_model, tiny_tokenizer, added, names, expected
):
    tiny_base_model.save_pretrained(tmp_path)
    changed = copy.deepcopy(tiny_tokenizer)
    changed.add_tokens(added, special_tokens=True)
    for name, token in names.items():
        setattr(changed, name, token)
    changed.save_pretrained(tmp_path)
    base_model, tokenizer = load_base_model(tmp_path)
    assert tokenizer.pad_token == expected
    prompts = tokenizer(["Norbach", "Who founded Norbach Works?"])["input_ids"]
    assert generate_text(base_model, tokenizer, prompts) == generate_text(tiny_base_model, tiny_tokenizer, prompts)


def test_tokenizer_without_any_special_token_still_pads(tmp_path, tiny_base_model, tiny_tokenizer):
    tiny_base_model.save_pretrained(tmp_path)
    backend = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    backend["added_tokens"] = []
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)), chat_template=template
    ).save_pretrained(tmp_path)
    base_model, tokenizer = load_base_model(tmp_path)
    assert tokenizer.pad_token_id == 0
    prompts = tokenizer(["Norbach", "Who founded Norbach Works?"])["input_ids"]
    answers = generate_text(base_model, tokenizer, prompts)
    assert answers[0] == generate_text(base_model, tokenizer, prompts[:1])[0]


def damaged(folder, kind):
    match kind:
        case "weights cut off":
            path = folder / "model.safetensors"
            path.write_bytes(path.read_bytes()[:-100])
        case "weights missing":
            (folder / "model.safetensors").unlink()
        case "config is no JSON":
            (folder / "config.json").write_text("{")
        case "unknown architecture":
            (folder / "config.json").write_text('{"model_type": "llamma"}')
        case "no config":
            (folder / "config.json").unlink()


@pytest.mark.parametrize(
    "kind", ["weights cut off", "weights missing", "config is no JSON", "unknown architecture", "no config"]
)
def test_unloadable_source_is_refused_in_one_line_with_its_path(tmp_path, tiny_base_model_folder, kind):
    folder = tmp_path / "base_model"
    shutil.copytree(tiny_base_model_folder, folder)
    damaged(folder, kind)
    with pytest.raises(ValueError) as error:
        load_base_model(folder)
    message = str(error.value)
    assert "\n" not in message and str(folder) in message
    assert "Check the name, the files and the network." in message or "Give a folder" in message


@pytest.mark.parametrize("source", ["/nowhere/model", "./nowhere", "assets/nowhere/model", "~/nowhere"])
def test_missing_folder_is_not_looked_up_on_the_hub(source):
    with pytest.raises(ValueError, match=r"No base model in .*nowhere.*config.json is missing. Give a folder"):
        load_base_model(source)


def test_unreachable_hub_name_is_a_one_line_error():
    with pytest.raises(ValueError, match="Could not load the base model from nobody/nothing") as error:
        load_base_model("nobody/nothing")
    assert "\n" not in str(error.value)


# Building


def test_seed_decides_the_weights_and_leaves_torchs_rng():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, again, other = (build_base_model(LLAMA, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert fingerprint(one) == fingerprint(again) != fingerprint(other)
    assert one.config.hidden_size == 16
    assert LLAMA["model_type"] == "llama"  # the settings are not used up


@pytest.mark.parametrize("model_type", [None, "lama"])
def test_unknown_model_type_is_refused_with_examples(model_type):
    with pytest.raises(ValueError, match=rf"model_type is {model_type!r}; give one .*llama"):
        build_base_model({**LLAMA, "model_type": model_type})


def test_freeze_stops_gradients():
    model = freeze(nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train())
    assert not model.training and not model[1].training and not model[0].weight.requires_grad


# Fingerprint


def test_fingerprint_depends_on_weights_and_not_on_place(tmp_path, tiny_base_model_folder):
    base_model, tokenizer = load_base_model(tiny_base_model_folder)
    tokenizer.save_pretrained(tmp_path)
    expected = fingerprint(base_model)
    assert fingerprint(dict(reversed(base_model.state_dict().items()))) == expected
    base_model.save_pretrained(tmp_path)
    assert fingerprint(load_base_model(tmp_path, attention="eager")[0]) == expected
    strided = {name: t.t().contiguous().t() if t.ndim == 2 else t for name, t in base_model.state_dict().items()}
    assert fingerprint(strided) == expected


def test_fingerprint_of_known_weights_is_stable():
    """Adapters and checkpoints hold fingerprints: another way to compute them would orphan these."""
    tensors = {"b": torch.tensor([True]), "a": torch.tensor([[1.0, -2.0]], dtype=torch.bfloat16)}
    text = b"a torch.bfloat16 (1, 2)" + b"\x80\x3f\x00\xc0" + b"b torch.bool (1,)" + b"\x01"
    assert fingerprint(tensors) == hashlib.sha256(text).hexdigest()


@pytest.mark.parametrize(
    "changed",
    [
        {"a": torch.tensor([[1.0, 2.0], [3.0, 4.000001]]), "b": torch.tensor(1)},
        {"a": torch.tensor([[1.0, 2.0, 3.0, 4.0]]), "b": torch.tensor(1)},
        {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64), "b": torch.tensor(1)},
        {"A": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor(1)},
        {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]])},
        {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor(2)},
    ],
    ids=["value", "shape", "type", "name", "missing", "scalar"],
)
def test_fingerprint_changes_with_any_value_name_or_dtype(changed):
    tensors = {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor(1)}
    assert fingerprint(changed) != fingerprint(tensors) == fingerprint(dict(tensors))


def test_fingerprint_samples_large_tensors_unless_exact():
    tensors = {"large": torch.zeros(2**20 + 1)}
    sampled, exact = fingerprint(tensors), fingerprint(tensors, exact=True)
    tensors["large"][7] = 1  # not in the sample
    assert fingerprint(tensors) == sampled and fingerprint(tensors, exact=True) != exact
    tensors["large"] += 1
    assert fingerprint(tensors) != sampled
    small = {"small": torch.zeros(2**20)}
    assert fingerprint(small) == fingerprint(small, exact=True)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_byte_order_mark_in_a_base_model_is_refused(tmp_path, tiny_base_model_folder, name):
    folder = shutil.copytree(tiny_base_model_folder, tmp_path / "base_model")
    (folder / name).write_text("\ufeff" + (folder / name).read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(ValueError, match=f"{name} begins with a byte order mark. Save it as UTF-8"):
        load_base_model(folder)
