"""Needles in a haystack: what stands where, lengths, splits, chunk counts."""

import pickle
import re

import pytest

from hypernet.data.needles import FILLER, Needles
from hypernet.data.records import UNKNOWN
from hypernet.data.sources import Source, count_tokens
from hypernet.text.chunking import chunk_document

NEEDLE = re.compile(r"^The secret number(?: of (.+))? is (\d{4})\.$")


def planted(record):
    """(sentence's place, name or None, number) of each needle."""
    return [(i, *m.groups()) for i, s in enumerate(record.sentences) if (m := NEEDLE.match(s))]


def test_papers_task_is_one_four_digit_number_in_filler(tiny_tokenizer):
    needles = Needles("train", tokenizer=tiny_tokenizer, num_tokens=(60, 256))
    for index in range(30):
        record = needles.record(index)
        ((place, name, number),) = planted(record)
        (question,) = record.questions
        assert name is None and question == ("What is the secret number?", number, "document", "needle", None)
        assert {s for i, s in enumerate(record.sentences) if i != place} <= set(FILLER)


@pytest.mark.parametrize("filler", ["plain", "encyclopedia"])
@pytest.mark.parametrize("num_tokens", [90, 400, 2000])
def test_document_has_the_tokens_asked_for_or_hardly_fewer(tiny_tokenizer, filler, num_tokens):
    needles = Needles("train", tokenizer=tiny_tokenizer, filler=filler)
    for index in range(5):
        (found,) = count_tokens([needles.record(index, num_tokens=num_tokens).document], tiny_tokenizer)
        assert num_tokens - 80 < found <= num_tokens


def test_needle_length_without_tokenizer_counts_words():
    sizes = [len(Needles(num_tokens=(50, 50)).record(i).document.split()) for i in range(9)]
    assert max(sizes) <= 50 and min(sizes) > 35


def test_needle_lengths_are_known_and_spread_over_the_range(tiny_tokenizer):
    needles = Needles("train", tokenizer=tiny_tokenizer, num_tokens=(60, 256))
    aimed = [needles.num_tokens(i) for i in range(200)]
    assert 60 <= min(aimed) < 75 and 240 < max(aimed) <= 256
    for index in range(20):
        (found,) = count_tokens([needles.record(index).document], tiny_tokenizer)
        assert aimed[index] - 40 < found <= aimed[index]


def test_needle_stands_at_the_depth_or_anywhere_without():
    needles = Needles(num_tokens=(200, 200))
    for depth in (0, 0.25, 0.5, 1):
        record = needles.record(3, depth=depth)
        ((place, _, _),) = planted(record)
        assert place == round(depth * (len(record.sentences) - 1))
    places = [planted(r)[0][0] / (len(r.sentences) - 1) for r in map(needles.record, range(60))]
    assert min(places) < 0.1 and max(places) > 0.9
    with pytest.raises(ValueError, match="depth is 1.5; give a number from 0"):
        needles.record(0, depth=1.5)


def test_depth_keeps_number_and_filler_and_length_adds_filler():
    needles = Needles(num_tokens=(100, 100))
    start, end = needles.record(3, depth=0.0), needles.record(3, depth=1.0)
    assert start.questions == end.questions and start.sentences[1:] == end.sentences[:-1]
    longer = needles.record(3, depth=0.0, num_tokens=300)
    assert longer.sentences[: len(start.sentences)] == start.sentences and longer.questions == start.questions


def test_each_needle_key_has_its_own_question():
    record = Needles(num_tokens=(150, 150), num_keys=(4, 4)).record(5)
    told = {name: number for _, name, number in planted(record)}
    assert len(told) == len(set(told.values())) == 4
    assert {q.text: q.answer for q in record.questions} == {
        f"What is the secret number of {name}?": number for name, number in told.items()
    }


def test_numbers_of_one_key_are_answered_in_document_order():
    record = Needles(num_tokens=(150, 150), num_keys=(2, 2), num_needles=(3, 3)).record(5)
    for question in record.questions:
        name = question.text.removeprefix("What are the secret numbers of ").removesuffix("?")
        assert question.answer == ", ".join(number for _, other, number in planted(record) if other == name)
        assert len(question.answer.split(", ")) == 3
    record = Needles(num_tokens=(150, 150)).record(5, num_needles=2)
    assert record.questions[0].text == "What are the secret numbers?"
    assert record.questions[0].answer == ", ".join(number for _, _, number in planted(record))


def test_splits_share_no_numbers_names_or_filler_order():
    by_split = {}
    for split in ("train", "validation", "test"):
        records = [Needles(split, num_keys=(2, 2), num_tokens=(80, 80)).record(i) for i in range(150)]
        needles = [needle for record in records for needle in planted(record)]
        assert len(needles) == 300
        by_split[split] = {word for _, name, number in needles for word in (name, number)} | {
            tuple(s for s in record.sentences if not NEEDLE.match(s)) for record in records
        }
    train, validation, test = by_split.values()
    assert not train & validation and not train & test and not validation & test


def test_needle_record_depends_on_index_and_seed_only(tiny_tokenizer):
    needles = Needles("train", tokenizer=tiny_tokenizer, num_keys=(1, 3), filler="encyclopedia")
    records = [needles.record(i) for i in range(6)]
    assert len({record.document for record in records}) == 6
    again = pickle.loads(pickle.dumps(needles))
    assert [again.record(i) for i in (4, 1)] == [records[4], records[1]]
    assert Needles("train", seed=1, tokenizer=tiny_tokenizer, num_keys=(1, 3)).record(0) != records[0]


@pytest.mark.parametrize(("num_chunks", "size"), [(1, 60), (2, 100), (5, 60), (40, 128), (128, 100)])
def test_needle_document_has_given_number_of_chunks(tiny_tokenizer, num_chunks, size):
    needles = Needles("test", tokenizer=tiny_tokenizer)
    record = needles.record(2, num_chunks=num_chunks, max_chunk_tokens=size, depth=0.5)
    assert len(chunk_document(record.document, tiny_tokenizer, max_chunk_tokens=size).ids) == num_chunks
    ((place, _, _),) = planted(record)
    assert abs(place / len(record.sentences) - 0.5) < 0.1 or num_chunks < 3


def test_needles_refuse_invalid_settings(tiny_tokenizer):
    with pytest.raises(ValueError, match="num_chunks needs max_chunk_tokens, and a tokenizer"):
        Needles().record(0, num_chunks=3, max_chunk_tokens=50)
    with pytest.raises(ValueError, match="Found no haystack of 1 chunks of 10 tokens; the last had"):
        Needles(tokenizer=tiny_tokenizer).record(0, num_chunks=1, max_chunk_tokens=10)
    with pytest.raises(ValueError, match="Unknown filler 'essays'; choose one of plain, encyclopedia"):
        Needles(filler="essays")
    with pytest.raises(ValueError, match="holds no sentences, or empty ones"):
        Needles(filler=["A.", ""])
    with pytest.raises(ValueError, match="Unknown split 'dev'"):
        Needles("dev")


def test_needle_filler_can_be_a_list_of_sentences():
    record = Needles(filler=["It hums.", "It rings."], num_tokens=(40, 40)).record(0)
    assert {s for s in record.sentences if not NEEDLE.match(s)} == {"It hums.", "It rings."}


def test_cross_document_question_is_about_an_unmentioned_name():
    needles = Needles(num_keys=(2, 2))
    assert isinstance(needles, Source)
    record = needles.record(0)
    question = needles.cross_document(needles._rng("test"), record)
    name = re.fullmatch(r"What is the secret number of (.+)\?", question.text)[1]
    assert name not in record.document and (question.answer, question.kind) == (UNKNOWN, "cross_document")
