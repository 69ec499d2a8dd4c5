"""Tables of made-up rows, small enough to reckon by hand."""

import pytest

from benchmarks.forgetting.figures import TABLES, chosen, curves, markdown, recoveries, relative_drop


def row(method, seed, background, **more):
    items = {"background": background, "in_context": [1.0, 0.0], "new": [1.0, 1.0]}
    base = {"kind": "learned", "checkpoint": "tiny", "method": method, "seed": seed, "items": items, "new": 1.0}
    return {**base, "lr": 0.1, "steps": 10, "reached": True, "in_context": 0.5, "kl": 0.25, "changed_rows": 4, **more}


@pytest.fixture
def rows():
    before = [{**row("before", seed, [1.0] * 4), "kind": "before"} for seed in (0, 1)]
    random = [row("rows_random", seed, [1.0, 0.0, 1.0, 1.0]) for seed in (0, 1)]
    tfidf = [row("rows_tfidf", seed, [1.0, 1.0, 0.0, 1.0]) for seed in (0, 1)]
    # Keeps all, but has learned in one seed alone; and keeps more of what does not choose.
    tfidf += [row("rows_tfidf", seed, [1.0] * 4, lr=0.01, reached=seed == 0) for seed in (0, 1)]
    tfidf += [row("rows_tfidf", seed, [0.0, 1.0, 0.0, 1.0], lr=1.0) for seed in (0, 1)]
    return [*before, *random, *tfidf]


def test_rate_is_chosen_by_target_first_then_half_the_questions(rows):
    assert {name: own[0]["lr"] for name, own in chosen(rows).items()} == {"rows_random": 0.1, "rows_tfidf": 0.1}


def test_seeds_that_tried_all_rates_choose(rows):
    # Seed 0 alone has both rates of rows_random, so that it alone chooses, for rows_tfidf too.
    taken = chosen([*rows, row("rows_random", 0, [0.0] * 4, lr=0.01)])
    assert {name: own[0]["lr"] for name, own in taken.items()} == {"rows_random": 0.1, "rows_tfidf": 0.01}
    assert len(taken["rows_random"]) == 2
    far, near = (row("m", 0, [float(lr == 1)] * 4, lr=lr, reached=False, checked=1 / lr) for lr in (1, 2))
    assert chosen([near, far])["m"] == [far]


def test_loss_at_each_rate_is_told_where_the_target_was_reached(rows):
    assert markdown(rows, "rates").splitlines()[2:] == [
        "| rows random | – | 0.25 | – |",
        "| rows tfidf | – | 0.25 | 0.50 |",
    ]


def test_real_model_shows_every_learning_rate_over_its_seeds():
    before = {"kind": "before", "method": "before", "seed": 0, "background": 0.5, "cloze": 0.4, "perplexity": 26.72}
    learned = [
        {**before, "kind": "learned", "method": "lora_8", "lr": lr, "seed": seed, "new": 1.0 - 0.5 * seed}
        for lr, seed in ((1e-4, 0), (2e-3, 0), (2e-3, 1))
    ]
    other = {**before, "seed": 1, "background": 0.3}
    assert markdown([before, learned[0], other, *learned[1:]], "smollm2").splitlines()[2:] == [
        "| before | – | 2 | – | 0.40 | 0.40 | 26.7 |",
        "| lora 8 | 0.0001 | 1 | 1.00 | 0.50 | 0.40 | 26.7 |",
        "| lora 8 | 0.002 | 2 | 0.75 | 0.50 | 0.40 | 26.7 |",
    ]


def test_chosen_slots_are_compared_with_random_slots(rows):
    slots = [row("slots_random", seed, [0.0] * 4, lr=0.1) for seed in (0, 1)]
    slots += [row("slots_kl", seed, [1.0] * 4, lr=0.1) for seed in (0, 1)]
    *_, line = markdown([*rows, *slots], "rows").splitlines()
    assert line == "| slots kl | 4 | 10 | +1.000 | +1.000 to +1.000 | +0.000 | +0.000 to +0.000 |"


def test_tables_tell_of_the_other_half(rows):
    assert markdown(rows, "frontier").splitlines()[2:] == [
        "| rows random | 2 | 1.00 | 1.00 | 0.50 | 0.00 | 1.00 |",
        "| rows tfidf | 2 | 1.00 | 1.00 | 0.00 | 0.00 | 0.00 |",
    ]
    (line,) = markdown(rows, "rows").splitlines()[2:]
    assert line == "| rows tfidf | 4 | 10 | +0.500 | +0.000 to +1.000 | +0.000 | +0.000 to +0.000 |"
    assert markdown(rows, "budget").splitlines()[2:] == [
        "| rows random | – | 1.00 | – | 0.1 |",
        "| rows tfidf | 0.50 | 1.00 | 1.00 | 0.1 |",
    ]
    assert markdown(rows, "kept").splitlines()[2:] == [
        f"| {n} | 10 | 0.50 | 0.250 |" for n in ("before", "rows random", "rows tfidf")
    ]


def test_relative_drop_is_of_what_was_known(rows):
    before = {("tiny", 0): rows[0], ("tiny", 1): {**rows[1], "items": {"background": [1.0, 0.0, 1.0, 0.0]}}}
    after = [row("m", 0, [1.0, 0.0, 0.0, 0.0]), row("m", 1, [1.0, 0.0, 1.0, 0.0])]
    assert relative_drop(after, before, "background")[0] == pytest.approx(1 - 3 / 6)


def test_spurious_and_tasks_are_means_over_seeds():
    found = [
        {"kind": "recovery", "method": "lora_8", "seed": seed, "k": k, "old": old, "untold": 0.0, "probe_old": 0.5}
        | {"probe_untold": 0.2, "items": {"old": [old, 1.0], "untold": [0.0]}}
        for seed in (0, 1)
        for k, old in ((0, 0.2 + seed / 5), (10, 0.9))
    ]
    assert markdown(found, "spurious").splitlines()[2] == "| lora 8 | 0.30 | 0.90 | 0.00 | 0.50 | 0.20 |"
    assert recoveries(found).panels[0].series[0].points[1].y == pytest.approx(0.95)
    done = {"kind": "sequence", "method": "lora", "lr": 0.1, "bwt": -0.5, "background": 0.9, "reached": 1.0}
    found = [done | {"final_average": average} for average in (0.4, 0.6)]
    found += [done | {"final_average": 0.1, "lr": 0.2}]
    assert markdown(found, "tasks").splitlines()[2] == "| lora | 0.50 | 0.40 | 0.60 | -0.50 | 0.90 | 1.00 |"


def test_curves_have_the_rates_and_tables_seven_columns_at_most(rows):
    panels = curves(rows).panels
    assert [point.x for point in panels[0].series[1].points] == [0.01, 0.1, 1.0]
    assert panels[1].series[0].points[0].y == pytest.approx(0.75)
    assert curves([]) is None and recoveries([]) is None
    assert all(len(table(rows).head) <= 7 for table in TABLES.values())
