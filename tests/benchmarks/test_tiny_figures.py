"""benchmarks/tiny_figures.py: articles of the asked sizes, figures that follow from the rows."""

import pytest
from omegaconf import OmegaConf

from benchmarks.tiny_figures import METHODS, evaluate, held_out_articles, markdown, summarize
from hypernet.text.chunking import chunk_document


def rows_of(name: str, method: str, values: list[float]) -> list[dict]:
    return [{"set": name, "method": method, "document": i // 2, "exact_match": v} for i, v in enumerate(values)]


def test_tiny_figures_summary_has_means_and_gap_closed() -> None:
    rows = (
        rows_of("one entity", "no_context", [0, 0, 0, 0])
        + rows_of("one entity", "wrong_document", [0, 0, 0, 0])
        + rows_of("one entity", "adapter", [1, 0, 1, 0])
        + rows_of("one entity", "document_in_prompt", [1, 1, 1, 0])
    )
    by_method = {row["method"]: row for row in summarize(rows)}
    assert by_method["adapter"]["exact_match"] == 0.5
    assert by_method["adapter"]["gap_closed"] == pytest.approx(0.5 / 0.75)
    assert by_method["wrong_document"]["gap_closed"] == 0
    assert by_method["document_in_prompt"]["low"] <= 0.75 <= by_method["document_in_prompt"]["high"]
    assert "| one entity | adapter | 4 | 0.500 |" in markdown(list(by_method.values()))


def test_every_method_answers_same_held_out_questions(make_doc_to_lora) -> None:
    settings = {
        "seeds": [3, 4],
        "article_tokens": 200,
        "documents_one_entity": 3,
        "documents_many_entities": 2,
        "num_background": 4,
        "questions_per_batch": 16,
    }
    rows = evaluate(make_doc_to_lora(max_chunk_tokens=200), OmegaConf.create(settings))
    for name in ("one entity", "2-4 entities"):
        asked = {m: [r["question"] for r in rows if (r["set"], r["method"]) == (name, m)] for m in METHODS}
        assert asked["adapter"] and all(questions == asked["adapter"] for questions in asked.values())
        assert {r["document"] for r in rows if r["set"] == name} == {
            f"{seed}/{number}" for seed in (3, 4) for number in range(3 if name == "one entity" else 2)
        }
    assert len([r for r in rows if r["set"] == "background"]) == 2 * 8
    chunks = {r["num_chunks"] for r in rows if r["set"] == "2-4 entities"}
    assert chunks <= {2, 3, 4}


def test_articles_follow_the_seed_and_have_the_asked_sizes(tiny_tokenizer) -> None:
    settings = {"seed": 1, "article_tokens": 200, "one_entity": 2, "many_entities": 3}
    first, second = (held_out_articles(tiny_tokenizer, **settings) for _ in range(2))
    assert first == second
    for name, (least, most) in {"one entity": (1, 1), "2-4 entities": (2, 4)}.items():
        pieces = [len(chunk_document(r.document, tiny_tokenizer, max_chunk_tokens=200).ids) for r in first[name]]
        assert len(pieces) == settings[name.replace("2-4", "many").replace(" ", "_")]
        assert least <= min(pieces) and max(pieces) <= most


def test_held_out_articles_refuse_impossible_sizes(tiny_tokenizer) -> None:
    with pytest.raises(ValueError, match="article_tokens=3"):
        held_out_articles(tiny_tokenizer, seed=1, article_tokens=3, one_entity=2, many_entities=1)
