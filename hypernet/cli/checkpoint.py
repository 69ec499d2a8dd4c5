"""hypernet checkpoint: trained hypernetworks of others as folders of ours."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Trained hypernetworks.")


@app.callback()
def _checkpoint() -> None:
    """Trained hypernetworks."""  # a callback keeps `convert` a subcommand while it is the only one


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Option(help="The file, a folder that holds it, or hub:owner/repository/name.", show_default=False),
    ],
    output_dir: Annotated[
        str, typer.Option(help="Folder for config.yaml and hypernetwork.safetensors.", show_default=False)
    ],
    base_model: Annotated[
        str | None,
        typer.Option(help="Hub name or folder of the base model; without it the one that the file names."),
    ] = None,
    max_chunk_tokens: Annotated[
        int, typer.Option(min=1, help="Document tokens per chunk; published files do not say it.")
    ] = 512,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is in output-dir.")] = False,
) -> None:
    """Convert a published Doc-to-LoRA checkpoint (pytorch_model.bin) to safetensors and YAML.

    Nothing in the file is executed. Of the base model only config.json is
    needed, not its weights.

    \b
    hypernet checkpoint convert --source hub:SakanaAI/doc-to-lora/gemma_demo \\
      --output-dir outputs/gemma_demo
    hypernet checkpoint convert --source downloads/pytorch_model.bin \\
      --output-dir outputs/own --base-model google/gemma-2-2b-it
    """
    from hypernet.interop.checkpoints import convert as convert_published

    checkpoint = convert_published(
        source=source,
        output_dir=output_dir,
        base_model=base_model,
        max_chunk_tokens=max_chunk_tokens,
        overwrite=overwrite,
    )
    network, folder = checkpoint.hypernetwork, Path(output_dir).expanduser().resolve()
    typer.echo(
        f"{folder}: {network.parameter_counts()['total']:,} parameters, rank {network.rank}, "
        f"{', '.join(target.name for target in network.targets)} in {network.num_layers} layers of "
        f"{checkpoint.base_model}, chunks of {max_chunk_tokens} tokens"
    )
