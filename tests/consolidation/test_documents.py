"""Documents into memories that can be asked about, with a random tiny model, and evidence against a count by hand."""

import math
import os

import pytest

from hypernet.consolidation.consolidation import Consolidation
from hypernet.consolidation.consolidator import Consolidator
from hypernet.consolidation.documents import Evidence, add_documents, written_questions
from hypernet.consolidation.gate import AlwaysYes
from hypernet.consolidation.moves import LowRank
from hypernet.consolidation.questions import HELD_OUT, TRAINING, Templates
from hypernet.consolidation.rehearsal import NoRehearsal, OtherSubjects
from hypernet.memory.memory import Memory
from hypernet.memory.store.records import Filters

ALICE = Filters(user_id="alice")
# Of four sentences two can be asked for.
NOTES = (
    "The teacher of Fenda Elfax is Orla Wint. It rained. Fenda was born in Korvale. Norbach's river was the Palno.\n"
)


@pytest.fixture
def memory(tmp_path, make_doc_to_lora):
    model = make_doc_to_lora(bias_block=False)
    model.max_chunk_tokens = 128  # of a passage
    memory = Memory.open(tmp_path / "memory", model=model, max_new_tokens=4)
    yield memory
    memory.close()


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "notes"
    (folder / "old").mkdir(parents=True)
    (folder / "fenda.md").write_text(NOTES)
    (folder / "old" / "tolmar.txt").write_text("The mayor of Tolmar was Jorun Pell.")
    return folder


def consolidation_of(memory, **settings):
    settings = {"moves": LowRank(rank=2, target_modules=["down_proj"]), "rehearsal": NoRehearsal(), **settings}
    consolidator = Consolidator(**settings, steps=2, batch_size=4)
    return Consolidation(memory, consolidator=consolidator, gate=AlwaysYes(), background=["Why?"])


def filled(templates, *keys):
    return [text.format(subject=subject, relation=relation) for subject, relation in keys for text in templates]


def test_folder_becomes_weights_asked_in_held_out_wordings(memory, folder):
    own = consolidation_of(memory)
    candidate = own.consolidate(ALICE, documents=folder)
    fenda, tolmar = memory.list(user_id="alice")
    assert fenda.text == NOTES.strip() and fenda.source == str(folder / "fenda.md") and fenda.subject is None
    assert set(candidate.manifest.contains) == {fenda.ref, tolmar.ref}
    keys = [("Fenda Elfax", "teacher"), ("Norbach", "river"), ("Tolmar", "mayor")]
    lessons = own.consolidator.lessons(own.model, [fenda, tolmar])
    asked = filled(TRAINING, *keys)
    assert {lesson.question for lesson in lessons} <= set(asked) and {lesson.document for lesson in lessons} <= {
        fenda.text,
        tolmar.text,
    }
    exam = own.exam(candidate.manifest, [fenda, tolmar], ALICE, seconds=0.0)
    assert [one.question for one in exam.new] == filled(HELD_OUT, *keys) and exam.unasked == []
    assert not {one.question for one in exam.new} & set(asked)
    assert memory.list(user_id="bob") == ()


def test_documents_are_read_again_without_doubles(memory, folder):
    model = memory.bank.model.doc_to_lora()
    other = memory.add("I moved.", user_id="alice", source=str(folder / "fenda.md"))
    assert len(add_documents(memory, model, folder, ALICE)) == 2 and add_documents(memory, model, folder, ALICE) == []
    assert add_documents(memory, model, folder / "fenda.md", ALICE) == []
    (folder / "fenda.md").write_text("The teacher of Fenda Elfax is Jorun Pell.")
    assert len(add_documents(memory, model, folder, ALICE)) == 1
    texts = {one.text for one in memory.list(user_id="alice")}
    assert texts == {
        "I moved.",
        "The teacher of Fenda Elfax is Jorun Pell.",
        "The mayor of Tolmar was Jorun Pell.",
    }
    assert memory.get(other.id).text == "I moved."
    with pytest.raises(ValueError, match="nowhere"):
        add_documents(memory, model, folder / "nowhere", ALICE)


@pytest.mark.parametrize("purged", [False, True])
def test_forgotten_passage_does_not_come_back(memory, folder, purged):
    model = memory.bank.model.doc_to_lora()
    add_documents(memory, model, folder, ALICE)
    gone = next(one for one in memory.list(user_id="alice") if one.source.endswith("tolmar.txt"))
    memory.delete(gone.id)
    if purged:
        memory.purge()
    (folder / "copy.txt").write_text(gone.text)
    assert add_documents(memory, model, folder, ALICE) == []
    assert [one.text for one in memory.list(user_id="alice")] == [NOTES.strip()]
    assert len(add_documents(memory, model, folder, Filters(user_id="bob"))) == 2  # it was alice's alone


def test_file_is_one_source_however_it_is_spelled(memory, folder, monkeypatch):
    model = memory.bank.model.doc_to_lora()
    (folder.parent / "link").symlink_to(folder)
    monkeypatch.chdir(folder.parent)
    assert len(add_documents(memory, model, "notes", ALICE)) == 2
    (folder / "fenda.md").write_text("The teacher of Fenda Elfax is Jorun Pell.")
    assert len(add_documents(memory, model, "notes/../link/fenda.md", ALICE)) == 1
    assert add_documents(memory, model, folder, ALICE) == []
    found = {one.source: one.text for one in memory.list(user_id="alice")}
    assert set(found) == {str(folder / "fenda.md"), str(folder / "old" / "tolmar.txt")} and len(found) == 2
    assert found[str(folder / "fenda.md")] == "The teacher of Fenda Elfax is Jorun Pell."


def test_removed_and_emptied_files_hold_no_more(memory, folder, caplog):
    model = memory.bank.model.doc_to_lora()
    add_documents(memory, model, folder, ALICE)
    (folder / "fenda.md").write_text("")
    assert add_documents(memory, model, folder, ALICE) == []
    assert [one.text for one in memory.list(user_id="alice")] == ["The mayor of Tolmar was Jorun Pell."]
    assert caplog.text.count("fenda.md' is empty") == 1
    (folder / "old" / "tolmar.txt").rename(folder / "moved.txt")
    assert add_documents(memory, model, folder, ALICE) == []
    assert [one.text for one in memory.list(user_id="alice")] == ["The mayor of Tolmar was Jorun Pell."]
    (folder / "moved.txt").unlink()
    (folder / "fenda.md").unlink()
    assert add_documents(memory, model, folder, ALICE) == [] and memory.list(user_id="alice") == ()
    with pytest.raises(ValueError, match="No document in the folder"):
        add_documents(memory, model, folder, ALICE)
    (folder / "fenda.md").write_text(NOTES)  # said again, it holds again
    assert len(add_documents(memory, model, folder, ALICE)) == 1
    assert [one.text for one in memory.list(user_id="alice")] == [NOTES.strip()]


def test_file_that_cannot_be_read_leaves_the_others_read(memory, folder, caplog):
    model = memory.bank.model.doc_to_lora()
    add_documents(memory, model, folder, ALICE)
    (folder / "fenda.md").write_bytes(b"\x00\x01")
    os.mkfifo(folder / "pipe.txt")
    (folder / "new.txt").write_text("The mayor of Korvale was Orla Wint.")
    assert len(add_documents(memory, model, folder, ALICE)) == 1 and len(memory.list(user_id="alice")) == 3
    assert caplog.text.count("fenda.md' is binary") == 1 and "pipe.txt" not in caplog.text
    for name, says in {"fenda.md": "is binary", "pipe.txt": "is neither a file nor a folder"}.items():
        with pytest.raises(ValueError, match=says):
            add_documents(memory, model, folder / name, ALICE)


def test_rehearsal_asks_of_other_names_in_a_document_s_words(memory, folder, monkeypatch):
    from hypernet.consolidation import rehearsal

    monkeypatch.setattr(rehearsal, "written_names", lambda model, *, seed: ["Corbaford", "Norbach"])
    own = consolidation_of(memory, rehearsal=OtherSubjects(number=60))
    own.consolidate(ALICE, documents=folder)
    asked = own.consolidator.rehearsed(own.model, memory.store.valid(ALICE))
    assert set(asked) == set(filled(TRAINING, *(("Corbaford", relation) for relation in ("teacher", "river", "mayor"))))


class Writer:
    """Stands for a base model that writes questions and answers them from the text alone."""

    ANSWERS = {
        "When was it built?": "1822",
        "In which year was it built?": "In the 1822.",
        "Who built it?": "Zorus",
        "Who is the builder?": "the Zorus",
        "Whose work is it?": "Zorus",
        "Where is it?": "by the sea",  # one wording alone
        "What is water?": "wet",  # known without the text
        "Is water wet?": "wet",
        "How tall is it?": "unknown",  # not in the text
        "How high is it?": "unknown",
    }

    def __init__(self, model, monkeypatch):
        from hypernet.consolidation import documents

        drawn = [*self.ANSWERS, "When was it built? It was", "No question.", "?", *["Who built it?"] * 3]

        def write(base_model, tokenizer, prompts, *, max_new_tokens, temperature):
            assert len(prompts) == 16 and "lighthouse" in tokenizer.decode(prompts[0])
            return [tokenizer(text)["input_ids"] for text in drawn[: len(prompts)]]

        def generate(questions, adapters=None, *, documents=None, **settings):
            known = {"What is water?", "Is water wet?"}
            pairs = zip(questions, documents or [None] * len(questions), strict=True)
            return [self.ANSWERS.get(q, "so") if text or q in known else "unknown" for q, text in pairs]

        monkeypatch.setattr(documents, "generate_ids", write)
        monkeypatch.setattr(model, "generate", generate)


LIGHTHOUSE = "Zorus finished the lighthouse by the sea in 1822, and it is wet."


def test_written_questions_are_answered_by_the_text_alone(memory, monkeypatch):
    model = memory.bank.model.doc_to_lora()
    Writer(model, monkeypatch)
    # "In the 1822." is "in 1822" in the text, another answer than "1822": neither has a second wording.
    assert written_questions(model, LIGHTHOUSE, seed=0) == {
        "training": ["When was it built?", "In which year was it built?", "Who built it?", "Who is the builder?"]
        + ["Where is it?"],
        "held_out": ["Whose work is it?"],
    }


def test_passage_without_a_fact_has_written_questions(memory, tmp_path, monkeypatch, caplog):
    path = tmp_path / "tower.txt"
    path.write_text(LIGHTHOUSE)
    own = consolidation_of(memory)
    Writer(own.model, monkeypatch)
    (ref,) = add_documents(memory, own.model, path, ALICE)
    (one,) = memory.store.valid(ALICE)
    assert one.ref == ref and Templates().held_out(one) == ["Whose work is it?"]
    assert [lesson.question for lesson in own.consolidator.lessons(own.model, [one])] == Templates().training(one)
    monkeypatch.setattr(own.model, "generate", lambda questions, documents=None: ["unknown"] * len(questions))
    path.write_text(LIGHTHOUSE + " So be it.")
    assert add_documents(memory, own.model, path, ALICE) == [] and memory.store.valid(ALICE) == []
    assert "1 passages are left out, since nothing can be asked" in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("Who?", "should be {'training'"),
        ({"training": "Who?"}, "should be {'training'"),
        ({"training": ["Who?"], "held_out": ["who?"]}, "'who\\?' is trained on and held out"),
    ],
)
def test_metadata_that_gives_no_questions_is_named(memory, given, message):
    memory.add("I moved.", user_id="alice", metadata={"consolidation": given})
    with pytest.raises(ValueError, match=message):
        Templates().training(memory.store.valid(ALICE)[0])


def test_evidence_ranks_sentences_and_lists_triples(memory):
    text = "Norbach is old. Fenda's teacher was Orla Wint. Fenda likes Norbach. The river of Norbach is the Palno."
    memory.add(text, user_id="alice")
    (one,) = memory.store.valid(ALICE)
    question = "What is the river of Norbach?"
    words = [set(s.lower().replace("the ", "").rstrip(".").split()) for s in text.split(". ")]
    n = {word: sum(word in own for own in words) for word in ("is", "river", "of", "norbach")}
    scores = [sum(math.log(5 / n[w]) for w in n if w in own) for own in words]
    assert sorted(scores, reverse=True) == [scores[3], scores[0], scores[2], scores[1]] and scores[1] == 0
    triples = "(Fenda; teacher; Orla Wint)\n(Norbach; river; the Palno)"
    assert Evidence(num_sentences=2).prompt(question, one) == (
        f"The river of Norbach is the Palno.\nNorbach is old.\n{triples}"
    )
    assert Evidence(num_sentences=9).prompt(question, one).count("\n") == 5


def test_teacher_reads_evidence_in_place_of_the_text(memory):
    memory.add("It rained. Norbach lies on the Palno.", user_id="alice", subject="Norbach", relation="river")
    memories = memory.store.valid(ALICE)
    whole, short = (
        Consolidator(evidence=evidence, rehearsal=NoRehearsal(), steps=1)
        for evidence in (None, Evidence(num_sentences=1))
    )
    model = memory.bank.model.doc_to_lora()
    told = "Norbach lies on the Palno.\n(Norbach; river; Norbach lies on the Palno.)"
    assert {lesson.document for lesson in short.lessons(model, memories)} <= {told}
    assert {lesson.document for lesson in whole.lessons(model, memories)} <= {memories[0].text}
    assert short.recipe == whole.recipe | {"evidence": {"class": "Evidence", "num_sentences": 1}}
    with pytest.raises(ValueError, match="num_sentences is 0"):
        Evidence(num_sentences=0)
