"""benchmarks/training_speed/commits.py: the same documents for all arms, and what train.py itself logs of its steps."""

import json

import pytest
from hydra import compose, initialize_config_dir

from benchmarks.training_speed import commits
from benchmarks.training_speed.commits import (
    Arm,
    CommitsSettings,
    checkout,
    main,
    markdown,
    steps_of,
    summary,
    write_documents,
)
from hypernet.cli.scripts import plain

TRAIN = """
import csv, pathlib, sys
given = dict(setting.split("=", 1) for setting in sys.argv[1:])
if "fails" in given: sys.exit("train.py: fails should be left out")
folder = pathlib.Path(given["output_dir"], "logs"); folder.mkdir(parents=True)
with (folder / "metrics.csv").open("w") as file:
    rows = csv.writer(file)
    rows.writerow(["step", "perf/step_s", "perf/answer_tokens_per_s", "perf/peak_mib", "perf/share_student"])
    for step in range(int(given["trainer.max_steps"])):
        rows.writerow([step, [9, 2, 4, 3][step], 100, 500 + step, ""])
        rows.writerow([step, "", "", "", ""])
"""


@pytest.fixture
def squad(tmp_path):
    """Thirty paragraphs, every third with too few questions, and a long one before them."""
    paragraphs = [{"context": "word " * 300, "qas": [_asked(0, i) for i in range(3)]}]
    for number in range(30):
        asked = [_asked(number, i) for i in range(1 if number % 3 == 2 else 3)]
        paragraphs.append({"context": f"Text {number}.", "qas": asked})
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}))
    return path


def _asked(number, i):
    return {"id": f"{number}-{i}", "question": f"Question {i} of {number}?", "answers": [{"text": f"answer {i}"}]}


def settings(*overrides):
    with initialize_config_dir(str(commits.ROOT / "conf"), version_base="1.3"):
        return compose("training_commits", overrides=["output=null", *overrides])


def small(squad, *overrides):
    cfg = settings(f"documents_file={squad}", "documents=2", "questions=2", "steps=3", "warmup_steps=1", *overrides)
    return CommitsSettings(**plain(cfg))


def test_documents_have_as_many_questions_each(squad, tmp_path):
    write_documents(tmp_path / "own.json", small(squad))
    articles = json.loads((tmp_path / "own.json").read_text())["data"]
    texts = [paragraph["context"] for article in articles for paragraph in article["paragraphs"]]
    assert texts == [f"Text {number}." for number in range(30) if number % 3 != 2][:16]
    assert {len(article["paragraphs"][0]["qas"]) for article in articles} == {2}
    assert articles[1]["paragraphs"][0]["qas"][1]["question"] == "Question 1 of 1?"
    assert len({qa["id"] for article in articles for qa in article["paragraphs"][0]["qas"]}) == 32


def test_too_few_documents_are_told(squad, tmp_path):
    with pytest.raises(ValueError, match="has 20 paragraphs of at most 200 words with 2 questions; 64 are needed"):
        write_documents(tmp_path / "own.json", small(squad, "documents=8"))


def test_unknown_commit_is_one_line():
    with pytest.raises(ValueError, match="no files of commit 0123abcd here"):
        checkout("0123abcd", commits.ROOT)


def test_steps_are_those_that_train_logs_after_warming_up(squad, tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    cfg = small(squad)
    arm = Arm(commit=None, settings=["documents='{file}'"])
    steps = steps_of(arm, cfg, root=tmp_path, documents=squad, base_model="somewhere")
    assert [step["step_s"] for step in steps] == [2, 4, 3] and steps[0]["peak_mib"] == 501
    assert set(steps[0]) == {"step_s", "answer_tokens_per_s", "peak_mib"}


def test_train_that_fails_is_told(squad, tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    cfg = small(squad)
    arm = Arm(commit=None, settings=["fails=1"])
    with pytest.raises(ValueError, match="train.py fails=1 ended with 1: train.py: fails should be left out"):
        steps_of(arm, cfg, root=tmp_path, documents=squad, base_model="somewhere")


def test_arms_take_turns_and_compare_run_by_run(squad, monkeypatch, capsys):
    order, seconds = [], {"before": iter([8.0, 12.0]), "same_recipe": iter([4.0, 4.0]), "shipped_recipe": iter([2, 2])}

    def steps_of(arm, cfg, *, root, documents, base_model):
        now = "same_recipe" if "experiment=tiny" in arm.settings else "shipped_recipe"
        name = "before" if arm.commit else now
        order.append(name)
        assert (root == commits.ROOT) == (arm.commit is None) and documents.is_file()
        one = {"step_s": next(seconds[name]), "answer_tokens_per_s": 10.0, "peak_mib": 100.0 + len(order)}
        return [{**one, "share_teacher": 0.5}] * cfg.steps

    monkeypatch.setattr(commits, "steps_of", steps_of)
    monkeypatch.setattr(commits, "checkout", lambda commit, folder: folder.mkdir())
    given = [f"documents_file={squad}", "documents=2", "questions=2", "steps=3", "warmup_steps=1", "runs=2"]
    main.__wrapped__(settings(*given))
    assert order[:3] == ["before", "same_recipe", "shipped_recipe"]
    assert order[3:] == ["same_recipe", "shipped_recipe", "before"]
    table = capsys.readouterr().out
    assert "| before | 10.0 | 0.4 | 1.00 | 1.00 | 1.00 | 106 |" in table
    assert "| same recipe | 4.0 | 1.0 | 2.50 | 2.00 | 3.00 | 104 |" in table


def test_rows_hold_the_spread_and_the_shares(squad):
    cfg = small(squad)
    step = {"step_s": 2.0, "answer_tokens_per_s": 30.0, "peak_mib": 7.0, "share_student": 0.25}
    found = {"before": [[step], [{**step, "step_s": 6.0}]], "same_recipe": [[step], [step]]}
    rows = list(summary(found, cfg))
    assert rows[0]["commit"] == "d53352e" and rows[1]["commit"] is None
    assert (rows[0]["least_step_s"], rows[0]["step_s"], rows[0]["most_step_s"]) == (2, 4, 6)
    assert rows[0]["answer_tokens"] == [60] and rows[0]["questions"] == 4 and rows[0]["questions_per_s"] == 1
    assert (rows[1]["least_times"], rows[1]["most_times"], rows[1]["share_student"]) == (1, 3, 0.25)
    assert markdown(rows).splitlines()[-1] == "| same recipe | 2.0 | 2.0 | 2.00 | 1.00 | 3.00 | 7 |"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("documents_file=none.json", "Cannot read none.json: No such file or directory"),
        ("documents=0", "documents should be"),
        ("arms.before.commit=0123abcd", "There are no files of commit 0123abcd here"),
        ("+arms.before.setting=[]", "There is no setting 'arms.before.setting'. There are arms.before.commit, "),
    ],
)
def test_training_commits_errors_are_one_line(squad, override, message):
    given = {"documents_file": str(squad), "documents": 2, "questions": 2, "steps": 3, "warmup_steps": 1}
    overrides = [f"{key}={value}" for key, value in given.items() if not override.startswith(f"{key}=")]
    with pytest.raises(SystemExit, match=f"benchmarks.training_speed.commits: .*{message}"):
        main.__wrapped__(settings(*overrides, override))
