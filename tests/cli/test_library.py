"""hypernet library: what each subcommand does to a library, prints and exits with."""

import json
import re

import pytest

from hypernet.adapters.library import AdapterLibrary
from tests.adapters.test_composition import uneven_adapter
from tests.cli.command import hypernet

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def library(tmp_path) -> AdapterLibrary:
    """A library of one adapter, of the document d1.txt; a second adapter lies in tmp_path / "two"."""
    uneven_adapter(1, seed=2).save(tmp_path / "two")
    library = AdapterLibrary(tmp_path / "library")
    library.add(uneven_adapter(1))
    return library


def only_id(library: AdapterLibrary) -> str:
    (entry,) = library.list()
    return entry.id


def damage(library: AdapterLibrary) -> str:
    """Flips the last bit of the weights; returns the entry's id."""
    identity = only_id(library)
    path = library.directory / identity / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return identity


def test_add_stores_the_adapter_and_prints_its_id(tmp_path, capsys):
    uneven_adapter(1).save(tmp_path / "one")
    assert hypernet("library", "add", "--adapter", tmp_path / "one", "--directory", tmp_path / "library") == 0
    assert capsys.readouterr().out.strip() == uneven_adapter(1).content_id()
    assert only_id(AdapterLibrary(tmp_path / "library")) == uneven_adapter(1).content_id()


def test_list_shows_id_document_and_base_model(library, capsys):
    assert hypernet("library", "list", "--directory", library.directory) == 0
    out = capsys.readouterr().out
    assert only_id(library)[:12] in out and "d1.txt" in out and "tiny-llama base-1" in out


@pytest.mark.parametrize("columns", [20, 40, 80, 300])
def test_listed_ids_stay_in_one_piece(library, capsys, monkeypatch, columns):
    monkeypatch.setattr("hypernet.cli.library.PIPED_WIDTH", columns)
    assert hypernet("library", "list", "--directory", library.directory) == 0
    assert only_id(library)[:12] in capsys.readouterr().out


def test_list_marks_an_entry_that_is_cut_off(library, capsys):
    assert hypernet("library", "list", "--directory", library.directory) == 0
    assert "damage" not in capsys.readouterr().out
    path = library.directory / only_id(library) / WEIGHTS
    path.write_bytes(path.read_bytes()[:100])
    assert hypernet("library", "list", "--directory", library.directory) == 0
    out = capsys.readouterr().out
    assert "damage" in out and "100 bytes" in out


def test_empty_library_says_that_it_is_empty(tmp_path, capsys):
    assert hypernet("library", "list", "--directory", tmp_path) == 0
    assert capsys.readouterr().out == f"No adapters in {tmp_path}.\n"


def test_verify_lists_other_files_without_calling_them_damaged(library, capsys):
    (library.directory / "notes.txt").touch()
    assert hypernet("library", "verify", "--directory", library.directory) == 0
    out = capsys.readouterr().out
    assert out == "Not the library's, and left alone: notes.txt\nAll 1 adapters are as they were stored.\n"
    assert hypernet("library", "verify", "--directory", library.directory, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"adapters": 1, "damaged": [], "foreign": ["notes.txt"]}


@pytest.mark.parametrize("command", ["list", "verify", "clean"])
def test_folder_of_other_things_is_refused(tmp_path, capsys, command):
    (tmp_path / "letter.txt").touch()
    assert hypernet("library", command, "--directory", tmp_path) == 1
    assert f"{tmp_path} is no adapter library: it holds letter.txt" in capsys.readouterr().err


def test_list_as_json_holds_what_an_entry_knows(library, capsys):
    assert hypernet("library", "list", "--directory", library.directory, "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)
    (entry,) = library.list()
    assert found["id"] == entry.id and found["directory"] == str(entry.directory)
    assert [(d["name"], d["sha256"]) for d in found["documents"]] == list(entry.documents)
    assert (found["rank"], found["num_bytes"], found["replaces"]) == (entry.rank, entry.num_bytes, [])


def test_verify_of_an_intact_library_ends_well(library, capsys):
    assert hypernet("library", "verify", "--directory", library.directory) == 0
    assert capsys.readouterr().out == "All 1 adapters are as they were stored.\n"


def test_verify_names_what_is_damaged_and_exits_with_1(library, capsys):
    identity = damage(library)
    assert hypernet("library", "verify", "--directory", library.directory) == 1
    assert re.search(rf"{identity}: {WEIGHTS} is not what was stored.*\n1 damaged", capsys.readouterr().out)


def test_verify_as_json_lists_the_damage(library, capsys):
    identity = damage(library)
    assert hypernet("library", "verify", "--directory", library.directory, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    (told,) = found["damaged"]
    assert found["adapters"] == 1 and told["name"] == identity and WEIGHTS in told["reason"]


def test_replace_leaves_the_new_adapter_alone(library, tmp_path, capsys):
    options = ["--id", "d1.txt", "--adapter", tmp_path / "two", "--directory", library.directory]
    assert hypernet("library", "replace", *options) == 0
    assert capsys.readouterr().out.strip() == only_id(library) == uneven_adapter(1, seed=2).content_id()


def test_remove_takes_even_a_damaged_adapter_out(library, capsys):
    identity = damage(library)
    assert hypernet("library", "remove", "--id", identity, "--directory", library.directory) == 0
    assert capsys.readouterr().out.strip() == f"removed {identity}" and library.list() == ()


def test_clean_removes_what_a_killed_writer_left(library, capsys):
    (library.directory / f".{'0' * 32}.new").mkdir()
    assert hypernet("library", "clean", "--directory", library.directory) == 0
    assert capsys.readouterr().out == f"removed .{'0' * 32}.new\n"
    assert hypernet("library", "clean", "--directory", library.directory) == 0
    assert capsys.readouterr().out == "Nothing to clean up.\n"


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["list", "--directory", "/no/where"], 1, "No adapter library at /no/where"),
        (["remove", "--id", "x", "--directory", "/no/where"], 1, "No adapter library at /no/where"),
        (["add", "--adapter", "/no/adapter"], 1, "/no/adapter"),
        (["show"], 2, "No such command 'show'. See hypernet library --help."),
        (["list", "verify"], 2, "unexpected extra argument(s) (verify). See hypernet library list --help."),
        (["list", "directory=x"], 2, "unexpected extra argument(s) (directory=x)"),
        (["remove"], 2, "Missing option '--id'. See hypernet library remove --help."),
        (["list", "--depth", "1"], 2, "No such option: --depth"),
    ],
)
def test_command_line_mistakes_are_one_line_errors(arguments, status, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert hypernet("library", *arguments) == status
    captured = capsys.readouterr()
    assert captured.err.startswith("hypernet: ") and says in captured.err
    assert captured.err.count("\n") == 1 and not captured.out
