"""The ends of statements, against a reference that asks for one instant at a time."""

import random

import pytest

from hypernet.memory.store.timeline import End, Statement, ends


def holds(statement: Statement, statements: list[Statement], at: int) -> bool:
    """By the rule itself, without ends: who speaks last at this instant, and does anyone better overrule it?"""
    told = [s for s in statements if s.priority == statement.priority and s.valid_at <= at]
    if not told or max(told, key=lambda s: (s.valid_at, s.seq)) != statement:
        return False
    if statement.stated_until is not None and at >= statement.stated_until:
        return False
    better = [s for s in statements if s.priority < statement.priority]
    if any(statement.valid_at < s.valid_at <= at for s in better):
        return False
    return not any(holds(s, statements, statement.valid_at) for s in better)


def random_statements(rng: random.Random, *, num_priorities: int) -> list[Statement]:
    return [
        Statement(
            seq=seq,
            priority=rng.randrange(num_priorities),
            valid_at=(start := rng.randrange(12)),
            stated_until=start + rng.randrange(1, 6) if rng.random() < 0.3 else None,
            created_at=100 + seq,
        )
        for seq in range(rng.randrange(1, 9))
    ]


@pytest.mark.parametrize("num_priorities", [1, 3])
def test_ends_agree_with_the_rule_at_every_instant(num_priorities):
    rng = random.Random(num_priorities)
    for _ in range(300):
        statements = random_statements(rng, num_priorities=num_priorities)
        found = ends(statements)
        for at in range(18):
            for s in statements:
                end = found[s.seq].invalid_at
                assert (s.valid_at <= at and (end is None or at < end)) == holds(s, statements, at), (statements, s, at)


def test_order_of_arrival_changes_no_end():
    rng = random.Random(2)
    for _ in range(100):
        starts = rng.sample(range(50), 6)
        orders = [list(range(6)), rng.sample(range(6), 6)]
        views = []
        for order in orders:
            statements = [Statement(seq, 0, starts[which], None, 100 + seq) for seq, which in enumerate(order)]
            found = ends(statements)
            views.append({s.valid_at: found[s.seq].invalid_at for s in statements})
        assert views[0] == views[1]


def test_end_is_known_since_the_later_of_both_statements():
    first, second = Statement(1, 0, 10, None, created_at=100), Statement(2, 0, 20, None, created_at=200)
    assert ends([first, second])[1] == End(20, 200)
    late = Statement(3, 0, 15, None, created_at=300)  # told last, about the time in between
    assert ends([first, second, late]) == {1: End(15, 300), 2: End(None, None), 3: End(20, 300)}


def test_same_instant_is_won_by_the_one_told_last():
    assert ends([Statement(1, 0, 10, None, 100), Statement(2, 0, 10, None, 200)]) == {
        1: End(10, 200),
        2: End(None, None),
    }
