"""Writes the generated tables of README, the documentation and the model card, and the plots that they show, from the
committed rows: `python -m benchmarks.tables`

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, NAME being one of `TABLES`. A test fails when one
differs from what its rows give, and so for the plots.
"""

import re
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from benchmarks.forgetting import editing_tables
from benchmarks.forgetting import figures as forgetting
from benchmarks.measuring.rows import Row, Rows, merged, read_rows
from benchmarks.memory import nights_tables, surface_figures
from benchmarks.refining import figures as refining
from benchmarks.report import figures, own_documents
from benchmarks.report.names import ADAPTER, CEILING, FLOOR, GATED, ROUTED, WRONG, name_of, order, task_name
from benchmarks.report.plots import MATCH, Axis, Panel, Point, Series, standalone, style_of
from benchmarks.report.tables import METHOD, Cell, Table, number, questions, scaled
from benchmarks.serving.projection import projection
from benchmarks.use import figures as use
from benchmarks.use import persona_tables, pooling_tables

ROOT = Path(__file__).parent.parent
RESULTS = "benchmarks/results"
SUMMARY = f"{RESULTS}/summary.html"
# The page of all sweeps and what a person says of it are of these, in this order.
REPORTS = ("bench", "niah", "composition", "many_documents", "interference", "capacity", "conflict")
FILES = (
    *("README.md", "docs/results.md", "docs/memory.md", "docs/consolidation.md", "docs/forgetting.md"),
    *("docs/learning_from_use.md", "docs/learning_from_use_private.md", "docs/learning_from_use_persona.md"),
    *("docs/serving.md", "docs/scale.md"),
    *("assets/tiny/README.md", "assets/smollm2-135m/README.md"),
)
PLOTS: dict[str, Callable[[Rows], figures.Figure | None]] = {
    "niah": figures.needles,
    "composition": figures.composition,
    "many_documents": figures.composition,
    "interference": figures.interference,
    "capacity": figures.capacity,
    "conflict": figures.conflict,
    "own_documents": own_documents.plot,
    "refining": refining.plot,
    "memory_growth": figures.memory_growth,
    "memory_break_even": surface_figures.cheapest,
    "memory_cadence": surface_figures.regrets,
    "memory_nights": nights_tables.nights_figure,
    "forgetting_frontier": forgetting.curves,
    "forgetting_spurious": forgetting.recoveries,
    "forgetting_editing": editing_tables.edits_figure,
    "use_memrl": use.learning,
    "use_evolver": use.returns,
    "use_persona": persona_tables.arms_figure,
}
# The main figures of the shipped model: what is asked → file, the rows' place there.
MAIN = {
    "an article about one entity": ("tiny_figures", {"set": "one entity"}),
    "an article about 2 to 4 entities": ("tiny_figures", {"set": "2-4 entities"}),
    "an article longer than the window": ("bench", {"task": "encyclopedia", "set": "sixteen entities"}),
    "one of eight joined documents": ("composition", {"set": "8 documents"}),
    "facts that contradict what the model learned": ("conflict", {"set": "known entities"}),
    "facts that the document does not mention": ("interference", {"set": "background, never protected"}),
}
MATCHED = number("exact_match")
COMPARED = {FLOOR: FLOOR, WRONG: WRONG, CEILING: "document_in_prompt", ADAPTER: "adapter"}
OVERVIEW = (
    ("encyclopedia", "one entity"),
    ("encyclopedia", "four entities"),
    ("encyclopedia", "sixteen entities"),
    ("locality", "background, never protected"),
    ("conflict", "known entities"),
    ("updates", "old version dropped"),
)


def read(name: str) -> list[Row]:
    """Committed rows."""
    return read_rows(ROOT / RESULTS / f"{name}.jsonl")


def pivot(rows: Iterable[Row], down: Mapping[str, Cell], across: Cell, value: Cell = MATCHED) -> str:
    """A line for each value of `down`, a column for each of `across`, in the order of the rows."""
    rows = list(rows)
    found = {(*(cell(row) for cell in down.values()), across(row)): value(row) for row in rows}
    columns = list(dict.fromkeys(map(across, rows)))
    lines = dict.fromkeys(place[:-1] for place in found)
    return Table(
        "", [*down, *columns], [[*line, *(found.get((*line, c), "–") for c in columns)] for line in lines]
    ).markdown()


def by_method(name: str, key: str, unit: str, *, task: str) -> str:
    """Methods down, values of the attribute across."""
    rows = [row for row in read(name) if row["kind"] == "slice" and row["task"] == task and row["by"] == [key]]
    rows.sort(key=lambda row: (order(row["method"]), row["attributes"][key]))
    return pivot(
        rows, METHOD, lambda row: f"{row['attributes'][key]:g} {unit}{'s' if row['attributes'][key] > 1 else ''}"
    )


def niah() -> str:
    rows = [row for row in read("niah") if row["kind"] == "slice" and row["by"] == ["num_chunks"]]
    rows.sort(key=lambda row: (row["attributes"]["num_chunks"], order(row["method"])))
    return pivot(
        rows, {"chunks": lambda row: f"{row['attributes']['num_chunks']:g}"}, lambda row: name_of(row["method"])
    )


def niah_seeds() -> str:
    """Training seeds across; of no context and the wrong document the highest of the seeds."""
    lines = []
    for one in (rows := [row for row in read("niah_seeds") if row["kind"] == "summary"]):
        if one["method"] == f"{ADAPTER}_seed1":
            own = {row["method"]: row["exact_match"] for row in rows if row["set"] == one["set"]}
            cells = [own[f"{method}_seed{seed}"] for method in (ADAPTER, CEILING) for seed in (1, 2)]
            cells += [max(own[f"{method}_seed{seed}"] for seed in (1, 2)) for method in (FLOOR, WRONG)]
            lines.append([one["set"].split()[0], *(f"{cell:.2f}" for cell in cells)])
    head = [f"{name_of(method)}, seed {seed}" for method in (ADAPTER, CEILING) for seed in (1, 2)]
    return Table("", ["chunks", *head, *(f"{name_of(m)}, highest" for m in (FLOOR, WRONG))], lines).markdown()


def interference() -> str:
    rows = [row for row in read("interference") if row["kind"] == "summary"]
    rows.sort(key=lambda row: order(row["method"]))
    return pivot(rows, METHOD, lambda row: row["set"], number("exact_match", 3))


def conflict(*methods: str) -> str:
    rows = [r for r in read("conflict") if r["kind"] == "slice" and r["by"] == ["real_world", "times_asked_from"]]
    rows.sort(
        key=lambda r: (
            r["attributes"]["real_world"],
            r["attributes"]["times_asked_from"],
            methods.index(r["method"]) if r["method"] in methods else 9,
        )
    )
    down = {
        "facts": lambda row: ("invented entities", "the real world")[int(row["attributes"]["real_world"])],
        "training": figures.bands(rows),
        "questions": lambda row: str(row["questions"]),
    }
    return pivot([r for r in rows if r["method"] in methods], down, lambda row: name_of(row["method"]))


def conflict_adapter() -> str:
    """What the adapter leaves of what was learned."""
    rows = [r for r in read("conflict") if r["kind"] == "slice" and r["by"] == ["real_world", "times_asked_from"]]
    rows.sort(key=lambda row: (row["attributes"]["real_world"], row["attributes"]["times_asked_from"]))
    cells = {
        "facts": lambda row: ("invented entities", "the real world")[int(row["attributes"]["real_world"])],
        "training": figures.bands(rows),
        "times asked, mean": lambda row: f"{row['attributes']['times_asked']:.0f}",
        "the document's answer": number("exact_match"),
        "the learned answer": number("old_answer"),
        "log-likelihood, nats": number("log_likelihood", 1),
    }
    return Table.of("", [row for row in rows if row["method"] == ADAPTER], cells).markdown()


def bench_scores() -> str:
    rows = [row for row in read("bench") if row["kind"] == "summary" and (row["task"], row["set"]) in OVERVIEW]
    rows.sort(key=lambda row: (order(row["method"]), OVERVIEW.index((row["task"], row["set"]))))
    name = lambda row: row["set"] if row["task"] == "encyclopedia" else f"{task_name(row['task'])}: {row['set']}"  # noqa: E731
    return pivot(rows, METHOD, name)


def bench_costs() -> str:
    """On four entities; break-even with full context."""
    rows = [row for row in read("bench") if row["kind"] == "summary" and row["set"] == "four entities"]
    rows = [{**row, "answer_s": figures.at_equal_length(row)} for row in rows]
    even = lambda key: lambda row: questions((row.get("break_even") or {}).get(CEILING, {}), key, digits=3)  # noqa: E731
    cells = METHOD | {
        "prepare, ms": scaled("prepare_s", 1000),
        "first token, ms": scaled("first_token_s", 1000),
        "answer, ms": scaled("answer_s", 1000),
        "kept, KiB": scaled("stored_bytes", 2**-10),
        "break-even by the clock": even("seconds"),
        "break-even in FLOPs": even("flops"),
    }
    return Table.of("", rows, cells).markdown()


def main_rows(name: str) -> dict[str, Row]:
    """Row of each of `COMPARED` for one of `MAIN`, with an interval."""
    file, place = MAIN[name]
    rows = [row for row in read(file) if row["kind"] == "summary" and place.items() <= row.items()]
    found = {row["method"]: {"interval": [row["low"], row["high"]], **row} if "low" in row else row for row in rows}
    return {method: found.get(method) or found[other] for method, other in COMPARED.items()}


def readme() -> str:
    lines = [[name, *(number("exact_match")(row) for row in main_rows(name).values())] for name in MAIN]
    head = ["questions about", "no context", "wrong document", "document in the prompt", "own adapter"]
    return Table("", head, lines).markdown()


def main_plot() -> str:
    names, titles = list(MAIN), ("One document", "Joined documents, and other facts")
    legend = {
        FLOOR: "no context",
        WRONG: "wrong document",
        CEILING: "document in the prompt",
        ADAPTER: "own adapter",
    }
    panels = []
    for title, part in zip(titles, (names[:3], names[3:]), strict=True):
        rows = [main_rows(name) for name in part]
        points = {
            m: [Point(i, row[m]["exact_match"], row[m]["interval"]) for i, row in enumerate(rows)] for m in legend
        }
        series = [Series(name, style_of(method), points[method]) for method, name in legend.items()]
        panels.append(Panel(title, series, Axis(""), MATCH, groups=part))
    return standalone(panels, [(name, style_of(method)) for method, name in legend.items()])


def memory_switches() -> str:
    """By method, also as a share of the right memory's alone in the prompt."""
    rows = sorted(
        (row for row in read("memory_switches") if row["kind"] == "summary"), key=lambda r: order(r["method"])
    )
    (oracle,) = (row["exact_match"] for row in rows if row["method"] == "memory_oracle")
    share = lambda row: f"{row['exact_match'] / oracle:.2f}"  # noqa: E731
    lines = [[name_of(row["method"]), MATCHED(row), share(row)] for row in rows]
    return Table("", ["method", "exact match", "of the oracle"], lines).markdown()


def memory_growth() -> str:
    """Exact match by number of memories; of the tiers also milliseconds of a question by itself."""
    rows = [row for row in read("memory_growth") if row["kind"] == "summary"]
    rows.sort(key=lambda row: (order(row["method"]), row["attributes"]["num_memories"]))
    timed = [row for row in rows if row["method"] in ("memory_token", "memory_adapter", "memory_found_adapter")]
    names = {"what": lambda row: f"{name_of(row['method'])}, {row['unit']}"}
    scores = [{**row, "unit": "exact match", "value": MATCHED(row)} for row in rows]
    times = [{**row, "unit": "ms", "value": f"{1e3 * row['question_s']:.0f}"} for row in timed]
    stored = [row for row in timed if row["method"] != "memory_found_adapter"]  # the same adapters
    bytes_ = [{**row, "unit": "KiB", "value": f"{row['stored_bytes'] / 1024:,.0f}"} for row in stored]
    across = lambda row: f"{row['attributes']['num_memories']:,.0f}"  # noqa: E731
    return pivot([*scores, *times, *bytes_], names, across, lambda row: row["value"])


def memory_override() -> str:
    """What the answers hold: what the memory was told, or what the base model learned."""
    rows = [row for row in read("memory_override") if row["kind"] == "summary"]
    bases = {"memory_override": "{}", "memory_conflict_nq": "{}", "memory_conflict_nq_smollm2": "{}, SmolLM2-135M"}
    sets = list(dict.fromkeys(row["set"] for row in rows))
    rows.sort(key=lambda row: (list(bases).index(row["task"]), sets.index(row["set"]), order(row["method"])))
    cells = {
        "facts": lambda row: bases[row["task"]].format(row["set"]),
        **METHOD,
        "questions": lambda row: str(row["questions"]),
        "what was told": number("contains_answer"),
        "what was learned": number("contains_old_answer"),
        "neither": number("contains_neither"),
    }
    return Table.of("", rows, cells).markdown()


def memory_forgetting() -> str:
    rows = [row for row in read("memory_forgetting") if row["kind"] == "summary"]
    rows.sort(key=lambda row: order(row["method"]))
    return pivot(rows, METHOD, lambda row: row["set"])


def summary() -> str:
    """What a person says of the rows, in Markdown."""
    text = (ROOT / SUMMARY).read_text(encoding="utf-8")
    text = re.sub(r"</?strong>", "**", re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL))
    return re.sub(r"<[^>]*>", "", text).strip()


def _speed(module: str, name: str | None = None) -> Callable[[], str]:
    def table() -> str:
        from importlib import import_module

        return import_module(f"benchmarks.{module}").markdown(read(name or module))

    return table


def _surface(name: str, part: str) -> Callable[[], str]:
    return lambda: surface_figures.markdown(read(name), part)


def _nights(part: str) -> Callable[[], str]:
    return lambda: nights_tables.markdown(read("memory_nights"), part)


def _forgetting(part: str) -> Callable[[], str]:
    name = part if part in ("spurious", "tasks", "smollm2") else "frontier"
    return lambda: forgetting.markdown(read(f"forgetting_{name}"), part)


def _own_documents(part: str) -> Callable[[], str]:
    return lambda: own_documents.markdown(read("own_documents"), part)


def _editing(part: str) -> Callable[[], str]:
    return lambda: editing_tables.markdown(read("forgetting_editing"), part)


def _use(part: str) -> Callable[[], str]:
    return lambda: use.markdown(read(f"use_{part.split('_')[0]}"), part)


def _pooling(part: str) -> Callable[[], str]:
    return lambda: pooling_tables.markdown(read(f"use_{part.split('_')[0]}"), part)


def _persona(part: str) -> Callable[[], str]:
    return lambda: persona_tables.markdown(read("use_persona"), part)


PROJECTED = ("serving_ingest", "serving_load", "memory_store", "training_speed_gpu")
TABLES: dict[str, Callable[[], str]] = {
    "readme": readme,
    "summary": summary,
    "tiny_figures": _speed("tiny_figures"),
    "real_text": _speed("real_text"),
    "bench_scores": bench_scores,
    "bench_costs": bench_costs,
    "niah": niah,
    "niah_seeds": niah_seeds,
    "composition": lambda: by_method("composition", "num_documents", "document", task="composition"),
    "many_documents": lambda: by_method("many_documents", "num_documents", "document", task="composition"),
    "interference": interference,
    "conflict": lambda: conflict(FLOOR, CEILING, WRONG, ADAPTER),
    "conflict_joined": lambda: conflict(FLOOR, ADAPTER, GATED, ROUTED),
    "conflict_adapter": conflict_adapter,
    "capacity": lambda: by_method("capacity", "facts", "fact", task="capacity"),
    "capacity_entities": lambda: by_method("capacity", "facts", "fact", task="capacity_entities"),
    "memory_switches": memory_switches,
    "memory_growth": memory_growth,
    "memory_forgetting": memory_forgetting,
    "memory_override": memory_override,
    "training_speed": _speed("training_speed.__main__", "training_speed"),
    "training_speed_gpu": _speed("training_speed.__main__", "training_speed_gpu"),
    "training_commits": _speed("training_speed.commits", "training_commits"),
    "internalize_cost": _speed("internalize_cost"),
    "kernel_speed": _speed("kernel_speed"),
    "memory_times": _speed("memory.times", "memory_times"),
    "memory_store": _speed("memory.store", "memory_store"),
    "memory_peers": _speed("memory.peers", "memory_peers"),
    "memory_break_even": _surface("memory_break_even", "break_even"),
    "memory_order": _surface("memory_break_even", "order"),
    "memory_cadence": _surface("memory_cadence", "cadence"),
    "memory_cadence_ratios": _surface("memory_cadence", "cadence_ratios"),
    **{f"own_documents_{part}": _own_documents(part) for part in own_documents.TABLES},
    "refining": lambda: refining.markdown(read("refining")),
    **{f"memory_{part}": _nights(part) for part in nights_tables.TABLES},
    **{f"forgetting_{part}": _forgetting(part) for part in forgetting.TABLES},
    **{f"forgetting_edits_{part}": _editing(part) for part in editing_tables.TABLES},
    "use_headline": lambda: use.headline({name: read(f"use_{name}") for name in use.HEADLINE}).markdown(),
    **{f"use_{part}": _use(part) for part in use.TABLES},
    **{f"use_{part}": _pooling(part) for part in pooling_tables.TABLES},
    **{f"use_{part}": _persona(part) for part in persona_tables.TABLES},
    "serving_load": _speed("serving.load", "serving_load"),
    "serving_load_smollm2": _speed("serving.load", "serving_load_smollm2"),
    "serving_ingest": _speed("serving.ingest", "serving_ingest"),
    "serving_projection": lambda: projection(*map(read, PROJECTED)).markdown(),
}
_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(text: str) -> str:
    """The text with every table made anew from its rows.

    Raises:
        ValueError: a block names no table that there is.
    """

    def block(found: re.Match) -> str:
        if found[2] not in TABLES:
            raise ValueError(f"{found[1].strip()} names no table; there are {', '.join(TABLES)}.")
        return f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}"

    return _BLOCK.sub(block, text)


def made_plots() -> dict[str, str]:
    """File → SVG of every plot that the documentation shows."""
    made = {"docs/results.svg": main_plot()}
    for name, figure_of in PLOTS.items():
        figure = figure_of(read(name))
        if figure:
            made[f"{RESULTS}/{name}.svg"] = standalone(figure.panels[:3], figure.legend)
    return made


def all_rows() -> list[Row]:
    """Of the page of all sweeps."""
    return merged([(name, read(name)) for name in REPORTS])


def main() -> None:
    ArgumentParser("python -m benchmarks.tables", description=__doc__).parse_args()  # it takes none but --help
    texts = {name: with_tables((ROOT / name).read_text(encoding="utf-8")) for name in FILES}
    for name, text in {**texts, **made_plots()}.items():
        (ROOT / name).write_text(text, encoding="utf-8")
        print(f"{name} follows its rows.", file=sys.stderr)


if __name__ == "__main__":
    main()
