"""The encyclopedia: what it offers, that articles answer their questions, and that the splits share nothing invented.

Articles are read back with patterns made from the YAML file, not with the code that writes them.
"""

import os
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
import yaml

import hypernet.data
from hypernet.data.encyclopedia import (
    NUM_KNOWN_ENTITIES,
    SPLITS,
    Encyclopedia,
    background_facts,
    background_questions,
    known_facts,
    relations,
)
from hypernet.data.records import UNKNOWN, Question, Record

DATA = yaml.safe_load((Path(hypernet.data.__file__).parent / "encyclopedia.yaml").read_text(encoding="utf-8"))
RELATIONS = {
    name: {"kind": kind, **entry} for kind, entries in DATA["relations"].items() for name, entry in entries.items()
}
MENTIONS = {
    "person": ["he", "she"],
    "town": ["the town", "it"],
    "company": ["the company", "the firm"],
    "instrument": ["the instrument", "it"],
}
NUMBERS = {"year", "count", "population"}


@cache
def articles(split: str, number: int) -> list[Record]:
    """Articles of all sizes, one to four entities."""
    encyclopedia = Encyclopedia(split)
    return [
        encyclopedia.record(
            i, num_entities=1 + i % 4, num_facts=1 + i % 4 + i % 7, num_distractors=i % 4, num_unanswerable=i % 3
        )
        for i in range(number)
    ]


@cache
def pattern(form: str) -> re.Pattern:
    """Matches what a form can become; the names in braces are groups."""
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+)", re.escape(form)), re.IGNORECASE)


@cache
def asked_about(question: Question) -> str:
    """The entity's name in a question."""
    names = {m["n"] for f in RELATIONS[question.group]["questions"] if (m := pattern(f).fullmatch(question.text))}
    (name,) = names
    return name


def statements(record: Record, relation: str, name: str, value: str | None, *, alone: bool) -> dict[int, int]:
    """Sentences that state the fact (with any value for None) → which form they have."""
    subjects = {name, *name.split()[1:], *(MENTIONS[RELATIONS[relation]["kind"]] if alone else [])}
    subjects = {subject.lower() for subject in subjects}
    result = {}
    for number, sentence in enumerate(record.sentences):
        for i, form in enumerate(RELATIONS[relation]["sentences"]):
            if match := pattern(form).fullmatch(sentence):
                said = match.groupdict()
                same_value = value is None or value.lower() == said["v"].lower()
                if said.get("s", said.get("n")).lower() in subjects and same_value:
                    result[number] = i
    return result


def is_about(sentence: str, forms: list[str], name: str) -> bool:
    matches = (pattern(form).fullmatch(sentence) for form in forms)
    return any(match["n"].lower() == name.lower() for match in matches if match)


# What there is


def test_encyclopedia_has_enough_relations_and_phrasings():
    assert len(relations()) == len(RELATIONS) >= 12
    for relation in relations():
        assert len(set(relation.sentences)) >= 6 and len(set(relation.questions)) >= 4


def test_relation_sentences_differ_in_structure():
    for name, relation in RELATIONS.items():
        skeletons = {" ".join(re.sub(r"\{\w+\}", "_", form).lower().split()) for form in relation["sentences"]}
        assert len(skeletons) == len(relation["sentences"]), name


def test_every_form_names_subject_and_value_once():
    for name, relation in RELATIONS.items():
        for form in relation["sentences"]:
            assert form.count("{v}") == 1 and form.count("{s}") + form.count("{n}") == 1, (name, form)
        for form in relation["questions"]:
            assert re.findall(r"\{\w+\}", form) == ["{n}"] and form.endswith("?"), (name, form)


def test_relations_share_no_question_or_sentence():
    for (one, first), (other, second) in combinations(RELATIONS.items(), 2):
        for key in ("sentences", "questions"):
            shared = {form.replace("{s}", "{n}") for form in first[key]} & {
                f.replace("{s}", "{n}") for f in second[key]
            }
            assert not shared, (one, other)


def test_encyclopedia_asks_for_all_kinds_of_values():
    kinds = {relation.value_kind for relation in relations()}
    assert {"person", "place", "date"} <= kinds and kinds & NUMBERS
    phrases = kinds - {"person", "place", "date"} - NUMBERS
    assert len(phrases) >= 3
    rng = Encyclopedia().rng("values")
    for kind in kinds:
        values = {Encyclopedia().value(rng, kind) for _ in range(50)}
        assert len(values) > 30, kind
        shapes = {"date": r"\d+ [A-Z]\w+", "place": r"\w+"} | dict.fromkeys(NUMBERS, r"\d+")
        assert all(re.fullmatch(shapes.get(kind, r"[\w ]+ \w+"), value) for value in values), kind


def test_encyclopedia_yaml_holds_only_texts():
    """Unquoted no, true or 1 would become False, True or 1, and then "False" in an article."""

    def walk(tree, place):
        if isinstance(tree, dict):
            for key, value in tree.items():
                assert isinstance(key, str), (place, key)
                walk(value, f"{place}/{key}")
        elif isinstance(tree, list):
            for i, value in enumerate(tree):
                walk(value, f"{place}/{i}")
        else:
            assert isinstance(tree, str) and tree.strip(), (place, tree)

    walk(DATA, "")


# Articles


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_stands_in_one_sentence_that_states_it(split):
    for record in articles(split, 300):
        asked = [question for question in record.questions if question.kind == "document"]
        alone = len({asked_about(question) for question in asked}) == 1
        for question in asked:
            name = asked_about(question)
            # A phrase at the start of its sentence is capitalised there.
            assert question.answer.lower() in record.document.lower() and question.answer not in question.text
            stated = statements(record, question.group, name, question.answer, alone=alone)
            assert len(stated) == 1, (record, question)
            # No second value for the same relation of the same entity.
            assert statements(record, question.group, name, None, alone=alone).keys() == stated.keys()
        assert len({(asked_about(question), question.group) for question in asked}) == len(asked)


@pytest.mark.parametrize("split", SPLITS)
def test_every_sentence_states_its_fact_and_no_other(split):
    for record in articles(split, 300):
        asked = [question for question in record.questions if question.kind == "document"]
        names = {asked_about(question): RELATIONS[question.group]["kind"] for question in asked}
        facts = set()
        for question in asked:
            name = asked_about(question)
            facts.update(statements(record, question.group, name, question.answer, alone=len(names) == 1))
        others = 0
        for sentence in record.sentences:
            for name, kind in names.items():
                forms = DATA["distractors"]["any"] + DATA["distractors"][kind] + DATA["distractors"]["opening"][kind]
                if is_about(sentence, forms, name):
                    others += 1
                    break
        assert len(facts) == len(asked) and len(asked) + others == len(record.sentences), record


def test_unanswerable_questions_are_unstated_and_unknown():
    seen = 0
    for record in articles("train", 600) + articles("test", 300):
        names = {asked_about(question) for question in record.questions}
        for question in record.questions:
            assert (question.answer == UNKNOWN) == (question.kind == "unanswerable")
            if question.kind == "unanswerable":
                seen += 1
                stated = statements(record, question.group, asked_about(question), None, alone=len(names) == 1)
                assert not stated, (record, question)
                assert UNKNOWN not in record.document
    assert seen > 300


def test_distractors_never_match_a_relation_form():
    kinds = list(DATA["relations"])
    for kind in kinds:
        others = DATA["distractors"]["any"] + DATA["distractors"][kind] + DATA["distractors"]["opening"][kind]
        fills = {"n": "Xo Xa", "person": "Yo Ya", "place": "Zo"}
        for distractor in others:
            for name, relation in RELATIONS.items():
                if relation["kind"] == kind:
                    for form in relation["sentences"]:
                        assert not pattern(form).fullmatch(distractor.format(**fills)), (distractor, name, form)


def test_sentences_about_several_entities_name_theirs():
    for record in articles("train", 400):
        names = {asked_about(question).lower() for question in record.questions if question.kind == "document"}
        if len(names) > 1:
            for sentence in record.sentences:
                assert any(name in sentence.lower() for name in names), sentence


def test_first_sentence_names_the_only_entity():
    for record in articles("train", 400):
        names = {asked_about(question).lower() for question in record.questions if question.kind == "document"}
        if len(names) == 1:
            assert names.pop() in record.sentences[0].lower(), record.sentences


def test_sentences_start_capitalized_and_end_with_full_stop():
    for record in articles("test", 300):
        for sentence in record.sentences:
            assert re.fullmatch(r"[A-Z0-9].*[^.]\.", sentence) and "  " not in sentence and "{" not in sentence


def test_article_entities_never_share_a_name():
    """Article 2833 drew the same company name twice and said two things of it."""
    record = Encyclopedia("test").record(2833, num_entities=4, num_facts=16)
    assert len({asked_about(question) for question in record.questions}) == 4


def test_values_are_never_entity_names():
    """This article said that Branmimouth was built beside the river Branmimouth."""
    record = Encyclopedia("test").record(62, num_entities=3, num_facts=9, num_distractors=2, num_unanswerable=2)
    assert not {asked_about(question) for question in record.questions} & {q.answer for q in record.questions}


def test_encyclopedia_record_has_the_given_sizes():
    encyclopedia = Encyclopedia("train")
    for num_entities, num_facts, num_unanswerable in [(1, 1, 0), (1, 3, 2), (3, 3, 1), (2, 7, 3), (4, 9, 4)]:
        record = encyclopedia.record(
            5, num_entities=num_entities, num_facts=num_facts, num_distractors=2, num_unanswerable=num_unanswerable
        )
        kinds = Counter(question.kind for question in record.questions)
        assert (kinds["document"], kinds["unanswerable"]) == (num_facts, num_unanswerable)
        names = [asked_about(question) for question in record.questions if question.kind == "document"]
        assert len(set(names)) == num_entities
        # An article about one may need an opening sentence.
        assert len(record.sentences) - num_facts - 2 in ((0, 1) if num_entities == 1 else (0,))
    everything = encyclopedia.record(5, num_facts=100, num_unanswerable=1)
    kind = RELATIONS[everything.questions[0].group]["kind"]
    assert len(everything.questions) == len(DATA["relations"][kind])


def test_fewer_facts_than_entities_are_refused():
    with pytest.raises(ValueError, match="num_facts is 1, fewer than the 2 entities"):
        Encyclopedia("train").record(0, num_entities=2, num_facts=1)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="Unknown split 'dev'; choose one of train, validation, test, known"):
        Encyclopedia("dev")


# Splits and seeds


def test_record_depends_on_seed_split_index_and_sizes_only():
    record = Encyclopedia("train", seed=3).record(7, num_facts=3)
    again = Encyclopedia("train", seed=3)
    again.record(6)
    assert again.record(7, num_facts=3) == record
    others = [
        Encyclopedia("train", seed=4).record(7, num_facts=3),
        Encyclopedia("test", seed=3).record(7, num_facts=3),
        again.record(8, num_facts=3),
    ]
    assert all(other.document != record.document for other in others)


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_encyclopedia_record_is_equal_in_every_process(hash_seed):
    code = "from hypernet.data.encyclopedia import Encyclopedia as E; print([E('test').record(i) for i in range(9)])"
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    root = Path(hypernet.data.__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True)
    assert result.stdout.strip() == str([Encyclopedia("test").record(i) for i in range(9)]), result.stderr


@cache
def invented_names(split: str) -> set[str]:
    """Entities, persons and places of all sentences and questions of a split."""
    names = set()
    for record in articles(split, 1200):
        for question in record.questions:
            names.add(asked_about(question))
            if RELATIONS[question.group]["value"] in ("person", "place") and question.kind == "document":
                names.add(question.answer)
        entities = {asked_about(question): RELATIONS[question.group]["kind"] for question in record.questions}
        for sentence in record.sentences:
            for kind in entities.values():
                for form in DATA["distractors"]["any"] + DATA["distractors"][kind]:
                    match = pattern(form).fullmatch(sentence)
                    names.update(match.groups() if match else ())
    return names


def test_splits_share_no_invented_name():
    names = {split: invented_names(split) for split in SPLITS}
    assert all(len(found) > 2000 for found in names.values())
    for one, other in combinations(SPLITS, 2):
        assert not names[one] & names[other], (one, other)


def test_last_two_sentence_forms_are_for_the_test_split():
    used = {split: {name: set() for name in RELATIONS} for split in SPLITS}
    for split in SPLITS:
        for record in articles(split, 1200):
            asked = [question for question in record.questions if question.kind == "document"]
            alone = len({asked_about(question) for question in asked}) == 1
            for question in asked:
                stated = statements(record, question.group, asked_about(question), question.answer, alone=alone)
                used[split][question.group].update(stated.values())
    for name, relation in RELATIONS.items():
        everything = set(range(len(relation["sentences"])))
        kept = {len(everything) - 2, len(everything) - 1}
        assert used["test"][name] == everything
        assert used["train"][name] == used["validation"][name] == everything - kept


# Background facts


def test_held_out_and_other_background_partition_all():
    halves = [{(q.group, q.answer, q.text) for q in background_questions(held_out=part)} for part in (False, True)]
    everything = {(q.group, q.answer, q.text) for q in background_questions()}
    assert halves[0] | halves[1] == everything and not halves[0] & halves[1]
    assert min(map(len, halves)) > 0.2 * len(everything)
    # By fact, not by question: no other form of a protected question is in the other part.
    facts = {(group, subject): answer for group, subject, answer in background_facts()}
    assert len(facts) == len(background_facts()) > 100
    for group, subject in facts:
        texts = {form.format(s=subject) for form in DATA["background"][group]["questions"]}
        assert len({i for i, half in enumerate(halves) if texts & {text for g, _, text in half if g == group}}) == 1
    # Known entities by entity: nothing is asked in training about one that is held out.
    known = [{name for name in known_names() if any(name in text for _, _, text in half)} for half in halves]
    assert not known[0] & known[1] and len(known[0] | known[1]) == NUM_KNOWN_ENTITIES
    assert 0.15 < len(known[1]) / NUM_KNOWN_ENTITIES < 0.35


def known_names() -> set[str]:
    return {fact.entity.name for fact in known_facts()}


def test_known_entities_have_every_relation_and_no_article():
    facts = {(fact.entity.name, fact.relation.name): fact.value for fact in known_facts()}
    assert len(facts) == len(known_facts()) > 1000 and len(known_names()) == NUM_KNOWN_ENTITIES
    told = Counter(fact.entity for fact in known_facts())
    assert {entity.kind for entity in told} == set(DATA["relations"])
    assert all(number == len(DATA["relations"][entity.kind]) for entity, number in told.items())
    for split in ("train", "validation", "test"):
        assert not known_names() & invented_names(split)


def test_background_forms_of_one_fact_have_one_answer():
    answers = {}
    for question in background_questions():
        assert question.kind == "background" and answers.setdefault(question.text, question.answer) == question.answer
    assert all(len(set(entry["questions"])) >= 2 for entry in DATA["background"].values())
    assert answers["What is the capital of France?"] == "Paris" and answers["What is the opposite of true?"] == "false"


def test_with_shared_relations_only_the_name_decides():
    encyclopedia = Encyclopedia("train")
    for index in range(40):
        record = encyclopedia.record(index, num_entities=3, num_facts=6, num_distractors=0, shared_relations=True)
        relations = [question.group for question in record.questions]
        assert sorted(relations) == sorted([*set(relations)] * 3) and len(set(relations)) == 2
        assert len({question.text for question in record.questions}) == 6
    # Facts that do not divide evenly: the rest of them is shared by some.
    record = encyclopedia.record(7, num_entities=2, num_facts=5, shared_relations=True)
    assert sorted(map([q.group for q in record.questions].count, {q.group for q in record.questions})) == [1, 2, 2]
