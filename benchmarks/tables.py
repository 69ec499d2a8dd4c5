"""Writes the tables in README.md and the model card from the committed rows: `python -m benchmarks.tables`

A table stands between `<!-- figures: benchmarks/results/<name>.jsonl -->` and `<!-- /figures -->`; a test fails when it
differs from what its rows give.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import internalize_cost, kernel_speed, real_text, report, tiny_figures

ROOT = Path(__file__).parent.parent
FILES = ("README.md", "assets/tiny/README.md")
TABLES: dict[str, Callable[[list[dict]], str]] = {
    "tiny_figures": tiny_figures.markdown,
    "real_text": lambda rows: real_text.markdown(rows[0]),
    "kernel_speed": kernel_speed.markdown,
    "internalize_cost": internalize_cost.markdown,
    "bench": report.overview,
}
_BLOCK = re.compile(r"(<!-- figures: (benchmarks/results/(\w+)\.jsonl) -->\n)(.*?)(<!-- /figures -->)", re.DOTALL)


def with_tables(text: str) -> str:
    """The text with every table made anew from its rows."""

    def table(match: re.Match) -> str:
        lines = (ROOT / match[2]).read_text(encoding="utf-8").splitlines()
        return f"{match[1]}\n{TABLES[match[3]]([json.loads(line) for line in lines])}\n\n{match[5]}"

    return _BLOCK.sub(table, text)


def main() -> None:
    for name in FILES:
        path = ROOT / name
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"{name} follows its rows.", file=sys.stderr)


if __name__ == "__main__":
    main()
