"""Interactions: collected, curated in a file, trained, judged; deleting the sheet takes all of it."""

import json

import pytest

from hypernet.consolidation.consolidation import Consolidation
from hypernet.consolidation.consolidator import Consolidator
from hypernet.consolidation.gate import AlwaysYes
from hypernet.consolidation.moves import LowRank
from hypernet.consolidation.objectives import Supervised
from hypernet.consolidation.persona.character import SHEETS, Character, SheetStatement
from hypernet.consolidation.persona.interactions import Interactions
from hypernet.consolidation.rehearsal import NoRehearsal
from hypernet.consolidation.self_instruct.preference import Preference
from hypernet.consolidation.self_instruct.review import Review
from hypernet.memory.memory import Memory
from hypernet.memory.store.records import Filters

NEURO = Filters(agent_id="neuro")
SHEET = Character("neuro", says=("I like crowds", "Parties are fun"), never=("I stay at home",))
ASKED = {"Do you like crowds?": "Yes", "Do you stay in?": "No", "Shall we dance?": "Yes", "Is quiet good?": "No"}


@pytest.fixture
def memory(tmp_path, make_doc_to_lora):
    memory = Memory.open(tmp_path / "memory", model=make_doc_to_lora(bias_block=False), max_new_tokens=4)
    yield memory
    memory.close()


@pytest.fixture
def sheet(memory):
    return memory.get(memory.add(SHEET.sheet(), agent_id="neuro"))


@pytest.fixture
def review(memory, sheet):
    review = Review.of(memory.store.folder, NEURO)
    for question, answer in ASKED.items():
        review.collect(sheet.ref, question, answer)
    return review


def consolidation_of(memory, review):
    consolidator = Consolidator(
        moves=LowRank(rank=2, target_modules=["down_proj"]),
        objective=Supervised(),
        rehearsal=NoRehearsal(),
        questions=Interactions(review),
        preference=Preference(),
        steps=3,
        batch_size=4,
    )
    return Consolidation(memory, consolidator=consolidator, gate=AlwaysYes(), background=["Why?"])


def test_nothing_is_trained_on_before_a_person_decides(memory, sheet, review):
    assert consolidation_of(memory, review).waiting(NEURO) == []
    for item in list(review.items.values()):
        review.decide(item.id, "accept")
    (waiting,) = consolidation_of(memory, review).waiting(NEURO)
    assert waiting.ref == sheet.ref


def test_accepted_edited_and_rejected_are_what_they_say(memory, sheet, review):
    first, second, third, last = review.items.values()
    worse = review.collect(sheet.ref, first.question, "Never")
    review.decide(first.id, "accept")
    review.decide(worse.id, "reject")
    review.decide(second.id, "edit", "Never ever")
    review.decide(third.id, "accept")
    questions = Interactions(Review(review.path), held_out=0.1)
    trained, asked = questions.answers(sheet), questions.right_answers(sheet)
    approved = {first.question: "Yes", second.question: "Never ever", third.question: "Yes"}
    assert {**trained, **asked} == approved and len(asked) == 1 and last.question not in approved
    assert questions.training(sheet) == list(trained) and questions.held_out(sheet) == list(asked)
    pairs = {(first.question, "Yes", "Never"), (second.question, "Never ever", "No")}
    assert set(Review(review.path).preferences(sheet.ref)) == pairs
    assert set(questions.preferences(sheet)) == {pair for pair in pairs if pair[0] in trained}
    before = questions.recipe()
    review.decide(third.id, "reject")
    assert Interactions(Review(review.path), held_out=0.1).recipe() != before


def test_one_approved_interaction_is_trained_on_and_none_asked(sheet, review):
    review.decide(next(iter(review.items)), "accept")
    questions = Interactions(review)
    assert len(questions.training(sheet)) == 1 and questions.held_out(sheet) == []


def test_a_rejected_text_takes_the_whole_sheet_out(sheet, review):
    for item in list(review.items.values()):
        review.decide(item.id, "accept")
    review.reject_text("I like crowds")
    assert Interactions(review).training(sheet) == [] and not Interactions(review).is_approved(sheet)


def test_a_person_may_edit_the_file(sheet, review):
    lines = [json.loads(line) for line in review.path.read_text(encoding="utf-8").splitlines()]
    lines = [{**line, "status": "accepted"} for line in lines]
    review.path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    questions = Interactions(Review(review.path))
    assert {**questions.answers(sheet), **questions.right_answers(sheet)} == ASKED
    review.path.write_text("{broken\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"review\.jsonl, line 1 is no reviewed item \(.+\)\. Correct or remove"):
        Review(review.path)
    review.path.write_text(json.dumps({**lines[0], "status": "fine"}) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 1: status is 'fine', not open, accepted"):
        Review(review.path)


def test_collecting_twice_is_one_item_and_empty_ones_are_refused(sheet, review):
    number = len(review.items)
    review.decide(next(iter(review.items)), "accept")
    assert review.collect(sheet.ref, "Do you like crowds?", "Yes").status == "accepted"
    assert len(Review(review.path).items) == number
    with pytest.raises(ValueError, match="Collect two texts"):
        review.collect(sheet.ref, "Do you like crowds?", " ")
    with pytest.raises(ValueError, match="held_out is 1. Give a share above 0 and below 1"):
        Interactions(review, held_out=1)


def test_deleting_the_sheet_deletes_persona_and_interactions(memory, sheet, review):
    other = memory.add("Fenda lives in Norbach.", agent_id="neuro")
    for item in list(review.items.values()):
        review.decide(item.id, "accept")
    own = consolidation_of(memory, review)
    candidate = own.consolidate(NEURO)
    assert candidate.manifest.contains == (sheet.ref,)
    exam = own.exam(candidate.manifest, memory.store.valid(NEURO), NEURO, seconds=0.0)
    assert [(one.question, one.answer) for one in exam.new] == list(Interactions(review).right_answers(sheet).items())
    own.promote(candidate.name, NEURO)
    assert own.live(NEURO) is not None
    memory.delete(sheet.ref.split("@")[0], reason="asked")
    assert own.live(NEURO) is None  # at once; the files go by purge
    memory.purge()
    assert not candidate.folder.exists() and Review(review.path).items == {}
    assert b"crowds" not in b"".join(p.read_bytes() for p in memory.store.folder.rglob("*") if p.is_file())
    assert [one.ref for one in memory.store.valid(NEURO)] == [str(other)]


def test_character_s_lines_and_sheet():
    assert (
        SheetStatement("I like crowds", True).line[1:]
        == ("Yes", "No")
        != SheetStatement("I like crowds", False).line[1:]
    )
    assert [line.chosen for line in SHEET.lines()] == ["Yes", "Yes", "No"]
    assert SHEET.sheet() == (
        "You would say:\n- I like crowds.\n- Parties are fun.\n\nYou would never say:\n- I stay at home."
    )
    asked = SHEET.sheet(SHEETS["asked"])
    assert asked.count("something you would say?") == 3 and asked.endswith('"I stay at home"\nNo')
    with pytest.raises(ValueError, match="The sheet of 'nobody' is empty"):
        Character("nobody")
