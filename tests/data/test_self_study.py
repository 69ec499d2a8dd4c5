"""Self-study: what is stored against plain prompts, shards, restarting, dividing the work, reading back."""

import dataclasses
import json
import random
import re
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import hypernet.data.self_study as module
from hypernet.base.base_model import generate_text, load_base_model
from hypernet.data.batches import DistillationBatches
from hypernet.data.curriculum import Curriculum
from hypernet.data.encyclopedia import Encyclopedia
from hypernet.data.records import UNKNOWN
from hypernet.data.self_study import (
    SelfStudy,
    StudySettings,
    TransformersEngine,
    clean_question,
    main,
    parse,
    read_provenance,
    study,
)
from hypernet.data.sources import Source
from hypernet.text.chat import ChatLayout
from hypernet.training.losses import context_distillation_kl, context_distillation_kl_topk

NUM_DOCUMENTS = 10


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    """A folder of texts."""
    folder = tmp_path_factory.mktemp("notes")
    for i in range(NUM_DOCUMENTS):
        text = Encyclopedia("train").record(i, num_facts=6).document
        (folder / f"{i:02}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def engine(tiny_base_model_folder):
    return TransformersEngine(*load_base_model(tiny_base_model_folder), batch_size=64)


@pytest.fixture(scope="module")
def settings(notes, tiny_base_model_folder, tmp_path_factory):
    """settings(**changes)"""

    def make(**changes):
        values = {
            "output_dir": str(tmp_path_factory.mktemp("study")),
            "base_model": str(tiny_base_model_folder),
            "documents": str(notes),
            "questions_per_chunk": 2,
            "max_chunk_tokens": 40,
            "max_question_tokens": 6,
            "max_answer_tokens": 5,
            "top_k": 4,
            "chunks_per_shard": 8,
        }
        return StudySettings(**{**values, **changes})

    return make


@pytest.fixture(scope="module")
def studied(settings, engine):
    """(settings, shards) of one run."""
    made = settings()
    return made, study(made, answerer=engine)


def rows_of(shards):
    return [row for shard in shards for row in pq.read_table(shard).to_pylist()]


# What is stored


def test_every_answer_is_greedy_and_stored_with_the_base_model_s_own_probabilities(studied, engine):
    rows = rows_of(studied[1])
    layout = ChatLayout.of(engine.tokenizer)
    assert len(rows) > 2 * len(studied[1])
    for row in rows[::17]:
        prompt = layout.prompt(row["question"], row["document"])
        greedy = generate_text(engine.base_model, engine.tokenizer, [prompt], max_new_tokens=5)
        assert greedy == [row["answer"]]
        ids, answer = engine.tokenizer(prompt, add_special_tokens=False)["input_ids"], row["answer_ids"]
        with torch.no_grad():
            logits = engine.base_model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
        log_probs, indices = logits.log_softmax(-1).topk(4)
        assert row["top_indices"] == indices.flatten().tolist()
        torch.testing.assert_close(torch.tensor(row["top_log_probs"]).view(-1, 4), log_probs, atol=1e-4, rtol=1e-4)
        assert indices[:, 0].tolist() == answer


def test_chunks_cover_the_texts_and_each_says_where_it_is_from(studied, notes, settings, engine):
    import hashlib

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


def test_a_shard_holds_its_provenance(studied, engine, notes):
    found = read_provenance(studied[1][0])
    assert found["base_model_fingerprint"] == found["questions_by_fingerprint"] == engine.fingerprint
    assert found["settings"]["seed"] == 0 and found["settings"]["top_k"] == 4 and found["prompts"]
    assert set(found["sources"]) <= {path.name for path in notes.iterdir()}
    assert json.dumps(found).count(studied[0].output_dir) == 0


def test_the_seed_decides_what_is_asked(settings, engine, studied):
    again, other = settings(max_documents=2), settings(max_documents=2, seed=1)
    first = [rows_of(study(s, answerer=engine)) for s in (again, settings(max_documents=2), other)]
    assert first[0] == first[1] != first[2]
    sampled = rows_of(study(settings(max_documents=2, answer_temperature=1.5), answerer=engine))
    assert [row["question"] for row in sampled] == [row["question"] for row in first[0]]
    assert [row["answer_ids"] for row in sampled] != [row["answer_ids"] for row in first[0]]


def test_another_model_can_ask(settings, engine, tiny_base_model_folder):
    base_model, tokenizer = load_base_model(tiny_base_model_folder)
    with torch.no_grad():
        base_model.lm_head.weight.mul_(1.5)
    asker = TransformersEngine(base_model, tokenizer)
    (shard, *_) = study(settings(max_documents=3), answerer=engine, asker=asker)
    assert read_provenance(shard)["questions_by_fingerprint"] == asker.fingerprint != engine.fingerprint


def test_questions_are_cleaned_of_what_models_put_around_them():
    assert clean_question('\n 1. "Who leads it?"\nBecause') == "Who leads it?"
    assert clean_question("**\n") == clean_question("  \n ") == ""


# Shards


def test_run_again_it_makes_only_what_is_missing_and_the_same(settings, engine):
    made = settings(max_documents=3, chunks_per_shard=3)
    shards = study(made, answerer=engine)
    assert len(shards) > 2 and study(made, answerer=engine) == []
    before = rows_of(shards)
    shards[1].unlink()
    assert study(made, answerer=engine) == [shards[1]] and rows_of(shards) == before


def test_a_shard_that_fails_leaves_nothing_behind(settings, engine, monkeypatch):
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
    found = list(module.Path(made.output_dir).iterdir())
    assert [path.name for path in found] == ["shard-00000.parquet"]
    monkeypatch.undo()
    assert study(made, answerer=engine)[0].name == "shard-00001.parquet"


def test_processes_divide_the_shards(settings, engine):
    alone = settings(max_documents=3, chunks_per_shard=3)
    together = settings(max_documents=3, chunks_per_shard=3, num_processes=2, process_index=1, batch_size=3)
    shards = study(alone, answerer=engine)
    second = study(together, answerer=engine)
    assert [path.name for path in second] == [path.name for path in shards[1::2]]
    assert rows_of(second) == rows_of(shards[1::2])


def test_shards_of_another_run_are_refused(settings, engine, tmp_path):
    made = settings(max_documents=2)
    study(made, answerer=engine)
    other = settings(max_documents=2, output_dir=made.output_dir, top_k=3)
    with pytest.raises(ValueError, match="was made otherwise: settings, top_k differ. Name another output_dir"):
        study(other, answerer=engine)
    (tmp_path / "shard-00000.parquet").write_bytes(b"PAR1 half")
    with pytest.raises(ValueError, match="is no complete shard of self-study .*Remove it"):
        study(settings(max_documents=2, output_dir=str(tmp_path)), answerer=engine)


# Reading back


def test_every_passage_of_a_split_comes_once_each_time_round(studied, tiny_tokenizer):
    settings, shards = studied
    found = {}
    for split in ("train", "validation", "test"):
        try:
            source = SelfStudy(split, path=settings.output_dir, tokenizer=tiny_tokenizer)
            size = len(source._index)
        except ValueError as error:
            assert "is in the" in str(error)  # ten texts need not reach every split
            continue
        epochs = [[source.record(epoch * size + i).document for i in range(size)] for epoch in range(2)]
        assert sorted(epochs[0]) == sorted(epochs[1]) and len(set(epochs[0])) == size
        assert size < 4 or epochs[0] != epochs[1]
        found[split] = set(epochs[0])
        assert isinstance(source, Source) and 0 < source.num_tokens(size + 1) <= 40
        again = SelfStudy(split, path=settings.output_dir)
        assert again.record(size + 1).document == epochs[1][1 % size] if size > 1 else True
    assert found["train"] and set.union(*found.values()) == {row["document"] for row in rows_of(shards)}
    assert sum(map(len, found.values())) == len(set.union(*found.values()))


def test_a_stage_trains_on_the_stored_probabilities(studied, engine, tiny_tokenizer):
    """From parquet to the loss: what was stored is what the teacher would say now."""
    settings, _ = studied
    source = SelfStudy("train", path=settings.output_dir, tokenizer=tiny_tokenizer)
    stage = {"steps": 2, "batch_size": 3, "source": "study", "num_background": 1}
    curriculum = Curriculum(Encyclopedia("train"), [stage], sources={"study": source})
    batch = DistillationBatches(curriculum, tiny_tokenizer, max_chunk_tokens=50)[1]
    student, stored = batch.student, batch.stored
    is_answer = student.target_kind >= 0
    where = stored.where[is_answer]
    assert where.any() and not where.all()  # background questions have no stored teacher
    with torch.no_grad():
        teacher = module.packed_logits(engine.base_model, batch.teacher, batch.teacher.target_kind >= 0)
        plain = module.packed_logits(engine.base_model, student, is_answer)
    log_probs, indices = teacher[where].log_softmax(-1).topk(4)
    assert torch.equal(stored.indices[is_answer][where].long(), indices)
    torch.testing.assert_close(stored.log_probs[is_answer][where], log_probs, atol=1e-4, rtol=1e-4)
    whole = context_distillation_kl(plain[where], teacher[where])
    # This model is so unsure that most of a distribution is not in what was stored.
    kept = stored.indices[is_answer][where], stored.log_probs[is_answer][where]
    kl = context_distillation_kl_topk(plain[where], *kept)
    assert (0 < kl).all() and (kl <= whole).all()
    log_probs, indices = teacher[where].log_softmax(-1).topk(teacher.shape[-1])
    torch.testing.assert_close(context_distillation_kl_topk(plain[where], indices, log_probs), whole)


def test_foreign_questions_come_from_other_passages_without_a_stored_answer(studied):
    source = SelfStudy("train", path=studied[0].output_dir)
    record = source.record(0)
    question = source.cross_document(random.Random(0), record)
    assert (question.kind, question.answer, question.stored) == ("cross_document", UNKNOWN, None)


def test_what_cannot_be_read_back_is_refused(studied, tmp_path, engine):
    with pytest.raises(ValueError, match="No shards in .*Make them: python -m hypernet.data.self_study"):
        SelfStudy(path=tmp_path).record(0)
    with pytest.raises(ValueError, match="Unknown split 'dev'"):
        SelfStudy("dev", path=tmp_path)
    other = load_base_model(studied[0].base_model)[1]
    other.add_tokens(["new"])
    with pytest.raises(ValueError, match="was stored with the tokenizer of .*whose ids mean other tokens"):
        SelfStudy(path=studied[0].output_dir, tokenizer=other).record(0)


# Corrupt rows


def damaged_copy(shards, folder, change):
    """The shards again, with change(rows) done to each one's rows."""
    folder.mkdir(exist_ok=True)
    for shard in shards:
        table = pq.read_table(shard)
        rows = table.to_pylist()
        change(rows)
        schema = table.schema
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / shard.name)
    return folder


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ({"question": None}, "has no question"),
        ({"document": ""}, "has no document"),
        ({"answer_ids": []}, "has no answer_ids"),
        ({"top_indices": [1, 2, None]}, "has gaps in its tokens"),
        ({"top_indices": [1, 2, 3]}, r"has 3 tokens with \d+ probabilities for an answer of \d tokens"),
        ({"answer_ids": [-5]}, "has a negative token"),
        ({"top_log_probs": [float("nan")] * 4, "top_indices": [1, 2, 3, 4], "answer_ids": [1]}, "probabilities that"),
        ({"top_log_probs": [0.5, -1, -2, -3], "top_indices": [1, 2, 3, 4], "answer_ids": [1]}, "probabilities that"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_corrupt_answer_is_left_out_and_told(studied, tmp_path, caplog, damage, reason):
    settings, shards = studied
    intact = SelfStudy("train", path=settings.output_dir)
    size = len(intact._index)
    number, _, _ = intact._index[intact._place(2)]
    document, question = intact.record(2).document, intact.record(2).questions[0].text

    def change(rows):
        for row in rows:
            if (row["document"], row["question"]) == (document, question):
                row.update(damage)

    source = SelfStudy("train", path=damaged_copy(shards, tmp_path / "damaged", change), max_corrupt_rows=1)
    for index in range(2 * size):
        expected, found = intact.record(index), source.record(index)
        if expected.document != document:
            assert found.document == expected.document and len(found.questions) == len(expected.questions)
        else:
            assert question not in [q.text for q in found.questions]
    (told,) = caplog.messages  # once, however often the shard is read
    assert "1 corrupt rows are left out; the first: Row" in told and f"of {shards[number].name}" in told
    assert re.search(reason, told)
    strict = SelfStudy("train", path=source.path, max_corrupt_rows=0)
    with pytest.raises(ValueError, match=f"has more than 0 corrupt rows; the first: Row .*{reason}"):
        for index in range(size):
            strict.record(index)


def test_a_passage_without_answers_gives_its_place_to_the_next(studied, tmp_path):
    settings, shards = studied
    intact = SelfStudy("train", path=settings.output_dir)
    gone = intact.record(0).document

    def change(rows):
        for row in rows:
            if row["document"] == gone:
                row["question"] = None

    folder = damaged_copy(shards, tmp_path / "damaged", change)
    sources = [SelfStudy("train", path=folder) for _ in range(2)]
    order = list(range(len(intact._index)))
    found = [sources[0].record(i).document for i in order]
    assert found == [sources[1].record(i).document for i in reversed(order)][::-1]
    assert gone not in found and set(found) == {intact.record(i).document for i in order} - {gone}
    assert all(sources[0].cross_document(random.Random(i), intact.record(0)).text for i in range(20))


def test_shards_of_corrupt_answers_alone_are_refused(studied, tmp_path):
    def change(rows):
        for row in rows:
            row["question"] = ""

    source = SelfStudy("train", path=damaged_copy(studied[1], tmp_path / "damaged", change))
    with pytest.raises(ValueError, match="has no passage that can be used. Remove its shards, make them again."):
        source.record(0)


def test_a_damaged_shard_says_which_one(studied, tmp_path):
    folder = damaged_copy(studied[1], tmp_path / "damaged", lambda rows: None)
    source = SelfStudy("train", path=folder)
    size = len(source._index)
    for shard in folder.iterdir():
        content = shard.read_bytes()
        shard.write_bytes(content[:40] + bytes(len(content) - 240) + content[-200:])
    with pytest.raises(ValueError, match="shard-0000.*parquet is damaged .*Remove it, make it again"):
        for index in range(size):
            source.record(index)


def test_rows_of_a_stream_without_a_text_are_left_out(monkeypatch):
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


# The command


def test_the_command_makes_shards_and_says_so(notes, tiny_base_model_folder, tmp_path, capsys):
    given = [f"documents={notes}", f"base_model={tiny_base_model_folder}", f"output_dir={tmp_path}"]
    given += ["max_documents=1", "max_chunk_tokens=40", "max_answer_tokens=3", "max_question_tokens=4"]
    main(given)
    assert "1 shards made" in capsys.readouterr().out and list(tmp_path.glob("shard-*.parquet"))


def test_help_names_every_setting(capsys):
    main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n  {field.name}=" in text for field in module.dataclasses.fields(StudySettings))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["output_dir=a", "documents=b"], "base_model is missing"),
        (["output_dir=a", "base_model=b"], "Give either documents= .* or dataset="),
        (["output_dir=a", "base_model=b", "documents=c", "top_k=0"], "top_k should be at least 1, got 0"),
        (["output_dir=a", "base_model=b", "documents=c", "top_k=x"], "top_k should be a whole number, got 'x'"),
        (["output_dir=a", "base_model=b", "documents=c", "process_index=1"], "counts from 0 to num_processes - 1"),
        (["output_dir=a", "base_model=b", "documents=c", "engine=x"], "Unknown engine 'x'"),
        (["folder=a"], "Cannot read 'folder=a': settings are key=value with output_dir"),
        (["seed=1", "seed=2"], "seed is given twice"),
    ],
)
def test_wrong_settings_are_refused_with_what_to_do(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse(arguments)
    with pytest.raises(SystemExit, match="self_study: "):
        main(arguments)


def test_a_dataset_is_read_as_a_stream(monkeypatch):
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


def test_without_vllm_its_engine_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed, whether it is or not
    with pytest.raises(ValueError, match="engine=vllm needs vLLM, which is not installed: pip install vllm"):
        module.VllmEngine("any")
