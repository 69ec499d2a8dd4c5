"""Writes the tables in README.md and the model card, and README's plots, from the committed rows:
`python -m benchmarks.tables`

A table stands between `<!-- figures: benchmarks/results/<name>.jsonl -->` and `<!-- /figures -->`; where a file gives
several, the table's name follows the file's: `<!-- figures: benchmarks/results/bench.jsonl capacity -->`. A test fails
when one differs from what its rows give, and so for the plots, `benchmarks/results/<name>.svg`.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import internalize_cost, kernel_speed, plots, real_text, report, tiny_figures, training_speed
from benchmarks.svg import standalone
from benchmarks.verdict import verdict


def answer(rows: list[dict]) -> str:
    """When an adapter wins, in one paragraph of Markdown."""
    return " ".join(f"**{title}** {text}" for title, text in verdict(rows))


ROOT = Path(__file__).parent.parent
RESULTS = Path("benchmarks/results")
FILES = ("README.md", "assets/tiny/README.md")
TABLES: dict[str, Callable[[list[dict]], str]] = {
    "tiny_figures": tiny_figures.markdown,
    "real_text": lambda rows: real_text.markdown(rows[0]),
    "kernel_speed": kernel_speed.markdown,
    "internalize_cost": internalize_cost.markdown,
    "training_speed": training_speed.markdown,
    "bench": lambda rows: f"{answer(rows)}\n\n{report.overview(rows)}",
    "niah": report.niah,
    "niah_seeds": report.niah_seeds,
    "composition": report.composition,
    "many_documents": report.composition,
    "interference": report.interference,
    "capacity": report.capacity,
    "conflict": report.conflict,
}
# Of the report's rows: from a file of that name, or else from the tiny sweep's; a crowd is no part of that one.
PLOTS: dict[str, Callable[[list[dict]], plots.Figure | None]] = {
    "niah": plots.needles,
    "composition": plots.composition,
    "many_documents": plots.composition,
    "interference": plots.interference,
    "capacity": plots.capacity,
    "conflict": plots.conflict,
}
MAX_PANELS = 3  # side by side, as wide as README shows
_BLOCK = re.compile(
    r"(<!-- figures: (benchmarks/results/(\w+)\.jsonl)(?: (\w+))? -->\n)(.*?)(<!-- /figures -->)", re.DOTALL
)


def with_tables(text: str) -> str:
    """The text with every table made anew from its rows.

    Raises:
        ValueError: a block names no table that there is.
    """

    def table(match: re.Match) -> str:
        name = match[4] or match[3]
        if name not in TABLES:
            raise ValueError(f"{match[1].strip()} asks for table {name!r}; there are {', '.join(TABLES)}.")
        return f"{match[1]}\n{TABLES[name](_rows(ROOT / match[2]))}\n\n{match[6]}"

    return _BLOCK.sub(table, text)


def made_plots(root: Path = ROOT) -> dict[str, str]:
    """File → SVG of every plot whose rows are committed."""
    made = {}
    for name, figure_of in PLOTS.items():
        stems = (name,) if name == "many_documents" else (name, "bench")
        path = next((p for stem in stems if (p := root / RESULTS / f"{stem}.jsonl").is_file()), None)
        figure = figure_of(_rows(path)) if path else None
        if figure:
            panels = figure.panels[:MAX_PANELS]
            made[f"{RESULTS}/{name}.svg"] = standalone(panels, figure.legend)
    return made


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    for name in FILES:
        path = ROOT / name
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"{name} follows its rows.", file=sys.stderr)
    for name, svg in made_plots().items():
        (ROOT / name).write_text(svg, encoding="utf-8")
        print(f"{name} follows its rows.", file=sys.stderr)


if __name__ == "__main__":
    main()
