"""study: what is stored against plain prompts, restarting, dividing the work, reading a stream."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from hypernet.base.base_model import load_base_model
from hypernet.base.generation import generate_text
from hypernet.data.self_study import study as module
from hypernet.data.self_study.engines import TransformersEngine
from hypernet.data.self_study.settings import StudySettings
from hypernet.data.self_study.shards import read_provenance, read_shard
from hypernet.data.self_study.study import clean_question, study
from hypernet.text.chat import ChatLayout


def rows_of(shards):
    return [row for shard in shards for row in pq.read_table(shard).to_pylist()]


# What is stored


def test_answers_are_greedy_and_stored_with_their_probabilities(studied, engine):
    rows = rows_of(studied[1])
    layout = ChatLayout.of(engine.tokenizer)
    assert len(rows) > 2 * len(studied[1])
    for row in rows[::17]:
        prompt = layout.prompt(row["question"], row["document"])
        ids, answer = engine.tokenizer(prompt, add_special_tokens=False)["input_ids"], row["answer_ids"]
        greedy = generate_text(engine.base_model, engine.tokenizer, [ids], max_new_tokens=5)
        assert greedy == [row["answer"]]
        with torch.no_grad():
            logits = engine.base_model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
        log_probs, indices = logits.log_softmax(-1).topk(4)
        assert row["top_indices"] == indices.flatten().tolist()
        torch.testing.assert_close(torch.tensor(row["top_log_probs"]).view(-1, 4), log_probs, atol=1e-4, rtol=1e-4)
        assert indices[:, 0].tolist() == answer


def test_chunks_cover_the_texts_and_name_their_sources(studied, notes, settings, engine):
    rows = rows_of(studied[1])
    assert {row["source"] for row in rows} <= {path.name for path in notes.iterdir()}
    for row in rows:
        data = (notes / row["source"]).read_bytes()
        assert row["source_sha256"] == hashlib.sha256(data).hexdigest()
        assert data.decode()[row["start"] : row["end"]].strip() == row["document"] and 0 < row["num_tokens"] <= 40
    passages = list(module._passages(studied[0], engine.tokenizer))
    for path in notes.iterdir():
        spans = sorted(p.span for p in passages if p.document.name == path.name)
        assert spans[0][0] == 0 and all(a[1] == b[0] for a, b in zip(spans, spans[1:], strict=False))


def test_shard_holds_its_provenance(studied, engine, notes):
    found = read_provenance(studied[1][0])
    assert found["base_model_fingerprint"] == found["questions_by_fingerprint"] == engine.fingerprint
    assert found["settings"]["seed"] == 0 and found["settings"]["top_k"] == 4 and found["prompts"]
    assert set(found["sources"]) <= {path.name for path in notes.iterdir()}
    assert json.dumps(found).count(studied[0].output_dir) == 0


def test_self_study_seed_decides_the_questions(settings, engine, studied):
    again, other = settings(max_documents=2), settings(max_documents=2, seed=1)
    first = [rows_of(study(s, answerer=engine)) for s in (again, settings(max_documents=2), other)]
    assert first[0] == first[1] != first[2]
    sampled = rows_of(study(settings(max_documents=2, answer_temperature=1.5), answerer=engine))
    assert [row["question"] for row in sampled] == [row["question"] for row in first[0]]
    assert [row["answer_ids"] for row in sampled] != [row["answer_ids"] for row in first[0]]


def test_self_study_questions_can_come_from_another_model(settings, engine, tiny_base_model_folder):
    base_model, tokenizer = load_base_model(tiny_base_model_folder)
    with torch.no_grad():
        base_model.lm_head.weight.mul_(1.5)
    asker = TransformersEngine(base_model, tokenizer)
    (shard, *_) = study(settings(max_documents=3), answerer=engine, asker=asker)
    assert read_provenance(shard)["questions_by_fingerprint"] == asker.fingerprint != engine.fingerprint


def test_self_study_questions_are_cleaned():
    assert clean_question('\n 1. "Who leads it?"\nBecause') == "Who leads it?"
    assert clean_question("**\n") == clean_question("  \n ") == ""


# Questions that are given


GIVEN = [
    ("Norbach was founded by Ilda Renwick.", "Who founded Norbach?", ["Ilda Renwick", "Renwick"]),
    ("Norbach was founded by Ilda Renwick.", "Who sold Norbach?", []),
    ("Norbach was founded by Ilda Renwick.", "What is Norbach?", ["a town"]),
    ("Elmouth lies on the Vel. " * 40, "Where does Elmouth lie?", ["on the Vel"]),  # too long
    ("Elmouth lies on the Vel.", "Where does Elmouth lie?", ["on the Vel"]),
]


@pytest.fixture
def questions(tmp_path):
    """The path of a file in the columns of SQuAD 2.0."""
    path = tmp_path / "questions.jsonl"
    rows = [{"context": text, "question": asked, "answers": {"text": right}} for text, asked, right in GIVEN]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_given_questions_are_answered_as_they_are(settings, engine, questions):
    (shard,) = study(settings(documents="", questions=str(questions), kept_answers="all"), answerer=engine)
    rows = rows_of([shard])
    assert [(row["document"], row["question"], row["kind"]) for row in rows] == [
        (GIVEN[0][0], "Who founded Norbach?", "document"),
        (GIVEN[0][0], "What is Norbach?", "document"),
        (GIVEN[0][0], "Who sold Norbach?", "unanswerable"),
        (GIVEN[4][0], "Where does Elmouth lie?", "document"),
    ]
    layout = ChatLayout.of(engine.tokenizer)
    for row in rows:  # what has no answer in the text is asked without it
        prompt = layout.prompt(row["question"], None if row["kind"] == "unanswerable" else row["document"])
        ids = engine.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert generate_text(engine.base_model, engine.tokenizer, [ids], max_new_tokens=5) == [row["answer"]]
        with torch.no_grad():
            logits = engine.base_model(torch.tensor([ids + row["answer_ids"]])).logits[0, len(ids) - 1 : -1]
        log_probs, indices = logits.log_softmax(-1).topk(4)
        assert row["top_indices"] == indices.flatten().tolist()
        torch.testing.assert_close(torch.tensor(row["top_log_probs"]).view(-1, 4), log_probs, atol=1e-4, rtol=1e-4)
    records, wrong = read_shard(shard)
    assert not wrong and [q.kind for q in records[0].questions] == ["document", "document", "unanswerable"]


def test_answers_that_miss_the_given_one_are_left_out(settings, engine, questions, monkeypatch):
    said = {"Who founded Norbach?": "it was RENWICK.", "What is Norbach?": "atown", "Where does Elmouth lie?": "on the"}

    def write(prompts, **_):
        texts = [next((a for q, a in said.items() if q in engine.tokenizer.decode(prompt)), "x") for prompt in prompts]
        return [engine.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    monkeypatch.setattr(engine, "write", write)
    (shard,) = study(settings(documents="", questions=str(questions)), answerer=engine)
    assert [row["question"] for row in rows_of([shard])] == ["Who founded Norbach?", "Who sold Norbach?"]


# Shards


def test_second_run_makes_only_the_missing_shards(settings, engine):
    made = settings(max_documents=3, chunks_per_shard=3)
    shards = study(made, answerer=engine)
    assert len(shards) > 2 and study(made, answerer=engine) == []
    before = rows_of(shards)
    shards[1].unlink()
    assert study(made, answerer=engine) == [shards[1]] and rows_of(shards) == before


def test_failing_shard_leaves_no_file(settings, engine, monkeypatch):
    made = settings(max_documents=4, chunks_per_shard=4)
    real = engine.top_k
    calls = []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 6:
            raise RuntimeError("crash")
        return real(*arguments)

    monkeypatch.setattr(engine, "top_k", failing)
    with pytest.raises(RuntimeError, match="crash"):
        study(made, answerer=engine)
    found = list(Path(made.output_dir).iterdir())
    assert [path.name for path in found] == ["shard-00000.parquet"]
    monkeypatch.undo()
    assert study(made, answerer=engine)[0].name == "shard-00001.parquet"


def test_self_study_processes_divide_the_shards(settings, engine):
    alone = settings(max_documents=3, chunks_per_shard=3)
    together = settings(max_documents=3, chunks_per_shard=3, num_processes=2, process_index=1, batch_size=3)
    shards = study(alone, answerer=engine)
    second = study(together, answerer=engine)
    assert [path.name for path in second] == [path.name for path in shards[1::2]]
    assert rows_of(second) == rows_of(shards[1::2])


def test_self_study_refuses_shards_of_another_run(settings, engine, tmp_path):
    made = settings(max_documents=2)
    study(made, answerer=engine)
    other = settings(max_documents=2, output_dir=made.output_dir, top_k=3)
    with pytest.raises(ValueError, match="was made otherwise: settings, top_k differ. Name another output_dir"):
        study(other, answerer=engine)
    (tmp_path / "shard-00000.parquet").write_bytes(b"PAR1 half")
    with pytest.raises(ValueError, match="is no complete shard of self-study .*Remove it"):
        study(settings(max_documents=2, output_dir=str(tmp_path)), answerer=engine)


# A stream from the hub


def test_stream_rows_without_text_are_skipped(monkeypatch):
    import datasets

    rows = [{"text": "A."}, {"text": None}, {"text": "B."}, {"text": 3}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter(rows))
    settings = StudySettings(output_dir="a", base_model="b", dataset="some/texts", max_corrupt_rows=2)
    assert [document.text for document in module._documents(settings)] == ["A.", "B."]
    assert "max_corrupt_rows" not in settings.described()
    settings = dataclasses.replace(settings, max_corrupt_rows=1)
    expected = "some/texts has more than 1 corrupt rows; the first: Row 1 has None as text, not a text. Mend the data"
    with pytest.raises(ValueError, match=expected):
        list(module._documents(settings))


def test_self_study_streams_a_dataset(monkeypatch):
    import datasets

    calls = []

    def load_dataset(*names, **settings):
        calls.append((names, settings))
        return iter([{"text": "A b."}, {"text": " "}, {"text": "C d."}, {"text": "E f."}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = {"dataset": "some/texts", "dataset_config": "small", "max_documents": 2}
    settings = StudySettings(output_dir="a", base_model="b", **source)
    found = [(document.name, document.text) for document in module._documents(settings)]
    assert found == [("some/texts/0", "A b."), ("some/texts/2", "C d.")]
    assert calls == [(("some/texts", "small"), {"split": "train", "streaming": True})]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter([{"body": "A"}]))
    with pytest.raises(ValueError, match="Could not read some/texts: KeyError: 'text'. Check the name, dataset_column"):
        list(module._documents(settings))
