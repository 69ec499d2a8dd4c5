"""How often its training asked the base model for each fact that it knows without a document.

    python -m benchmarks.times_asked                                     # of the shipped base model
    asked = read_times_asked("benchmarks/results/times_asked.jsonl")
    asked.counts["capital", "France"]

A curriculum draws its questions from the seed and the step alone, so these are counts and no estimates: the training's
own batches are drawn again, step by step, but neither tokenized nor trained on.
"""

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import hydra
from omegaconf import OmegaConf

from hypernet.cli.scripts import Script
from hypernet.cli.settings import Number, OutputFile, Settings, Text
from hypernet.data.encyclopedia import background_facts, background_questions, known_facts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hypernet.data.curriculum import Curriculum
    from hypernet.data.records import Question

CONF = Path(__file__).parent.parent / "conf"
Fact = tuple[str, str]  # group, and subject or known entity


class TimesAsked(NamedTuple):
    """counts: of each fact, all its question forms together. base_model_fingerprint: whose training asked."""

    base_model_fingerprint: str
    counts: dict[Fact, int]


def count(
    curriculum: "Curriculum", tokenizer: "PreTrainedTokenizerBase", *, steps: Iterable[int] | None = None
) -> dict:
    """Fact → how often a base model was asked for it in these steps; None: in all of them.

    Args:
        tokenizer: the base model's; for its chat layout alone, nothing is tokenized.
    """
    from hypernet.data.batches import BaseModelBatches

    class Asked(BaseModelBatches):
        """The training's own draws: a batch is what each article's row asks, (question, does it see the article)."""

        def _encode(self, texts: Sequence[str]) -> list[list[int]]:
            return [[] for _ in texts]

        def _rows(
            self,
            prefixes: Sequence[list[int]],
            asked: Sequence[Sequence[tuple["Question", bool]]],
            extra: object = None,
        ) -> Sequence[Sequence[tuple["Question", bool]]]:
            return asked

    batches = Asked(curriculum, tokenizer)
    fact_of = _fact_of_question()
    asked = Counter(
        fact_of[question.text]
        for step in (range(len(batches)) if steps is None else steps)
        for questions in batches[step]
        for question, _ in questions
        if question.kind == "background"
    )
    return {fact: asked[fact] for fact in dict.fromkeys(fact_of.values())}


def bands(counts: Iterable[int], number: int) -> list[int]:
    """The smallest count of each of so many bands of about as many facts each; what was never asked is in none."""
    ordered = sorted(value for value in counts if value)
    return sorted({ordered[len(ordered) * k // number] for k in range(number)}) if ordered else []


def band_of(count: int, lowest: Sequence[int]) -> int:
    """The smallest count of the band that a count is in; 0 for what was never asked.

    Args:
        lowest: as `bands` gives them.
    """
    place = bisect_right(lowest, count)
    return lowest[place - 1] if place else 0


def read_times_asked(path: str | Path) -> TimesAsked:
    """What the command has written.

    Raises:
        ValueError: there is no such file, or it is no such file.
    """
    try:
        first, *groups = map(json.loads, Path(path).read_text(encoding="utf-8-sig").splitlines())
        counts = Counter()
        for row in groups:  # of every stage
            counts.update({(row["group"], subject): n for subject, n in row["times_asked"].items()})
        return TimesAsked(first["base_model_fingerprint"], dict(counts))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"Cannot read how often facts were asked from {path} ({type(error).__name__}: {error}); make the file with "
            f"python -m benchmarks.times_asked output={path}."
        ) from error


def _fact_of_question() -> dict[str, Fact]:
    """Text of each background question → the fact that it asks for."""
    known = {
        form.format(n=fact.entity.name): (fact.relation.name, fact.entity.name)
        for fact in known_facts()
        for form in fact.relation.questions
    }
    subjects = {(group, answer): subject for group, subject, answer in background_facts()}
    assert len(subjects) == len(background_facts())  # within a group an answer says which fact it is
    return {q.text: known.get(q.text) or (q.group, subjects[q.group, q.answer]) for q in background_questions()}


class TimesAskedSettings(Settings):
    experiment: Text
    base_model: Text
    stages: list[Number] | None
    output: OutputFile | None


SCRIPT = Script("benchmarks.times_asked", TimesAskedSettings)


@hydra.main(config_path="../conf/benchmark", config_name="times_asked", version_base="1.3")
@SCRIPT
def main(cfg: TimesAskedSettings) -> None:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.utils import instantiate

    from benchmarks.measuring.rows import describe_run, write_rows
    from hypernet.base.base_model import fingerprint, load_base_model
    from hypernet.training.build import make_curriculum

    base_model, tokenizer = load_base_model(cfg.base_model)
    GlobalHydra.instance().clear()  # there can be one: this command's, whose settings are read by now
    with initialize_config_dir(str(CONF), version_base="1.3"):
        training = compose("train", [f"experiment={cfg.experiment}"])
    sources = instantiate(training.task.get("sources"), _convert_="all")
    stages = OmegaConf.to_container(training.task.stages)
    curriculum = make_curriculum("train", stages, seed=training.seed, sources=sources, tokenizer=tokenizer)
    counts: Counter[Fact] = Counter()
    groups: dict[tuple[int, str], dict[str, int]] = {}
    every = list(range(len(curriculum.stages)))
    wanted = every if cfg.stages is None else cfg.stages
    if not wanted or set(wanted) - set(every):
        raise ValueError(f"stages is {wanted}; give some of {every}, or null for all.")
    num_steps, end = 0, 0
    for stage, steps in enumerate(stage.steps for stage in curriculum.stages):
        end += steps
        if stage not in wanted:
            continue
        num_steps += steps
        found = count(curriculum, tokenizer, steps=range(end - steps, end))
        counts.update(found)
        for (group, subject), times in found.items():
            groups.setdefault((stage, group), {})[subject] = times
    lowest = bands(counts.values(), 3)
    summary = {
        "kind": "times_asked",
        "experiment": cfg.experiment,
        "base_model_fingerprint": fingerprint(base_model),
        "steps": num_steps,
        "facts": len(counts),
        "questions": sum(counts.values()),
        "fewest": min(counts.values()),
        "most": max(counts.values()),
    }
    rows = [summary]
    rows += [{"kind": "group", "stage": s, "group": g, "times_asked": found} for (s, g), found in groups.items()]
    if cfg.output:
        write_rows(cfg.output, rows, run=describe_run(cfg.model_dump()))
    print(
        f"{summary['questions']:,} questions on {summary['facts']:,} facts in {summary['steps']:,} steps of "
        f"{cfg.experiment}: {summary['fewest']} to {summary['most']} times each; three bands of as many facts begin at "
        f"{', '.join(map(str, lowest))}."
    )


if __name__ == "__main__":
    SCRIPT.run(main, CONF / "benchmark/times_asked.yaml")
