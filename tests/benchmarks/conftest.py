"""Synthetic cells of the benchmark, small enough to reckon by hand, and what the report makes of them."""

import json

import pytest

from benchmarks.measuring.aggregate import describe, summarize
from benchmarks.measuring.cost import CostModel, ModelShape

SCORES = {
    "no_context": [0, 0, 0, 0],
    "full_context": [1, 1, 1, 0],
    "prefix_cache": [1, 1, 1, 0],
    "retrieval": [1, 1, 1, 1],
    "doc_to_lora": [1, 0, 1, 0],
    "wrong_document": [0, 0, 0, 0],
    "text_lora": [0, 0, 1, 0],
}
# Seconds to prepare, to the first token, of a question; answers have 5 tokens.
COSTS = {
    "no_context": (0.001, 0.006, 0.01),
    "full_context": (0.001, 0.046, 0.05),
    "prefix_cache": (0.1, 0.008, 0.012),
    "retrieval": (0.002, 0.011, 0.015),
    "doc_to_lora": (0.2, 0.006, 0.01),
    "wrong_document": (0.2, 0.006, 0.01),
    "text_lora": (2.0, 0.006, 0.01),
}
SETS = {
    "encyclopedia": {"one entity": (60, {}), "two entities": (130, {})},
    "needles": {
        "1 chunk": (90, {"num_chunks": 1, "depth": 0.5}),
        "8 chunks": (700, {"num_chunks": 8, "depth": 0.5}),
    },
    "composition": {"1 document": (60, {"num_documents": 1}), "4 documents": (240, {"num_documents": 4})},
    "capacity": {
        "2 facts, 1 entity": (40, {"facts": 2, "rank": 8}),
        "4 facts, 1 entity": (70, {"facts": 4, "rank": 8}),
    },
    "conflict_by_times_asked": {
        "known entities": (60, {"real_world": 0, "times_asked": 300, "times_asked_from": 260}),
        "the real world": (60, {"real_world": 1, "times_asked": 340, "times_asked_from": 332}),
        "entities never learned": (60, {"real_world": 0, "times_asked": 0, "times_asked_from": 0}),
    },
    "locality": {"background": (60, {})},
    "encyclopedia_empty_document": {"one entity": (60, {})},
}


def made_cells() -> list[dict]:
    rows = []
    for task, sets in SETS.items():
        for method, scores in SCORES.items():
            rows += _cell(task, method, scores, sets)
    return json.loads(json.dumps(rows))  # as they come from a file: keys are strings


def _cell(task: str, method: str, scores: list[int], sets: dict) -> list[dict]:
    rows = []
    cell = {"task": task, "method": method, "seed": 0, "identity": "x"}
    prepare, first, question = COSTS[method]
    for place, (name, (tokens, attributes)) in enumerate(sets.items()):
        for number, score in enumerate(scores):
            same = cell | {"set": name, "case": f"{place}/{number}", "attributes": attributes}
            if task == "locality":  # known without a document
                score = 1 if method in ("no_context", "retrieval", "full_context") else score
            elif task == "encyclopedia_empty_document":
                score = 0
            for step in (0, 8) if method == "text_lora" else (None,):
                value = float(score if step != 0 else 0)
                row = {"kind": "question", "number": 0, "step": step, "prompt_tokens": 12, "fits": True}
                row |= {"exact_match": value, "token_f1": value, "log_likelihood": -1.0 - number}
                row |= dict.fromkeys(("rouge_l_precision", "rouge_l_recall", "rouge_l_f1"), value)
                rows.append(same | row)
            row = {"kind": "case", "documents": 1, "questions": 1, "document_tokens": tokens, "stored_bytes": 1000}
            row |= {"prepare_s": prepare, "first_token_s": first, "question_s": question, "tokens_per_s": 1000.0}
            row |= {"prepare_flops": 10**6, "answer_flops": 10**6}
            row |= {"prepare_peak_bytes": 10**6, "answer_peak_bytes": 10**5}
            row |= {"step_s": {0: 0.0, 8: prepare} if method == "text_lora" else {}}
            rows.append(same | row)
    settings = {"num_chunks": 3, "max_chunk_tokens": 32} if method == "retrieval" else {"lr": 0.01, "rank": None}
    config = {"task": {}, "method": settings, "checkpoint": "assets/tiny", "max_new_tokens": 32}
    run = {"commit": "abc", "hardware": "2 CPU cores", "threads": 2, "versions": {"torch": "2"}, "date": "2026-01-01"}
    overrides = ["seed=0", f"task={task}", f"method={method}"]
    summary = {"kind": "summary", "wall_s": 1.0, "run": run | {"config": config}, "overrides": overrides}
    return [*rows, cell | summary]


def made_model(checkpoint: str = "") -> CostModel:
    """1,000 linear weights in 2 layers of width 10; internalizing costs 100 FLOPs per chunk and 10 per token."""
    shape = ModelShape(linear_weights=1000, head_weights=500, num_layers=2, attention_width=10)
    return CostModel(
        shape=shape,
        targets=(),
        rank_per_chunk=8,
        bias_rank=8,
        max_chunk_tokens=100,
        tokens_per_chunk=90.0,
        internalize_flops=(100.0, 10.0),
        question_tokens=16,
        answer_tokens=5,
        retrieved_tokens=0,
    )


@pytest.fixture
def cells() -> list[dict]:
    return made_cells()


@pytest.fixture(scope="session")
def report_rows() -> list[dict]:
    """What the report makes of the cells; read it, do not change it."""
    made = made_cells()
    error = {"task": "squad", "method": "no_context", "seed": 0, "error": "ValueError: <no file>"}
    return json.loads(json.dumps([describe(made, [error]), *summarize(made, cost_model=made_model)]))


@pytest.fixture
def cost_model() -> CostModel:
    return made_model()
