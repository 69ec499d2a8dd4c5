"""benchmarks/tasks/question_answering.py: whole files, every annotator's answer, one line where there is no dataset."""

import json

import datasets
import pytest

from benchmarks.tasks.question_answering import QuestionAnsweringTask


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_accepted_answers_count_and_all_questions_are_asked(tmp_path) -> None:
    rows = [{"context": f"Paper {i}.", "input": f"Which {i}?", "answers": [f"one {i}", f"1 {i}"]} for i in range(30)]
    path = tmp_path / "qasper.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    cases = list(QuestionAnsweringTask(name="qasper", path=str(path), num_cases=None).cases(0))
    assert {case.documents[0]: case.questions[0].answers for case in cases} == {
        f"Paper {i}.": (f"one {i}", f"1 {i}") for i in range(30)
    }
    assert {case.set for case in cases} == {"qasper"}
    few = list(QuestionAnsweringTask(name="qasper", path=str(path), num_cases=4).cases(0))
    assert len(few) == 4 and {case.name for case in few} < {case.name for case in cases}
    assert all(case.name == case.documents[0].split()[1].rstrip(".") for case in few)  # its place in the dataset


def test_qa_set_without_dataset_has_the_file_name(tmp_path) -> None:
    content = {"data": [{"paragraphs": [{"context": "A.", "qas": [{"question": "B?", "answers": [{"text": "C"}]}]}]}]}
    path = tmp_path / "towns.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    (case,) = QuestionAnsweringTask(name=None, path=str(path), num_cases=3).cases(0)
    assert (case.set, case.questions[0].answers) == ("towns", ("C",))


def test_missing_qa_dataset_is_a_one_line_error(tmp_path, monkeypatch) -> None:
    def offline(*_, **__):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    for settings, message in (
        ({"name": "multifieldqa_en", "path": None}, "Could not read .*multifieldqa_en.* network. Check"),
        ({"name": None, "path": str(tmp_path / "none.json")}, "there is no such file. Check the path"),
        ({"name": None, "path": None}, "Give the name of a dataset, or the path"),
        ({"name": "squat", "path": None}, "Unknown dataset 'squat'"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            list(QuestionAnsweringTask(**settings, num_cases=1).cases(0))
        assert "\n" not in str(caught.value)
