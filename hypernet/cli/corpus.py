"""hypernet corpus: an adapter for each of many documents, in this process or on a Ray cluster."""

import sys
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from hypernet.corpora.ingest import Totals

_SILENT_S = 60  # where nobody watches: no line of progress before that, and one for so many seconds


def corpus(
    source: Annotated[
        list[str], typer.Argument(help="File, folder, .parquet, .jsonl, saved dataset or hub:OWNER/NAME.")
    ],
    output: Annotated[str, typer.Option(help="Folder of the library, or a URL such as s3://bucket/library.")],
    model: Annotated[str, typer.Option(help="Checkpoint, as DocToLoRA.from_pretrained takes it.")] = "assets/tiny",
    base_model: Annotated[
        str | None, typer.Option(help="Of another place than the checkpoint names.", show_default=False)
    ] = None,
    column: Annotated[str, typer.Option(help="With the text, where a document is a row.")] = "text",
    split: Annotated[str, typer.Option(help="Of datasets.")] = "train",
    workers: Annotated[int, typer.Option(min=0, help="Processes on Ray, each with the model; 0: this one alone.")] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of each process; default all cores, shared.", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto; each worker on Ray has a GPU.")] = "auto",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of the base model's weights; default as stored.", show_default=False),
    ] = None,
) -> None:
    """Make an adapter of each of many documents, and add them to a library.

    Run it again after whatever stopped it: what has its adapter is skipped. A
    document that cannot be read is told in a line, the others are done, and the
    exit status is 1. With RAY_ADDRESS a Ray cluster that runs already is used.

    \b
    hypernet corpus examples --output outputs/corpus
    hypernet corpus rows.parquet notes --column body --output s3://bucket/a
    hypernet corpus hub:owner/name --workers 2 --output outputs/corpus
    """
    from tqdm import tqdm

    from hypernet.cli.settings import choose_device
    from hypernet.corpora.corpus import Corpus
    from hypernet.corpora.ingest import Totals, ingest
    from hypernet.corpora.internalizer import Reader
    from hypernet.text.cleaning import escaped

    if "memory://" in output:
        raise ValueError(f"--output {output} ends with this process. Name a folder, or a URL that lasts.")
    documents = Corpus(source, column=column, split=split)
    total = documents.count()
    reader = Reader(model, base_model=base_model, device=choose_device(device), dtype=dtype, threads=threads)
    totals = Totals()
    watched = sys.stderr.isatty()
    with tqdm(
        desc="Documents",
        unit="doc",
        total=total,
        leave=False,
        delay=0 if watched else _SILENT_S,
        mininterval=0.1 if watched else _SILENT_S,
    ) as bar:
        for result in ingest(documents, output, reader=reader, workers=workers):
            totals.add(result)
            if result.status == "failed":
                line = f"hypernet: {escaped(f'{result.name}: {result.reason}')}"
                if watched:
                    bar.write(line, file=sys.stderr)
                else:
                    typer.echo(line, err=True)
            bar.update()
    _print(totals, output)
    if totals.counts["failed"]:
        raise typer.Exit(1)


def _print(totals: "Totals", output: str) -> None:
    added = totals.counts["added"]
    counts = ", ".join(f"{count:,} {status}" for status, count in totals.counts.items())
    each = f"; {totals.work_s / added:.2f} s of one process a document" if added else ""
    lines = {
        "Documents": f"{sum(totals.counts.values()):,}: {counts}",
        "Adapters": f"{output}: {totals.num_chunks:,} chunks, {totals.num_bytes / 2**20:,.1f} MiB added",
        "Seconds": f"{totals.seconds:,.1f}: {added / totals.seconds:.2f} documents/s{each}",
    }
    for name, text in lines.items():
        typer.echo(f"{name:<10} {text}")
