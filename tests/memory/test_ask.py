"""Asker: each tier against the model asked by hand; what memories did against the difference by hand."""

import pytest

from hypernet.memory.ask import MemoryQuestion, Unwritten
from hypernet.memory.memory import Memory
from hypernet.memory.store.records import Filters
from hypernet.memory.store.times import now, to_text

FACTS = ("Orla Wint taught Fenda Elfax.", "Norbach is a town by the river.", "Ilda Renwick founded the mill.")
QUESTION = "Who taught Fenda Elfax?"


@pytest.fixture
def model(make_doc_to_lora):
    return make_doc_to_lora()


@pytest.fixture
def memory(tmp_path, model):
    memory = Memory.open(tmp_path / "memory", model=model, max_new_tokens=6, limit=2, dtype="float32")
    yield memory
    memory.close()


@pytest.fixture
def told(memory):
    memory.refs = [str(memory.add(fact, user_id="alice", valid_at="2026-01-01")) for fact in FACTS]
    memory.write_adapters()
    return memory


def test_none_is_the_base_model_alone(told, model):
    answer = told.ask(QUESTION, user_id="alice", tier="none")
    assert [answer.text] == model.generate([QUESTION], max_new_tokens=6) and answer.memories == ()


def test_token_puts_what_a_search_finds_into_the_prompt(told, model):
    answer = told.ask(QUESTION, user_id="alice", tier="token")
    hits = told.search(QUESTION, user_id="alice", limit=2)
    document = f"{hits[1].text} {hits[0].text}"
    assert [answer.text] == model.generate([QUESTION], documents=[document], max_new_tokens=6)
    assert answer.memories == tuple(hit.ref for hit in hits) and answer.prompt_tokens > 10
    assert (answer.tier, answer.reason, answer.user_id) == ("token", "asked for", "alice")


def test_adapter_routes_among_the_memories(told, model):
    answer = told.ask(QUESTION, user_id="alice", tier="adapter")
    adapter = model.internalize(list(FACTS), pass_chunks=16)
    assert [answer.text] == model.generate([QUESTION], adapter, join="route", max_new_tokens=6)
    assert len(answer.memories) == 2 and set(answer.memories) <= set(told.refs) and answer.prompt_tokens == 0


def test_adapters_of_many_memories_are_chosen_among_hits(told, model):
    """Exactly the hits that hold, however the adapters score the others; of few memories no text is read."""
    asker, question = told.asker, MemoryQuestion(QUESTION, Filters("alice"))
    (of_all,) = asker.choose([question])
    told.update(told.refs[0].partition("@")[0], "Jorun Pell taught Fenda Elfax.", valid_at="2026-06-01")
    told.write_adapters()
    asker.search_above, asker.num_adapter_candidates = 2, 1
    for as_of, known_at in (("2026-03-01", None), (None, None), ("2026-07-01", to_text(now()))):
        (found,) = told.search(QUESTION, user_id="alice", limit=1, as_of=as_of, known_at=known_at)
        (choice,) = asker.choose([question._replace(as_of=as_of, known_at=known_at)])
        assert choice.refs == (found.ref,)
        hidden = question._replace(as_of=as_of, known_at=known_at, hidden=frozenset({found.ref}))
        asker.search_above = 1  # one of three is hidden
        assert found.ref not in (refs := asker.choose([hidden])[0].refs) and len(refs) <= 1
        asker.search_above = 2
    texts = ["Quite something else?", QUESTION]
    together = asker.choose([question._replace(text=text) for text in texts])
    for text, choice in zip(texts, together, strict=True):
        hits = told.search(text, user_id="alice", limit=1)
        assert choice.refs == tuple(hit.ref for hit in hits) and (choice.adapter is None) == (not hits)
    asker.search_above = 3
    assert len(asker.choose([question])[0].refs) == len(of_all.refs) == 2


@pytest.mark.parametrize("setting", ["search_above", "num_adapter_candidates"])
def test_impossible_number_of_candidates_is_one_line(tmp_path, setting):
    with pytest.raises(ValueError, match=f"{setting} .*whole number"):
        Memory.open(tmp_path / "memory", **{setting: 0})


def test_gated_adapter_is_that_of_all_memories(tmp_path, model):
    memory = Memory.open(
        tmp_path / "memory", model=model, max_new_tokens=6, join="gate", gate_power=2.0, dtype="float32"
    )
    for fact in FACTS:
        memory.add(fact, user_id="alice")
    memory.write_adapters()
    adapter = model.internalize(list(FACTS), pass_chunks=16)
    expected = model.generate([QUESTION], adapter, join="gate", gate_power=2.0, max_new_tokens=6)
    assert [memory.ask(QUESTION, user_id="alice", tier="adapter").text] == expected
    memory.close()


@pytest.mark.parametrize("tier", ["token", "adapter"])
def test_questions_of_several_users_are_answered_by_their_own(told, tier):
    others = [told.add(f"Somebody else {n} taught Fenda Elfax.", user_id="bob") for n in range(2)]
    told.write_adapters(user_id="bob")
    questions, users = [QUESTION, QUESTION, "Where is Norbach?"], ["alice", "bob", "alice"]
    together = told.ask_many(questions, user_ids=users, tier=tier)
    alone = [told.ask(q, user_id=user, tier=tier) for q, user in zip(questions, users, strict=True)]
    assert [a.text for a in together] == [a.text for a in alone]
    assert [a.memories for a in together] == [a.memories for a in alone]
    assert set(together[1].memories) <= set(map(str, others)) and set(together[0].memories) <= set(told.refs)


def test_user_without_memories_gets_the_base_model(told, model):
    (plain,) = model.generate([QUESTION], max_new_tokens=6)
    for tier in ("token", "adapter", "none"):
        answer = told.ask(QUESTION, user_id="nobody", tier=tier)
        assert (answer.text, answer.memories) == (plain, ())


@pytest.mark.parametrize("tier", ["token", "adapter"])
def test_date_decides_which_version_answers(told, tier):
    told.update(told.refs[0].partition("@")[0], "Jorun Pell taught Fenda Elfax.", valid_at="2026-06-01")
    told.write_adapters()
    identity = told.refs[0].partition("@")[0]
    for date, version in (("2026-03-01", 1), ("2026-07-01", 2)):
        answer = told.ask(QUESTION, user_id="alice", tier=tier, as_of=date)
        assert [ref for ref in answer.memories if ref.startswith(identity)] in ([f"{identity}@{version}"], [])
        assert answer.as_of.startswith(date)
    known = told.ask(QUESTION, user_id="alice", tier=tier, as_of="2026-07-01", known_at="2020-01-01")
    assert known.memories == ()


def test_missing_adapters_are_named_and_leave_the_others(told):
    new = told.add("It is raining.", user_id="alice")
    with pytest.raises(Unwritten, match=f"1 of 4 memories have no adapter .* such as {new}. Write the adapters"):
        told.ask(QUESTION, user_id="alice", tier="adapter")
    assert told.ask(QUESTION, user_id="alice", tier="adapter", as_of="2026-02-01").memories


@pytest.mark.parametrize("tier", ["token", "adapter"])
def test_effect_is_the_difference_without_the_memory(told, model, tmp_path, tier):
    answer = told.ask(QUESTION, user_id="alice", tier=tier)
    effects = told.explain(answer)
    assert [effect.memory for effect in effects] == list(answer.memories)
    for effect in effects:
        assert effect.effect == effect.log_p - effect.log_p_without and effect.text in FACTS
        twin = Memory.open(tmp_path / effect.memory, model=model, max_new_tokens=6, limit=2, dtype="float32")
        for fact in FACTS:
            if fact != effect.text:
                twin.add(fact, user_id="alice", valid_at="2026-01-01")
        twin.write_adapters()
        asked = twin.asker.ask([_question(answer)], tier=tier)[0]
        (expected,) = twin.asker.log_likelihoods([_question(asked)], [answer.text], tier=tier)
        assert effect.log_p_without == pytest.approx(expected, abs=2e-3)
        twin.close()
    assert any(abs(effect.effect) > 1e-3 for effect in effects)


def _question(answer):
    return MemoryQuestion(answer.question, Filters(answer.user_id), answer.as_of)


def test_deleted_memory_cannot_be_explained(told):
    answer = told.ask(QUESTION, user_id="alice", tier="token")
    told.delete(answer.memories[0])
    with pytest.raises(ValueError, match="There is no memory"):
        told.explain(answer)


def test_long_memories_fit_into_the_prompt_or_stay_out(memory):
    page = "Norbach lies by the river and the mill of Norbach is old. " * 12
    for number in range(3):
        memory.add(f"{page} {number}", user_id="alice")
    answer = memory.ask("Where is Norbach?", user_id="alice", tier="token")
    assert len(answer.memories) == 1


def test_memory_beyond_the_prompt_gives_way_to_those_that_fit(told):
    page = "Norbach lies by the river and the mill of Norbach is old. " * 200
    ref = told.add(page, user_id="bob")[0]
    with pytest.raises(
        ValueError, match=rf"^The memory {ref}@1 has \d+ tokens, the prompt has room for \d+. Ask the tier"
    ):
        told.ask("Where is Norbach?", user_id="bob", tier="token")
    told.add("Norbach is by the river.", user_id="bob")
    assert [told.get(m).text for m in told.ask("Where is Norbach?", user_id="bob", tier="token").memories] == [
        "Norbach is by the river."
    ]


# --- Measured tiers -------------------------------------------------------------------------------------------------


def test_measure_keeps_accuracy_and_cost_of_each_tier(told):
    text = told.ask(QUESTION, user_id="alice", tier="adapter").text
    questions = [(QUESTION, text), ("Where is Norbach?", "surely not this")]
    found = {measured.tier: measured for measured in told.measure(user_id="alice", questions=questions)}
    assert found.keys() == {"none", "adapter", "token"} and found["adapter"].accuracy == 0.5
    adapter, token = found["adapter"], found["token"]
    assert (adapter.memories, adapter.questions, adapter.reference) == (3, 2, "given")
    assert adapter.prepare_s > 0 == token.prepare_s and token.question_tokens > 0 == adapter.question_tokens
    assert min(m.question_s for m in found.values()) > 0
    tiers = told.status(user_id="alice")["tiers"]
    assert tiers["adapter"]["accuracy"] == 0.5 and tiers["adapter"]["measured_at"] == adapter.at
    expected = (adapter.prepare_s - 0) / (token.question_s - adapter.question_s)
    assert tiers["adapter"]["break_even"] == (expected if expected > 0 else float("inf"))


def test_questions_are_made_of_keyed_memories(memory, model):
    memory.add("Orla taught Fenda.", user_id="alice", subject="Fenda", relation="teacher")
    memory.add("No key here.", user_id="alice")
    (case,) = memory.asker.made_cases(Filters("alice"))
    assert case.question == "What is the teacher of Fenda?"
    assert list(case.answers) == model.generate([case.question], documents=["Orla taught Fenda."], max_new_tokens=6)
    memory.write_adapters()
    measured = memory.measure(user_id="alice", tiers=["token"])
    assert measured[0].reference == "oracle" and measured[0].oracle == 1.0


def test_nothing_to_measure_with_is_one_line(told):
    with pytest.raises(ValueError, match="There are no questions to measure with"):
        told.measure(user_id="alice")
    with pytest.raises(ValueError, match="is no question with its answer"):
        told.measure(user_id="alice", questions=["Who?"])
    with pytest.raises(ValueError, match="Unknown tier 'weights'"):
        told.measure(user_id="alice", questions=[("a", "b")], tiers=["weights"])


def test_auto_takes_what_was_measured(told):
    assert told.ask(QUESTION, user_id="alice").tier == "token"
    assert "no tier has been measured" in told.ask(QUESTION, user_id="alice").reason
    text = told.ask(QUESTION, user_id="alice", tier="adapter").text
    told.measure(user_id="alice", questions=[(QUESTION, text)], tiers=["adapter"])
    answer = told.ask(QUESTION, user_id="alice", accuracy=1.0)
    assert (answer.tier, answer.text) == ("adapter", text) and "cheapest with at least 1: 1.00 of 1" in answer.reason
    told.add("It is raining.", user_id="alice")  # without an adapter
    assert told.ask(QUESTION, user_id="alice", accuracy=1.0).tier == "token"


# --- Borders --------------------------------------------------------------------------------------------------------


def test_wrong_calls_are_one_line(told, tmp_path, tiny_base_model_folder):
    with pytest.raises(ValueError, match="Unknown tier 'weights': choose one of auto, token"):
        told.ask(QUESTION, tier="weights")
    with pytest.raises(ValueError, match="Got 1 user_ids for 2 questions"):
        told.ask_many(["a", "b"], user_ids=["alice"])
    with pytest.raises(ValueError, match="user_id is ' '"):
        told.ask(QUESTION, user_id=" ")
    for model, says in ((None, "Answers need a checkpoint"), (tiny_base_model_folder, "without a hypernetwork")):
        memory = Memory.open(tmp_path / str(model is None), model=model)
        with pytest.raises(ValueError, match=says):
            memory.ask(QUESTION)
        memory.close()


def test_model_is_loaded_when_it_is_first_needed(tmp_path):
    memory = Memory.open(tmp_path / "memory", model="assets/tiny")
    memory.add("one.", user_id="alice")
    assert memory.list() and memory.bank.model.__dict__.keys() == {"source", "_given"}
    assert memory.ask("One?", user_id="alice", tier="none").tier == "none"
    assert memory.bank.model.__dict__["_checkpoint"] is not None
    memory.close()
