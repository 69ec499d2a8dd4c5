"""benchmarks.memory.surface_figures: tables and plots of rows that can be reckoned by hand."""

from benchmarks.memory.surface_figures import QUESTIONS, cheapest, markdown, regrets
from benchmarks.report.plots import standalone


def at(method, accuracy, prepare_s, question_s, *, facts=4, **more):
    row = {"kind": "surface", "facts": facts, "tokens": 13.5 * facts, "method": method, "accuracy": accuracy}
    row |= {"prepare_s": prepare_s, "question_s": question_s, "break_even_s": None, "break_even_flops": None}
    return row | more


ROWS = [
    at("no_context", 0.0, 0.0, 0.001, break_even_s=0.0),
    at("full_context", 0.9, 0.0, 0.01),
    at("doc_to_lora", 0.6, 0.2, 0.002, break_even_s=25.0, break_even_flops=1234.5),
    at("weights", 0.9, 80.0, 0.001),
]


def test_cheapest_method_reaches_the_accuracy_asked():
    panels = cheapest(ROWS).panels
    found = [{one.name: [point.x for point in one.points] for one in panel.series} for panel in panels]
    assert found[0] == {"no context": list(QUESTIONS)}
    # From 0.2 / 0.008 = 25 questions on the adapter, and from (80 - 0.2) / 0.001 = 79,800 on the weights.
    limits = {"full context": (0, 25), "Doc-to-LoRA": (25, 79_800), "weights": (79_800, 1e9)}
    assert found[1] == {name: [n for n in QUESTIONS if low < n <= high] for name, (low, high) in limits.items()}
    # Without the adapter, which is right too seldom, from 80 / 0.009 = 8,889.
    assert found[2]["full context"] == [n for n in QUESTIONS if n <= 8_889] and "Doc-to-LoRA" not in found[2]
    # Where it was not measured, accuracy is not known.
    unknown = [*ROWS[:3], ROWS[3] | {"accuracy": None}]
    assert "weights" not in [one.name for one in cheapest(unknown).panels[1].series]
    assert "Exact match asked: 0.8" in standalone(panels, cheapest(ROWS).legend) and cheapest([]) is None


def test_break_even_is_never_or_so_many_questions():
    lines = markdown([*ROWS, at("no_context", 0, 1, 1, facts=3)], "break_even").splitlines()[2:]
    assert lines[1:] == [
        "| 4 | full context | 0.90 | 0 | 10 | – | – |",
        "| 4 | Doc-to-LoRA | 0.60 | 200 | 2 | 25 | 1,234 |",
        "| 4 | weights | 0.90 | 80,000 | 1 | never | never |",
    ]


def test_order_table_shows_what_is_within_noise():
    row = {"kind": "agreement", "currency": "flops", "tiers": "all", "pairs": 15, "near": 2, "agreement": 0.98}
    row |= {"interval": [0.9, 1.0], "of_all_pairs": 0.9}
    assert markdown([row], "order").splitlines()[2] == "| FLOPs, all | 15 | 2 | 0.980 | 0.900 | 1.000 | 0.900 |"
    assert "| – | – |" in markdown([row | {"interval": None}], "order")


def regret(policy, stream, value, *, ratio=1.0, parameters="default"):
    row = {"kind": "regret", "policy": policy, "parameters": parameters, "stream": stream, "ratio": ratio}
    return row | {"regret": value, "interval": [0.9 * value, 1.2 * value]}


def test_regrets_are_means_by_policy():
    rows = [regret("calendar", "stationary", 0.5), regret("calendar", "bursty", 1.0)]
    rows += [regret("economic", name, 0.2, parameters="costs") for name in ("stationary", "bursty")]
    rows += [
        regret(p, "bursty", 3.0, ratio=10.0, parameters=k) for p, k in (("calendar", "default"), ("economic", "costs"))
    ]
    rows.append({"kind": "free", "policy": "calendar", "parameters": "default", "sleeps": 12.0})
    assert markdown(rows, "cadence").splitlines()[2:] == [
        "| calendar | default | 0.50 | 1.00 | 0.15 |",
        "| economic | K and h | 0.20 | 0.20 | 0.03 |",
    ]
    assert markdown(rows, "cadence_ratios").splitlines()[2:] == [
        "| calendar | default | 0.75 | 3.00 | 12 |",
        "| economic | K and h | 0.20 | 3.00 | – |",
    ]
    (panel,) = regrets(rows).panels
    assert panel.groups == ["calendar, default", "economic, K and h"]
    assert [[point.y for point in one.points] for one in panel.series] == [[0.5, 0.2], [1.0, 0.2]]
    assert "bursty: 1.00 (0.90 to 1.20)" in standalone([panel], regrets(rows).legend) and regrets([]) is None
