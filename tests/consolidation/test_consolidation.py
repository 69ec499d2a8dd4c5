"""A memory's third tier with a random tiny model: planned, judged, made live, handed over, forgotten, slept, killed."""

import os
import signal
import time

import pytest
import torch

from hypernet.consolidation.cadence import EveryN
from hypernet.consolidation.consolidation import Consolidation
from hypernet.consolidation.consolidator import Consolidator
from hypernet.consolidation.gate import AlwaysYes, Asked, Check, GateReport, PromotionGate, _read
from hypernet.consolidation.moves import LowRank
from hypernet.consolidation.rehearsal import NoRehearsal
from hypernet.consolidation.sleep import Sleep
from hypernet.memory.memory import Memory
from hypernet.memory.store.records import Filters
from hypernet.memory.weights.versions import BASE, GateRefused

ALICE, BOB = Filters(user_id="alice"), Filters(user_id="bob")
FACTS = (("Fenda", "teacher", "Orla Wint taught Fenda."), ("Norbach", "river", "Norbach lies on the Palno."))


class Strict(PromotionGate):
    """Refuses everything, as a real gate would a model that has learned nothing."""

    def __init__(self):
        super().__init__(min_recall=2.0)


def consolidation_of(memory, **changes):
    settings = {"moves": LowRank(rank=2, target_modules=["down_proj"]), "rehearsal": NoRehearsal()}
    consolidator = Consolidator(**settings, **{"steps": 2, "batch_size": 4, "checkpoint_steps": 1})
    return Consolidation(
        memory, **{"consolidator": consolidator, "gate": AlwaysYes(), "background": ["Why?"], **changes}
    )


@pytest.fixture
def memory(tmp_path, make_doc_to_lora):
    memory = Memory.open(tmp_path / "memory", model=make_doc_to_lora(bias_block=False), max_new_tokens=4)
    memory.refs = [
        str(memory.add(text, user_id="alice", subject=subject, relation=relation)) for subject, relation, text in FACTS
    ]
    yield memory
    memory.close()


@pytest.mark.parametrize("anew", [True, False])
def test_later_version_is_trained_anew_or_on_top(memory, anew):
    """Anew it is what one night with all memories makes, to the bit; on top it is not."""
    own = consolidation_of(memory, anew=anew)
    first = own.consolidate(ALICE)
    own.promote(first.name, ALICE)
    memory.add("Vell is a miller.", user_id="alice", subject="Vell", relation="profession")
    second = own.consolidate(ALICE)
    assert second.manifest.parent == first.name and second.manifest.recipe["anew"] is anew
    own.rollback("base", ALICE)
    alone = own.consolidate(ALICE, retry=True)
    assert alone.manifest.parent is None and alone.manifest.contains == second.manifest.contains
    tensors = [own._weights(version).tensors for version in (second, alone)]
    assert all(torch.equal(tensors[0][name], tensor) for name, tensor in tensors[1].items()) is anew


def test_candidate_is_never_live_by_itself(memory):
    own = consolidation_of(memory)
    candidate = own.consolidate(ALICE)
    assert own.live(ALICE) is None and candidate.passed and set(candidate.manifest.contains) == set(memory.refs)
    assert own.consolidate(ALICE).name == candidate.name and len(own.versions(ALICE).all()) == 1  # not done again
    own.promote(candidate.name, ALICE)
    assert own.live(ALICE).name == candidate.name and own.live(BOB) is None and own.live(Filters()) is None
    with pytest.raises(ValueError, match="Nothing waits to be consolidated"):
        own.consolidate(ALICE)


def test_refused_candidate_is_kept_but_not_promoted(memory):
    own = consolidation_of(memory, gate=Strict())
    candidate = own.consolidate(ALICE)
    assert [line for line in candidate.gate["failed"] if line.startswith("recall ") and line.endswith(" < 2")]
    with pytest.raises(GateRefused):
        own.promote(candidate.name, ALICE)
    assert own.live(ALICE) is None and own.waiting(ALICE) == [] and len(own.waiting(ALICE, retry=True)) == 2
    own.promote(candidate.name, ALICE, force=True)
    assert own.live(ALICE).name == candidate.name and own.versions(ALICE).promotions()[0]["forced"]


def test_rollback_answers_as_before_to_the_bit(memory):
    own = consolidation_of(memory)
    plain = {name: tensor.clone() for name, tensor in own.model.base_model.state_dict().items()}
    before = [answer.text for answer in own.ask(["Who taught Fenda?"], ALICE)]
    own.promote(own.consolidate(ALICE).name, ALICE)
    own.ask(["Who taught Fenda?"], ALICE)
    own.rollback(BASE, ALICE)
    assert [answer.text for answer in own.ask(["Who taught Fenda?"], ALICE)] == before
    assert all(torch.equal(plain[name], tensor) for name, tensor in own.model.base_model.state_dict().items())


def test_what_was_rolled_back_stays_held_back(memory):
    own = consolidation_of(memory)
    first = own.consolidate(ALICE)
    own.promote(first.name, ALICE)
    added = str(memory.add("Vell is a miller.", user_id="alice", subject="Vell", relation="profession"))
    second = own.consolidate(ALICE)
    own.promote(second.name, ALICE)
    own.rollback(first.name, ALICE)
    assert own.waiting(ALICE) == [] and [m.ref for m in own.waiting(ALICE, retry=True)] == [added]
    own.rollback(BASE, ALICE)
    assert not Sleep(own).run(ALICE, at_once=True).slept and own.live(ALICE) is None
    assert own.forget(added, ALICE).version == BASE and own.live(ALICE) is None
    assert own.consolidate(ALICE, retry=True).name == first.name
    own.promote(first.name, ALICE)
    assert own.live(ALICE).name == first.name and own.versions(ALICE).rolled_back() == {added}


def test_memory_leaves_its_adapter_only_when_weights_answer(memory, monkeypatch):
    own = consolidation_of(memory)
    memory.write_adapters(user_id="alice")
    own.promote(own.consolidate(ALICE).name, ALICE)
    answers = {"What is the teacher of Fenda?": "Orla", "What is the river of Norbach?": "Palno"}
    wrong = {"What is the river of Norbach?"}
    live = own._weights(own.live(ALICE))

    def generate(questions, adapters=None, *, documents=None, **settings):
        inside = own.model.base_model.get_parameter(next(iter(live.tensors))).data_ptr()
        is_student = inside == next(iter(live.tensors.values())).data_ptr()
        assert is_student == (not any(documents or ()))
        return ["other" if is_student and text in wrong else answers[text] for text in questions]

    monkeypatch.setattr(own.model, "generate", generate)
    assert own.hand_over(ALICE) == own.handed_over(ALICE) == memory.refs[:1]
    monkeypatch.undo()
    (answer,) = own.ask(["Where?"], ALICE, tier="weights+adapter")
    assert answer.memories == (memory.refs[1],)  # the first one's adapter is not among them
    assert own.ask(["Where?"], ALICE)[0].memories == ()


def test_forgotten_memory_is_rebuilt_without(memory):
    own = consolidation_of(memory)
    with_both = own.consolidate(ALICE)
    own.promote(with_both.name, ALICE)
    rebuilt = own.forget(memory.refs[0], ALICE)
    assert rebuilt.gone == (with_both.name,) and rebuilt.seconds > 0
    live = own.live(ALICE)
    assert live.name == rebuilt.version and live.manifest.contains == (memory.refs[1],) and live.manifest.parent is None
    assert [check["name"] for check in live.gate["checks"]].count("absent") == 1
    memory.purge()
    assert not with_both.folder.exists() and own.live(ALICE).name == live.name


def test_version_with_a_corrected_memory_answers_nothing(memory):
    own = consolidation_of(memory)
    own.promote(own.consolidate(ALICE).name, ALICE)
    memory.update(memory.refs[0].split("@")[0], "Jorun Pell taught Fenda.")
    assert own.live(ALICE) is None and len(own.waiting(ALICE)) == 2


def test_sleep_waits_until_it_is_due_and_then_does_it_all(memory):
    own = consolidation_of(memory)
    assert Sleep(own, cadence=EveryN(memories=3)).run(ALICE).reason == "not due: 2 wait"
    night = Sleep(own, cadence=EveryN(memories=2)).run(ALICE)
    assert night.slept and night.promoted and own.live(ALICE).name == night.version and night.waiting == 2
    assert memory.status(user_id="alice")["tiers"]["adapter"]["missing"] == 0
    assert Sleep(own, cadence=EveryN(memories=1)).run(ALICE).reason == "nothing waits"
    assert Sleep(consolidation_of(memory, gate=Strict())).run(BOB).reason == "nothing waits"


def test_refused_night_changes_nothing_and_is_not_tried_again(memory):
    own = consolidation_of(memory)
    Sleep(own).run(ALICE, at_once=True)
    live, digest = own.live(ALICE), own.versions(ALICE).check(own.live(ALICE))
    memory.add("Zzk vvv qpx.", user_id="alice")  # nothing can ask about it
    own.gate = PromotionGate(min_recall=0, min_gain=-1, min_kept=0, min_background=0, max_kl=1e9)
    memory.add("Tolmar lies on the Vess.", user_id="alice", subject="Tolmar", relation="river")
    night = Sleep(own).run(ALICE, at_once=True)
    assert night.reason == "refused: asked 0.5 < 1" and not night.promoted
    assert own.live(ALICE) == live and own.versions(ALICE).check(live) == digest
    assert Sleep(own).run(ALICE, at_once=True).reason == "nothing waits"
    memory.add("Dronau lies on the Ilm.", user_id="alice", subject="Dronau", relation="river")
    assert Sleep(own).run(ALICE, at_once=True).promoted and len(own.live(ALICE).manifest.contains) == 3


def test_gate_leaves_out_what_the_base_model_did_not_read(memory, monkeypatch):
    def answers(model, asked, *, with_documents):
        return ["Orla" if with_documents and "teacher" in one.question else "unknown" for one in asked]

    monkeypatch.setattr("hypernet.consolidation.gate._answers", answers)
    teacher, river = Asked("the teacher?", "Orla Wint taught Fenda."), Asked("the river?", "Norbach lies on the Palno.")
    corrected = river._replace(answer="Palno")
    model = consolidation_of(memory).model
    assert _read(model, [river, teacher]) == [teacher._replace(answer="Orla")]
    assert _read(model, [river]) == [river._replace(answer="unknown")]  # all: nothing else is left to ask
    assert _read(model, [corrected, river, teacher])[:1] == [corrected]


def test_gate_says_what_failed():
    checks = (
        Check("recall", 0.5, 0.8, True, 4),
        Check("locality", 2.0, 1.0, False, 1),
        Check("kept", 0.8, 0.8, True, 4),
    )
    report = GateReport(checks)
    assert (
        report.failed == ("recall 0.5 < 0.8", "locality 2 > 1")
        and not report.passed
        and str(checks[2]) == "kept 0.8 >= 0.8"
    )


def test_settings_that_cannot_be_are_refused(memory):
    with pytest.raises(ValueError, match="start is 'warm'. Versions start from adapters or nothing"):
        consolidation_of(memory, start="warm")
    with pytest.raises(ValueError, match="Unknown tier 'none'"):
        consolidation_of(memory).ask(["Why?"], ALICE, tier="none")


def test_warm_start_names_the_generator(memory):
    own = consolidation_of(memory, start="adapters")
    assert own.consolidate(ALICE).manifest.generator == memory.bank.generator
    assert consolidation_of(memory).planned(ALICE)[0].generator is None


@pytest.mark.parametrize("left", [0, 1])  # steps; before the last one there still is a checkpoint to be written
def test_memory_purged_while_it_is_trained_on_makes_no_version(memory, left):
    own = consolidation_of(memory)

    def purge(done, total):
        if done == total - left:
            memory.delete(memory.refs[0])
            memory.purge()

    with pytest.raises(ValueError, match="was purged while it was trained on. Consolidate again"):
        own.consolidate(ALICE, progress=purge)
    assert own.versions(ALICE).all() == [] and not list(own.versions(ALICE).folder.glob(".*/*"))
    assert own.consolidate(ALICE).manifest.contains == (memory.refs[1],)


def sleep_in_child(memory):
    """The child's process id, once it sleeps; it has a memory of its own on the same folder."""
    model, (reads, writes) = memory.bank.model.doc_to_lora(), os.pipe()
    if child := os.fork():
        os.close(writes)
        assert os.read(reads, 1) == b"b"
        os.close(reads)
        return child
    try:
        torch.set_num_threads(1)  # OpenMP's threads are not there after a fork
        own = consolidation_of(Memory.open(memory.store.folder, model=model, max_new_tokens=4))
        os.write(writes, b"b")
        Sleep(own).run(ALICE, at_once=True)
    finally:
        os._exit(0)


def test_killed_sleep_goes_on_to_the_same_version(memory):
    for delay in (0.1, 0.6):
        child = sleep_in_child(memory)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    own = consolidation_of(memory)
    Sleep(own).run(ALICE, at_once=True)
    (version,) = own.versions(ALICE).all()
    assert own.live(ALICE).name == version.name and own.versions(ALICE).check(version)
    assert not list(own.versions(ALICE).folder.glob(".unfinished-*"))
