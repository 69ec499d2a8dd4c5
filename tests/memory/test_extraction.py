"""Keys of plain sentences: found where the relation is named, and nowhere else."""

import pytest

from hypernet.memory.extraction import extract_facts
from hypernet.memory.memory import Memory


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("Fenda Elfax's teacher is Orla Wint.", ("Fenda Elfax", "teacher", "Orla Wint")),
        ("Fenda’s home town was Korvale", ("Fenda", "home town", "Korvale")),
        ("The teacher of Fenda Elfax was Jorun Pell.", ("Fenda Elfax", "teacher", "Jorun Pell")),
        ("Fenda has the rank of captain.", ("Fenda", "rank", "captain")),
        ("Fenda Elfax was born in Korvale.", ("Fenda Elfax", "born in", "Korvale")),
        ("Fenda works as a carver.", ("Fenda", "works as", "a carver")),
        ("The company is located in Rome.", ("The company", "located in", "Rome")),
    ],
)
def test_named_relation_gives_key_and_object(text, fact):
    ((_, *found),) = extract_facts(text)
    assert tuple(found) == fact


@pytest.mark.parametrize(
    "text",
    [
        "Fenda is tall.",
        "Fenda is a teacher.",
        "Is Fenda's teacher Orla?",
        "Fenda's teacher is not Orla.",
        "Fenda's teacher isn't Orla.",
        "Perhaps Fenda's teacher is Orla.",
        "She was born in Korvale.",
        "It is located in Rome.",
        "Hello there!",
        "",
    ],
)
def test_everything_else_gives_none(text):
    assert extract_facts(text) == []


def test_extractor_is_off_unless_asked_for(tmp_path):
    told = ("Fenda's teacher is Orla.", "The teacher of Fenda is Jorun.", "Fenda is tall.", "Fenda is a carver.")
    for extractor, expected in ((None, 4), (extract_facts, 3)):
        memory = Memory.open(tmp_path / str(expected), extractor=extractor)
        for text in told:
            memory.add(text, user_id="alice")
        assert [m.text for m in memory.list()] == list(told[-expected:])


def test_text_of_several_facts_gets_no_key(tmp_path):
    memory = Memory.open(tmp_path / "memory", extractor=extract_facts)
    memory.add("Fenda's teacher is Orla. Fenda's home is Korvale.")
    memory.add("Fenda's teacher is Orla. That is all.")
    assert [m.subject for m in memory.list()] == [None, None]
