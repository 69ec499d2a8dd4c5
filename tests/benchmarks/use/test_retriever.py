"""benchmarks.use.retriever: held-out entities are in no trace, controls are what they say, tables by hand."""

import pytest
from hydra import compose, initialize_config_dir

from benchmarks.use import pooling_tables
from benchmarks.use.retriever import SCRIPT, draw, rows
from hypernet.data.encyclopedia import relations
from tests.test_configs import CONF

SMALL = [
    *("seeds=[0]", "num_users=2", "num_entities=3", "num_asked=5", "num_held_out=4", "training.steps=3"),
    *("training.batch_size=4", "training.hidden_dim=4", "output=null"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cells = tmp_path_factory.mktemp("cells")
        return list(rows(SCRIPT.check(compose("use_retriever", overrides=[*SMALL, f"cells={cells}"]))))


def test_questions_have_one_sentence_that_answers_them():
    told = draw("train", 0, "user-0", 5)
    assert len({one.question for one in told}) == len(told) > 12
    assert all(sum(one.answer in other.text and one.text == other.text for other in told) == 1 for one in told)
    assert draw("train", 0, "user-0", 5) == told != draw("train", 0, "user-1", 5)


def test_held_out_entities_are_in_no_trace():
    traced = {subject(one) for user in ("user-0", "user-1", "user-2") for one in draw("train", 0, user, 20)}
    asked = {subject(one) for one in draw("validation", 0, "held out", 20)}
    assert len(traced) > 50 and len(asked) > 15 and not asked & traced


def subject(told):
    """Whom a question asks about."""
    for relation in relations():
        for before, after in (form.split("{n}") for form in relation.questions):
            if told.question.startswith(before) and told.question.endswith(after):
                return told.question[len(before) : len(told.question) - len(after)]
    raise AssertionError(f"{told.question} is in no form that the encyclopedia has")


def test_every_search_is_measured_on_the_same_questions(found):
    searches = {row["method"]: row for row in found if row["kind"] == "search"}
    assert list(searches) == [
        *("bm25", "dense", "trained", "shuffled", "dense and bm25", "trained and bm25", "shuffled and bm25"),
        "right memory",
    ]
    assert {len(row["items"]["recall"]) for row in searches.values()} == {4}
    assert searches["right memory"]["recall"] == 1.0
    (traces,) = (row for row in found if row["kind"] == "traces")
    assert 0 < traces["usable"] <= traces["asked"] == 10 and traces["right"] > 0


def test_without_a_users_traces_the_encoder_is_as_if_never_had(found):
    (deleted,) = (row for row in found if row["kind"] == "deleted")
    assert deleted["equal"] and deleted["changed"] and deleted["removed"] == 20


def test_tables_have_means_and_differences_by_hand():
    def row(method, seed, recall):
        items = {"recall": recall, "exact_match": recall}
        mean = sum(recall) / len(recall)
        return {"kind": "search", "method": method, "seed": seed, "recall": mean, "exact_match": mean, "items": items}

    scores = {"trained": [1.0, 1.0], "dense": [1.0, 0.0], "shuffled": [0.0, 0.0], "bm25": [0.0, 1.0]}
    both = [row(name, seed, values) for seed in (0, 1) for name, values in scores.items()]
    both += [row("trained and bm25", seed, [1.0, 1.0]) for seed in (0, 1)]
    assert pooling_tables.retriever(both).lines[0] == ["trained", "1.00", "1.00", "1.00", "1.00", "1.00", "1.00"]
    lines = pooling_tables.gains(both).lines
    assert [line[:2] for line in lines] == [
        *(["trained against dense", "+0.50"], ["trained against shuffled", "+1.00"]),
        *(["trained against bm25", "+0.50"], ["trained and bm25 against bm25", "+0.50"]),
    ]
    assert all(float(line[2]) <= float(line[1]) <= float(line[3]) for line in lines)
