"""train.py beside train.py of an earlier commit, on the same documents: `python -m benchmarks.training_speed.commits`

Each arm is a command line of train.py, here or in a copy of the earlier commit's files; arms take turns. All take steps
of so many documents of one file, each with as many questions, so questions a step are the same. Seconds are of a step,
as train.py logs them, without a run's first ones; the peak is of the process.
"""

import csv
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra

from benchmarks.report.tables import Cell, Table, number
from hypernet.cli.scripts import Script
from hypernet.cli.settings import Count, Number, OutputFile, Settings, Text, checked

ROOT = Path(__file__).parents[2]
_WORDS = 200  # of a document, at most: with its questions it fits into a window of 512 tokens


class Arm(Settings):
    """commit: whose files; None: these. settings: of train.py; {base_model} and {file} stand for paths,
    {documents} for how many a step has."""

    commit: Text | None
    settings: list[str]


class CommitsSettings(Settings):
    arms: dict[str, dict[str, Any]]
    base_model: Text
    documents_file: Text
    documents: Count
    questions: Count
    steps: Count
    warmup_steps: Number
    runs: Count
    threads: Count | None
    output: OutputFile | None


def write_documents(path: Path, cfg: CommitsSettings) -> None:
    """So many paragraphs that no step repeats one, each with its first questions, in SQuAD's format.

    Raises:
        ValueError: the file has too few.
    """
    from benchmarks.real_text import read_squad

    wanted = 2 * cfg.documents * (cfg.warmup_steps + cfg.steps)  # a fifth goes to validation and test
    asked = [(text, qas) for text, qas in read_squad(cfg.documents_file) if len(qas) >= cfg.questions]
    found = [(text, qas) for text, qas in asked if len(text.split()) <= _WORDS][:wanted]
    if len(found) < wanted:
        raise ValueError(
            f"{cfg.documents_file} has {len(found)} paragraphs of at most {_WORDS} words with {cfg.questions} "
            f"questions; {wanted} are needed. Set documents, questions or steps lower."
        )
    paragraphs = [
        {
            "context": text,
            "qas": [{"id": f"{number}.{i}", **_as_asked(*qa)} for i, qa in enumerate(qas[: cfg.questions])],
        }
        for number, (text, qas) in enumerate(found)
    ]
    articles = [{"title": str(number), "paragraphs": [one]} for number, one in enumerate(paragraphs)]
    path.write_text(json.dumps({"version": "1.1", "data": articles}), encoding="utf-8")


def _as_asked(question: str, answers: Sequence[str]) -> dict[str, Any]:
    return {"question": question, "answers": [{"text": answers[0], "answer_start": 0}]}


def checkout(commit: str, folder: Path) -> None:
    """The commit's files, without touching the repository.

    Raises:
        ValueError: there is no such commit.
    """
    run = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True)
    if run.returncode:
        raise ValueError(f"There are no files of commit {commit} here. Clone the repository with its whole history.")
    with tarfile.open(fileobj=io.BytesIO(run.stdout)) as files:
        files.extractall(folder, filter="data")


def steps_of(arm: Arm, cfg: CommitsSettings, *, root: Path, documents: Path, base_model: str) -> list[dict[str, float]]:
    """What train.py logs of each step, its first ones left out.

    Raises:
        ValueError: it failed.
    """
    places = {"base_model": base_model, "file": str(documents), "documents": cfg.documents}
    with tempfile.TemporaryDirectory(prefix="training-speed-") as output:
        settings = [
            *(setting.format(**places) for setting in arm.settings),
            *(f"trainer.max_steps={cfg.warmup_steps + cfg.steps}", "trainer.log_every_n_steps=1"),
            *("+trainer.limit_val_batches=0", "trainer.enable_progress_bar=false"),
            *(f"threads={cfg.threads or 'null'}", f"output_dir={output}/run"),
        ]
        run = subprocess.run(
            [sys.executable, "train.py", *settings],
            **{"cwd": root, "capture_output": True, "text": True, "env": os.environ | {"PYTHONPATH": ""}},
        )
        if run.returncode:
            last = (run.stderr.strip() or run.stdout.strip()).splitlines()[-1:]
            raise ValueError(f"train.py {' '.join(arm.settings)} ended with {run.returncode}: {' '.join(last)}")
        (log,) = Path(output).rglob("metrics.csv")
        with log.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["perf/step_s"]]
    return [
        {key.removeprefix("perf/"): float(value) for key, value in row.items() if key.startswith("perf/") and value}
        for row in rows[cfg.warmup_steps :]
    ]


def measure(cfg: CommitsSettings) -> Iterator[dict[str, Any]]:
    """A row for each arm, when all have run.

    Raises:
        ValueError: an arm, the documents or the base model cannot be.
    """
    from tqdm import tqdm

    from hypernet.base.catalog import locate

    arms = {name: checked(Arm, arm, place=f"arms.{name}") for name, arm in cfg.arms.items()}
    base_model = str(Path(locate(cfg.base_model)).resolve())
    found: dict[str, list[list[dict[str, float]]]] = {name: [] for name in arms}
    with tempfile.TemporaryDirectory(prefix="training-speed-") as folder:
        documents = Path(folder) / "documents.json"
        write_documents(documents, cfg)
        roots: dict[str | None, Path] = {None: ROOT}
        for commit in {arm.commit for arm in arms.values() if arm.commit}:
            roots[commit] = Path(folder) / commit
            checkout(commit, roots[commit])
        names = list(arms)
        with tqdm(total=cfg.runs * len(names), desc="train.py", unit="run", file=sys.stderr) as bar:
            for run in range(cfg.runs):
                for name in names[run % len(names) :] + names[: run % len(names)]:
                    arm = arms[name]
                    places: dict[str, Any] = {"documents": documents, "base_model": base_model}
                    found[name].append(steps_of(arm, cfg, root=roots[arm.commit], **places))
                    bar.update()
    yield from summary(found, cfg)


def summary(found: dict[str, list[list[dict[str, float]]]], cfg: CommitsSettings) -> Iterator[dict[str, Any]]:
    """Medians of the steps, with the least and most of runs; how many times the first arm's speed, run by run."""
    asked = cfg.documents * cfg.questions
    first = found[next(iter(found))]
    for name, runs in found.items():
        of_run = [statistics.median(step["step_s"] for step in run) for run in runs]
        times = [statistics.median(step["step_s"] for step in a) / b for a, b in zip(first, of_run, strict=True)]
        steps = [step for run in runs for step in run]
        shares = sorted({key for step in steps for key in step if key.startswith("share_")})
        yield {
            **{"arm": name, "commit": cfg.arms[name]["commit"], "steps": len(steps), "questions": asked},
            "step_s": statistics.median(of_run),
            **{"least_step_s": min(of_run), "most_step_s": max(of_run)},
            "questions_per_s": asked / statistics.median(of_run),
            **{"times_first": statistics.median(times), "least_times": min(times), "most_times": max(times)},
            "peak_mib": max(step["peak_mib"] for step in steps),
            "answer_tokens": [round(step["step_s"] * step["answer_tokens_per_s"]) for step in runs[0]],
            **{key: statistics.mean(step.get(key, 0.0) for step in steps) for key in shares},
        }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    cells: dict[str, Cell] = {
        "step, s": number("step_s", 1),
        "questions/s": number("questions_per_s", 1),
        "times the first": number("times_first"),
        "least": number("least_times"),
        "most": number("most_times"),
        "peak, MiB": lambda row: f"{row['peak_mib']:,.0f}",
    }
    return Table.of("", rows, {"train.py": lambda row: row["arm"].replace("_", " ")} | cells).markdown()


SCRIPT = Script("benchmarks.training_speed.commits", CommitsSettings)


@hydra.main(config_path="../../conf", config_name="training_commits", version_base="1.3")
@SCRIPT
def main(cfg: CommitsSettings) -> None:
    from benchmarks.measuring.rows import describe_run, write_rows

    rows = list(measure(cfg))
    if cfg.output:
        write_rows(cfg.output, rows, run=describe_run(cfg.model_dump()))
    print(markdown(rows))


if __name__ == "__main__":
    SCRIPT.run(main, ROOT / "conf/training_commits.yaml")
