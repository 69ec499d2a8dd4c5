"""Self-instruct with a random tiny model: what a person rejected is trained on nowhere, nothing without approval."""

import numpy as np
import pytest
import torch

from hypernet.consolidation.consolidation import Consolidation
from hypernet.consolidation.consolidator import Consolidator, Lesson, _log_p, _rows
from hypernet.consolidation.gate import AlwaysYes
from hypernet.consolidation.moves import LowRank
from hypernet.consolidation.objectives import Supervised
from hypernet.consolidation.questions import Templates
from hypernet.consolidation.rehearsal import NoRehearsal
from hypernet.consolidation.self_instruct.preference import Preference
from hypernet.consolidation.self_instruct.review import Review, Reviewed
from hypernet.memory.memory import Memory
from hypernet.memory.store.records import Filters

ALICE = Filters(user_id="alice")
FACTS = (("Fenda", "teacher", "Orla Wint taught Fenda."), ("Norbach", "river", "Norbach lies on the Palno."))


@pytest.fixture
def memory(tmp_path, make_doc_to_lora):
    memory = Memory.open(tmp_path / "memory", model=make_doc_to_lora(bias_block=False), max_new_tokens=4)
    memory.refs = [
        str(memory.add(text, user_id="alice", subject=subject, relation=relation)) for subject, relation, text in FACTS
    ]
    yield memory
    memory.close()


@pytest.fixture
def review(memory):
    found = Review.of(memory.store.folder, ALICE)
    made = found.draft(memory.bank.model.doc_to_lora(), memory.store.valid(ALICE), Templates())
    assert len(made) == 10 and {item.memory for item in made} == set(memory.refs)
    return found


def consolidation_of(memory, review, **changes):
    consolidator = Consolidator(
        moves=LowRank(rank=2, target_modules=["down_proj"]),
        objective=Supervised(),
        rehearsal=NoRehearsal(),
        questions=Reviewed(Templates(), review, **changes),
        preference=Preference(),
        steps=3,
        batch_size=4,
    )
    return Consolidation(memory, consolidator=consolidator, gate=AlwaysYes(), background=["Why?"])


def test_nothing_is_made_without_approval(memory, review):
    own = consolidation_of(memory, review)
    with pytest.raises(ValueError, match="or is not approved"):
        own.consolidate(ALICE)
    assert own.versions(ALICE).all() == [] and own.waiting(ALICE) == []
    assert len(consolidation_of(memory, review, require_approval=False).waiting(ALICE)) == 2


def test_what_was_rejected_is_trained_on_nowhere(memory, review):
    first, second, *others = (item.id for item in review.items.values() if item.memory == memory.refs[0])
    review.decide(first, "edit", "Jorun")
    review.decide(second, "reject")
    for key in others:
        review.decide(key, "accept")
    for item in [item for item in review.items.values() if item.memory == memory.refs[1]]:
        review.decide(item.id, "accept")
    review.reject_text("norbach")
    own = consolidation_of(memory, Review(review.path))
    lessons = own.consolidator.lessons(own.model, memory.store.valid(ALICE))
    asked = {lesson.question: lesson.answer for lesson in lessons}
    assert asked[review.items[first].question] == "Jorun" and review.items[second].question not in asked
    assert len(asked) == 4 and not any("norbach" in question.casefold() for question in asked)
    candidate = own.consolidate(ALICE)
    assert candidate.manifest.contains == (memory.refs[0],)
    again = Review(review.path)
    again.decide(others[0], "reject")
    assert consolidation_of(memory, again).planned(ALICE)[0].key != candidate.manifest.key
    again.reject_text("ORLA WINT")  # stands in the memory alone
    assert consolidation_of(memory, again).waiting(ALICE) == []


def test_gate_asks_for_what_a_person_corrected(memory, review):
    for item in review.items.values():
        review.decide(item.id, "edit", "Jorun")
    own = consolidation_of(memory, review)
    first = own.consolidate(ALICE)
    exam = own.exam(first.manifest, memory.store.valid(ALICE), ALICE, seconds=0.0)
    assert {one.answer for one in exam.new} == {"Jorun"}
    other = next(iter(review.items.values()))
    review.decide(other.id, "edit", "Olwin")  # of one memory two answers, so that nobody knows which one is meant
    exam = own.exam(first.manifest, memory.store.valid(ALICE), ALICE, seconds=0.0)
    assert [one.answer for one in exam.new] == [None, "Jorun"]
    memory.delete(memory.refs[1])
    exam = own.exam(first.manifest, memory.store.valid(ALICE), ALICE, seconds=0.0)
    assert [one.answer for one in exam.deleted] == ["Jorun"]


def test_file_survives_and_forgets_what_is_purged(memory, review):
    key = next(iter(review.items))
    review.decide(key, "accept")
    assert Review(review.path).items == review.items and review.items[key].status == "accepted"
    memory.delete(memory.refs[0].split("@")[0], reason="asked")
    memory.purge()
    assert {item.memory for item in Review(review.path).items.values()} == {memory.refs[1]}
    assert b"Fenda" not in review.path.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("q-0", "accept"), "There is no item 'q-0'"),
        ((None, "keep"), "'keep' is no decision: choose one of accept, reject, edit"),
        ((None, "edit"), "An edit needs an answer"),
    ],
)
def test_decisions_that_cannot_be_are_refused(review, arguments, message):
    with pytest.raises(ValueError, match=message):
        review.decide(arguments[0] or next(iter(review.items)), arguments[1])


@pytest.mark.parametrize("line", [b"{}", b'{"reject": "caf\xe9"}'])
def test_damaged_line_is_named(review, line):
    review.path.write_bytes(b'{"reject": "Orla"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"review.jsonl, line 2 is no reviewed item"):
        Review(review.path)


def test_preference_is_dpo_in_float64():
    rng = np.random.default_rng(3)
    values = rng.normal(size=(4, 7)) * 5
    margins = (values[0] - values[2]) - (values[1] - values[3])
    expected = np.log1p(np.exp(-0.3 * margins)).mean()
    found = Preference(beta=0.3)(*torch.tensor(values, dtype=torch.float64))
    assert found.item() == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="beta is 0"):
        Preference(beta=0)


def test_log_p_of_pairs_is_that_of_whole_answers(make_doc_to_lora):
    from hypernet.consolidation.consolidator import _forward

    model = make_doc_to_lora(bias_block=False)
    answers = ["Orla", "Jorun Pell", "Palno", "the Vess"]
    questions = ["Who?", "Who?", "Where does it lie?", "Where does it lie?"]
    rows = _rows(model, [Lesson(q, None, a) for q, a in zip(questions, answers, strict=True)], with_documents=False)
    chosen, rejected = _log_p(_forward(model, {}, rows, False).logits, rows)
    expected = model.log_likelihoods(questions, answers)
    assert torch.allclose(chosen, torch.tensor(expected[::2]), atol=1e-4)
    assert torch.allclose(rejected, torch.tensor(expected[1::2]), atol=1e-4)


def test_preference_prefers_a_person_s_answer(memory, review):
    model = memory.bank.model.doc_to_lora()
    item = next(iter(review.items.values()))
    review.decide(item.id, "edit", "Jorun")
    own = consolidation_of(memory, review)
    own.consolidator.steps, own.consolidator.lr = 15, 3e-2
    from hypernet.consolidation.weights import installed

    margins = []
    for preference in (None, Preference(beta=2.0, weight=4.0)):
        own.consolidator.preference = preference
        trained = own.consolidator.train(model, memory.store.valid(ALICE)[:1])
        with installed(model.base_model, trained.weights.tensors):
            better, worse = model.log_likelihoods([item.question] * 2, ["Jorun", item.answer])
        margins.append(better - worse)
    assert margins[1] > margins[0]
