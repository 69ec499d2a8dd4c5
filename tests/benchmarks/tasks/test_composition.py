"""benchmarks/tasks/composition.py: the same articles and questions in every set, only joined with more."""

from collections import Counter

import pytest

from benchmarks.tasks.composition import CompositionTask


def test_composition_sets_share_articles_and_questions() -> None:
    task = CompositionTask(num_documents=[1, 2, 4], num_cases=3)
    sets: dict[int, list] = {}
    for case in task.cases(0):
        sets.setdefault(case.attributes["num_documents"], []).append(case)
    assert {size: len(cases) for size, cases in sets.items()} == {1: 12, 2: 6, 4: 3}
    expected = Counter(question for case in sets[1] for question in case.questions)
    for size, cases in sets.items():
        assert all(len(case.documents) == size and len(case.others) == size for case in cases)
        assert Counter(question for case in cases for question in case.questions) == expected
        assert [d for case in cases for d in case.documents] == [case.documents[0] for case in sets[1]]


def test_every_document_is_asked_about_and_has_its_own_entities() -> None:
    cases = list(CompositionTask(num_documents=[4], num_cases=30, questions_per_document=2).cases(0))
    for case in cases:
        for document in case.documents:
            assert any(question.answers[0].lower() in document.lower() for question in case.questions)
        assert len(case.questions) == 8
    # One entity would be asked about in the same words by two cases sooner or later.
    texts = [question.text for case in cases for question in case.questions]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("sizes", [[2, 3], [0, 4], []])
def test_composition_refuses_uneven_group_sizes(sizes) -> None:
    with pytest.raises(ValueError, match="each must divide the largest"):
        CompositionTask(num_documents=sizes, num_cases=1)
