"""hypernet memory ask, explain, write-adapters, measure, forget: what each prints and exits with."""

import json

import pytest

from hypernet.memory.memory import Memory
from tests.cli.command import hypernet


@pytest.fixture
def run(tmp_path, capsys, make_doc_to_lora, tiny_base_model_folder):
    """run("ask", "text", ...) is exit status and what was printed, as JSON where --json is given; then errors."""
    make_doc_to_lora().save_pretrained(tmp_path / "model")

    def run(command: str, *arguments):
        model = () if command in ("add", "status", "purge", "update") else ("--model", tmp_path / "model")
        status = hypernet("memory", command, *arguments, *model, "--directory", tmp_path / "memory")
        out, run.errors = capsys.readouterr()
        return status, json.loads(out) if "--json" in arguments and out else out

    return run


def test_story_by_commands(run, tmp_path):
    _, ref = run(
        "add", "Orla taught Fenda.", "--user", "alice", "--subject", "Fenda", "--relation", "teacher", "--json"
    )
    run("add", "Norbach is a town.", "--user", "alice")
    assert run("ask", "Who taught Fenda?", "--user", "alice", "--tier", "adapter")[0] == 3
    assert run.errors.startswith("hypernet: 2 of 2 memories have no adapter") and run.errors.count("\n") == 1
    assert run("status", "--user", "alice")[0] == 0  # nobody has asked for adapters yet
    status, written = run("write-adapters", "--user", "alice", "--json")
    assert status == 0 and (written["written"], written["refused"]) == (2, {})
    assert run("write-adapters")[1].startswith("0 written, 0 copied, 2 kept; ")
    status, answer = run("ask", "Who taught Fenda?", "--user", "alice", "--tier", "adapter", "--json")
    assert status == 0 and answer["tier"] == "adapter" and len(answer["memories"]) == 2
    status, printed = run("ask", "Who taught Fenda?", "--user", "alice")
    assert status == 0 and "token: " in printed and "(no tier has been measured, see measure)" in printed
    _, found = run("explain", "Who taught Fenda?", "--user", "alice", "--tier", "adapter", "--json")
    assert {effect["memory"] for effect in found["effects"]} == set(answer["memories"])
    assert all(e["effect"] == pytest.approx(e["log_p"] - e["log_p_without"]) for e in found["effects"])
    assert "Orla taught Fenda." in run("explain", "Who taught Fenda?", "--user", "alice")[1]
    (tmp_path / "q.jsonl").write_text('{"question": "Who taught Fenda?", "answer": "Orla"}\n\n')
    measured = run("measure", "--user", "alice", "--questions", tmp_path / "q.jsonl", "--json")[1]
    assert {row["tier"] for row in measured} == {"none", "adapter", "token"}
    assert (
        "adapter   0." in run("measure", "--user", "alice")[1] or "adapter   1." in run("measure", "--user", "alice")[1]
    )
    status, printed = run("status", "--user", "alice")
    assert status == 0 and printed.splitlines()[-3].split()[:4] == ["tier", "memories", "valid_now", "missing"]
    assert printed.splitlines()[-1].split()[:5] == ["adapter", "2", "2", "0", "0"]
    run("update", ref["id"], "Jorun taught Fenda.")
    status, found = run("status", "--user", "alice", "--json")
    assert status == 3 and found["tiers"]["adapter"]["missing"] == 1
    run("write-adapters")
    status, printed = run("forget", ref["id"], "--verify", "--reason", "asked")
    assert status == 0 and printed.startswith("forgot 2 versions (v") and printed.endswith("passed\n")
    assert "1 of 1 are the twin's to the bit" in printed
    assert run("purge")[0] == 0 and run("status", "--json")[1]["is_unfinished"] is False


def test_interrupted_write_is_unfinished_work(run, tmp_path, make_doc_to_lora):
    run("add", "one", "--user", "alice")
    run("write-adapters")
    memory = Memory.open(tmp_path / "memory")
    memory.bank.library.add(make_doc_to_lora().internalize("Nobody's."))
    memory.close()
    assert run("status")[0] == 3
    assert hypernet("memory", "verify", "--directory", tmp_path / "memory") == 0
    assert run("status")[0] == 0


def test_failed_audit_exits_with_1(run, monkeypatch):
    _, ref = run("add", "one", "--user", "alice", "--json")
    monkeypatch.setattr("hypernet.memory.audit.DeletionAudit._unreachable", lambda *_: False)
    status, printed = run("forget", ref["id"], "--verify")
    assert status == 1 and printed.splitlines()[-1].startswith("FAILED")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("forget", "0123"), "There is no memory 0123"),
        (("measure",), "There are no questions to measure with"),
        (("measure", "--questions", "pyproject.toml"), "pyproject.toml, line 1 is no object with question and answer"),
    ],
)
def test_mistakes_are_one_line(run, arguments, says):
    run("add", "one", "--user", "alice")
    assert run(*arguments)[0] == 1
    assert says in run.errors and run.errors.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ("ask", "Who?", "--tier", "lost"),
            "'lost' is not one of auto, token, adapter, none, weights, weights+adapter.",
        ),
        (("explain", "Who?", "--tier", "weights"), "'weights' is not one of auto, token, adapter, none."),
        (("ask", "Who?", "--as-of", "2026-13-01"), "not a date that exists"),
        (("ask", "Who?", "--accuracy", "7"), "'--accuracy': Input should be less than or equal to 1"),
        (("ask", "Who?", "--user", " "), "--user is"),
        (("export", "all.jsonl", "--format", "zep"), "'zep' is not one of plain, mem0, graphiti, letta."),
        (("consolidate", "--moves", "all"), "'--moves': 'all' is not one of lora, everything, upper."),
        (("profile", "--user", "a", "--recent-days", "-1"), "--recent-days is -1"),
    ],
)
def test_wrong_options_exit_with_2_in_one_line(tmp_path, capsys, arguments, says):
    Memory.open(tmp_path / "memory").close()
    assert hypernet("memory", *arguments, "--directory", tmp_path / "memory") == 2
    errors = capsys.readouterr().err
    assert says in errors and errors.count("\n") == 1


def test_model_that_is_not_there_is_named_with_its_place(tmp_path, capsys, monkeypatch):
    """As the default, assets/tiny, is outside a checkout."""
    monkeypatch.chdir(tmp_path)
    for command in (("add", "one"), ("ask", "Who?")):
        status = hypernet("memory", *command, "--directory", tmp_path / "memory")
    place = tmp_path / "assets/tiny"
    assert status == 1 and f"No checkpoint assets/tiny: there is no folder {place}. Give" in capsys.readouterr().err


def test_writing_adapters_tells_its_progress(run, tmp_path, make_doc_to_lora, monkeypatch):
    """Memories done of all, over shards of several users; a bar shows them."""
    for number in range(7):
        run("add", f"note {number} is here", "--user", "alice" if number % 2 else "bob")
    told = []
    memory = Memory.open(tmp_path / "memory", model=make_doc_to_lora(), shard_memories=2, pass_chunks=2)
    memory.write_adapters(progress=lambda *pair: told.append(pair))
    memory.close()
    assert {total for _, total in told} == {7} and told[-1] == (7, 7)
    assert told == sorted(told) and len({done for done, _ in told}) > 3
    run("add", "one more", "--user", "bob")
    monkeypatch.setattr("tqdm.std.tqdm.__init__", _always_shown(told.clear() or told))
    run("write-adapters")
    assert "write adapters" in told


def _always_shown(seen):
    from tqdm import tqdm

    make = tqdm.__init__

    def made(self, *arguments, **settings):
        seen.append(settings["desc"])
        make(self, *arguments, **settings)

    return made


def test_another_base_model_is_named_as_missing_adapters(run, tmp_path, make_doc_to_lora, tiny_base_model):
    import torch

    run("add", "one", "--user", "alice")
    run("write-adapters")
    with torch.no_grad():
        tiny_base_model.lm_head.weight[0, 0] += 1
    other = make_doc_to_lora(base_model=tiny_base_model)
    other.save_pretrained(tmp_path / "other", include_base_model=True)
    arguments = ("--tier", "adapter", "--model", tmp_path / "other", "--directory", tmp_path / "memory")
    assert hypernet("memory", "ask", "Who?", "--user", "alice", *arguments) == 3
