"""benchmarks/tasks/needles.py: haystacks of just so many chunks with the needle where it is said to be."""

import re

import pytest

from benchmarks.tasks.needles import NeedlesTask
from hypernet.text.chunking import chunk_document
from hypernet.text.sentences import split_sentences


@pytest.fixture
def make(make_doc_to_lora):
    def make(**changes) -> NeedlesTask:
        settings = {"num_chunks": [1, 2, 5], "depths": [0, 0.5, 1], "num_cases": 6, **changes}
        return NeedlesTask(model=make_doc_to_lora(max_chunk_tokens=100), **settings)

    return make


def test_needle_sets_have_the_given_number_of_chunks(make) -> None:
    task = make()
    cases = list(task.cases(0))
    assert [case.set for case in cases] == ["1 chunk"] * 6 + ["2 chunks"] * 6 + ["5 chunks"] * 6
    for case in cases:
        chunks = chunk_document(case.documents[0], task.model.tokenizer, max_chunk_tokens=100)
        assert case.attributes["num_chunks"] == len(chunks.ids)
        assert case.attributes["num_tokens"] == chunks.num_tokens
        assert str(len(chunks.ids)) in case.set


def test_needle_stands_at_its_depth(make) -> None:
    for case in make().cases(0):
        document = case.documents[0]
        sentences = [document[start:end] for start, end in split_sentences(document)]
        (place,) = [i for i, sentence in enumerate(sentences) if case.questions[0].answers[0] in sentence]
        assert place / (len(sentences) - 1) == pytest.approx(case.attributes["depth"], abs=0.5 / (len(sentences) - 1))


def test_needle_is_the_same_at_every_filler_length(make) -> None:
    by_case: dict[str, set] = {}
    for case in make().cases(0):
        by_case.setdefault(case.name, set()).add((case.questions, case.attributes["depth"]))
    assert len(by_case) == 6 and all(len(found) == 1 for found in by_case.values())
    assert len({next(iter(found))[0] for found in by_case.values()}) > 1


def test_several_keys_are_each_asked_for(make) -> None:
    for case in make(num_chunks=[4], num_keys=4, filler="encyclopedia").cases(0):
        assert len({question.text for question in case.questions}) == 4
        for question in case.questions:
            name = re.fullmatch(r"What is the secret number of (.+)\?", question.text)[1]
            assert f"The secret number of {name} is {question.answers[0]}." in case.documents[0]
    (case, *_) = make(num_chunks=[4], num_keys=4, max_questions=2).cases(0)
    assert len(case.questions) == 2


def test_wrong_document_lacks_the_needle(make) -> None:
    for case in make().cases(0):
        assert not any(question.answers[0] in case.others[0] for question in case.questions)


def test_impossible_haystacks_are_refused_before_measuring(make) -> None:
    with pytest.raises(ValueError, match="depths is .0.5, 2.; give numbers from 0"):
        make(depths=[0.5, 2])
    with pytest.raises(ValueError, match="Unknown filler 'filler'"):
        make(filler="filler")
    with pytest.raises(ValueError, match="Unknown split 'exam'"):
        make(split="exam")
