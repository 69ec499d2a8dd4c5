"""benchmarks.use.world: rules that worlds share or not, disjoint splits, and a run by hand."""

import random

import pytest

from benchmarks.use.world import INGREDIENT, KEY, OPTIONS, TOOL, Obstacle, World, obstacles_of, play
from hypernet.memory.use.principles import Try

MAP = (
    Obstacle("hall", "Corbaford", KEY, "tin spoons", ("brass bells", "tin spoons", "clay cups")),
    Obstacle("kitchen", "Palno", TOOL, "clay cups", ("clay cups", "brass bells", "tin spoons")),
)


def in_order(_subject, _relation, objects):
    return list(objects)


def test_worlds_share_names_and_recipes_but_not_keys():
    one, same, other = World(0), World(0), World(1)
    assert one.rules == same.rules and one.rules.keys() == other.rules.keys() and len(one.rules) == 24
    differ = {relation: 0 for relation in (KEY, INGREDIENT, TOOL)}
    for (subject, relation), right in one.rules.items():
        differ[relation] += other.rules[subject, relation] != right
    assert differ[TOOL] == differ[INGREDIENT] == 0 and differ[KEY] > 8
    words = [word for name in one.objects for word in name.split()]
    assert len(words) == len(set(words)) and len(one.objects) == 12


def test_no_map_of_one_split_is_of_the_other():
    world = World(0)
    splits = {split: world.maps(split, 80) for split in ("train", "test")}
    train, test = ({obstacles_of(one) for one in maps} for maps in splits.values())
    assert len(train) > 50 and len(test) > 50 and not train & test
    # Another world's maps are split the same way: what it has explored is none of this one's test maps.
    assert not {obstacles_of(one) for one in World(1).maps("train", 80)} & test
    for one in splits["test"]:
        assert sorted(each.relation for each in one) == [INGREDIENT, KEY, KEY, KEY, TOOL]
        assert all(each.right in each.objects and len(set(each.objects)) == OPTIONS for each in one)
        assert all(world.rules[each.subject, each.relation] == each.right for each in one)
    with pytest.raises(ValueError, match="There is no split 'odd': choose of train, test"):
        world.maps("odd", 1)


def test_run_by_hand():
    outcome = play(MAP, in_order, rng=random.Random(0), jam=0.0, spare=1)
    assert outcome.total == 1.0 and outcome.trajectory.tries == (
        Try("Corbaford", KEY, "brass bells", False),
        Try("Corbaford", KEY, "tin spoons", True),
        Try("Palno", TOOL, "clay cups", True),
    )
    assert (
        outcome.trajectory.text.count("nothing happens") == 1 and "Corbaford wants its key" in outcome.trajectory.text
    )
    # Without a try to spare the last obstacle is left; where all objects have failed they are tried again.
    assert play(MAP, in_order, rng=random.Random(0), jam=0.0, spare=0).total == 0.5
    jammed = play(MAP, in_order, rng=random.Random(0), jam=1.0, spare=3)
    assert jammed.total == 0.0 and [one.action for one in jammed.trajectory.tries] == [
        *MAP[0].objects,
        *MAP[0].objects[:2],
    ]


def test_right_object_fails_as_often_as_is_said():
    rng, failed = random.Random(1), 0
    for _ in range(2000):
        failed += not play(MAP[1:], in_order, rng=rng, jam=0.3, spare=0).total
    assert failed / 2000 == pytest.approx(0.3, abs=0.03)
