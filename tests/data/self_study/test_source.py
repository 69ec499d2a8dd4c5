"""SelfStudy: every passage of a split, training on what is stored, what cannot be read, corrupt rows."""

import random
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hypernet.base.base_model import load_base_model
from hypernet.base.packed_attention import packed_logits
from hypernet.data.batches import DistillationBatches
from hypernet.data.curriculum import Curriculum
from hypernet.data.encyclopedia import Encyclopedia
from hypernet.data.records import UNKNOWN
from hypernet.data.self_study.source import SelfStudy
from hypernet.data.sources import Source
from hypernet.training.losses import context_distillation_kl, context_distillation_kl_topk


def rows_of(shards):
    return [row for shard in shards for row in pq.read_table(shard).to_pylist()]


def test_every_passage_of_a_split_comes_once_an_epoch(studied, tiny_tokenizer):
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


def test_stage_trains_on_stored_probabilities(studied, engine, tiny_tokenizer):
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
        teacher = packed_logits(engine.base_model, batch.teacher, batch.teacher.target_kind >= 0)
        plain = packed_logits(engine.base_model, student, is_answer)
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


def test_cross_document_questions_have_no_stored_answer(studied):
    source = SelfStudy("train", path=studied[0].output_dir)
    record = source.record(0)
    question = source.cross_document(random.Random(0), record)
    assert (question.kind, question.answer, question.stored) == ("cross_document", UNKNOWN, None)


def test_self_study_refuses_missing_or_incompatible_shards(studied, tmp_path, engine):
    with pytest.raises(ValueError, match="No shards in .*Make them: hypernet self-study --help"):
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
def test_corrupt_stored_answer_is_skipped_with_warning(studied, tmp_path, caplog, damage, reason):
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


def test_passage_without_answers_gives_way_to_the_next(studied, tmp_path):
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


def test_shards_with_only_corrupt_answers_are_refused(studied, tmp_path):
    def change(rows):
        for row in rows:
            row["question"] = ""

    source = SelfStudy("train", path=damaged_copy(studied[1], tmp_path / "damaged", change))
    with pytest.raises(ValueError, match="has no passage that can be used. Remove its shards, make them again."):
        source.record(0)


def test_damaged_shard_is_named(studied, tmp_path):
    folder = damaged_copy(studied[1], tmp_path / "damaged", lambda rows: None)
    source = SelfStudy("train", path=folder)
    size = len(source._index)
    for shard in folder.iterdir():
        content = shard.read_bytes()
        shard.write_bytes(content[:40] + bytes(len(content) - 240) + content[-200:])
    with pytest.raises(ValueError, match="shard-0000.*parquet is damaged .*Remove it, make it again"):
        for index in range(size):
            source.record(index)
