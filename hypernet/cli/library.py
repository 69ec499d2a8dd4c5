"""hypernet library: what is in a folder of adapters, whether it is whole, and changing it by hand."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from hypernet.adapters.library import LibraryEntry

PIPED_WIDTH = 160  # columns of the table where there is no terminal to fit
LEAST_WIDTH = 80  # narrower terminals break the lines, which leaves ids whole more often than narrower columns do

app = typer.Typer(
    no_args_is_help=True,
    help="""Adapters in a folder, each under the hash of its content.

    Every entry is an ordinary adapter folder that PEFT loads in place. An ID is
    that hash, the beginning of one, or the name of a document. In Python this
    is hypernet.AdapterLibrary.

    \b
    python generate_adapter.py document=examples/fenda_elfax.txt \\
      output_dir=outputs/fenda
    hypernet library add --adapter outputs/fenda
    hypernet library list
    hypernet library verify
    hypernet library remove --id fenda_elfax.txt
    """,
)

Directory = Annotated[str, typer.Option(help="The library's folder.")]
Adapter = Annotated[str, typer.Option(help="An adapter folder, as generate_adapter.py leaves it.", show_default=False)]
Id = Annotated[
    str, typer.Option("--id", help="Id, unique beginning of one, or document name.", show_default=False, metavar="ID")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead, for programs.")]
DIRECTORY = "outputs/library"


@app.command("list")
def list_(directory: Directory = DIRECTORY, as_json: Json = False) -> None:
    """List the adapters, the oldest first.

    \b
    hypernet library list
    hypernet library list --directory outputs/library --json
    """
    from hypernet.adapters.library import AdapterLibrary

    entries = AdapterLibrary(directory).list()
    if as_json:
        typer.echo(json.dumps([_described(entry) for entry in entries], indent=2))
        return
    if not entries:
        typer.echo(f"No adapters in {directory}.")
        return
    from rich.console import Console

    width = None if sys.stdout.isatty() else PIPED_WIDTH
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    console.width = max(console.width, LEAST_WIDTH)
    console.print(_table(entries))


@app.command()
def verify(directory: Directory = DIRECTORY, as_json: Json = False) -> None:
    """Read everything and compare it with its hashes. Exit status 1 if something is damaged.

    \b
    hypernet library verify
    hypernet library verify --directory outputs/library --json
    """
    from hypernet.adapters.library import AdapterLibrary

    library = AdapterLibrary(directory)
    damages = library.verify()
    num_adapters, foreign = len(library.list()), library.foreign()
    if as_json:
        found = {
            "adapters": num_adapters,
            "damaged": [dataclasses.asdict(damage) for damage in damages],
            "foreign": list(foreign),
        }
        typer.echo(json.dumps(found, indent=2))
    else:
        for damage in damages:
            typer.echo(f"{damage.name}: {damage.reason}")
        if foreign:
            typer.echo(f"Not the library's, and left alone: {', '.join(foreign)}")
        typer.echo(f"{len(damages)} damaged" if damages else f"All {num_adapters} adapters are as they were stored.")
    if damages:
        raise typer.Exit(1)


@app.command()
def clean(directory: Directory = DIRECTORY) -> None:
    """Remove what killed writers left, unless somebody is writing just now.

    \b
    hypernet library clean
    """
    from hypernet.adapters.library import AdapterLibrary

    names = AdapterLibrary(directory).clean()
    typer.echo("\n".join(f"removed {name}" for name in names) or "Nothing to clean up.")


@app.command()
def add(adapter: Adapter, directory: Directory = DIRECTORY) -> None:
    """Store an adapter and print its id; one that is there already stays as it is.

    \b
    hypernet library add --adapter outputs/fenda
    """
    from hypernet.adapters.adapter import LoRAAdapter
    from hypernet.adapters.library import AdapterLibrary

    typer.echo(AdapterLibrary(directory).add(LoRAAdapter.load(adapter)))


@app.command()
def remove(id_: Id, directory: Directory = DIRECTORY) -> None:
    """Take an adapter out, damaged or not.

    \b
    hypernet library remove --id fenda_elfax.txt
    """
    from hypernet.adapters.library import AdapterLibrary

    typer.echo(f"removed {AdapterLibrary(directory).remove(id_)}")


@app.command()
def replace(id_: Id, adapter: Adapter, directory: Directory = DIRECTORY) -> None:
    """Store an adapter, then remove the one it replaces; print the new id.

    \b
    hypernet library replace --id fenda_elfax.txt --adapter outputs/fenda
    """
    from hypernet.adapters.adapter import LoRAAdapter
    from hypernet.adapters.library import AdapterLibrary

    typer.echo(AdapterLibrary(directory).replace(id_, LoRAAdapter.load(adapter)))


def _described(entry: "LibraryEntry") -> dict[str, Any]:
    documents = [{"name": name, "sha256": sha256} for name, sha256 in entry.documents]
    return {**dataclasses.asdict(entry), "directory": str(entry.directory), "documents": documents}


def _table(entries: "Sequence[LibraryEntry]") -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table()
    headers = ["id", "documents", "base model", "hypernetwork", "chunks", "rank", "KiB", "added"]
    if any(entry.damage for entry in entries):
        headers.append("damage")
    for header in headers:
        justify: Literal["left", "right"] = "right" if header in ("chunks", "rank", "KiB") else "left"
        # An id is one piece at any width, so that it can be copied.
        table.add_column(header, overflow="fold", justify=justify, no_wrap=header == "id")
    for entry in entries:
        row = (
            entry.id[:12],
            ", ".join(name or (sha256 or "?")[:12] for name, sha256 in entry.documents),
            f"{entry.base_model_name} {(entry.base_model_fingerprint or '')[:12]}",
            (entry.generator or "")[:12],
            str(entry.num_chunks),
            str(entry.rank),
            f"{entry.num_bytes / 1024:.0f}",
            entry.added[:19].replace("T", " "),
            entry.damage or "",
        )
        table.add_row(*(Text(cell) for cell in row[: len(headers)]))
    return table
