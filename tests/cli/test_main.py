"""hypernet: help that teaches and comes at once, exit statuses, and examples that can be copied."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from hypernet import __version__
from hypernet.adapters.library import AdapterLibrary
from hypernet.cli.main import app
from tests.cli.command import hypernet

ROOT = Path(__file__).parents[2]


def _commands(command: typer.core.TyperCommand, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
    """Every command and group → its help text."""
    found = {path: command.help or ""}
    for name, inner in getattr(command, "commands", {}).items():
        found |= _commands(inner, (*path, name))
    return found


COMMANDS = _commands(typer.main.get_command(app))
EXAMPLES = [
    line.strip()
    for text in COMMANDS.values()
    for line in text.replace("\\\n", " ").splitlines()
    if line.strip().startswith("hypernet ")
]


def test_the_commands_are_those_that_are_promised():
    library = {("library", name) for name in ("list", "verify", "clean", "add", "remove", "replace")}
    verbs = "add search get list history profile update invalidate delete delete-all restore purge versions rollback"
    verbs += (
        " status import export verify ask explain write-adapters measure forget consolidate promote sleep copy review"
    )
    memory = {("memory", name) for name in verbs.split()}
    expected = {
        (),
        ("library",),
        *library,
        ("memory",),
        *memory,
        ("checkpoint",),
        ("checkpoint", "convert"),
        ("self-study",),
    }
    expected |= {("base-model",), ("base-model", "list"), ("base-model", "fetch")}
    expected |= {("serve",), ("api-key",), ("mcp",), ("corpus",)}
    assert set(COMMANDS) == expected


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_explains_every_option(path, capsys):
    assert hypernet(*path, "--help") == 0
    captured = capsys.readouterr()
    assert "Usage: hypernet" in captured.out and not captured.err
    command = typer.main.get_command(app)
    for name in path:
        command = command.commands[name]
    assert command.help and all(getattr(option, "help", None) for option in command.params)


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_in_help_are_understood(example, monkeypatch):
    """Up to where the command would start to work."""
    _, *arguments = shlex.split(example)
    command = typer.main.get_command(app)
    context = command.make_context("hypernet", arguments[:1], resilient_parsing=True)
    while hasattr(command, "commands") and arguments != ["--help"]:
        command, arguments = command.commands[arguments[0]], arguments[1:]
    if "--help" not in arguments:
        assert command.make_context(command.name, list(arguments), parent=context).params


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_lines_of_help_fit_a_terminal(path):
    """Only the first paragraph is filled by Typer; an example that is broken cannot be copied."""
    _, *others = COMMANDS[path].split("\n\n")
    assert max((len(line) for text in others for line in text.splitlines()), default=0) <= 78


def test_help_is_quick_and_quiet():
    """Under a second by itself; torch and transformers alone take several."""
    script = (
        "import sys; from hypernet.cli.main import main\n"
        "try: main(['self-study', '--help'])\n"
        "except SystemExit as end: print(end.code, sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("\n0 []\n") and done.stderr == ""


def test_version_is_printed(capsys):
    assert hypernet("--version") == 0
    assert capsys.readouterr().out == f"hypernet {__version__}\n"


@pytest.mark.parametrize("path", [(), ("library",), ("checkpoint",), ("base-model",)], ids=" ".join)
def test_without_a_subcommand_help_is_shown(path, capsys):
    assert hypernet(*path) == 2
    captured = capsys.readouterr()
    assert "Commands" in captured.out and captured.err == ""


def test_interrupt_exits_with_130_in_one_line(monkeypatch, capsys):
    def interrupted(self) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(AdapterLibrary, "list", interrupted)
    assert hypernet("library", "list") == 130
    assert capsys.readouterr().err == "hypernet: interrupted\n"


def test_interrupt_while_modules_are_imported_is_one_line():
    """A signal raises KeyboardInterrupt wherever Python is: here in the import of the first of them."""
    script = (
        "import sys, runpy\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'hypernet.cli.main': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupting()); sys.argv = ['hypernet', 'library', 'list']\n"
        "runpy.run_module('hypernet', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "hypernet: interrupted\n")


def test_mistake_of_ours_keeps_its_traceback(monkeypatch):
    def broken(self) -> None:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(AdapterLibrary, "list", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        hypernet("library", "list")


def test_process_tells_a_mistake_in_one_line(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "hypernet", "library", "lost"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "hypernet: No such command 'lost'. Did you mean 'list'? See hypernet library --help.\n"
