"""benchmarks/tiny_figures.py: articles of the asked sizes, figures that follow from the rows."""

import pytest
from omegaconf import OmegaConf

from benchmarks.tiny_figures import METHODS, evaluate, held_out_articles, markdown, summarize


def rows_of(name: str, method: str, values: list[float]) -> list[dict]:
    return [{"set": name, "method": method, "document": i // 2, "exact_match": v} for i, v in enumerate(values)]


def test_summary_gives_means_and_the_share_of_the_gap_closed() -> None:
    rows = (
        rows_of("one chunk", "no_context", [0, 0, 0, 0])
        + rows_of("one chunk", "wrong_adapter", [0, 0, 0, 0])
        + rows_of("one chunk", "adapter", [1, 0, 1, 0])
        + rows_of("one chunk", "document_in_prompt", [1, 1, 1, 0])
    )
    by_method = {row["method"]: row for row in summarize(rows)}
    assert by_method["adapter"]["exact_match"] == 0.5
    assert by_method["adapter"]["gap_closed"] == pytest.approx(0.5 / 0.75)
    assert by_method["wrong_adapter"]["gap_closed"] == 0
    assert by_method["document_in_prompt"]["low"] <= 0.75 <= by_method["document_in_prompt"]["high"]
    assert "| one chunk | adapter | 4 | 2 | 0.500 |" in markdown(list(by_method.values()))


def test_every_method_answers_the_same_held_out_questions(make_doc_to_lora) -> None:
    settings = {
        "seed": 3,
        "documents_one_chunk": 3,
        "documents_many_chunks": 2,
        "num_background": 4,
        "questions_per_batch": 16,
    }
    rows = evaluate(make_doc_to_lora(max_chunk_tokens=200), OmegaConf.create(settings))
    for name in ("one chunk", "2-4 chunks"):
        asked = {m: [r["question"] for r in rows if (r["set"], r["method"]) == (name, m)] for m in METHODS}
        assert asked["adapter"] and all(questions == asked["adapter"] for questions in asked.values())
    assert len([r for r in rows if r["set"] == "background"]) == 8
    chunks = {r["num_chunks"] for r in rows if r["set"] == "2-4 chunks"}
    assert chunks <= {2, 3, 4}


def test_articles_are_the_same_for_the_same_seed(make_doc_to_lora) -> None:
    model = make_doc_to_lora(max_chunk_tokens=200)
    first, second = (held_out_articles(model, seed=1, one_chunk=2, many_chunks=1) for _ in range(2))
    assert first == second


def test_chunks_too_short_for_any_article_are_refused(make_doc_to_lora) -> None:
    with pytest.raises(ValueError, match="max_chunk_tokens"):
        held_out_articles(make_doc_to_lora(max_chunk_tokens=3), seed=1, one_chunk=2, many_chunks=1)
