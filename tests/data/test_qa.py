"""Question answering: small files in each dataset's columns, splits, what is refused."""

import json
import pickle
import random
import re
import zipfile

import datasets
import pytest

import hypernet.data.qa as module
from hypernet.data.qa import DATASETS, QuestionAnswering, accepted_answers, file_rows
from hypernet.data.records import UNKNOWN
from hypernet.data.sources import Source

SPLITS = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rows_of(name, count=60, first=0):
    """Two questions about each document in the columns that the dataset has on the hub."""
    for i in range(first, first + count):
        for side in ("left", "right"):
            question, answer = f"What is {side} of {i}?", f"{side} {i}"
            spans = [answer, f"{answer} too"] if i % 3 == 0 else [answer]
            yield {
                "squad": {"id": f"{i}{side}", "title": "T", "context": f"Text {i}.", "question": question}
                | {"answers": {"text": spans, "answer_start": [0] * len(spans)}},
                "squad_v2": {"id": f"{i}{side}", "title": "T", "context": f"Text {i}.", "question": question}
                | {"answers": {"text": spans if side == "left" else [], "answer_start": []}},
                "drop": {"section_id": "s", "query_id": f"{i}{side}", "passage": f"Text {i}.", "question": question}
                | {"answers_spans": {"spans": spans, "types": ["span"] * len(spans)}},
                "ropes": {"id": f"{i}{side}", "background": f"Text {i}.", "situation": "And so.", "question": question}
                | {"answers": {"text": [answer]}},
                "pwc": {"input": f"Text {i}.", "prompt": question, "answer": answer},
                "long_bench": {"input": question, "context": f"Text {i}.", "answers": spans, "length": 2}
                | {"dataset": "qasper", "language": "en", "all_classes": None, "_id": f"{i}{side}"},
            }[name]


def write(path, rows):
    rows = list(rows)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def questions_of(source):
    return {q.text: q for record in source.records for q in record.questions}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", ["squad", "squad_v2", "drop", "ropes", "pwc"])
def test_files_in_dataset_columns_become_records_by_document(tmp_path, name, suffix):
    path = write(tmp_path / f"rows{suffix}", rows_of(name))
    sources = [QuestionAnswering(split, name=name, path=path) for split in SPLITS]
    documents = [{record.document for record in source.records} for source in sources]
    assert sum(map(len, documents)) == len(set.union(*documents)) == 60 and all(documents)
    questions = {text: q for source in sources for text, q in questions_of(source).items()}
    assert len(questions) == 120 and all(len(r.questions) == 2 for source in sources for r in source.records)
    expected = "left 3, left 3 too" if name == "drop" else "left 3"
    assert questions["What is left of 3?"].answer == expected and questions["What is left of 3?"].kind == "document"
    right = questions["What is right of 4?"]
    assert (right.answer, right.kind) == ((UNKNOWN, "unanswerable") if name == "squad_v2" else ("right 4", "document"))
    by_question = {q.text: record for source in sources for record in source.records for q in record.questions}
    assert by_question["What is left of 3?"].document == ("Text 3.\n\nAnd so." if name == "ropes" else "Text 3.")


def test_a_test_files_documents_are_in_no_other_split(tmp_path):
    path, test_path = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    write(path, rows_of("drop", 60))
    write(test_path, rows_of("drop", 10, first=55))
    sources = {s: QuestionAnswering(s, name="drop", path=path, test_path=test_path) for s in SPLITS}
    documents = {split: {record.document for record in source.records} for split, source in sources.items()}
    assert documents["test"] == {f"Text {i}." for i in range(55, 65)}
    assert documents["train"] | documents["validation"] == {f"Text {i}." for i in range(55)}
    assert not documents["train"] & documents["validation"] and documents["validation"]
    # There several spans are several annotators' answers.
    assert questions_of(sources["test"])["What is left of 57?"].answer == "left 57"


SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "Towns",
            "paragraphs": [
                {
                    "context": f"Elmouth {i} lies on the Vel.",
                    "qas": [
                        {"id": "a", "question": "Which river?", "answers": [{"text": "the Vel", "answer_start": 17}]},
                        {"id": "b", "question": "Who leads it?", "is_impossible": True, "answers": []},
                        {"id": "c", "question": "Hidden?", "answers": []},
                    ],
                }
                for i in range(40)
            ],
        }
    ],
}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.json", "a.JSONL"])
def test_byte_order_mark_says_the_encoding_of_questions(tmp_path, name, encoding):
    row = {"context": "Ida kämmte Ö.", "question": "Wer?", "answers": {"text": ["Ida"]}}
    paragraph = {"context": row["context"], "qas": [{"question": "Wer?", "answers": [{"text": "Ida"}]}]}
    squad = json.dumps({"data": [{"paragraphs": [paragraph]}]}, ensure_ascii=False)
    lines = "\r\n".join([json.dumps(row, ensure_ascii=False)] * 2)
    (tmp_path / name).write_bytes((squad if name == "a.json" else lines).encode(encoding))
    assert next(iter(file_rows(tmp_path / name))) == row
    assert len(list(file_rows(tmp_path / name))) == (1 if name == "a.json" else 2)


def test_mark_in_the_middle_of_joined_json_lines_is_dropped(tmp_path):
    (tmp_path / "a.jsonl").write_text('\ufeff\n{"a": 1}\n\ufeff{"a": 2}\n', encoding="utf-8")
    assert list(file_rows(tmp_path / "a.jsonl")) == [{"a": 1}, {"a": 2}]


def test_squad_json_is_read_with_unanswerable_questions(tmp_path):
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(SQUAD), encoding="utf-8")
    sources = [QuestionAnswering(split, path=path) for split in SPLITS]
    assert sum(len(source.records) for source in sources) == 40
    for source in sources:
        for record in source.records:
            assert [(q.text, q.answer, q.kind) for q in record.questions] == [
                ("Which river?", "the Vel", "document"),
                ("Who leads it?", UNKNOWN, "unanswerable"),
            ]


def test_qa_dataset_reshuffles_every_epoch(tmp_path):
    source = QuestionAnswering("train", name="pwc", path=write(tmp_path / "rows.jsonl", rows_of("pwc", 20)))
    size = len(source.records)
    epochs = [[source.record(epoch * size + i).document for i in range(size)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) and len(set(epochs[0])) == size and epochs[0] != epochs[1]
    assert [pickle.loads(pickle.dumps(source)).record(i).document for i in (5, 3)] == [epochs[0][5], epochs[0][3]]
    other = QuestionAnswering("train", seed=1, name="pwc", path=source.path)
    assert [other.record(i).document for i in range(size)] != epochs[0]
    assert isinstance(source, Source) and source.num_tokens(3) == 2


def test_qa_skips_documents_that_are_too_long(tmp_path, tiny_tokenizer):
    rows = [{"input": "word " * (i + 1), "prompt": "How many?", "answer": str(i)} for i in range(50)]
    path = write(tmp_path / "rows.jsonl", rows)
    source = QuestionAnswering("train", name="pwc", path=path, max_document_tokens=20)
    assert 10 < len(source.records) <= 20 and max(map(source.num_tokens, range(30))) <= 20
    with pytest.raises(ValueError, match="has no document for the train split"):
        _ = QuestionAnswering("train", name="pwc", path=path, max_document_tokens=0).records


def test_cross_document_questions_are_other_documents(tmp_path):
    source = QuestionAnswering("train", name="pwc", path=write(tmp_path / "rows.jsonl", rows_of("pwc", 5)))
    record = source.records[0]
    for seed in range(10):
        question = source.cross_document(random.Random(seed), record)
        assert question.text not in {q.text for q in record.questions}
        assert (question.kind, question.answer) == ("cross_document", UNKNOWN)


# What is measured: every annotator's answer


@pytest.mark.parametrize("name", ["squad", "squad_v2", "drop", "ropes", "pwc", "qasper"])
def test_accepted_answers_are_in_the_datasets_order(tmp_path, name):
    columns = "long_bench" if name == "qasper" else name
    path = write(tmp_path / "rows.jsonl", rows_of(columns, 12))
    found = accepted_answers(name, path=path)
    first = "Text {}.\n\nAnd so." if name == "ropes" else "Text {}."
    assert list(found) == [first.format(i) for i in range(12)]
    several = ("left 3", "left 3 too") if name not in ("ropes", "pwc") else ("left 3",)
    assert found[first.format(3)]["What is left of 3?"] == several
    right = (UNKNOWN,) if name == "squad_v2" else ("right 4",)
    assert found[first.format(4)] == {"What is left of 4?": ("left 4",), "What is right of 4?": right}
    # The record that is trained on or validated with has the first of them.
    for record in QuestionAnswering("test", name=name, path=path, test_path=path).records if name != "qasper" else ():
        assert all(found[record.document][q.text][0] == q.answer for q in record.questions)


def test_hidden_questions_are_not_measured(tmp_path):
    rows = [
        {"context": "A.", "question": "B?", "answers": {"text": ["C", "C", " D "]}},
        {"context": "A.", "question": "E?", "answers": {"text": []}},
        {"context": "F.", "question": "G?", "answers": {"text": []}},
        {"context": " ", "question": "H?", "answers": {"text": ["I"]}},
    ]
    assert accepted_answers("squad", path=write(tmp_path / "a.jsonl", rows)) == {"A.": {"B?": ("C", "D")}}
    with pytest.raises(ValueError, match="b.jsonl holds no question with an answer"):
        accepted_answers("squad", path=write(tmp_path / "b.jsonl", rows[2:]))
    with pytest.raises(ValueError, match="Give the name of a dataset, or the path"):
        accepted_answers()


# The hub, with load_dataset replaced


@pytest.fixture
def hub(monkeypatch):
    """Calls of load_dataset, which answers with rows in the columns of the dataset."""
    calls = []

    def load_dataset(name, **settings):
        calls.append((name, settings))
        columns = next((key for key, c in DATASETS.items() if c.hub == name), "long_bench")
        return list(rows_of(columns, 30, first=0 if settings["split"] == "train" else 25))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize("name", ["squad", "squad_v2", "drop", "ropes", "pwc"])
def test_a_datasets_test_split_is_ours_and_no_code_of_it_runs(hub, name):
    found = {split: {r.document for r in QuestionAnswering(split, name=name).records} for split in SPLITS}
    assert len(found["test"]) == 30 and found["train"] and found["validation"]
    assert not found["train"] & found["validation"] and not (found["train"] | found["validation"]) & found["test"]
    test_split = "test" if name == "pwc" else "validation"
    assert {(called, settings["split"]) for called, settings in hub} == {
        (DATASETS[name].hub, "train"),
        (DATASETS[name].hub, test_split),
    }
    assert all("trust_remote_code" not in settings for _, settings in hub)


def test_qa_reads_nothing_before_the_first_record(hub):
    source = QuestionAnswering("test", name="qasper")
    assert not hub
    assert len(source.records) == 30
    archive = "zip://data/qasper.jsonl::hf://datasets/zai-org/LongBench/data.zip"
    assert hub == [("json", {"data_files": archive, "split": "train"})]
    with pytest.raises(ValueError, match="qasper is for measuring alone and has no train split"):
        _ = QuestionAnswering("train", name="qasper").records


@pytest.mark.parametrize("name", DATASETS)
def test_accepted_answers_read_the_hub_test_split(hub, name):
    found = accepted_answers(name)
    assert len(found) == 30 and all(answers for questions in found.values() for answers in questions.values())
    ((_, settings),) = hub
    long_bench = DATASETS[name].train is None
    assert settings["split"] == ("train" if long_bench else "test" if name == "pwc" else "validation")
    assert ("data_files" in settings) == long_bench


def test_long_bench_task_is_read_from_its_archive(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/qasper.jsonl", "\n".join(map(json.dumps, rows_of("long_bench", 4))))
    local = f"zip://data/qasper.jsonl::{tmp_path / 'data.zip'}"
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # no matter that the file is here
    monkeypatch.setitem(DATASETS, "qasper", DATASETS["qasper"]._replace(data_files=local))
    source = QuestionAnswering("test", name="qasper")
    assert {r.document for r in source.records} == {f"Text {i}." for i in range(4)}
    assert questions_of(source)["What is left of 3?"].answer == "left 3"


# What is refused


def test_unreadable_qa_file_is_a_one_line_error(tmp_path, monkeypatch):
    bad, text = tmp_path / "bad.json", tmp_path / "a.txt"
    bad.write_text('{"data": [{"title": "T"}]}')
    text.write_text("A")
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 no")
    other = write(tmp_path / "other.jsonl", [{"text": "A", "question": "B"}])
    cases = [
        ({"name": "squat"}, "Unknown dataset 'squat'; choose one of squad, squad_v2, drop"),
        ({}, "Give the name of a dataset, or the path"),
        ({"path": tmp_path / "none.json"}, "there is no such file. Check the path"),
        ({"path": text}, "its suffix is none of .json, .jsonl, .parquet"),
        ({"path": bad}, r"is not in SQuAD's JSON format \(KeyError: 'paragraphs'\)"),
        ({"path": broken, "name": "drop"}, "Could not read .*broken.parquet"),
        ({"path": other, "name": "drop"}, "has no column passage in row 0; it has text, question"),
        ({"path": bad, "split": "dev"}, "Unknown split 'dev'"),
    ]
    for settings, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            _ = QuestionAnswering(**settings).records
        assert "\n" not in str(caught.value)

    def offline(*_, **__):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match="Could not read rajpurkar/squad: ConnectionError: no network. Check"):
        _ = QuestionAnswering(name="squad").records
    assert module.log.name == "hypernet.data.qa" and file_rows is module.file_rows


# Corrupt rows


@pytest.mark.parametrize(
    ("corrupt", "reason"),
    [
        ('{"input": "Text 1.", "prom', "Line 4 is no JSON"),
        (b'{"input": "Text \xff.", "prompt": "Q?", "answer": "A"}', "Line 4 is no JSON .UnicodeDecodeError"),
        ("[1, 2]", "Line 4 is no JSON object"),
        ('{"input": null, "prompt": "Q?", "answer": "A"}', "Row 3 has None as input, not a text"),
        ('{"input": "Text.", "prompt": 7, "answer": "A"}', "Row 3 has 7 as prompt, not a text"),
        ('{"input": "Text.", "prompt": " ", "answer": "A"}', "Row 3 has no question in prompt"),
        ('{"input": "Text.", "prompt": "Q?", "answer": {"text": "A"}}', "Row 3 has .* as answer, not one text or"),
        ('{"input": "Text.", "prompt": "Q?", "answer": ["A", null]}', "Row 3 has None as answer, not a text"),
        ('{"input": "Text \\ud800.", "prompt": "Q?", "answer": "A"}', "Row 3 has half a character in input"),
        ('{"input": "Text.", "answer": "A"}', "has no column prompt in row 3; it has input, answer"),
    ],
)
def test_a_corrupt_row_is_left_out_and_logged(tmp_path, caplog, corrupt, reason):
    path = write(tmp_path / "rows.jsonl", rows_of("pwc", 20))
    intact = {split: QuestionAnswering(split, name="pwc", path=path).records for split in SPLITS}
    assert not caplog.records
    lines = path.read_bytes().split(b"\n")
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_bytes(
        b"\n".join([*lines[:3], corrupt if isinstance(corrupt, bytes) else corrupt.encode(), *lines[3:]])
    )
    for split in SPLITS:
        assert QuestionAnswering(split, name="pwc", path=damaged, max_corrupt_rows=1).records == intact[split]
    logged = [record.getMessage() for record in caplog.records]
    assert len(logged) == 3
    assert all(f"{damaged}: 1 corrupt rows are left out; the first: " in message for message in logged)
    assert re.search(reason, logged[0])
    with pytest.raises(
        ValueError, match=f"has more than 0 corrupt rows; the first: .*{reason}.*raise max_corrupt_rows"
    ):
        _ = QuestionAnswering(name="pwc", path=damaged, max_corrupt_rows=0).records


def test_corrupt_squad_questions_leave_the_others(tmp_path, caplog):
    content = json.loads(json.dumps(SQUAD))
    paragraphs = content["data"][0]["paragraphs"]
    del paragraphs[3]["context"]
    del paragraphs[5]["qas"][0]["question"]
    paragraphs[7]["qas"][0]["answers"] = [{"answer_start": 3}]
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    sources = [QuestionAnswering(split, path=path) for split in SPLITS]
    assert sum(len(source.records) for source in sources) == 39
    questions = [q.text for source in sources for record in source.records for q in record.questions]
    assert questions.count("Which river?") == 37 and questions.count("Who leads it?") == 39
    assert "3 corrupt rows are left out; the first: Paragraph 3 of 'Towns' lacks context or qas" in caplog.text


def test_a_file_of_corrupt_rows_alone_names_the_first_reason(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"input": 1, "prompt": "Q?", "answer": "A"}] * 3)
    with pytest.raises(ValueError, match="has no row that can be used; the first: Row 0 has 1 as input, not a text"):
        _ = QuestionAnswering(name="pwc", path=path).records
