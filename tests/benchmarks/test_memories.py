"""benchmarks/methods/memories.py: each answers as `Memory.ask` does by its tier; controls know nothing."""

import pytest

from benchmarks.measuring.measure import is_base_model, load_model, run_cell
from benchmarks.methods.memories import (
    AdapterMemory,
    AnothersAdapterMemory,
    AnothersTokenMemory,
    OracleMemory,
    TokenMemory,
)
from benchmarks.methods.prompts import NoContext
from benchmarks.tasks.base import Asked, Case
from benchmarks.tasks.conflict import OverrideTask
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


STATEMENTS = {"capital": "The capital of {s} is {v}.", "symbol": "The chemical symbol of {s} is {v}."}


@pytest.mark.story(11)
def test_memories_override_what_the_base_model_knows(shipped):
    """Alone it says what it learned; by each tier some of what it was told, with another's memory nothing of it."""
    task = OverrideTask(model=shipped, num_memories=6, num_cases=2, statements=STATEMENTS)
    found = {}
    for method in (NoContext, TokenMemory, AdapterMemory, AnothersAdapterMemory):
        rows = run_cell(task.cases(0), method(model=shipped, max_new_tokens=12), seed=0, num_timed=0, num_profiled=0)
        asked = [row for row in rows if row["kind"] == "question" and row["set"] == "known entities"]
        for row in asked:
            assert row["contains_neither"] == (not row["contains_answer"] and not row["contains_old_answer"])
        names = ("contains_answer", "contains_old_answer")
        found[method] = tuple(sum(row[name] for row in asked) / len(asked) for name in names)
    assert found[NoContext][0] == 0 and found[NoContext][1] > 0.9
    for tier in (TokenMemory, AdapterMemory):  # .41 and .37 of 100 questions: what was learned often stays
        assert found[tier][0] > 0 and found[tier][1] < found[NoContext][1]
    assert found[AnothersAdapterMemory][0] == 0 and found[AnothersAdapterMemory][1] > 0.6


def test_base_model_alone_answers_from_texts_and_has_no_adapters(tiny_base_model_folder):
    model = load_model(str(tiny_base_model_folder), "cpu")
    assert is_base_model(str(tiny_base_model_folder)) and not is_base_model("assets/tiny")
    case = Case("set", "0", ("Orla taught Fenda.",), (Asked("Who taught Fenda?", ("Orla",)),), others=("Nobody.",))
    for method in (NoContext, TokenMemory):
        rows = run_cell([case], method(model=model, max_new_tokens=3), seed=0, num_timed=0, num_profiled=0)
        assert [row["kind"] for row in rows] == ["question", "case"]
    with pytest.raises(ValueError, match="is a base model without a hypernetwork. Choose a method without adapters"):
        AdapterMemory(model=model, max_new_tokens=3).prepare(case)
