"""The command `hypernet`; `python -m hypernet` is the same.

A new subcommand is one file in this folder and one line under "The subcommands" below. torch and transformers take
seconds to import: import them, and modules of ours that do, in the bodies of commands, so that help appears at once.
"""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from hypernet import __version__
from hypernet.cli import base_model, checkpoint, corpus, library, self_study, serve
from hypernet.cli.errors import INTERRUPTED, one_line, one_line_warnings
from hypernet.cli.memory import texts as memory
from hypernet.text.cleaning import escaped

app = typer.Typer(
    name="hypernet",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"hypernet {__version__}")
        raise typer.Exit()


@app.callback()
def _hypernet(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Doc-to-LoRA: a document becomes LoRA weights in one forward pass of a hypernetwork.

    Documents become adapters with python generate_adapter.py, hypernetworks are
    trained with python train.py; both have --help. The commands here look after
    what these need and make. Each explains itself, with examples:

    \b
    hypernet library --help
    hypernet library list --help
    """


# The subcommands
app.add_typer(library.app, name="library")
app.add_typer(memory.app, name="memory")
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(base_model.app, name="base-model")
app.command("corpus")(corpus.corpus)
app.command("self-study")(self_study.self_study)
app.command("serve")(serve.serve)
app.command("api-key")(serve.api_key)
app.command("mcp")(serve.mcp)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and ends the process.

    The exit status is 0; 1 after a mistake that a command found, told in one line on standard error, or where `library
    verify` found damage; 2 after a wrong option; 130 after Ctrl-C. `memory` adds 1 where `search` finds nothing, and 3
    where work is unfinished.

    Args:
        arguments: without the command's own name; None takes the process's.
    """
    sys.exit(_status(sys.argv[1:] if arguments is None else arguments))


def _status(arguments: Sequence[str]) -> int:
    try:
        # Not standalone: Typer would put usage errors in a box of several lines.
        with one_line_warnings("hypernet"):
            status = app(args=list(arguments), prog_name="hypernet", standalone_mode=False) or 0
    except typer.TyperException as error:
        # Without a subcommand there is no message: the help has been printed.
        if message := " ".join(error.format_message().split()):
            context = getattr(error, "ctx", None)
            end = "" if message[-1] in ".?" else "."
            _say(f"{message}{end} See {context.command_path if context else 'hypernet'} --help.")
        return error.exit_code
    except Exception as error:
        if (reason := one_line(error)) is None:
            raise
        _say(reason)
        return 1
    if status == INTERRUPTED:
        _say("interrupted")
    return status


def _say(reason: str) -> None:
    print(f"hypernet: {escaped(reason)}", file=sys.stderr)
