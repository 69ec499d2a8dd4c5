"""Notes: answers stand in the text, nothing contradicts, splits share no kind and no name, the same everywhere."""

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from hypernet.data.notes import Note, Notes, note_kinds, write_rows
from hypernet.data.qa import QuestionAnswering, accepted_answers
from hypernet.data.records import UNKNOWN
from hypernet.data.sources import Source

ROOT = Path(__file__).parents[2]
SPLITS = ("train", "validation", "test")
# Words that say nothing about the subject, for the overlap of questions with the text.
FUNCTION_WORDS = set(
    "a an and are as at be been by can could did do does for from had has have how in into is it its many much must of"
    " on one or out she should that the their them there they this to up was were what when where which who whom"
    " whose why will with would people person".split()
)


@cache
def drawn(split: str, count: int = 600) -> list[Note]:
    notes = Notes(split, num_unanswerable=(1, 2))
    return [notes.note(i) for i in range(count)]


@cache
def read(name: str) -> dict:
    # Python's own parser, which is stricter than the one that hypernet.data.notes prefers.
    return yaml.safe_load(files("hypernet.data").joinpath(name).read_text(encoding="utf-8"))


def entries() -> dict:
    return read("notes.yaml")["kinds"]


def slots_in(text: str) -> set[str]:
    return set(re.findall(r"\{(\w+)\}", text))


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


# The YAML file


def test_there_are_40_kinds_and_200_sentences_at_least():
    assert len(note_kinds()) >= 40
    assert sum(note_kinds().values()) >= 200
    assert [len(note_kinds(split)) for split in SPLITS] == [97, 5, 9]


@pytest.mark.parametrize("name", sorted(entries()))
def test_titles_name_the_subject_and_frames_tell_every_slot(name):
    entry = entries()[name]
    about, slots = set(entry["about"].split(" | ")), entry["slots"]
    assert all(about <= slots_in(title) <= slots.keys() for title in entry["titles"])
    assert all(slots_in(filler) <= about for filler in entry["fillers"])
    told = set().union(*map(slots_in, [*entry["titles"], *entry["frames"], *entry.get("closings", [])]))
    assert told - set(entry.get("speakers", "").split(" | ")) <= slots.keys()
    assert {slot for slot, of in slots.items() if "ask" in of} <= told
    for frame in entry.get("rows", {}).get("frames", ()):
        assert {entry["rows"]["key"]} <= slots_in(frame) <= slots.keys() | entry["rows"]["slots"].keys()


@pytest.mark.parametrize("name", sorted(entries()))
def test_each_question_asks_for_one_slot_in_several_wordings(name):
    entry = entries()[name]
    rows = entry.get("rows", {}).get("slots", {})
    asked = Counter()
    for slot, of in [*entry["slots"].items(), *rows.items()]:
        forms = of["ask"].split(" | ") if "ask" in of else []
        asked.update(forms)
        for form in forms:
            assert form[0].isupper() and form.endswith("?")
            assert slots_in(form) <= entry["slots"].keys() | rows.keys() - {slot}
        if forms and slot not in entry["about"].split(" | ") and slot not in rows:
            assert len(forms) >= 3
            # Two documents in one adapter: something names the subject.
            assert any(slots_in(form) & set(entry["about"].split(" | ")) for form in forms), slot
    assert max(asked.values()) == 1


# Notes


@pytest.mark.parametrize("split", SPLITS)
def test_answers_stand_in_the_sentence_that_tells_them(split):
    for note in drawn(split):
        assert any(asked.answerable for asked in note.questions)
        for asked in note.questions:
            if asked.answerable:
                value, sentence = note.facts[asked.fact]
                assert value == asked.answer and value in sentence and value in note.text
                assert value.lower() not in asked.question.lower()
                assert value not in asked.variants and len(set(asked.variants)) == len(asked.variants)
            else:
                assert (asked.answer, asked.variants) == (UNKNOWN, ())
                assert asked.fact not in note.facts


@pytest.mark.parametrize("split", SPLITS)
def test_no_question_has_two_answers(split):
    """Every text of a question occurs once in a note, but for its two wordings, and every value belongs to one fact."""
    for note in drawn(split):
        assert max(Counter(asked.question for asked in note.questions).values()) == 1
        values = [value.lower() for value, _ in note.facts.values()]
        assert len(set(values)) == len(values)
        if len(note.kinds) > 1:  # two notes: a question says which one it is about
            subjects = [subject.lower() for subject in note.subjects]
            for asked in note.questions:
                assert any(subject in asked.question.lower() for subject in subjects), asked


def test_people_of_a_note_share_no_name():
    for note in drawn("train"):
        people = {a.answer: a.variants[:2] for a in note.questions if a.kind == "person" and len(a.variants) >= 3}
        names = [name for both in people.values() for name in both]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("split", SPLITS)
def test_every_slot_was_filled_and_lengths_are_in_range(split):
    for note in drawn(split):
        assert not re.search(r"[{}]|  \S", note.text.replace("\t", " "))
        assert all("{" not in asked.question for asked in note.questions)
        assert 30 <= len(note.text.split()) <= 320


def test_short_and_long_notes_are_drawn_as_asked():
    short, long = (Notes(num_words=bounds) for bounds in ((30, 40), (250, 300)))
    mean = [sum(len(notes.note(i).text.split()) for i in range(80)) / 80 for notes in (short, long)]
    assert mean[0] < 60 and mean[1] > 170


def test_note_is_made_alone_in_any_order_and_by_seed():
    notes = Notes("train", seed=3)
    backwards = [notes.note(i) for i in reversed(range(40))]
    assert backwards[::-1] == [Notes("train", seed=3).note(i) for i in range(40)]
    assert Notes("train", seed=4).note(0) != notes.note(0)


def test_note_is_the_same_in_every_process():
    """Sets of texts come in another order where Python's hashes are salted otherwise."""
    program = (
        "from hypernet.data.notes import *; print([Notes(s).note(i) for s in ('train', 'test') for i in range(60)])"
    )
    env = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONIOENCODING": "utf-8"}  # this process has another salt
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, cwd=ROOT, env=env).stdout
    here = [Notes(split).note(i) for split in ("train", "test") for i in range(60)]
    assert printed.decode().strip() == str(here)


def test_ten_thousand_documents_differ():
    notes = Notes("train")
    assert len({notes.note(i).text for i in range(10_000)}) == 10_000


def test_splits_share_no_kind_and_no_name():
    kinds = {split: {kind for note in drawn(split) for kind in note.kinds} for split in SPLITS}
    assert kinds == {split: set(note_kinds(split)) for split in SPLITS}
    owned = ("person", "city", "place", "company", "ref", "extension", "serial", "licence", "hotel", "school")
    values = {
        split: {asked.answer for note in drawn(split) for asked in note.questions if asked.kind in owned}
        for split in SPLITS
    }
    assert all(len(values[split]) > 300 for split in SPLITS)
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not kinds[one] & kinds[other]
        assert not values[one] & values[other] - {UNKNOWN}


def test_names_come_from_many_languages():
    people = read("notes_words.yaml")["people"]
    assert len(people) >= 15
    for which in ("first", "last"):
        assert len({name for area in people.values() for name in area[which].split()}) >= 300


def test_dates_times_and_amounts_are_written_in_many_ways():
    answers = {kind: set() for kind in ("date", "time", "money", "number", "person")}
    for note in drawn("train"):
        for asked in note.questions:
            if asked.kind in answers and asked.answerable:
                answers[asked.kind].add(re.sub(r"[^\W\d_]+", "x", re.sub(r"\d+", "0", asked.answer)))
    assert len(answers["date"]) >= 10 and len(answers["time"]) >= 4 and len(answers["money"]) >= 8


def test_variants_of_dates_times_and_amounts_are_right():
    found = {}
    for note in drawn("train"):
        found |= {asked.answer: asked.variants for asked in note.questions}
    hours = {text: variants for text, variants in found.items() if re.fullmatch(r"\d{2}:\d{2}", text)}
    assert hours
    for text, variants in hours.items():
        hour, minute = map(int, text.split(":"))
        assert f"{(hour - 1) % 12 + 1}:{minute:02} {'am' if hour < 12 else 'pm'}" in variants
    iso = {text: variants for text, variants in found.items() if re.fullmatch(r"20\d\d-\d\d-\d\d", text)}
    months = ["January", "February", "March", "April", "May", "June", "July", "August", "September"]
    months += ["October", "November", "December"]
    assert iso
    for text, variants in iso.items():
        year, month, day = map(int, text.split("-"))
        assert f"{day} {months[month - 1]} {year}" in variants
    pounds = {text: variants for text, variants in found.items() if re.fullmatch(r"£[\d,]+", text)}
    assert pounds and all(text[1:].replace(",", "") in variants for text, variants in pounds.items())


def test_questions_are_worded_differently_from_the_text():
    """Of a question's content words, names left out, the share in the sentence that answers it; .13 when written."""
    shares = []
    for note in drawn("train"):
        named = {word for value, _ in note.facts.values() for word in words_of(value)}
        named |= {word for subject in note.subjects for word in words_of(subject)}
        for asked in note.questions:
            if asked.answerable:
                words = set(words_of(asked.question)) - FUNCTION_WORDS - named
                shares += [len(words & set(words_of(note.facts[asked.fact][1]))) / len(words)] if words else []
    assert len(shares) > 5000
    assert 0.03 < sum(shares) / len(shares) < 0.2


# As a source, and as a file


def test_notes_are_a_source_of_records(tiny_tokenizer):
    notes = Notes("train", tokenizer=tiny_tokenizer)
    assert isinstance(notes, Source)
    record, note = notes.record(5), notes.note(5)
    assert record.document == note.text
    assert [(q.text, q.answer) for q in record.questions] == [(a.question, a.answer) for a in note.questions]
    assert {q.kind for i in range(20) for q in notes.record(i).questions} == {"document", "unanswerable"}
    assert {q.group for q in record.questions} <= set(note.kinds)
    assert notes.num_tokens(5) == len(tiny_tokenizer(note.text, add_special_tokens=False)["input_ids"])
    assert Notes("train").num_tokens(5) == len(note.text.split())


def test_cross_document_question_names_another_subject():
    notes, rng = Notes("test"), random.Random(0)
    for i in range(40):
        record = notes.record(i)
        question = notes.cross_document(rng, record)
        assert (question.answer, question.kind) == (UNKNOWN, "cross_document")
        assert question.group in note_kinds("test")
        assert question.text not in {asked.text for asked in record.questions}


def test_only_named_questions_hold_what_the_note_is_about():
    notes = Notes("train", only_named=True)
    for note in map(notes.note, range(150)):
        for asked in note.questions:
            assert any(subject.lower() in asked.question.lower() for subject in note.subjects)


def test_number_of_wordings_is_the_most_a_fact_is_asked():
    for wordings in (1, 3):
        counts = Counter()
        for note in map(Notes("train", num_wordings=wordings).note, range(60)):
            counts.update(Counter(asked.fact for asked in note.questions if asked.answerable).values())
        assert max(counts) == wordings


def test_written_rows_are_read_back_with_all_answers(tmp_path):
    notes, path = Notes("test", num_unanswerable=(1, 1)), tmp_path / "notes.jsonl"
    write_rows(notes, path, num_notes=12, first=3)
    accepted = accepted_answers("squad_v2", path=path)
    assert list(accepted) == [notes.note(i).text for i in range(3, 15)]
    for i in range(3, 15):
        note = notes.note(i)
        assert accepted[note.text] == {q.question: (q.answer, *q.variants) for q in note.questions}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert {row["title"].split(", ")[0] for row in rows} <= set(note_kinds("test"))
    read = QuestionAnswering("train", name="squad_v2", path=path).records
    assert {record.document for record in read} <= set(accepted)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"split": "dev"}, "Unknown split 'dev'; choose one of train, validation, test"),
        ({"split": "test", "kinds": ["minutes"]}, "No kind of note 'minutes' in split test; choose from ship_log"),
        ({"num_words": [90, 30]}, "num_words is \\[90, 30\\]; give the least and the most"),
        ({"num_unanswerable": [1]}, "num_unanswerable is \\[1\\]"),
        ({"num_wordings": 0}, "num_wordings is 0; ask for each fact at least once"),
    ],
    ids=["split", "kind", "words", "unanswerable", "wordings"],
)
def test_settings_that_make_no_note_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        Notes(**settings)


def test_notes_of_one_kind_can_be_drawn():
    notes = Notes("train", kinds=["recipe"], num_words=[200, 300])
    assert {notes.note(i).kinds for i in range(20)} == {("recipe",)}
