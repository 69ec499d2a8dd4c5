"""Principles by hand: counted, de-duplicated, scored; a run's deletion leaves what a memory without it would have."""

import pytest

from hypernet.memory.memory import Memory
from hypernet.memory.retriever import Retriever
from hypernet.memory.store.records import Filters
from hypernet.memory.use.principles import Principle, Principles, Trajectory, Try, distilled
from hypernet.memory.use.utilities import Utilities

AGENT = Filters(agent_id="agent")
RIGHT, WRONG = Try("Corbaford", "key", "tin spoons", True), Try("Corbaford", "key", "brass bells", False)
OTHER = Try("Palno", "key", "brass bells", True)


def run(*tries: Try) -> Trajectory:
    text = " ".join(f"{one.action} at {one.subject}: {'open' if one.succeeded else 'shut'}." for one in tries)
    return Trajectory(text, tries, sum(one.succeeded for one in tries) / len(tries))


def shown(memories) -> list:
    return [(one.text, one.metadata) for one in sorted(memories, key=lambda one: one.text)]


def test_principles_are_counted_and_scored_by_hand():
    failed = RIGHT._replace(succeeded=False)
    again = RIGHT._replace(subject=" corbaford ", action="Tin  spoons")  # the same but for case and blanks
    assert distilled([RIGHT, WRONG, again, failed, OTHER]) == [
        Principle("Corbaford", "key", "tin spoons", uses=3, successes=2),
        Principle("Palno", "key", "brass bells", uses=1, successes=1),
    ]
    assert Principle("Corbaford", "key", "tin spoons", 3, 2).score == 3 / 5
    assert Principle("Corbaford", "key", "tin spoons", 3, 2).text == "The key of Corbaford is tin spoons."
    assert distilled([WRONG]) == [] == distilled([RIGHT, failed])  # scores 1/3 and 1/2
    assert [one.uses for one in distilled([RIGHT, failed], least=0.4)] == [2]


def test_best_action_becomes_the_principle():
    lucky = WRONG._replace(succeeded=True)
    assert distilled([lucky, RIGHT, RIGHT])[0].action == "tin spoons"  # 2/3 and 3/4
    assert distilled([lucky, WRONG, WRONG, RIGHT])[0].action == "tin spoons"


def test_distilled_principles_are_found_and_runs_are_not(store):
    principles = Principles(store)
    for trajectory in (run(RIGHT, OTHER), run(WRONG)):
        principles.record(trajectory, AGENT)
    made = principles.distill(AGENT)
    hits = Retriever(store).search("What is the key of Corbaford?", principles.where(AGENT))
    assert [hit.text for hit in hits][0] == "The key of Corbaford is tin spoons."
    assert {hit.ref for hit in hits} <= {one.ref for one in made}
    assert shown(made) == [
        ("The key of Corbaford is tin spoons.", {"uses": 1, "successes": 1, "runs": 2}),
        ("The key of Palno is brass bells.", {"uses": 1, "successes": 1, "runs": 1}),
    ]
    batch = store.versions()[-1]
    assert principles.distill(AGENT) == made and store.versions()[-1] == batch  # nothing was written


def test_deleted_run_leaves_what_was_never_told(new_store):
    told, twin = new_store("told"), new_store("twin")
    refs = [Principles(told).record(one, AGENT) for one in (run(RIGHT, OTHER), run(WRONG, RIGHT))]
    Principles(told).distill(AGENT)
    refs.append(Principles(told).record(run(RIGHT), AGENT))
    made = Principles(told).distill(AGENT)
    learned = Utilities(told)
    learned.credit([one.ref for one in made], 1.0)
    told.delete(refs[0].id)
    # At once: what the run was a part of is gone, with its utilities; then it is made anew of the others.
    assert Principles(told).stored(AGENT) == [] and learned.of() == {}
    for one in (run(WRONG, RIGHT), run(RIGHT)):
        Principles(twin).record(one, AGENT)
    anew = Principles(told).distill(AGENT)
    assert shown(anew) == shown(Principles(twin).distill(AGENT))
    assert shown(anew) == [("The key of Corbaford is tin spoons.", {"uses": 2, "successes": 2, "runs": 2})]
    assert learned.get(anew[0].ref).outcomes == 0
    for ref in refs[1:]:
        told.delete(ref.id)
    assert Principles(told).distill(AGENT) == []
    told.purge()
    assert told.verify() == ((), ()) and told.counts()["versions"] == told.counts()["deleted"] == 0


def test_principle_that_runs_contradict_is_withdrawn(store):
    principles = Principles(store)
    principles.record(run(RIGHT), AGENT)
    assert len(principles.distill(AGENT)) == 1
    for _ in range(2):
        principles.record(run(RIGHT._replace(succeeded=False)), AGENT)
    assert principles.distill(AGENT) == []  # 1 of 3: score 2/5


@pytest.mark.parametrize("verb", ["delete", "forget"])
def test_adapters_of_principles_go_with_a_run(tmp_path, verb):
    memory = Memory.open(tmp_path / "memory", model="assets/tiny")
    principles = Principles(memory.store)
    first, _ = (principles.record(run(one), AGENT) for one in (RIGHT, OTHER))
    made = principles.distill(AGENT)
    memory.write_adapters(agent_id="agent", run_id="principles")
    where = principles.where(AGENT)
    assert set(memory.bank.held(where).refs) == {one.ref for one in made}
    getattr(memory, verb)(first.id)
    (left,) = (one.ref for one in made if one.subject == "Palno")
    if verb == "delete":
        memory.write_adapters(agent_id="agent", run_id="principles")
    assert list(memory.bank.held(where).refs) == [left]
    memory.purge()
    assert b"Corbaford" not in b"".join(path.read_bytes() for path in memory.store.folder.rglob("*") if path.is_file())
