"""benchmarks.memory.times: spans as they stand in questions, TimeQA's file, and what the controls must show."""

import json
from datetime import date

import pytest

from benchmarks.memory.times import _SPAN, mistakes, order, read_timeqa, span_of, timeqa


@pytest.mark.parametrize(
    ("question", "span"),
    [
        ("Who led it from 1954 to 1958?", (date(1954, 1, 1), date(1958, 1, 1))),
        ("Who led it from Apr 2015 to October 2017?", (date(2015, 4, 1), date(2017, 10, 1))),
        ("Who led it between Sep 1909 and 1916?", (date(1909, 9, 1), date(1916, 1, 1))),
        ("Who led it 1958-1959?", (date(1958, 1, 1), date(1959, 1, 1))),
        ("Who joined in 2009?", (date(2009, 1, 1), date(2010, 1, 1))),
        ("Who joined in Feb 2008?", (date(2008, 2, 1), date(2008, 3, 1))),
        ("Who joined in Dec 1999?", (date(1999, 12, 1), date(2000, 1, 1))),
        ("Who led it from 2016 to 2016?", (date(2016, 1, 1), date(2017, 1, 1))),
        ("Who led it from 1959 to 1958?", None),
    ],
)
def test_span_is_read_from_a_question(question, span):
    (found,) = _SPAN.finditer(question)
    assert span_of(found) == span


def page(link: str = "/wiki/Fenda", name: str = "Fenda Elfax") -> dict:
    taught = "She taught in Korvale . Then she moved to Halvawold and taught there . She liked her garden very much ."
    marked = [(taught.index(place), taught.index(place) + len(place), place) for place in ("Korvale", "Halvawold")]
    answers = [[{"para": 1, "from": start, "end": end, "answer": place}] for start, end, place in marked]
    questions = [
        [f"Where did {name} teach from 1950 to 1955?", answers[0]],
        [f"Where did {name} teach from 1955 to 1960?", answers[1]],
        [f"Where did {name} teach in 1970?", [{"para": 0, "from": 0, "end": 0, "answer": ""}]],
        [f"Where did {name}, born in 1920, teach in 1952?", answers[0]],
    ]
    return {"index": f"{link}#P108", "type": "P108", "link": link, "questions": questions, "paras": [name, taught]}


@pytest.fixture
def pages(tmp_path):
    content = [page(), page("/wiki/Orla", "Orla Wint"), page("/wiki/Jorun", "Jorun Pell")]
    (tmp_path / "timeqa.json").write_text(json.dumps(content))
    return read_timeqa(tmp_path / "timeqa.json")


def test_statement_is_the_marked_sentence_with_its_dates(pages):
    first, second, *_ = pages.questions
    assert first.right == (
        ("/wiki/Fenda", "P108", "Fenda Elfax: She taught in Korvale .", date(1950, 1, 1), date(1955, 1, 1)),
    )
    assert second.undated == "Where did Fenda Elfax teach ?" and second.answers == ("Halvawold",)
    assert second.right[0].text == "Fenda Elfax: Then she moved to Halvawold and taught there ."
    assert pages.others[0] == ("/wiki/Fenda", "Fenda Elfax: She liked her garden very much .")
    assert pages.skipped == {"it has no answer": 3, "its dates are not one span": 3}


def test_right_span_is_found_by_its_date_alone(pages):
    rows = {
        (row["dates"], row["asked_at"], row["question"]): row
        for row in timeqa(pages, [0, 1], num_others=0, embedder=None)
    }
    for kept in ("start and end", "start, and a key"):
        for asked in ("as asked", "without its dates"):
            assert rows[kept, "date of the span", asked]["right_at_1"] == 1
            assert rows[kept, "date of another span", asked]["right_at_5"] == 0
    none = rows["none", "no date", "without its dates"]
    assert none["right_at_1"] == 0.5 and none["right_at_5"] == 1  # two spans, and nothing that tells them apart
    assert none["questions"] == 12 and none["pages"] == 3 and none["right_at_1_interval"] == [0.5, 0.5]


def test_other_files_are_refused(tmp_path):
    (tmp_path / "other.json").write_text('[{"question": "x"}]')
    with pytest.raises(ValueError, match="is not TimeQA's human annotated file"):
        read_timeqa(tmp_path / "other.json")


def test_order_of_telling_changes_nothing_and_the_control_much():
    row = order(0, num_keys=12, statements_per_key=4, num_orders=3, num_dates=15)
    assert row["changed"] == 0 and row["answers"] == 360 and row["changed_if_the_last_told_won"] > 36


@pytest.mark.parametrize(("key", "wrong"), [("given", False), ("subject", True)])
def test_facts_end_by_mistake_only_where_the_key_is_the_subject(key, wrong):
    row = mistakes(0, num_facts=60, num_corrections=20, key=key)
    assert (row["ended_by_mistake"] > 10) == wrong and row["corrections_missed"] == 0
    assert wrong or row["ended_by_mistake"] == 0
