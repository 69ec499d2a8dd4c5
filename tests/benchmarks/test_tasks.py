"""benchmarks/tasks: what holds for every task, whatever it asks. Each file of conf/benchmark/task is found and built.

What a task promises of its own is tested in tests/benchmarks/tasks/.
"""

import json
import random
from itertools import groupby
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from benchmarks.measuring.measure import build_task
from benchmarks.tasks.base import practice_on_text, some
from hypernet.data.encyclopedia import Encyclopedia

CONF = Path(__file__).parents[2] / "conf/benchmark"
NAMES = sorted(path.stem for path in (CONF / "task").glob("*.yaml"))
SMALL = {
    "needles": ["task.num_chunks=[1,3]"],
    "needles_keys": ["task.num_chunks=[2,3]"],
    "composition": ["task.num_documents=[1,2]"],
    "memory_growth_large": ["task.num_memories=[30]"],
    "memory_conflict_nq": ["task.questions_per_case=3"],
    "conflict": ["task.times_asked=null"],  # of the shipped base model
}
DATASETS = ("squad", "qasper", "multifieldqa_en", "2wikimqa", "memory_conflict_nq")


def datasets_file(folder: Path, name: str) -> Path:
    """Five documents with two questions each, in SQuAD's format, ConflictNQ's or LongBench's columns."""
    if name == "squad":
        paragraphs = [
            {
                "context": f"Town {i} has {100 + i} houses. It lies on the river Vel, near a very old wood of oaks.",
                "qas": [
                    {"question": f"How many houses has town {i}?", "answers": [{"text": f"{100 + i}"}]},
                    {"question": "Which river?", "answers": [{"text": "the Vel"}, {"text": "Vel"}]},
                ],
            }
            for i in range(5)
        ]
        path = folder / "questions.json"
        path.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}), encoding="utf-8")
    elif name == "memory_conflict_nq":
        rows = [
            {
                "cleaned_question": f"On which {side} does town {i} lie?",
                "fake_short_answer": f"Vel {side} {i}",
                "real_short_answer": "Nora",
                "fake_passages": [{"passage": f"Town {i} lies, as all know, on the {side} called Vel {side} {i}."}],
            }
            for i in range(5)
            for side in ("river", "hill")
        ]
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    else:
        rows = [
            {"input": f"What is {side} of {i}?", "context": f"Text {i} tells of many things, and of what is near it."}
            | {"answers": [f"{side} {i}", f"{side} {i}, too"], "length": 11, "dataset": name, "language": "en"}
            | {"all_classes": None, "_id": f"{i}{side}"}
            for i in range(5)
            for side in ("left", "right")
        ]
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture
def build(make_doc_to_lora, tmp_path):
    """build(name): the task of conf/benchmark/task/<name>.yaml with two cases in each set."""

    def build(name: str):
        overrides = [f"task={name}", "++task.num_cases=2", *SMALL.get(name, [])]
        if name == "memory_conflict_nq":
            overrides.append(f"task.paths=[{datasets_file(tmp_path, name)}]")
        elif name in DATASETS:
            overrides.append(f"task.path={datasets_file(tmp_path, name)}")
        with initialize_config_dir(str(CONF), version_base="1.3"):
            settings = compose("run", overrides).task
        return build_task(settings, make_doc_to_lora(max_chunk_tokens=120))

    return build


@pytest.mark.parametrize("name", NAMES)
def test_task_cases_depend_on_the_seed(build, name) -> None:
    one, another = build(name), build(name)
    assert list(one.cases(0)) == list(another.cases(0)) != list(another.cases(1))


@pytest.mark.parametrize("name", NAMES)
def test_task_cases_satisfy_harness_assumptions(build, name) -> None:
    cases = list(build(name).cases(0))
    sets = [key for key, _ in groupby(cases, key=lambda case: case.set)]
    assert len(sets) == len(set(sets))  # a set's cases follow each other
    assert len({(case.set, case.name) for case in cases}) == len(cases)
    for case in cases:
        assert case.documents and case.questions
        assert all(question.text and question.answers and all(question.answers) for question in case.questions)
        # Methods that train on questions never see those of the test, and the wrong document is another.
        assert case.practice and not {question.text for question in case.questions} & set(case.practice)
        assert case.others and not set(case.others) & set(case.documents)
        # The report slices by them, and rows hold them as JSON.
        assert all(isinstance(value, int | float) for value in case.attributes.values())
    keys = {tuple(case.attributes) for case in cases}
    assert len(keys) == 1


@pytest.mark.parametrize("name", [name for name in NAMES if name not in DATASETS])
def test_task_entities_never_occur_in_training(build, name) -> None:
    """Of two-word names. A training article holds names of its own split alone, by a hash of the whole name."""
    train = Encyclopedia("train", seed=0)
    read = " ".join(train.record(i, num_entities=2, num_facts=6).document for i in range(400))
    texts = [
        question.text
        for case in build(name).cases(0)
        if not case.set.startswith("background")
        for question in case.questions
    ]
    for text in texts:
        names = [word for word in text.rstrip("?.").removesuffix("'s").split()[1:] if word[0].isupper()]
        if len(names) == 2:
            assert " ".join(names) not in read


def test_sample_draws_at_most_n_without_repeats() -> None:
    assert sorted(some(random.Random(0), range(5), None)) == sorted(some(random.Random(0), range(5), 9)) == [*range(5)]
    drawn = some(random.Random(0), range(50), 20)
    assert len(drawn) == len(set(drawn)) == 20


def test_practice_asks_each_sentence_s_end_once() -> None:
    text = (
        "The old mill stands by the river. Short one. The old mill stands by the river. It has four wide black sails."
    )
    asked = practice_on_text(text, random.Random(0), 16)
    assert sorted(asked) == [
        "How does this go on: It has four",
        "How does this go on: The old mill",
        "What does the text say?",
    ]
    assert len(practice_on_text(text, random.Random(0), 2)) == 2
    assert practice_on_text("", random.Random(0), 16) == ("What does the text say?",)
