"""hypernet self-study: training data of your own texts. Its options are the fields of StudySettings."""

import dataclasses
import inspect
import logging
import sys
from typing import Annotated, Any

import typer

from hypernet.data.self_study.settings import StudySettings


def self_study(**settings: Any) -> None:
    """Make training data of texts: questions, and how the base model answers them.

    One model writes questions about your texts, the base model answers them with
    the text in its prompt, and the likeliest tokens at each place of its answers
    are stored. Training reads them (conf/data/self_study.yaml) without a teacher.

    Run it again to make the shards that are missing. Run it n times at once with
    --process-index 0 to n-1 and --num-processes n to divide them.

    \b
    hypernet self-study --documents examples \\
      --base-model assets/tiny/base_model --output-dir outputs/study
    hypernet self-study --dataset HuggingFaceFW/fineweb-edu \\
      --dataset-config sample-10BT --max-documents 100000 \\
      --base-model google/gemma-2-2b-it --questions-by google/gemma-3-12b-it \\
      --engine vllm --output-dir outputs/fineweb
    """
    asked = StudySettings(**settings)
    from hypernet.data.self_study.study import study

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    for quiet in ("httpx", "datasets", "transformers"):
        logging.getLogger(quiet).setLevel(logging.WARNING)
    made = study(asked)
    typer.echo(f"{len(made)} shards made in {asked.output_dir}; those that were there already stay.")


def _option(field: dataclasses.Field[Any]) -> inspect.Parameter:
    required = field.default is dataclasses.MISSING
    option = typer.Option(
        help=field.metadata["help"], rich_help_panel=field.metadata["heading"], show_default=field.default != ""
    )
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[field.type, option],
        default=inspect.Parameter.empty if required else field.default,
    )


# Typer reads a command's options from its signature.
self_study.__signature__ = inspect.Signature([_option(field) for field in dataclasses.fields(StudySettings)])  # type: ignore[attr-defined]
