"""hypernet memory: what each subcommand prints and exits with."""

import io
import json

import pytest

from hypernet.memory.memory import Memory
from tests.cli.command import hypernet


@pytest.fixture
def run(tmp_path, capsys):
    """run("add", "text", ...) is exit status and what was printed, as JSON where --json is given."""

    def run(command: str, *arguments):
        status = hypernet("memory", command, *arguments, "--directory", tmp_path / "memory")
        out = capsys.readouterr().out
        return status, json.loads(out) if "--json" in arguments else out

    return run


def test_story_of_one_user_by_commands(run):
    _, ref = run("add", "Fenda was taught by Orla.", "--user", "alice", "--valid-at", "2026-03-01", "--json")
    key = ref["id"]
    assert ref == {"id": key, "version": 1, "batch": "v1"}
    assert run("update", key, "Fenda was taught by Jorun.", "--valid-at", "2026-06-01")[1] == f"{key}@2 (v2)\n"
    status, hits = run("search", "Who taught Fenda?", "--user", "alice", "--as-of", "2026-04-01", "--json")
    assert status == 0 and [hit["text"] for hit in hits] == ["Fenda was taught by Orla."]
    assert {"id", "version", "score", "source", "valid_at", "invalid_at"} <= hits[0].keys()
    assert run("get", f"{key}@2")[1] == "Fenda was taught by Jorun.\n"
    assert run("invalidate", key, "--at", "2026-07-01")[0] == 0
    assert "2026-06-01 to 2026-07-01  Fenda was taught by Jorun." in run("list", "--as-of", "2026-06-15")[1]
    assert run("delete", key, "--reason", "asked")[1] == "delete: 3 versions (v4)\n"
    assert run("search", "Fenda", "--user", "alice", "--as-of", "2026-06-15") == (1, "")
    assert run("rollback", "v4")[1] == "rollback: 3 versions (v5)\n"
    assert run("profile", "--user", "alice", "--json")[1]["stable"] == []
    assert [entry["operation"] for entry in run("history", key, "--json")[1]][:3] == ["add", "update", "invalidate"]
    run("delete-all", "--user", "alice")
    assert run("restore", key)[1].startswith("restore: 3 versions")
    run("delete-all", "--user", "alice")
    assert run("purge", "--json")[1]["memories"] == [f"{key}@{n}" for n in (1, 2, 3)]
    assert run("status", "--json")[1]["memories"] == 0
    assert run("verify") == (0, "Everything is as it was stored.\n")
    assert [batch["operation"] for batch in run("versions", "--json")[1]][-1] == "purge"


def test_text_is_read_from_standard_input(run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("told by a pipe\n"))
    run("add", "-")
    assert [m["text"] for m in run("list", "--json")[1]] == ["told by a pipe"]


def test_file_is_imported_and_exported(run, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"id": "m1", "memory": "plays chess", "user_id": "alice"}\n')
    assert run("import", tmp_path / "in.jsonl", "--format", "mem0")[1] == "import: 1 versions (v1)\n"
    assert run("export", tmp_path / "out.jsonl")[1] == f"1 memories in {tmp_path / 'out.jsonl'}\n"
    assert json.loads((tmp_path / "out.jsonl").read_text())["text"] == "plays chess"


def test_interrupted_purge_is_unfinished_work(run, tmp_path):
    run("add", "one")
    (tmp_path / "memory" / ".purging").touch()
    assert run("status")[0] == 3
    assert run("verify") == (0, "repaired an interrupted purge\n") and run("status")[0] == 0


def test_damage_is_named_with_status_1(run, tmp_path):
    from sqlalchemy import text

    run("add", "one")
    memory = Memory.open(tmp_path / "memory")
    with memory.store.database.write() as connection:
        connection.execute(text("UPDATE memories SET text = 'forged'"))
    memory.close()
    status, found = run("verify", "--json")
    assert status == 1 and "is not the text that was stored" in found["damage"][0]


def test_control_characters_are_escaped_on_the_screen(run, tmp_path, capsys):
    forged = "clear \x1b[2J title \x9b1m\nnext\u202eline"
    key = run("add", forged, "--user", "alice\x07", "--json")[1]["id"]
    printed = "clear \\x1b[2J title \\x9b1m\\nnext\\u202eline\n"
    assert run("list")[1].endswith(printed) and run("search", "clear title")[1].endswith(printed)
    assert run("get", key)[1] == printed.replace("\\n", "\n")
    assert "\x1b" not in run("history", key)[1] + run("profile", "--user", "alice\x07")[1]
    run("delete", key, "--reason", "\x1b]0;title\x07")
    assert "\\x1b]0;title\\x07" in run("history", key)[1]
    run("restore", key)
    assert [m["text"] for m in run("list", "--json")[1]] == [forged]
    assert hypernet("memory", "get", "a@\x1b[2J", "--directory", tmp_path / "memory") == 1
    assert "\x1b" not in capsys.readouterr().err


def test_import_says_what_it_left_out(run, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"id": "m1", "text": "a"}\n')
    run("import", tmp_path / "in.jsonl")
    assert run("import", tmp_path / "in.jsonl")[1] == "import: 0 versions, 1 left out that were here before\n"
    assert len(run("versions", "--json")[1]) == 1


def test_import_of_a_faulty_file_makes_no_memory(run, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b"caf\xe9")
    assert run("import", tmp_path / "in.jsonl")[0] == run("import", tmp_path / "none.jsonl")[0] == 1
    assert not (tmp_path / "memory").exists()


def test_empty_list_is_no_error_and_no_hit_is_status_1(run):
    run("add", "one")
    assert run("list", "--user", "nobody") == (0, "") and run("search", "two") == (1, "")


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["get", "nobody"], 1, "There is no memory nobody"),
        (["delete", "x@y"], 1, "'x@y' is no memory's id"),
        (["delete-all"], 1, "delete-all needs --user, --agent or --run"),
        (["delete-all", "--agent", " "], 2, "--agent is ' '. Give a text"),
        (["list", "--run", ""], 2, "--run is ''. Give a text"),
        (["forget", "x", "--reason", ""], 2, "--reason is ''. Give a text"),
        (["add", "x", "--subject", "", "--relation", "is"], 2, "--subject is ''. Give a text"),
        (["add", "x", "--source", ""], 2, "--source is ''. Give a text"),
        (["delete-all", "--user", ""], 2, "--user is ''"),
        (["profile"], 1, "A profile is somebody's. Give --user, --agent or --run."),
        (["profile", "--user", "a", "--recent-days", "-1"], 2, "--recent-days is -1.0. Give a number from 0"),
        (["list", "--limit", "0"], 2, "Invalid value for '--limit': Input should be greater"),
        (["list", "--as-of", "x"], 2, "--as-of is 'x', not a date"),
        (["search", "x", "--known-at", "x"], 2, "--known-at is 'x', not a date"),
        (["invalidate", "x", "--at", "x"], 2, "--at is 'x', not a date"),
        (["add", "x", "--invalid-at", "9999-12-31T23:59:59-14:00"], 2, "--invalid-at is '9999-12-31T23:59:59-14:00',"),
        (["add", "x", "--valid-at", "2026-02-01", "--invalid-at", "2026-01-01"], 1, "It would end at 2026-01-01"),
        (["add", "x", "--valid-at", "2026-02-30"], 2, "--valid-at is '2026-02-30', not a date that exists"),
        (["add", "x", "--valid-at", "2026-02-01T00:00+30:00"], 2, "not a date that exists"),
        (["add", "  "], 1, "A memory is a text"),
        (["rollback", "v7"], 1, "There is no batch v7"),
        (["import", "/no/file"], 1, "No such file or directory: /no/file"),
        (["search"], 2, "Missing argument 'question'. See hypernet memory search --help."),
        (["recall"], 2, "No such command 'recall'"),
    ],
)
def test_memory_mistakes_are_one_line_errors(arguments, status, says, tmp_path, capsys):
    Memory.open(tmp_path / "memory").close()
    given = ["--directory", tmp_path / "memory"] if status == 1 else []
    assert hypernet("memory", *arguments, *given) == status
    captured = capsys.readouterr()
    assert says in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_reading_makes_no_memory(tmp_path, capsys):
    assert hypernet("memory", "list", "--directory", tmp_path / "new") == 1
    assert "No memory at" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_versions_and_status_are_said_in_words(run, tmp_path):
    run("add", "one", "--user", "alice")
    run("rollback", "v1")
    printed = run("versions")[1].splitlines()
    assert printed[0].endswith("add  1  taken back") and "True" not in "".join(printed)
    key = run("add", "two")[1].split("@")[0]
    run("rollback", "v3")
    assert "taken back" in run("history", key)[1] and "True" not in run("history", key)[1]
    assert "\nunfinished    no\n" in run("status")[1]
    (tmp_path / "memory" / ".purging").touch()
    assert "\nunfinished    yes, run verify\n" in run("status")[1]


def test_overwriting_and_emptied_memories_are_one_line(run, tmp_path, capsys):
    run("add", "one")
    folder = tmp_path / "memory"
    assert hypernet("memory", "export", folder / "memory.sqlite", "--directory", folder) == 1
    assert "the folder of a memory. Name a file elsewhere." in capsys.readouterr().err
    (folder / "memory.sqlite").write_bytes(b"")
    for command in (["list"], ["add", "x"], ["verify"]):
        assert hypernet("memory", *command, "--directory", folder) == 1
        error = capsys.readouterr().err
        assert "is damaged (it has 0 bytes)" in error and error.count("\n") == 1


def test_copy_is_the_same_memory_and_replaces_nothing(run, tmp_path, capsys):
    run("add", "one", "--user", "alice")
    run("delete-all", "--user", "alice")
    assert run("copy", tmp_path / "second", "--json")[1]["memories"] == 1
    listed = run("versions", "--json")[1]
    assert hypernet("memory", "versions", "--json", "--directory", tmp_path / "second") == 0
    assert json.loads(capsys.readouterr().out) == listed
    for arguments, message in (
        ((tmp_path / "second",), "is there already. Name a new folder"),
        ((tmp_path / "third", "--database", "mysql://alice:hidden@host/x"), "database is no URL of PostgreSQL"),
    ):
        assert hypernet("memory", "copy", *arguments, "--directory", tmp_path / "memory") == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and "hidden" not in error
    assert not (tmp_path / "third").exists()
