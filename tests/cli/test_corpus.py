"""hypernet corpus: what it prints, its exit statuses, and its mistakes in one line."""

import sys
from importlib.util import find_spec

import pytest

from hypernet.adapters.library import AdapterLibrary
from hypernet.data.encyclopedia import Encyclopedia
from tests.cli.command import hypernet


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "documents"
    folder.mkdir()
    for i in range(2):
        (folder / f"{i}.txt").write_text(Encyclopedia("test").record(i, num_facts=3).document)
    return folder


def test_summary_counts_what_became_of_the_documents(folder, tmp_path, capsys):
    library = tmp_path / "library"
    assert hypernet("corpus", folder, "--output", library, "--threads", "1") == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0] == "Documents  2: 2 added, 0 skipped, 0 failed" and not captured.err
    chunks = sum(entry.num_chunks for entry in AdapterLibrary(library).list())
    assert lines[1].startswith(f"Adapters   {library}: {chunks} chunks, ") and "documents/s; " in lines[2]

    (folder / "3.txt").write_bytes(b"\x00\x01")
    assert hypernet("corpus", folder, "--output", library, "--threads", "1") == 1
    captured = capsys.readouterr()
    assert captured.out.startswith("Documents  3: 0 added, 2 skipped, 1 failed\n")
    assert captured.err.startswith("hypernet: 3.txt: ") and captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["lost", "--output", "{}/library"], 1, "There is no file or folder lost"),
        (["examples", "--output", "README.md"], 1, "README.md is a file. Name a folder"),
        (["examples", "--output", "{}/library", "--model", "lost"], 1, "There is no checkpoint folder or file lost"),
        (["examples", "--output", "memory://x"], 1, "--output memory://x ends with this process. Name a folder"),
        (["examples", "--output", "nonsense://x"], 1, "Cannot open nonsense://x"),
        (["examples", "--output", "{}/library", "--device", "cuda:77"], 1, "device is cuda:77"),
        (["examples"], 2, "Missing option '--output'"),
        (["--output", "{}/library"], 2, "Missing argument"),
        (["examples", "--output", "{}/library", "--workers", "-1"], 2, "Invalid value for '--workers'"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, status, says, tmp_path, capsys):
    assert hypernet("corpus", *(argument.format(tmp_path) for argument in arguments)) == status
    captured = capsys.readouterr()
    assert captured.err.startswith("hypernet: ") and says in captured.err
    assert captured.err.count("\n") == 1 and not captured.out and not (tmp_path / "library").exists()


def test_missing_ray_is_one_line_that_names_the_extra(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert hypernet("corpus", folder, "--output", tmp_path / "library", "--workers", "2") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Workers need the extra [ray]" in error and "'doc-to-lora[ray]'" in error


@pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra [ray]")
def test_ray_address_without_a_cluster_is_one_line(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert hypernet("corpus", folder, "--output", tmp_path / "library", "--workers", "1") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "There is no Ray cluster at RAY_ADDRESS=127.0.0.1:1" in error
