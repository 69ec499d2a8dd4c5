"""benchmarks/times_asked.py: counts are those of the questions that a training really tokenizes."""

import json
import runpy
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from benchmarks.times_asked import band_of, bands, count, read_times_asked
from hypernet.data.batches import BaseModelBatches
from hypernet.data.curriculum import Curriculum, Stage
from hypernet.data.encyclopedia import Encyclopedia, background_facts, background_questions, known_facts

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "benchmarks/results/times_asked.jsonl"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "assets/tiny/base_model")


@pytest.fixture
def curriculum() -> Curriculum:
    first = Stage(steps=3, batch_size=5, num_background=4, reordering=0.5)
    return Curriculum(
        Encyclopedia("train", seed=3),
        [first, Stage(steps=3, batch_size=7, num_entities=(1, 3), num_background=3, unanswerable=0.5)],
    )


def test_times_asked_counts_training_questions(curriculum, tokenizer, monkeypatch) -> None:
    tokenized = Counter()
    encode = BaseModelBatches._encode

    def spying(self, framed):
        tokenized.update(map("".join, framed))
        return encode(self, framed)

    with monkeypatch.context() as patched:
        patched.setattr(BaseModelBatches, "_encode", spying)
        for step in range(len(batches := BaseModelBatches(curriculum, tokenizer))):
            batches[step]
    layout = BaseModelBatches(curriculum, tokenizer).layout
    prompts = Counter()
    for text, number in tokenized.items():  # with the article before it, or without
        prompts[text.removeprefix(layout.before_user).removeprefix("\n\n").removesuffix(layout.after_user)] += number
    counts = count(curriculum, tokenizer)
    assert sum(counts.values()) == 3 * 5 * 4 + 3 * 7 * 3
    questions = background_questions()
    assert sum(prompts[question.text] for question in questions) == sum(counts.values())
    for fact in known_facts():
        forms = [form.format(n=fact.entity.name) for form in fact.relation.questions]
        assert counts[fact.relation.name, fact.entity.name] == sum(prompts[form] for form in forms)
    for group, subject, answer in background_facts():
        forms = {q.text for q in questions if (q.group, q.answer) == (group, answer)}
        assert counts[group, subject] == sum(prompts[form] for form in forms)


def test_times_asked_adds_up_over_steps(curriculum, tokenizer) -> None:
    whole, halves = Counter(count(curriculum, tokenizer)), Counter()
    for steps in (range(2), range(2, 6)):
        halves.update(count(curriculum, tokenizer, steps=steps))
    assert whole == halves


def test_committed_counts_are_of_the_shipped_base_model(monkeypatch, tmp_path) -> None:
    """Exactly, in the first stage; drawing all of them takes ten times as long."""
    output = tmp_path / "times_asked.jsonl"
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["benchmarks.times_asked", f"output={output}", "stages=[0]"])
    monkeypatch.delitem(sys.modules, "benchmarks.times_asked", raising=False)  # runpy warns of one that is there
    runpy.run_module("benchmarks.times_asked", run_name="__main__")
    (summary, *made), (whole, *committed) = (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in (output, COMMITTED)
    )
    assert {"commit", "versions", "config"} <= set(summary["run"])
    assert summary["base_model_fingerprint"] == whole["base_model_fingerprint"]
    assert (summary["steps"], whole["steps"]) == (300, 3600)
    of_stage = {n: [row | {"run": None} for row in committed if row["stage"] == n] for n in range(4)}
    assert [row | {"run": None} for row in made] == of_stage[0]
    stages = yaml.safe_load((ROOT / "conf/experiment/tiny_base_model_names.yaml").read_text())["task"]["stages"]
    for number, stage in enumerate(stages):
        asked = sum(times for row in of_stage[number] for times in row["times_asked"].values())
        assert asked == stage["steps"] * stage["batch_size"] * stage["num_background"]
    counts = read_times_asked(COMMITTED).counts.values()
    assert (sum(counts), min(counts), max(counts)) == (whole["questions"], whole["fewest"], whole["most"])
    config = yaml.safe_load((ROOT / "assets/tiny/config.yaml").read_text(encoding="utf-8"))
    assert read_times_asked(output).base_model_fingerprint == config["base_model"]["fingerprint"]
    assert len(read_times_asked(output).counts) == len(known_facts()) + len(background_facts())


def test_times_asked_bands_are_balanced() -> None:
    counts = [*range(10, 100), *[50] * 10, 0]
    lowest = bands(counts, 3)
    assert lowest[0] == 10 and len(lowest) == 3
    sizes = Counter(band_of(value, lowest) for value in counts if value)
    assert set(sizes) == set(lowest) and max(sizes.values()) - min(sizes.values()) <= 10
    assert band_of(0, lowest) == 0 and band_of(9, lowest) == 0 and band_of(10**6, lowest) == lowest[-1]
    assert bands([0, 0], 3) == [] and bands([7, 7, 7], 3) == [7] and band_of(5, []) == 0


@pytest.mark.parametrize("stages", ["[4]", "[]"])
def test_times_asked_refuses_unknown_stages(commands, stages) -> None:
    result = commands.run("benchmarks.times_asked", ["output=null", f"stages={stages}"], cwd=ROOT)
    assert result.code == 1 and "Traceback" not in result.stderr
    message = f"benchmarks.times_asked: stages is {stages}; give some of [0, 1, 2, 3], or null for all."
    assert result.stderr.splitlines()[-1] == message


def test_file_without_counts_is_refused_with_the_command(tmp_path) -> None:
    path = tmp_path / "counts.jsonl"
    for text in (None, "", "nonsense", '{"kind": "sweep"}\n'):
        if text is not None:
            path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="python -m benchmarks.times_asked"):
            read_times_asked(path)
