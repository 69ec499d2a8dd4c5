"""The model in assets/tiny does what its card says: on a few held-out articles, with the controls beside it."""

from pathlib import Path

import pytest
import torch

from hypernet.data.encyclopedia import Encyclopedia
from hypernet.doc_to_lora import DocToLoRA

TINY = Path(__file__).parent.parent / "assets/tiny"


@pytest.fixture(scope="module")
def model() -> DocToLoRA:
    return DocToLoRA.from_pretrained(TINY)


@pytest.fixture(scope="module")
def articles() -> list:
    encyclopedia = Encyclopedia("test", seed=1)
    return [encyclopedia.record(index, num_entities=1, num_facts=4, num_distractors=1) for index in range(12)]


def share_right(answers: list[str], questions: list) -> float:
    return sum(answer == question.answer for answer, question in zip(answers, questions, strict=True)) / len(questions)


def test_own_adapter_answers_another_and_none_do_not(model: DocToLoRA, articles: list) -> None:
    adapters = [model.internalize(article.document) for article in articles]
    asked = [(i, question) for i, article in enumerate(articles) for question in article.questions]
    questions = [question for _, question in asked]
    texts = [question.text for question in questions]
    own = model.generate(texts, [adapters[i] for i, _ in asked])
    other = model.generate(texts, [adapters[i - 1] for i, _ in asked])
    assert share_right(own, questions) >= 0.7
    assert share_right(other, questions) <= 0.1
    assert share_right(model.generate(texts), questions) <= 0.1


def test_swapped_adapters_answer_about_the_other_document(model: DocToLoRA, articles: list) -> None:
    first, second = articles[:2]
    adapters = [model.internalize(first.document), model.internalize(second.document)]
    for article, own, swapped in ((first, *adapters), (second, *reversed(adapters))):
        texts = [question.text for question in article.questions]
        right = share_right(model.generate(texts, own), article.questions)
        assert right > share_right(model.generate(texts, swapped), article.questions)


def test_peft_loads_the_exported_folder_with_the_same_logits(model: DocToLoRA, articles: list, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = model.internalize(articles[0].document)
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
