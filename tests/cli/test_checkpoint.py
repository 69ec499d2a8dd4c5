"""hypernet checkpoint: mistakes; what it converts is in tests/interop/test_checkpoints.py."""

import inspect

import pytest

from hypernet.cli import checkpoint
from hypernet.interop.checkpoints import PUBLISHED_MAX_CHUNK_TOKENS
from tests.cli.command import hypernet


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--source", "nowhere", "--output-dir", "a"], 1, "There is no published checkpoint nowhere"),
        (["--source", "hub:../x", "--output-dir", "b"], 1, "names nothing on the hub"),
        (["--source", "a"], 2, "Missing option '--output-dir'"),
        (["--output-dir", "a"], 2, "Missing option '--source'"),
        (["--source", "a", "--output-dir", "b", "--ranks", "3"], 2, "No such option: --ranks"),
        (["a", "--source", "a", "--output-dir", "b"], 2, "unexpected extra argument(s) (a)"),
        (["--source", "a", "--output-dir", "b", "--max-chunk-tokens", "0"], 2, "value for '--max-chunk-tokens'"),
        (["--source", "a", "--output-dir", "b", "--max-chunk-tokens", "1e3"], 2, "value for '--max-chunk-tokens'"),
    ],
)
def test_command_line_mistakes_are_one_line_errors(arguments, status, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert hypernet("checkpoint", "convert", *arguments) == status
    captured = capsys.readouterr()
    assert captured.err.startswith("hypernet: ") and says in captured.err
    assert captured.err.count("\n") == 1 and not captured.out
    assert not list(tmp_path.iterdir())


def test_command_and_function_agree_on_the_length_of_chunks():
    parameters = inspect.signature(checkpoint.convert).parameters
    assert parameters["max_chunk_tokens"].default == PUBLISHED_MAX_CHUNK_TOKENS
