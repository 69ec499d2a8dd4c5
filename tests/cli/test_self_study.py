"""hypernet self-study: its options are the fields of StudySettings, and it makes shards."""

import dataclasses
import logging

import pytest

from hypernet.data.self_study.settings import StudySettings
from tests.cli.command import hypernet


@pytest.fixture
def logging_as_before():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_command_makes_shards_and_says_how_many(tiny_base_model_folder, tmp_path, capsys, logging_as_before):
    (tmp_path / "notes.txt").write_text("Norbach was founded by Ilda Renwick. It lies on the river Palno.")
    given = ["--documents", tmp_path / "notes.txt", "--base-model", tiny_base_model_folder]
    given += ["--output-dir", tmp_path / "study", "--max-answer-tokens", "3", "--max-question-tokens", "4"]
    assert hypernet("self-study", *given) == 0
    assert "1 shards made" in capsys.readouterr().out
    assert len(list((tmp_path / "study").glob("shard-*.parquet"))) == 1


def test_help_shows_every_setting_with_its_default(capsys):
    assert hypernet("self-study", "--help") == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in dataclasses.fields(StudySettings):
        assert f"--{field.name.replace('_', '-')} " in text
        if field.default not in ("", dataclasses.MISSING):
            assert f"{field.metadata['help']} [default: {field.default}]" in text


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--documents", "c"], 2, "Missing option '--base-model'"),
        (["--base-model", "b"], 1, "Give one of documents (a file or folder), questions"),
        (["--base-model", "b", "--documents", "c", "--top-k", "0"], 1, "top_k should be at least 1, got 0"),
        (["--base-model", "b", "--documents", "c", "--top-k", "x"], 2, "Invalid value for '--top-k'"),
        (["--base-model", "b", "--documents", "c", "--process-index", "1"], 1, "counts from 0 to num_processes - 1"),
        (["--base-model", "b", "--documents", "c", "--kept-answers", "x"], 1, "kept_answers should be right or all"),
        (["--base-model", "b", "--questions", "c", "--documents", "c"], 1, "Give one of documents"),
        (["--base-model", "assets/tiny/base_model", "--questions", "no.json"], 1, "Cannot read questions from no.json"),
        (["--base-model", "b", "--documents", "c", "--engine", "x"], 1, "Unknown engine 'x'"),
    ],
)
def test_command_line_mistakes_are_one_line_errors(arguments, status, says, tmp_path, capsys):
    assert hypernet("self-study", "--output-dir", tmp_path / "study", *arguments) == status
    captured = capsys.readouterr()
    assert captured.err.startswith("hypernet: ") and says in captured.err
    assert captured.err.count("\n") == 1 and not captured.out and not (tmp_path / "study").exists()
