"""benchmarks/methods/memories.py: each answers as `Memory.ask` does by its tier; controls know nothing."""

import pytest

from benchmarks.measuring.measure import run_cell
from benchmarks.methods.memories import (
    AdapterMemory,
    AnothersAdapterMemory,
    AnothersTokenMemory,
    OracleMemory,
    TokenMemory,
)
from benchmarks.methods.prompts import NoContext
from benchmarks.tasks.memories import MemoriesTask
from hypernet.doc_to_lora import DocToLoRA


@pytest.fixture(scope="module")
def shipped():
    return DocToLoRA.from_pretrained("assets/tiny").eval().requires_grad_(False)


def exact_match(rows, name: str) -> float:
    found = [row["exact_match"] for row in rows if row["kind"] == "question" and row["set"] == name]
    return sum(found) / len(found)


@pytest.mark.parametrize(("method", "tier"), [(TokenMemory, "token"), (AdapterMemory, "adapter")])
def test_method_answers_as_the_tier_does(shipped, method, tier):
    (case,) = MemoriesTask(num_memories=[8], num_questions=8).cases(1)
    made = method(model=shipped, max_new_tokens=12)
    made.prepare(case)
    texts = [question.text for question in case.questions]
    asked = made.memory.ask_many(texts, user_ids=["asked"] * len(texts), tier=tier)
    assert [answer.text for answer in made.answer(case.questions)] == [answer.text for answer in asked]
    first, total, tokens = made.timed_answer(case.questions[0])
    assert 0 < first <= total and tokens > 0 and made.stored_bytes() > 0


def test_each_tier_answers_and_controls_do_not(shipped):
    task = MemoriesTask(num_memories=[8], num_questions=16, num_cases=2)
    scores = {}
    for method in (NoContext, OracleMemory, TokenMemory, AdapterMemory, AnothersTokenMemory, AnothersAdapterMemory):
        rows = run_cell(task.cases(1), method(model=shipped, max_new_tokens=12), seed=1, num_timed=0, num_profiled=0)
        scores[method] = exact_match(rows, "8 memories")
    assert min(scores[OracleMemory], scores[TokenMemory], scores[AdapterMemory]) > 0.7
    assert max(scores[NoContext], scores[AnothersTokenMemory], scores[AnothersAdapterMemory]) < 0.2


@pytest.mark.parametrize("method", [TokenMemory, AdapterMemory])
def test_forgotten_memories_answer_as_if_never_told(shipped, method):
    task = MemoriesTask(num_memories=[8], num_questions=8, num_forgotten=2)
    rows = run_cell(task.cases(0), method(model=shipped, max_new_tokens=12), seed=0, num_timed=0, num_profiled=0)
    said = {}
    for row in rows:
        if row["kind"] == "question":
            said.setdefault(row["set"], []).append(row["prediction"])
    for what in ("kept", "forgotten"):
        assert said[f"{what}, after"] == said[f"{what}, never told"]
    assert exact_match(rows, "forgotten, before") > exact_match(rows, "forgotten, after")
