"""Turn documents into an adapter folder and ask about them. `python generate_adapter.py --help` says what can be set.

The adapter is saved last: a run that fails or is interrupted leaves nothing behind.
"""

import json
import logging
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, cast

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from pydantic import BeforeValidator, Field, model_validator

from hypernet.cli.scripts import Script
from hypernet.cli.settings import Count, Device, OutputFolder, Settings, Text, Texts, as_list, choose_device

if TYPE_CHECKING:  # seconds each; a mistake in the settings is told without them
    from rich.console import Console

    from hypernet.adapters.adapter import LoRAAdapter
    from hypernet.adapters.joining import Joining
    from hypernet.doc_to_lora import DocToLoRA
    from hypernet.text.documents import Document

log = logging.getLogger("generate_adapter")

WITHOUT, WITH_ADAPTER, IN_PROMPT = (
    "Without context",
    "With the adapter\n(no document in the prompt)",
    "Document in the prompt",
)
MOST_STEPS = 10_000  # of refining; hours
MEASURED_CHUNKS = 128  # of one adapter in any benchmark here
PIPED_WIDTH = 120  # columns of the table where there is no terminal to fit
ALONE = "(no sentence was close: the base model's own)"

# Settings of before, and what says the same now.
RENAMED = {
    "route": "join=route top_k=2",
    "gate": "join=gate gate_power=1.25",
    "amplitude": "scale=1.5",
}
SETTING_OF = {"ridge": "ridge", "gate": "gate_power", "route": "top_k"}  # way to join → its own setting


def _as_questions(value: Any) -> Any:
    """A list, its texts as documents are read: bytes of the command that were no UTF-8 are half characters here."""
    from hypernet.text.cleaning import visible, whole

    questions = as_list(value)
    if any(isinstance(item, str) and not item.strip() for item in questions):
        raise ValueError("ask has an empty question. Leave it out, or write what you want to know.")
    return [visible(whole(item, "ask"), "ask") if isinstance(item, str) else item for item in questions]


class Refining(NamedTuple):
    """How long an adapter is refined: at most so many steps, and seconds if they are given."""

    steps: int
    max_seconds: float | None = None


def _as_refining(value: Any) -> Any:
    """30 → steps; "60s" → seconds."""
    if isinstance(value, str) and (found := re.fullmatch(r"(\d+(?:\.\d+)?) ?s", value)) and float(found[1]) > 0:
        return Refining(MOST_STEPS, float(found[1]))
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MOST_STEPS:
        return Refining(value)
    if value is None:
        return None
    raise ValueError(f"refine should be a number of steps, such as 30, or of seconds, such as 60s, got {value!r}.")


class GenerateSettings(Settings):
    """What can be set, as conf/generate_adapter.yaml has it."""

    document: Texts = Field(examples=["[a.txt,b.md]"])
    output_dir: OutputFolder
    overwrite: bool
    ask: Annotated[Texts, BeforeValidator(_as_questions)] = Field(examples=['["Who founded Norbach?","When?"]'])
    compare: bool
    max_new_tokens: Count
    join: Literal["sum", "ridge", "gate", "route"] | None = Field(
        description="one of sum, ridge, gate, route, or null for the way that the checkpoint was trained with"
    )
    ridge: float | None = Field(default=None, gt=0, description="a number above 0, such as 8, or null")
    gate_power: float = Field(default=1.25, gt=0, lt=1000, description="a number above 0, such as 1.25")
    top_k: Count = 2
    refine: Annotated[Refining | None, BeforeValidator(_as_refining)] = Field(
        default=None, description="gradient steps such as 30, seconds such as 60s, or null"
    )
    scale: float | Annotated[list[float], Field(min_length=1)] = Field(
        description="a number, or one for each layer: [1,1,1.5]"
    )
    checkpoint: Text
    base_model: Text | None
    device: Device
    dtype: Literal["float32", "bfloat16", "float16"] | None
    quantization: Literal["int8", "4bit"] | None
    attention: Text | None
    max_batch_tokens: Count

    @model_validator(mode="after")
    def _settings_fit_together(self) -> "GenerateSettings":
        if not self.document:
            raise ValueError(
                "Which document? Name a file, a folder, or - for standard input: document=examples/office_memo.txt. "
                "See --help for more."
            )
        for way, name in SETTING_OF.items():
            if self.join != way and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} is the setting of join={way}, but join is {self.join or 'null'}. Set join={way}, or leave "
                    f"{name} out."
                )
        return self


SCRIPT = Script(
    "generate_adapter.py",
    GenerateSettings,
    renamed=RENAMED,
    less="Lower max_batch_tokens, ask fewer questions at once, or set dtype=bfloat16.",
)


def generate(settings: GenerateSettings) -> None:
    """Reads `settings.document`, saves its adapter in `output_dir` and prints the answers to `ask`.

    Raises:
        ValueError, OSError: of one line, with what to do; nothing has been written then.
    """
    watch = Stopwatch()
    documents = read(settings.document, checkpoint=settings.checkpoint)
    watch.lap("read and chunk")

    # Imports go from the quick to the slow, so that what cannot be saved is told before the model is loaded.
    from hypernet.adapters.adapter import check_destination

    check_destination(settings.output_dir, overwrite=settings.overwrite)
    from hypernet.model.checkpoint import num_saved_layers

    check_scale(settings.scale, num_layers=num_saved_layers(settings.checkpoint))
    model = load(
        settings.checkpoint,
        base_model=settings.base_model,
        device=choose_device(settings.device),
        dtype=settings.dtype,
        quantization=settings.quantization,
        attention=settings.attention,
    )
    check_scale(settings.scale, num_layers=model.hypernetwork.num_layers)  # published files do not say it before
    joining = model.joining(
        settings.join,
        ridge=settings.ridge,
        gate_power=settings.gate_power if settings.join == "gate" else None,
        top_k=settings.top_k if settings.join == "route" else None,
    )
    check_way(model, joining, settings.checkpoint)
    watch.lap("load")

    log.info("Internalizing %s", ", ".join(document.name for document in documents))
    adapter = internalize(model, documents, max_batch_tokens=settings.max_batch_tokens, watch=watch)
    if settings.refine:
        watch.lap("internalize")
        log.info("Refining with questions that the base model writes")
        adapter = refined(model, adapter, documents, settings.refine)
        watch.lap("refine")
    if settings.scale != 1:
        from hypernet.adapters.composition import scale

        adapter = scale(adapter, settings.scale)
    if joining.is_plain_lora:
        adapter = adapter.fused(joining.way, ridge=joining.ridge)
    watch.lap("internalize")

    columns: dict[str, list[str]] = {}
    if settings.ask:
        log.info("Answering")
        columns = answer_all(
            model,
            adapter,
            documents,
            settings.ask,
            joining=joining,
            compare=settings.compare,
            max_new_tokens=settings.max_new_tokens,
        )
        watch.lap("answer")

    adapter.save(settings.output_dir, overwrite=settings.overwrite)
    watch.lap("save")
    if settings.ask:
        print_answers(settings.ask, columns)
    print_summary(model, adapter, documents, joining=joining, output_dir=settings.output_dir, seconds=watch.seconds)


def read(paths: Sequence[str], *, checkpoint: str) -> "list[Document]":
    """The documents, if there is a checkpoint for them."""
    from hypernet.text.documents import read_documents

    folder = Path(checkpoint).expanduser()
    if not checkpoint.startswith("hub:") and not folder.exists():
        raise ValueError(
            f"There is no checkpoint folder or file {folder}. Name one with checkpoint=..., or train one: "
            "python train.py"
        )
    return read_documents(paths)


def check_scale(scale: float | Sequence[float], *, num_layers: int | None) -> None:
    """Raises ValueError: as many factors as no adapter of this checkpoint has layers."""
    if isinstance(scale, Sequence) and num_layers is not None and len(scale) != num_layers:
        raise ValueError(
            f"scale should be a number, or one for each of the {num_layers} adapted layers, got {len(scale)} numbers."
        )


def check_way(model: "DocToLoRA", joining: "Joining", checkpoint: str) -> None:
    """Raises ValueError: the checkpoint says one chunk at a time, and the way would say all of them at once."""
    if model.hypernetwork.recitation is not None and joining.way != "route":
        raise ValueError(
            f"join={joining.way} would say all chunks of {checkpoint} at once; each question uses those that fit best. "
            "Leave join out, or set join=route."
        )


def load(
    checkpoint: str,
    *,
    base_model: str | None,
    device: str,
    dtype: str | None,
    quantization: str | None,
    attention: str | None,
) -> "DocToLoRA":
    """The model, on the device."""
    log.info("Loading %s on %s", checkpoint, device)
    from hypernet.doc_to_lora import DocToLoRA

    return DocToLoRA.from_pretrained(
        checkpoint, base_model=base_model, device=device, dtype=dtype, quantization=quantization, attention=attention
    )


def internalize(
    model: "DocToLoRA", documents: "Sequence[Document]", *, max_batch_tokens: int, watch: "Stopwatch"
) -> "LoRAAdapter":
    """The documents' chunks as they are generated, with a progress bar."""
    import torch
    from tqdm import tqdm

    bars: list[tqdm] = []

    def progress(done: int, total: int) -> None:
        if not done:
            watch.lap("read and chunk")  # chunking is done when the number of chunks is known
            if total > MEASURED_CHUNKS:
                network = model.hypernetwork
                widths = sum(place.d_in + place.d_out for target in network.targets for place in target.modules())
                log.warning(
                    "%s chunks make an adapter of rank %s and %s MB; answers were measured up to %s chunks.",
                    *(f"{total:,}", f"{total * network.rank:,}", f"{total * network.rank * widths * 4 / 1e6:,.0f}"),
                    MEASURED_CHUNKS,
                )
            bars.append(tqdm(desc="Internalizing", unit="chunk", total=total, disable=total < 2 or None))
        bars[-1].update(done - bars[-1].n)

    try:
        adapter = model.internalize(documents, max_batch_tokens=max_batch_tokens, progress=progress)
    finally:
        for bar in bars:
            bar.close()
    if model.device.type == "cuda":
        torch.cuda.synchronize()  # so that the time is this stage's
    return adapter


def refined(
    model: "DocToLoRA", adapter: "LoRAAdapter", documents: "Sequence[Document]", refining: Refining
) -> "LoRAAdapter":
    """The adapter after gradient steps, with a progress bar."""
    from tqdm import tqdm

    from hypernet.refining import refine

    with tqdm(desc="Refining", unit="step", disable=None) as bar:

        def told(done: int, altogether: int) -> None:
            bar.total = altogether if refining.max_seconds is None else None
            bar.update(done - bar.n)

        return refine(
            model,
            adapter,
            [document.text for document in documents],
            steps=refining.steps,
            max_seconds=refining.max_seconds,
            progress=told,
        )


def answer_all(
    model: "DocToLoRA",
    adapter: "LoRAAdapter",
    documents: "Sequence[Document]",
    questions: Sequence[str],
    *,
    joining: "Joining",
    compare: bool,
    max_new_tokens: int,
) -> dict[str, list[str]]:
    """Column of the table → answers; with `compare` also without the adapter, and with the documents in the prompt."""
    with answering(model, num_tokens=max_new_tokens * (2 if compare else 1)):
        answers = {WITH_ADAPTER: answer(model, questions, adapter, joining=joining, max_new_tokens=max_new_tokens)}
        if not compare:
            return answers
        text = "\n\n".join(document.text.strip() for document in documents)
        # In one batch: on a CPU a token of ten answers takes hardly longer than one of five.
        number = len(questions)
        contexts = [None] * number + [text] * number
        both = answer(model, [*questions, *questions], contexts=contexts, max_new_tokens=max_new_tokens)
    return {WITHOUT: both[:number], **answers, IN_PROMPT: both[number:]}


@contextmanager
def answering(model: "DocToLoRA", *, num_tokens: int) -> Iterator[None]:
    """A progress bar over the tokens of all batches, at most so many: an answer may end before. On a terminal alone."""
    from tqdm import tqdm

    with tqdm(desc="Answering", unit="token", total=num_tokens, leave=False, disable=num_tokens < 2 or None) as bar:

        def answered() -> None:
            bar.update()

        model.pause = answered
        try:
            yield
        finally:
            model.pause = None


def answer(
    model: "DocToLoRA",
    questions: Sequence[str],
    adapter: "LoRAAdapter | None" = None,
    *,
    joining: "Joining | None" = None,
    contexts: Sequence[str | None] | None = None,
    max_new_tokens: int,
) -> list[str]:
    """Greedy answers. Where prompt and answer exceed the base model's window, that instead of an answer; where no chunk
    of a recited adapter is close to the question, that behind it.

    Args:
        adapter: None: the base model alone.
        joining: how the adapter's chunks are joined; one plain LoRA is used as it is.
        contexts: texts to put into the prompts, one for each question.
    """
    from hypernet.base.generation import context_window

    window = context_window(model.base_model)
    contexts = contexts or [None] * len(questions)
    lengths = [len(prompt) for prompt in model.layout.prompt_ids(model.tokenizer, questions, contexts)]
    asked = zip(questions, contexts, lengths, strict=True)
    fitting = [(question, context) for question, context, length in asked if length + max_new_tokens <= window]
    # The trained way has settings of its own, which only None takes.
    each = joining if joining and not joining.is_plain_lora and joining != model.trained_joining else None
    answers = model.generate(
        [question for question, _ in fitting],
        adapter,
        join=each.way if each else None,
        gate_power=each.gate_power if each else None,
        top_k=each.top_k if each else None,
        documents=[context for _, context in fitting],
        max_new_tokens=max_new_tokens,
    )
    if adapter is not None and fitting and model.hypernetwork.recitation is not None:
        # One more reading of the questions, by ten blocks: hundredths of a second each.
        close = model.routing_scores([question for question, _ in fitting], adapter).any(1).tolist()
        answers = [text if found else f"{text}\n{ALONE}" for text, found in zip(answers, close, strict=True)]
    texts = iter(answers)
    return [
        next(texts)
        if length + max_new_tokens <= window
        else f"(does not fit: {length} tokens and {max_new_tokens} for the answer, the base model takes {window})"
        for length in lengths
    ]


def output() -> "Console":
    """Standard output, as wide as the terminal; it ends quietly when the reader of a pipe, such as head, has enough."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else PIPED_WIDTH
    return Console(width=width, highlight=False, markup=False, emoji=False)


def print_answers(questions: Sequence[str], columns: Mapping[str, Sequence[str]]) -> None:
    """Prints the table of answers, one row a question."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_lines=True)
    for header in ("Question", *columns):
        table.add_column(header, overflow="fold")
    for row in zip(questions, *columns.values(), strict=True):
        table.add_row(*(Text(text or "(nothing)") for text in row))
    output().print(table)


def print_summary(
    model: "DocToLoRA",
    adapter: "LoRAAdapter",
    documents: "Sequence[Document]",
    *,
    joining: "Joining",
    output_dir: str,
    seconds: Mapping[str, float],
) -> None:
    """Prints what was read, what the adapter is, how long it took, and how to load it."""
    from hypernet.text.tokens import text_ids

    tokens = sum(map(len, text_ids(model.tokenizer, [document.text for document in documents])))
    read = documents[0].name if len(documents) == 1 else f"{len(documents)} documents"
    chunks = "1 chunk" if adapter.num_chunks == 1 else f"{adapter.num_chunks} chunks"
    from hypernet.base.catalog import locate

    base_model = str(locate(model.base_model_source))
    source, folder = (json.dumps(text, ensure_ascii=False) for text in (base_model, output_dir))
    lines = {
        "Read": f"{read}: {tokens} tokens in {chunks}",
        "Adapter": f"{output_dir}: rank {adapter.rank}, {human_bytes(adapter.num_bytes)}",
        "Joined": joined(joining),
        "Seconds": ", ".join(f"{stage} {value:.2f}" for stage, value in seconds.items()),
        "PEFT": f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({source}), {folder})",
    }
    if model.hypernetwork.recitation is not None:
        lines["Joined"] = "in answers alone, for each question the chunk that fits best, by this framework"
        del lines["PEFT"]
    elif adapter.num_chunks < 2:
        del lines["Joined"]  # nothing to join
    console = output()
    for name, text in lines.items():
        console.print(f"{name:<8} {text}", soft_wrap=True)


def joined(joining: "Joining") -> str:
    """How the chunks of the saved adapter are joined."""
    name = SETTING_OF.get(joining.way)
    way = f"join={joining.way}" + (f" {name}={getattr(joining, name):g}" if name else "")
    if joining.is_plain_lora:
        return f"by {way}: one plain LoRA for any program"
    return (
        f"for each question by {way}; saved as generated. Other programs add its chunks up: for them, "
        "join=ridge or join=sum"
    )


def human_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


class Stopwatch:
    """Seconds per stage; a stage that is named again goes on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Gives the time since the last lap to a stage."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now


@hydra.main(config_path="conf", config_name="generate_adapter", version_base="1.3")
@SCRIPT
def main(settings: GenerateSettings) -> None:
    generate(settings)


def run() -> None:
    """The command."""
    sys.argv[1:] = map(literal, sys.argv[1:])
    SCRIPT.run(main, Path(__file__).parent / "conf/generate_adapter.yaml")


def literal(argument: str) -> str:
    """The argument such that Hydra takes ${ as it is: questions and paths may contain it.

    What Hydra cannot read stays the same, for Hydra to say so.
    """
    name = argument.partition("=")[0]
    if "${" not in argument or name.lstrip("+") not in GenerateSettings.model_fields:
        return argument
    try:
        value = OverridesParser.create().parse_override(argument).value()
    except HydraException:
        return argument
    if isinstance(value, list) and all(isinstance(item, (str, int, float, type(None))) for item in value):
        return f"{name}=[{','.join(map(_quoted, value))}]"
    return f"{name}={_quoted(value)}" if isinstance(value, str) else argument


def _quoted(value: str | float | None) -> str:
    """As Hydra reads it back. A backslash escapes an interpolation, and a backslash before that."""
    if not isinstance(value, str):
        return json.dumps(value)
    escaped = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return QuotedString(escaped, Quote.double).with_quotes()


if __name__ == "__main__":
    # A terminal of another encoding than UTF-8 shows what it can.
    cast(TextIOWrapper, sys.stdout).reconfigure(errors="replace")
    run()
