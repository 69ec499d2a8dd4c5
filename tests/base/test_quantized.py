"""A quantised base model takes adapters through the same hooks, and reads with the same weights."""

import sys

import pytest
import torch

from hypernet.base.base_model import fingerprint, load_base_model
from hypernet.doc_to_lora import DocToLoRA

QUESTIONS = ["Who founded Norbach?", "When?"]
TEXT = "Norbach was founded by Ilda Renwick in 1807. It makes tin boxes."


def int8(folder):
    pytest.importorskip("torchao")
    return load_base_model(folder, quantization="int8")[0]


def logits(model, adapter):
    batch = model.tokenizer(QUESTIONS, return_tensors="pt", padding=True)
    with torch.no_grad(), model.injector.using(adapter):
        return model.base_model(**{key: batch[key] for key in ("input_ids", "attention_mask")}).logits


def test_int8_base_model_applies_adapters(make_doc_to_lora, tiny_base_model_folder):
    plain, quantised = make_doc_to_lora(), make_doc_to_lora(base_model=int8(tiny_base_model_folder))
    quantised.hypernetwork.load_state_dict(plain.hypernetwork.state_dict())
    weight = quantised.base_model.model.layers[0].mlp.down_proj.weight
    assert type(weight).__module__.startswith("torchao")
    adapter = plain.internalize(TEXT)
    effect = logits(plain, adapter) - logits(plain, None)
    again = logits(quantised, adapter) - logits(quantised, None)
    # The same adapter does the same to both, but for what rounding to 8 bits changes on the way.
    assert effect.abs().max() > 0.5
    assert (again - effect).norm() < 0.1 * effect.norm()
    # Encoder and base are one copy: reading with the quantised weights gives nearly the same adapter.
    own = quantised.internalize(TEXT)
    for name in adapter.A:
        assert (own.A[name] - adapter.A[name]).norm() < 0.1 * adapter.A[name].norm()
        assert not torch.equal(own.A[name], adapter.A[name])


def test_int8_base_model_passes_gradients_to_hypernetwork(make_doc_to_lora, tiny_base_model_folder):
    model = make_doc_to_lora(base_model=int8(tiny_base_model_folder))
    ids = torch.randint(4, 600, (2, 9))
    A, B = model.adapt(ids, torch.ones_like(ids, dtype=torch.bool))
    model.activate(A, B, [1, 1])
    model.base_model(ids).logits.square().mean().backward()
    model.injector.clear()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.hypernetwork.parameters())


def test_quantized_batch_equals_single_questions(make_doc_to_lora, tiny_base_model_folder):
    model = make_doc_to_lora(base_model=int8(tiny_base_model_folder))
    adapters = [model.internalize(TEXT), model.internalize("Corvale lies in the north.")]
    together = model.generate(QUESTIONS, adapters, max_new_tokens=5)
    assert together == [model.generate([q], a, max_new_tokens=5)[0] for q, a in zip(QUESTIONS, adapters, strict=True)]


def test_a_checkpoint_fits_its_quantised_base_model(make_doc_to_lora, tmp_path):
    pytest.importorskip("torchao")
    make_doc_to_lora().save_pretrained(tmp_path / "checkpoint", include_base_model=True)
    plain = DocToLoRA.from_pretrained(tmp_path / "checkpoint")
    quantised = DocToLoRA.from_pretrained(tmp_path / "checkpoint", quantization="int8")
    # Adapters made with either belong to the same base model.
    assert quantised.base_model_fingerprint == plain.base_model_fingerprint
    assert plain.generate(QUESTIONS, quantised.internalize(TEXT), max_new_tokens=3)


def test_fingerprint_of_quantised_weights_is_of_their_content(tiny_base_model_folder):
    one, two = int8(tiny_base_model_folder), int8(tiny_base_model_folder)
    assert fingerprint(one) == fingerprint(two) != fingerprint(load_base_model(tiny_base_model_folder)[0])
    two.model.layers[0].mlp.down_proj.weight.qdata[0, 0] += 1
    assert fingerprint(one) != fingerprint(two)


def test_unknown_quantization_is_refused(tiny_base_model_folder):
    with pytest.raises(ValueError, match="Unknown quantization 'int3': choose one of int8, 4bit or None"):
        load_base_model(tiny_base_model_folder, quantization="int3")


@pytest.mark.parametrize("name, library", [("int8", "torchao"), ("4bit", "bitsandbytes")])
def test_missing_quantization_library_is_named(tiny_base_model_folder, monkeypatch, name, library):
    monkeypatch.setattr("hypernet.base.base_model.find_spec", lambda asked: None if asked == library else sys)
    with pytest.raises(ValueError, match=f"quantization={name} needs {library}: pip install {library}"):
        load_base_model(tiny_base_model_folder, quantization=name)


@pytest.mark.requires_gpu
def test_4bit_base_model_applies_adapters(make_doc_to_lora, tiny_base_model_folder):
    pytest.importorskip("bitsandbytes")
    base_model, _ = load_base_model(tiny_base_model_folder, quantization="4bit", device="cuda")
    model = make_doc_to_lora(base_model=base_model)
    model.hypernetwork.to("cuda")
    adapter = model.internalize(TEXT)
    assert model.generate(QUESTIONS, [adapter, None], max_new_tokens=3)
    ids = torch.randint(4, 600, (2, 9), device="cuda")
    A, B = model.adapt(ids, torch.ones_like(ids, dtype=torch.bool))
    model.activate(A, B, [1, 1])
    model.base_model(ids).logits.float().square().mean().backward()
    model.injector.clear()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.hypernetwork.parameters())
