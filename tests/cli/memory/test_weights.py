"""hypernet memory consolidate, promote, versions --weights, rollback, sleep: what each prints and exits with."""

import json

import pytest

from tests.cli.command import hypernet

SMALL = ("--steps", "1", "--rank", "2", "--rehearsal", "none")
WITH_MODEL = ("consolidate", "promote", "sleep", "ask")


@pytest.fixture
def run(tmp_path, capsys, make_doc_to_lora):
    """run("sleep", ...) is exit status and what was printed, as JSON where --json is given; then errors."""
    make_doc_to_lora(bias_block=False).save_pretrained(tmp_path / "model")
    (tmp_path / "yes.yaml").write_text(
        "min_recall: 0\nmin_gain: -1\nmin_kept: 0\nmin_background: 0\nmin_in_context: 0\n"
        "max_kl: 1000000\nmax_leak: 1000000\n"
    )
    (tmp_path / "no.yaml").write_text("min_recall: 2\n")

    def run(command, *arguments):
        model = ("--model", tmp_path / "model") if command in WITH_MODEL else ()
        status = hypernet("memory", command, *arguments, *model, "--directory", tmp_path / "memory")
        out, run.errors = capsys.readouterr()
        return status, json.loads(out) if "--json" in arguments and out else out

    run.yes, run.no = ("--gate", tmp_path / "yes.yaml"), ("--gate", tmp_path / "no.yaml")
    run("add", "Orla taught Fenda.", "--user", "alice", "--subject", "Fenda", "--relation", "teacher")
    return run


def test_refused_weights_exit_with_2_and_are_forced_only(run):
    assert run("consolidate", "--user", "alice", "--dry-run")[1] == "1 memories, 1 new, from base\n"
    status, printed = run("consolidate", "--user", "alice", *SMALL, *run.no)
    name = printed.splitlines()[-1].split()[0]
    assert status == 2 and printed.endswith(f"{name} was refused\n") and "recall" in printed and "FAILED" in printed
    status, _ = run("promote", name, "--user", "alice")
    assert status == 2 and run.errors.startswith(f"hypernet: {name} was refused: recall ")
    status, printed = run("promote", name, "--user", "alice", "--force")
    assert status == 0 and f"{name} is live, forced past the gate" in printed
    (row,) = run("versions", "--weights", "--user", "alice", "--json")[1]
    assert (row["version"], row["live"], row["gate"], row["forced"]) == (name, True, "refused", True)


def test_sleep_promotes_and_rollback_goes_to_base(run):
    assert run("sleep", "--user", "alice", *SMALL)[1] == "not due: 1 wait\n"
    status, night = run("sleep", "--user", "alice", "--now", *SMALL, *run.yes, "--json")
    assert status == 0 and night["promoted"] and night["waiting"] == 1
    assert run("sleep", "--user", "alice", "--now", *SMALL)[1] == "nothing waits\n"
    status, answer = run("ask", "Who?", "--user", "alice", "--tier", "weights", "--json")
    assert status == 0 and (answer["tier"], answer["reason"], answer["memories"]) == ("weights", night["version"], [])
    printed = run("ask", "Who?", "--user", "alice", "--tier", "weights")[1]
    assert printed.splitlines()[-1] == f"weights: {night['version']}"
    weights = run("status", "--user", "alice", "--json")[1]["tiers"]["weights"]
    assert (weights["memories"], weights["valid_now"], weights["missing"], weights["stale"]) == (1, 1, 0, 0)
    assert weights["live"] == night["version"] and weights["bytes"] > 1000
    assert "weights" not in run("status", "--user", "bob", "--json")[1]["tiers"]
    run("add", "Pell taught Fenda.", "--user", "alice", "--subject", "Fenda", "--relation", "teacher")
    assert run("status", "--user", "alice")[1].splitlines()[-1].split()[:5] == ["weights", "1", "0", "1", "1"]
    assert run("rollback", "base", "--user", "alice") == (0, "base is live\n")
    assert run("ask", "Who?", "--user", "alice", "--tier", "weights", "--json")[1]["reason"] == "base"
    assert run("rollback", night["version"], "--user", "bob")[0] == 1 and "was never live" in run.errors


def test_refused_sleep_exits_with_2(run):
    status, printed = run("sleep", "--user", "alice", "--now", *SMALL, *run.no)
    assert status == 2 and " refused: recall " in printed


def test_documents_become_weights(run, tmp_path):
    (tmp_path / "notes.md").write_text("The river of Norbach is the Palno.")
    given = ("--user", "bob", "--documents", tmp_path / "notes.md", *SMALL, *run.yes)
    assert run("consolidate", *given, "--dry-run")[0] == 1 and "--dry-run changes nothing" in run.errors
    assert run("list", "--user", "bob", "--json")[1] == []
    status, report = run("consolidate", *given, "--json")
    assert status == 0 and report["passed"] and report["checks"][0]["number"] == 1  # asked
    assert run("consolidate", *given, "--json")[1]["version"] == report["version"]
    (one,) = run("list", "--user", "bob", "--json")[1]
    assert one["text"] == "The river of Norbach is the Palno." and one["source"] == str(tmp_path / "notes.md")
    assert run("consolidate", "--user", "bob", "--documents", tmp_path / "none")[0] == 1 and "none" in run.errors


def test_only_what_was_approved_is_consolidated(run):
    items = run("review", "--user", "alice", "--json")[1]
    assert len(items) == 5 and {item["status"] for item in items} == {"open"}
    assert run("consolidate", "--user", "alice", "--approved", *SMALL, *run.yes)[0] == 1
    assert run.errors.startswith("hypernet: Nothing waits to be consolidated") and "not approved" in run.errors
    first, second = (item["id"] for item in items[:2])
    status, printed = run("review", "--user", "alice", "--reject", first, "--edit", second, "Pell", "--accept", "all")
    assert status == 0 and [line.split()[1] for line in printed.splitlines()] == [
        "rejected",
        "edited",
        *["accepted"] * 3,
    ]
    assert run("sleep", "--user", "alice", "--now", "--approved", *SMALL, *run.yes)[0] == 0
    assert run("review", "--user", "alice", "--reject-text", "Fenda")[1].count("rejected") == 5
    assert run("review", "--user", "alice", "--accept", "q-0")[0] == 1 and "There is no item 'q-0'" in run.errors


def test_mistakes_are_one_line(run, tmp_path):
    wrong = "Invalid value for"
    for arguments, status, reason in (
        (("consolidate", "--moves", "all"), 2, f"{wrong} '--moves': 'all' is not one of lora, everything, upper."),
        (("consolidate", "--user", "bob"), 1, "Nothing waits to be consolidated"),
        (("sleep", "--cadence", "weekly"), 2, f"{wrong} '--cadence': 'weekly' is not one of every-n, calendar"),
        (("promote", "w-1", "--user", "alice"), 1, "There is no version 'w-1' of these weights; there are: none."),
    ):
        assert (
            run(*arguments)[0] == status
            and run.errors.startswith(f"hypernet: {reason}")
            and run.errors.count("\n") == 1
        )


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"min_recal: 1\n", "min_recal in {} is none of max_kl, max_leak"),
        (b"min_recall: .nan\n", "min_recall in {} is nan, no finite number."),
        (b"min_recall: -.inf\n", "min_recall in {} is -inf, no finite number."),
        (b"min_recall: high\n", "min_recall in {} is 'high', no finite number."),
        (b"\xff\xfe\x00", "{} is no YAML. Write thresholds as min_recall: 0.8."),
        (b"a: [", "{} is no YAML."),
        (b"- 1\n", "{} is no YAML with thresholds."),
        (None, "{}: No such file or directory."),
    ],
)
def test_bad_gate_file_exits_with_2(content, reason, tmp_path, capsys):
    path = tmp_path / "bad.yaml"
    if content is not None:
        path.write_bytes(content)
    for command in ("consolidate", "sleep"):
        assert hypernet("memory", command, "--gate", path) == 2  # no memory is there: it is found before
        error = capsys.readouterr().err
        assert error.startswith(f"hypernet: Invalid value for '--gate': {reason.format(path)}"), error
        assert error.count("\n") == 1


@pytest.mark.parametrize("lr", ["-1", "0", "nan", "inf"])
def test_impossible_learning_rate_exits_with_2(lr, capsys):
    assert hypernet("memory", "sleep", "--lr", lr) == 2
    reason = f"{float(lr)} is not above 0 and finite."
    assert capsys.readouterr().err.startswith(f"hypernet: Invalid value for '--lr': {reason}")


def test_purge_erases_weights_with_what_was_purged(run, tmp_path):
    run("sleep", "--user", "alice", "--now", *SMALL, *run.yes)
    assert len(run("versions", "--weights", "--user", "alice", "--json")[1]) == 1
    run("delete-all", "--user", "alice")
    run("purge")
    assert run("versions", "--weights", "--user", "alice", "--json")[1] == []
