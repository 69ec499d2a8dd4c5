"""Cells of the benchmark → tables in Markdown and one HTML page with plots: `python -m benchmarks.report`

    python -m benchmarks.report output=benchmarks/results/bench.jsonl      # rows of the cells in outputs/benchmark
    python -m benchmarks.report rows=benchmarks/results/bench.jsonl        # a page of rows that are there
    python -m benchmarks.report rows=[bench.jsonl,niah.jsonl]              # one page of several reports

Every method has its controls on the same questions: absolute, relative to full context, and as the share of the gap
from no context that it closes, with paired bootstrap intervals over documents and seeds.
"""

import logging
from pathlib import Path

import hydra

from benchmarks.measuring.rows import Row, merged, read_report_rows, rounded, write_report_rows
from benchmarks.report.names import ADAPTER
from hypernet.cli.scripts import Script
from hypernet.cli.settings import OutputFile, Settings, Text, Texts

log = logging.getLogger("benchmarks.report")


class ReportSettings(Settings):
    input_dir: Text
    rows: Texts
    output: OutputFile | None
    page: OutputFile | None
    summary: Text | None


SCRIPT = Script("benchmarks.report", ReportSettings)


def read_rows(cfg: ReportSettings) -> list[Row]:
    from benchmarks.measuring.aggregate import describe, summarize
    from benchmarks.measuring.break_even import cost_model
    from benchmarks.measuring.cells import read_cells, read_errors

    if cfg.rows:
        return merged([(Path(path).stem, read_report_rows(path)) for path in cfg.rows])
    cells = read_cells(cfg.input_dir)
    return rounded([describe(cells, read_errors(cfg.input_dir)), *summarize(cells, cost_model=cost_model)])


@hydra.main(config_path="../../conf/benchmark", config_name="report", version_base="1.3")
@SCRIPT
def main(cfg: ReportSettings) -> None:
    from benchmarks.report.page import page
    from benchmarks.report.tables import break_even_table, set_tables

    rows = read_rows(cfg)
    text = page(rows, summary=Path(cfg.summary).read_text(encoding="utf-8") if cfg.summary else "")
    if cfg.output and not cfg.rows:
        write_report_rows(cfg.output, rows)
    if cfg.page:
        path = Path(cfg.page)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        log.info("%s", path)
    even = [row for row in rows if row["kind"] == "summary" and row["method"] == ADAPTER and row.get("break_even")]
    tables = [table for _, table in set_tables(rows)] + ([break_even_table(even)] if even else [])
    print("\n\n".join(f"**{table.caption}**\n\n{table.markdown()}" for table in tables))


if __name__ == "__main__":
    SCRIPT.run(main, Path(__file__).parents[2] / "conf/benchmark/report.yaml")
