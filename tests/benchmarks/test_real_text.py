"""benchmarks/real_text.py on a made file in SQuAD's format, and on XQuAD where it is at hand."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from benchmarks.real_text import evaluate, markdown, read_squad

XQUAD = Path(__file__).parents[3] / "shared/data/xquad/xquad.en.json"


def squad_file(folder: Path, paragraphs: list[tuple[str, str, str]]) -> Path:
    qas = [
        {"context": text, "qas": [{"id": q, "question": q, "answers": [{"text": a, "answer_start": text.find(a)}]}]}
        for text, q, a in paragraphs
    ]
    path = folder / "squad.json"
    path.write_text(json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": qas}]}), encoding="utf-8")
    return path


def settings(path: Path, **changes) -> OmegaConf:
    return OmegaConf.create(
        {"squad_file": str(path), "max_paragraphs": None, "peft": True, "questions_per_batch": 8, **changes}
    )


def test_real_text_paragraphs_become_peft_adapters(make_doc_to_lora, tmp_path) -> None:
    paragraphs = [
        ("The river Öl is 12 km long. Nobody swims in it – it is cold.", "How long is the Öl?", "12 km"),
        ("日本の首都は東京です。", "What is the capital?", "東京"),
        ("A" * 300, "Which letter?", "A"),
    ]
    result = evaluate(make_doc_to_lora(), settings(squad_file(tmp_path, paragraphs)))
    assert (result["adapters"], result["paragraphs"], result["questions"]) == (3, 3, 3)
    assert result["peft_logit_difference"] <= 1e-4
    assert "3 of 3 paragraphs became adapters" in markdown([result])


def test_real_text_refuses_other_file_formats(tmp_path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"rows": []}', encoding="utf-8")
    with pytest.raises(ValueError, match="not in SQuAD's v1.1 JSON format"):
        read_squad(path)
    with pytest.raises(ValueError, match="Name a file in SQuAD's v1.1 JSON format"):
        read_squad(tmp_path / "absent.json")


@pytest.mark.skipif(not XQUAD.is_file(), reason="XQuAD is not at ../shared/data/xquad")
def test_xquad_paragraphs_become_adapters(make_doc_to_lora) -> None:
    result = evaluate(make_doc_to_lora(max_chunk_tokens=112), settings(XQUAD, max_paragraphs=6))
    assert result["adapters"] == 6
    assert result["peft_logit_difference"] <= 1e-4
