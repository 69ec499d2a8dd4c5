"""Curricula: stages one after the other and in turn, what they draw, and the same records for the same step."""

import pickle
import re
from collections import Counter

import pytest

from hypernet.data.curriculum import RENAMED_STAGE_KEYS, Stage
from tests.data.curricula import make_curriculum, make_mixed

# Stages


def test_curriculum_stages_follow_in_order_and_end():
    curriculum = make_curriculum()
    assert curriculum.num_steps == 6
    assert [curriculum.stage(step)[0] for step in range(6)] == [0, 0, 1, 1, 1, 2]
    assert [curriculum.stage(step)[2] for step in range(6)] == [0, 1, 0, 1, 2, 0]
    with pytest.raises(IndexError, match="past the end of the curriculum"):
        curriculum.stage(6)


def test_each_step_has_the_articles_of_its_stage():
    curriculum = make_curriculum()
    for step in range(6):
        _, stage, _ = curriculum.stage(step)
        records = curriculum.records(step)
        kinds = [Counter(question.kind for question in record.questions) for record in records]
        assert len(records) == stage.batch_size
        facts = {count["document"] for count in kinds}
        if step < 2:
            assert facts == {1} and all(len(record.sentences) <= 2 for record in records)
        elif step < 5:
            # All articles of a step are of one size.
            assert len(facts) == 1 and 4 <= facts.pop() <= min(12, stage.max_questions)
            assert all(count["unanswerable"] == 1 for count in kinds)
        else:
            assert facts == {2} and all(len(record.sentences) >= 5 for record in records)


def test_max_questions_keeps_the_unanswerable_ones():
    stage = {"steps": 1, "batch_size": 9, "facts_per_entity": [4, 4], "num_distractors": [1, 1], "unanswerable": 1.0}
    full = make_curriculum(stages=[stage]).records(0)
    trimmed = make_curriculum(stages=[{**stage, "max_questions": 3}]).records(0)
    for record, short in zip(full, trimmed, strict=True):
        assert short.document == record.document
        assert set(short.questions) < set(record.questions) and len(short.questions) == 4
        assert short.questions[-1] == record.questions[-1] and short.questions[-1].kind == "unanswerable"
    assert len({record.questions.index(q) for record, s in zip(full, trimmed, strict=True) for q in s.questions}) == 5


def test_records_depend_on_step_and_seed_alone():
    steps = [make_curriculum().records(step) for step in (5, 0, 3)]
    curriculum = make_curriculum()
    in_order = [curriculum.records(step) for step in range(6)]
    assert [in_order[5], in_order[0], in_order[3]] == steps
    assert make_curriculum(seed=1).records(0) != in_order[0]


def test_alternating_stages_equal_written_out_stages():
    short, long = {"steps": 2, "batch_size": 3}, {"steps": 1, "batch_size": 4, "num_entities": [2, 3]}
    first = {"steps": 1, "batch_size": 2}
    written_out = make_curriculum(stages=[first, short, long, short, long, {**short, "steps": 1}])
    in_turn = make_curriculum(stages=[first, {"steps": 7, "alternate": [short, long]}])
    assert in_turn.stages == written_out.stages and in_turn.num_steps == 8
    for step in range(8):
        assert in_turn.records(step) == written_out.records(step)


@pytest.mark.parametrize(
    "stage",
    [{"steps": 3, "alternate": []}, {"alternate": [{"steps": 3}]}, {"steps": 3, "alternate": [{"steps": 0}]}]
    + [{"steps": 3, "alternate": [{"steps": 3}], "batch_size": 4}],
)
def test_incomplete_or_overfull_alternate_is_refused(stage):
    with pytest.raises(ValueError, match="A stage of several in turn needs steps, and alternate: a list") as error:
        make_curriculum(stages=[stage])
    assert "\n" not in str(error.value)


def test_curriculum_repeats_no_article():
    same = {"steps": 2, "batch_size": 3, "facts_per_entity": [5, 5], "num_distractors": [0, 0]}
    curriculum = make_curriculum(stages=[same, same])
    documents = [record.document for step in range(4) for record in curriculum.records(step)]
    assert len(set(documents)) == len(documents) == 12


def test_curriculum_refuses_empty_or_misspelt_stages():
    with pytest.raises(ValueError, match="at least one stage; give steps and batch_size"):
        make_curriculum(stages=[])
    with pytest.raises(TypeError, match="batchsize"):
        make_curriculum(stages=[{"steps": 1, "batchsize": 2}])


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"steps": 0}, "Stage 0: steps should be at least 1, got 0."),
        ({"batch_size": -2}, "Stage 0: batch_size should be at least 1, got -2."),
        ({"max_questions": 0}, "Stage 0: max_questions should be at least 1, got 0."),
        ({"num_background": -1}, "Stage 0: num_background should be at least 0, got -1."),
        ({"num_entities": [3, 1]}, r"Stage 0: num_entities should be a range \[from, to\], at least 1, got \[3, 1\]."),
        ({"facts_per_entity": [0, 2]}, r"facts_per_entity should be a range .* at least 1, got \[0, 2\]."),
        ({"num_distractors": [1]}, r"num_distractors should be a range .* got \[1\]."),
        ({"unanswerable": 5}, "Stage 0: unanswerable is a chance, from 0 to 1, got 5."),
    ],
)
def test_stage_out_of_range_is_one_line(stage, message):
    with pytest.raises(ValueError, match=message):
        make_curriculum(stages=[{"steps": 2, **stage}])


def test_shared_relations_is_a_share_of_articles():
    shape = {"steps": 4, "batch_size": 10, "num_entities": [2, 2], "facts_per_entity": [1, 1]}

    def shared(share):
        curriculum = make_curriculum(stages=[{**shape, "shared_relations": share}])
        records = [record for step in range(4) for record in curriculum.records(step)]
        return [len({question.group for question in record.questions}) == 1 for record in records]

    assert all(shared(1.0)) and 10 < sum(shared(0.5)) < 35 and sum(shared(0.0)) < 10
    plain, stated = (make_curriculum(stages=[{**shape, **more}]) for more in ({}, {"shared_relations": 0.0}))
    assert [plain.records(step) for step in range(4)] == [stated.records(step) for step in range(4)]


def test_shared_topic_is_a_share_of_steps():
    def records(**stage):
        stages = [{"steps": 20, "batch_size": 6, "num_entities": [2, 2], "facts_per_entity": [1, 2], **stage}]
        curriculum = make_curriculum(stages=stages)
        return [curriculum.records(step) for step in range(20)]

    def relations_of(step):
        return [sorted({question.group for question in record.questions}) for record in step]

    plain, some, every = records(), records(shared_topic=0.5), records(shared_topic=1.0)
    for step in every:
        assert len({*map(tuple, relations_of(step))}) == 1
        assert len({record.document for record in step}) == 6
    assert len({tuple(relations_of(step)[0]) for step in every}) > 5  # another topic in another step
    about_one = [len({*map(tuple, relations_of(step))}) == 1 for step in some]
    assert 4 <= sum(about_one) <= 16
    for one, mixed, before, all_of_one in zip(about_one, some, plain, every, strict=True):
        assert mixed == (all_of_one if one else before)


def test_unknown_distractor_source_is_refused(tiny_tokenizer):
    for name in ("filler", "encyclopedia"):
        with pytest.raises(ValueError, match=f"Stage 0 has distractor_source={name}, but the sources are none"):
            make_curriculum(stages=[{"steps": 1, "distractor_source": name}])


@pytest.mark.parametrize("num_joined", [[0, 4], [5, 4]])
def test_impossible_num_joined_documents_is_refused(num_joined):
    message = f"Stage 0: num_joined_documents should be a range [from, to], at least 1, got {num_joined}."
    with pytest.raises(ValueError, match=re.escape(message)):
        make_curriculum(stages=[{"steps": 1, "num_joined_documents": num_joined}])


@pytest.mark.parametrize("wrapped", [False, True], ids=["stage", "alternate"])
@pytest.mark.parametrize(("old", "new"), RENAMED_STAGE_KEYS.items())
def test_old_stage_keys_are_refused_with_their_new_name(old, new, wrapped):
    stage = {"steps": 3, old: 1}
    with pytest.raises(ValueError, match=f"A stage has no {old} any more; it is called {new} now") as error:
        make_curriculum(stages=[{"steps": 3, "alternate": [stage]} if wrapped else stage])
    assert "\n" not in str(error.value)


def test_every_old_stage_key_has_a_field_as_its_new_name():
    assert set(RENAMED_STAGE_KEYS.values()) <= set(Stage._fields)
    assert not set(RENAMED_STAGE_KEYS) & set(Stage._fields)


# Other sources


def numbers_of(records, name="a"):
    return [int(r.questions[0].answer.split()[1]) for r in records if r.questions[0].answer.startswith(f"{name} ")]


def test_a_source_goes_on_where_an_earlier_stage_stopped():
    stage = {"steps": 2, "batch_size": 3, "source": "a"}
    curriculum = make_mixed(stage, {"steps": 1}, stage)
    assert numbers_of(curriculum.records(0) + curriculum.records(1)) == list(range(6))
    assert numbers_of(make_mixed(stage, {"steps": 1}, stage).records(3)) == [6, 7, 8]
    # The encyclopedia's articles of a stage are those it would have anyway.
    assert curriculum.records(2) == make_curriculum(stages=[{"steps": 2, "batch_size": 3}, {"steps": 1}]).records(2)


def test_a_mixture_takes_shares_and_repeats_nothing():
    curriculum = make_mixed({"steps": 60, "batch_size": 10, "source": {"a": 3, "encyclopedia": 1}})
    named = [pair for step in range(60) for pair in curriculum.named_records(step)]
    counts = Counter(name for name, _ in named)
    assert 420 < counts["a"] < 480 and counts["a"] + counts["encyclopedia"] == 600
    assert numbers_of([record for _, record in named]) == list(range(counts["a"]))
    articles = [record.document for name, record in named if name == "encyclopedia"]
    assert len(set(articles)) == len(articles)
    again = make_mixed({"steps": 60, "batch_size": 10, "source": {"a": 3, "encyclopedia": 1}})
    assert again.named_records(59) == named[-10:]


def test_bucketed_step_has_documents_of_similar_length(tiny_tokenizer):
    curriculum = make_mixed({"steps": 8, "batch_size": 4, "source": "a", "bucket_documents": 16})
    steps = [numbers_of(curriculum.records(step)) for step in range(8)]
    assert sorted(steps[:4]) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]] != steps[:4]
    budget = make_mixed({"steps": 40, "source": "b", "max_step_tokens": 130, "bucket_documents": 30}, {"steps": 1})
    for step in range(40):
        numbers = numbers_of(budget.records(step), "b")
        assert len(numbers) * max(n % 7 + 1 for n in numbers) * 10 <= 130
    assert pickle.loads(pickle.dumps(budget)).records(39) == budget.records(39)
    with pytest.raises(ValueError, match=r"Stage 0 sorts by length .* and draws from the encyclopedia"):
        make_mixed({"steps": 1, "max_step_tokens": 100})


def test_unknown_source_is_refused_by_name():
    with pytest.raises(ValueError, match="Stage 1 draws from c, d, but the sources are encyclopedia, a, b"):
        make_mixed({"steps": 1}, {"steps": 1, "source": {"d": 1, "a": 2, "c": 1}})
