"""Which of the tried settings of each method is best on the validation split: `python -m benchmarks.tuning`

    python -m benchmarks.run sweep=tune
    python -m benchmarks.run sweep=tune_retrieval
    python -m benchmarks.tuning

Every method must have been tried with as many settings as any other. The steps of a gradient method are taken from the
curve that each of its runs gives anyway. What is best goes to conf/benchmark/method/ by hand.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import hydra

from hypernet.cli.scripts import Script
from hypernet.cli.settings import OutputFile, Settings, Text

Row = dict[str, Any]
SCORES = ("exact_match", "token_f1", "log_likelihood")  # of equal ones, the next decides


def tried(rows: Sequence[Row]) -> list[Row]:
    """One row per method, setting and number of steps: means over all questions.

    Args:
        rows: of cells, as `benchmarks.measuring.cells.read_cells` gives them.

    Raises:
        ValueError: a cell is not of the validation split or names no setting of its method, or methods were tried with
            different numbers of settings.
    """
    questions: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["kind"] == "question":
            questions.setdefault((row["task"], row["method"]), []).append(row)
    # Cells of other seeds are of the same setting.
    summaries = {(row["task"], row["method"]): row for row in rows if row["kind"] == "summary"}
    result = []
    for name, summary in summaries.items():
        method, setting = _setting(summary)
        for step in dict.fromkeys(row["step"] for row in questions[name]):
            mine = [row for row in questions[name] if row["step"] == step]
            scores = {score: sum(row[score] for row in mine) / len(mine) for score in SCORES}
            counts = {"questions": len(mine), "seeds": len({row["seed"] for row in mine})}
            result.append({"kind": "tried", "method": method, "setting": setting, "step": step, **counts, **scores})
    budgets = {method: len(_settings(part)) for method, part in _by_method(result).items()}
    if len(set(budgets.values())) > 1:
        counts = ", ".join(f"{method} {number}" for method, number in budgets.items())
        raise ValueError(
            f"Every method should have the same number of settings to choose from, but they have {counts}. Run the "
            "missing cells."
        )
    return result


def chosen(rows: Sequence[Row]) -> list[Row]:
    """The best of the rows of `tried` for each method, and what else there was.

    settings: how many the method was tried with. worst: exact match of the worst of them at its own best step.
    edge: what has its smallest or largest tried value at the best, so that a better one may lie beyond.
    """
    result = []
    for part in _by_method(rows).values():
        # Of equal ones the first, which has the fewest steps.
        best = max(sorted(part, key=lambda row: row["step"] or 0), key=lambda row: [row[score] for score in SCORES])
        settings = _settings(part)
        values = {key: [setting[key] for setting, _ in settings] for key in best["setting"]}
        found = {**best["setting"], "step": best["step"]}
        if best["step"] is not None:
            values["step"] = [row["step"] for row in part]
        edge = [key for key, of in values.items() if len(set(of)) > 1 and found[key] in (min(of), max(of))]
        worst = min(max(row["exact_match"] for row in mine) for _, mine in settings)
        result.append({**best, "kind": "chosen", "settings": len(settings), "worst": worst, "edge": edge})
    return result


def markdown(rows: Sequence[Row]) -> str:
    """One line per method, from the rows of `tried`."""
    head = ("method", "settings", "chosen", "steps", "exact match", "worst setting", "questions", "at the edge")
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * 3 + ['---:'] * 4 + ['---'])} |"]
    for best in chosen(rows):
        mine = [row["setting"] for row in rows if row["method"] == best["method"]]
        values = {key: sorted({setting[key] for setting in mine}) for key in best["setting"]}
        cells = (
            best["method"].replace("_", " "),
            "; ".join(f"{key} {', '.join(f'{value:g}' for value in found)}" for key, found in values.items()),
            "; ".join(f"{key} {value:g}" for key, value in best["setting"].items()),
            "–" if best["step"] is None else str(best["step"]),
            f"{best['exact_match']:.3f}",
            f"{best['worst']:.3f}",
            str(best["questions"]),
            ", ".join(best["edge"]) or "–",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _setting(summary: Row) -> tuple[str, dict[str, float]]:
    """(method, what was tried of it) of a cell."""
    given = dict(override.split("=", 1) for override in summary["overrides"] if "=" in override)
    config = summary["run"]["config"]
    setting = {key[7:]: config["method"][key[7:]] for key in given if key.startswith("method.")}
    wrong = None
    if (split := config["task"].get("split")) != "validation":
        wrong = f"is of the split {split}, and settings are chosen on task.split=validation"
    elif not setting:
        wrong = "names no setting, as method.lr=0.01 does, so nothing was tried"
    if wrong:
        raise ValueError(f"The cell of {summary['method']} {wrong}. Take it away, or name another input_dir.")
    return given.get("method", summary["method"]), setting


def _by_method(rows: Iterable[Row]) -> dict[str, list[Row]]:
    result: dict[str, list[Row]] = {}
    for row in rows:
        result.setdefault(row["method"], []).append(row)
    return result


def _settings(rows: Sequence[Row]) -> list[tuple[dict[str, float], list[Row]]]:
    """Each setting with its rows, one per number of steps."""
    result: dict[tuple, list[Row]] = {}
    for row in rows:
        result.setdefault(tuple(row["setting"].items()), []).append(row)
    return [(dict(setting), part) for setting, part in result.items()]


class TuningSettings(Settings):
    input_dir: Text
    output: OutputFile | None


SCRIPT = Script("benchmarks.tuning", TuningSettings)


@hydra.main(config_path="../conf/benchmark", config_name="tuning", version_base="1.3")
@SCRIPT
def main(cfg: TuningSettings) -> None:
    from benchmarks.measuring.cells import read_cells
    from benchmarks.measuring.rows import write_rows

    cells = read_cells(cfg.input_dir)
    rows = tried(cells)
    if cfg.output:
        runs = [row["run"] for row in cells if row["kind"] == "summary"]
        same = {key: runs[0][key] for key in ("hardware", "threads", "python", "versions")}
        run = {"commits": sorted({run["commit"] for run in runs}), "date": max(run["date"] for run in runs), **same}
        write_rows(cfg.output, [*chosen(rows), *rows], run=run)
    print(markdown(rows))


if __name__ == "__main__":
    SCRIPT.run(main, Path(__file__).parents[1] / "conf/benchmark/tuning.yaml")
