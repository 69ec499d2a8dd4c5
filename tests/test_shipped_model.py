"""The model in assets/tiny: its exact answers about a few held-out articles, with another adapter and with none."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from hypernet.adapters.adapter import LoRAAdapter
from hypernet.base.base_model import build_base_model
from hypernet.data.encyclopedia import Encyclopedia
from hypernet.data.records import UNKNOWN
from hypernet.doc_to_lora import DocToLoRA

TINY = Path(__file__).parent.parent / "assets/tiny"


@pytest.fixture(scope="module")
def model() -> DocToLoRA:
    return DocToLoRA.from_pretrained(TINY)


@pytest.fixture(scope="module")
def articles() -> list:
    encyclopedia = Encyclopedia("test", seed=1)
    return [encyclopedia.record(index, num_entities=1, num_facts=4, num_distractors=1) for index in range(12)]


@pytest.fixture(scope="module")
def adapters(model: DocToLoRA, articles: list) -> list[LoRAAdapter]:
    return [model.internalize(article.document) for article in articles]


# Answers are greedy, and the closest of these decisions is won by 0.13 (wrong adapter or none) or 0.5 (own adapter) in
# the logits, where float32 on another machine differs by about 1e-4: so they are compared exactly.


def test_own_adapter_answers_46_of_48_questions(model: DocToLoRA, articles: list, adapters: list) -> None:
    asked = [(i, question) for i, article in enumerate(articles) for question in article.questions]
    answers = model.generate([question.text for _, question in asked], [adapters[i] for i, _ in asked])
    wrong = {q.text: (q.answer, answer) for (_, q), answer in zip(asked, answers, strict=True) if answer != q.answer}
    assert len(asked) == 48
    assert wrong == {
        "Whose invention is the lanlevox?": ("Gelra Velfax", UNKNOWN),
        "Who founded Torsky Brothers?": ("Tamis Telden", "Tamis Lanfield"),
    }


def test_another_adapter_answers_one_question_of_48_wrongly(model: DocToLoRA, articles: list, adapters: list) -> None:
    asked = [(i, question.text) for i, article in enumerate(articles) for question in article.questions]
    answers = model.generate([text for _, text in asked], [adapters[i - 1] for i, _ in asked])
    given = {text: answer for (_, text), answer in zip(asked, answers, strict=True) if answer != UNKNOWN}
    # The year that the other document tells of another thing.
    assert given == {"Since which year has Sorham Brothers existed?": "1760"}


def test_without_an_adapter_every_answer_is_unknown(model: DocToLoRA, articles: list) -> None:
    texts = [question.text for article in articles for question in article.questions]
    assert model.generate(texts) == [UNKNOWN] * 48


def test_peft_loads_exported_folder_with_same_logits(
    model: DocToLoRA, articles: list, adapters: list, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = adapters[0]
    adapter.save(tmp_path / "adapter")
    ids = torch.tensor([model.tokenizer(model.layout.prompt(articles[0].questions[0].text))["input_ids"]])
    with torch.no_grad():
        with model.injector.using(adapter):
            injected = model.base_model(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(TINY / "base_model")
        assert (plain(ids).logits - injected).abs().max() > 0.1
        loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter")
        assert (loaded(ids).logits - injected).abs().max() <= 1e-4


def test_shipped_files_are_small_and_hold_no_pickle() -> None:
    files = [path for path in TINY.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 40e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".yaml", ".jinja", ".md"}


def test_base_model_of_another_shape_is_named_as_another_one(tmp_path):
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 6, "vocab_size": 600}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    build_base_model({"model_type": "llama", **sizes, **heads}).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(TINY / "base_model").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="was made for the base model .* Give the base model it was trained with."):
        DocToLoRA.from_pretrained(TINY, base_model=tmp_path)
