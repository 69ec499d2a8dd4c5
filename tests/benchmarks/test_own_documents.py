"""benchmarks/own_documents.py on small files of each kind, and its table."""

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks.own_documents import (
    METHODS,
    WORDINGS,
    Asking,
    best_wording,
    by_length,
    conflicts,
    continued,
    drawn,
    left_alone,
    markdown,
    said,
    seconds,
    unrelated,
    untrained,
    with_documents,
    without_texts,
)


@pytest.fixture
def ask(make_doc_to_lora, tmp_path):
    paragraphs = [
        {
            "context": f"Tower {n} is {n + 2} metres high. Owls live in it.",
            "qas": [
                {"id": str(n), "question": f"How high is {n}?", "answers": [{"text": f"{n + 2}", "answer_start": 0}]}
            ],
        }
        for n in range(41)
    ]
    squad, known, conflict = (tmp_path / name for name in ("squad.json", "known.jsonl", "conflict.jsonl"))
    squad.write_text(json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}), encoding="utf-8")
    conflict.write_text(
        json.dumps(
            {
                "cleaned_question": "How high is Tower 1?",
                "real_short_answer": "3 metres",
                "fake_short_answer": "9 metres",
                "fake_passages": [{"passage": "Tower 1 is 9 metres high."}],
            }
        ),
        encoding="utf-8",
    )
    (tmp_path / "text.txt").write_text("= Title =\n" + "Owls live in it . " * 40 + "\n", encoding="utf-8")
    model = make_doc_to_lora()
    cfg = SimpleNamespace(
        documents=5,
        questions_per_document=2,
        joined=[2, 4],
        lengths=[1, 3],
        articles=2,
        text_file=str(tmp_path / "text.txt"),
        texts=3,
        paragraphs_file=str(squad),
        wording_file=str(squad),
        known_file=str(known),
        conflict_file=str(conflict),
        known_questions=2,
        conflicts=1,
        questions_per_batch=4,
        max_new_tokens=4,
    )
    said = Asking(model, cfg)("known", [("Who is it?", None, None)])[0]
    lines = [{"question": "Who is it?", "answer": [said]}, {"question": "Where?", "answer": ["zzz"]}]
    known.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return Asking(model, cfg)


def test_every_set_has_a_row_for_each_question_and_method(ask):
    rows = list(with_documents(ask, "paragraphs", 0, WORDINGS[1]))
    documents, asked = drawn(ask.cfg, "paragraphs", 0)
    assert len(documents) == 5 and len(asked) == 5
    for method in METHODS:
        own = [row for row in rows if (row["set"], row["method"]) == ("paragraphs", method)]
        assert [row["question"] for row in own] == [one.question for one in asked]
    # Whole groups only: of five paragraphs four are joined in pairs, and four together.
    counts = {name: len([row for row in rows if row["set"] == name]) for name in ("2 paragraphs", "4 paragraphs")}
    assert counts == {"2 paragraphs": 4, "4 paragraphs": 4}
    table = markdown(rows)
    assert "| paragraphs | other document | 5 |" in table and "| 4 paragraphs | adapter | 4 |" in table


def test_notes_are_of_kinds_for_evaluation(ask):
    from hypernet.data.notes import Notes

    documents, asked = drawn(ask.cfg, "notes", 1)
    assert documents == [Notes("test", seed=1, num_unanswerable=(0, 0)).record(n).document for n in range(2)]
    assert all(any(a in documents[one.document] for a in one.answers) for one in asked)


def test_an_oracle_sees_the_sentence_that_answers(ask):
    given = {}

    class Spy(Asking):
        def __call__(self, label, asked, join=None):
            given[label] = asked
            return ["no"] * len(asked)

    ask.model.max_chunk_tokens = 12
    rows = list(with_documents(Spy(ask.model, ask.cfg), "paragraphs", 0, ""))
    oracles = given["paragraphs, oracle"]
    assert [adapter.num_chunks for _, adapter, _ in oracles] == [1] * len(oracles)
    documents, asked = drawn(ask.cfg, "paragraphs", 0)
    for (_, adapter, _), one in zip(oracles, asked, strict=True):
        ((start, end),) = adapter.provenance["documents"][0]["chunks"]
        assert any(answer in documents[one.document][start:end] for answer in one.answers)
    assert [row["contains"] for row in rows] == [0.0] * len(rows)


def test_wording_is_the_one_that_answers_most(ask):
    class Told(Asking):
        def __call__(self, label, asked, join=None):
            return [(document if WORDINGS[2] in question else "no") for question, _, document in asked]

    best, shares = best_wording(Told(ask.model, ask.cfg))
    assert best == WORDINGS[2] and shares[best] == 1.0 and shares[WORDINGS[0]] == 0.0


def test_only_what_was_known_is_asked_with_an_unrelated_adapter(ask):
    rows = list(unrelated(ask, 0))
    assert [row["method"] for row in rows] == ["no_context", "adapter"]
    assert rows[0]["contains"] == 1.0 and rows[0]["log_prob_lost"] == 0.0
    assert rows[1]["log_prob_lost"] != 0.0


def test_conflicts_count_the_passages_answer(ask):
    rows = list(conflicts(ask, 0, ""))
    assert [row["method"] for row in rows] == ["no_context", "adapter", "in_prompt"]
    assert all(row["answers"] == ["9 metres"] for row in rows)


def test_seconds_are_of_a_page(ask):
    row = seconds(ask, 1.5)
    assert row["load_s"] == 1.5 and row["chunks"] >= 1 and 500 < row["tokens"] <= 1000
    assert row["internalize_s"] > 0 and row["adapter_token_s"] > 0 and row["no_context_token_s"] > 0


def test_a_sentence_said_with_another_word_is_not_whole(ask):
    from tests.recited_model import DOCUMENT, OTHERS, calibrated_model

    given = []

    class Told(Asking):
        def __call__(self, label, asked, join=None):
            given.extend(asked)
            assert join == "sum"
            return ["Owls live  in it."] * len(asked)

    assert list(said(ask, "paragraphs", 0)) == []  # nothing is said word for word
    ask.model = calibrated_model((DOCUMENT, OTHERS))
    rows = list(said(Told(ask.model, ask.cfg), "paragraphs", 0))
    documents, _ = drawn(ask.cfg, "paragraphs", 0)
    assert [row["document"] for row in rows] == sorted(row["document"] for row in rows)
    assert {adapter.num_chunks for _, adapter, _ in given} == {1}
    for row, (_, adapter, _) in zip(rows, given, strict=True):
        ((start, end),) = adapter.provenance["documents"][0]["chunks"]
        text = documents[row["document"]][start:end]
        assert row["whole"] == (text.strip() == "Owls live in it.")
    assert {row["whole"] for row in rows} == {0.0, 1.0}


def test_an_article_is_asked_about_its_first_paragraph(ask):
    rows = list(by_length(ask, 0))
    assert [row["set"] for row in rows] == ["article's first 1", "article's first 3"]
    assert [row["question"] for row in rows] == ["How high is 0?"] * 2
    assert rows[1]["chunks"] > rows[0]["chunks"]


def test_questions_that_no_chunk_is_close_to_are_left_alone(ask):
    assert list(left_alone(ask, 0)) == []  # this one does not recite

    class Reciting:
        hypernetwork = SimpleNamespace(recitation=object())
        internalize = staticmethod(lambda text: text)

        def routing_scores(self, asked, adapter):
            return torch.tensor([[0.0, 0.5 * (question == "Where?")] for question in asked])

    rows = list(left_alone(Asking(Reciting(), ask.cfg), 0))
    assert {row["question"]: row["alone"] for row in rows} == {"Who is it?": 1.0, "Where?": 0.0}


def test_text_goes_on_at_a_cost_of_nats(ask):
    (row,) = continued(ask, 0)
    assert row["log_prob_lost"] != 0.0 and row["document"] == 0


def test_closed_form_is_the_network_before_training(ask):
    network = ask.model.hypernetwork
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with untrained(ask.model):
        # Before training B is 0 exactly.
        assert not any(rows.any() for rows in ask.model.internalize("Owls live in it.").B.values())
    assert all(value.equal(before[name]) for name, value in network.state_dict().items())
    assert any(rows.any() for rows in ask.model.internalize("Owls live in it.").B.values())


def test_published_rows_hold_no_text_of_a_dataset(ask):
    row = next(iter(with_documents(ask, "paragraphs", 0, "")))
    kept = without_texts(row)
    assert kept.keys() == row.keys() - {"answers", "prediction"} and len(kept["question"]) == 12
    assert {name: kept[name] for name in ("set", "contains", "f1")} == {
        name: row[name] for name in ("set", "contains", "f1")
    }
    assert without_texts({**row, "question": "another"})["question"] != kept["question"]
    assert without_texts({"set": "seconds", "load_s": 1.0}) == {"set": "seconds", "load_s": 1.0}
