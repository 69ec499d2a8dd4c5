"""Turn documents into an adapter folder and ask about them. `python generate_adapter.py --help` says what can be set.

The adapter is saved last: a run that fails or is interrupted leaves nothing behind.
"""

import errno
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

if TYPE_CHECKING:  # seconds each; a mistake in the settings is told without them
    from hypernet.adapters.adapter import LoRAAdapter
    from hypernet.doc_to_lora import DocToLoRA
    from hypernet.text.documents import Document

log = logging.getLogger("generate_adapter")

DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATIONS = ("int8", "4bit")
WITHOUT, WITH_ADAPTER, IN_PROMPT = (
    "Without context",
    "With the adapter\n(no document in the prompt)",
    "Document in the prompt",
)
PIPED_WIDTH = 120  # columns of the table where there is no terminal to fit


def generate(cfg: DictConfig) -> None:
    """Reads `cfg.document`, saves its adapter in `cfg.output_dir` and prints the answers to `cfg.ask`.

    Raises:
        ValueError, OSError: of one line, with what to do; nothing has been written then.
    """
    watch = Stopwatch()
    settings = check_settings(OmegaConf.to_container(cfg, resolve=True))
    documents = read(settings)
    watch.lap("read and chunk")

    model = load(settings)
    watch.lap("load")

    log.info("Internalizing %s", ", ".join(document.name for document in documents))
    adapter = internalize(model, documents, settings, watch)
    if settings["scale"] != 1:
        from hypernet.adapters.composition import scale

        adapter = scale(adapter, settings["scale"])
    watch.lap("internalize")

    columns = {}
    if settings["ask"]:
        log.info("Answering")
        columns = answer_all(model, adapter, documents, settings)
        watch.lap("answer")

    adapter.save(settings["output_dir"], overwrite=settings["overwrite"])
    watch.lap("save")
    report(model, adapter, documents, settings, columns, watch.seconds)


def setting_names() -> list[str]:
    config = OmegaConf.load(Path(__file__).parent / "conf/generate_adapter.yaml")
    return [key for key in config if key not in ("defaults", "hydra")]


def no_such_setting(name: str) -> str:
    return f"There is no setting {name!r}. There are {', '.join(setting_names())}; see --help."


def check_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with `document` and `ask` as lists of texts.

    Raises:
        ValueError: one has a value of the wrong kind.
    """
    if unknown := sorted(settings.keys() - set(setting_names())):
        raise ValueError(no_such_setting(unknown[0]))
    settings = dict(settings)
    for key, example in (("document", "[a.txt,b.md]"), ("ask", '["Who founded Norbach?","When?"]')):
        value = [] if settings[key] is None else settings[key]
        texts = value if isinstance(value, list) else [value]
        if not all(isinstance(text, (str, int, float)) and str(text).strip() for text in texts):
            raise ValueError(f"{key} should be a text or a list of texts, got {value!r}. Write '{key}={example}'.")
        settings[key] = [str(text) for text in texts]
    if not settings["document"]:
        raise ValueError(
            "Which document? Name a file, a folder, or - for standard input: document=examples/fenda_elfax.txt. "
            "See --help for more."
        )
    for key in ("overwrite", "compare"):
        if not isinstance(settings[key], bool):
            raise ValueError(f"{key} should be true or false, got {settings[key]!r}.")
    scale = settings["scale"] if isinstance(settings["scale"], list) else [settings["scale"]]
    if not scale or any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in scale):
        raise ValueError(
            f"scale should be a number, or one for each layer: [1,1,1.5], got {settings['scale']!r}."
        )
    for key in ("max_batch_tokens", "max_new_tokens", "route"):
        if key == "route" and settings[key] is None:
            continue
        if isinstance(settings[key], bool) or not isinstance(settings[key], int) or settings[key] < 1:
            raise ValueError(f"{key} should be a whole number, at least 1, got {settings[key]!r}.")
    gate = settings["gate"]
    if gate is not None and (isinstance(gate, bool) or not isinstance(gate, (int, float)) or not 0 < gate < 1000):
        raise ValueError(f"gate should be a number above 0, such as 1.25, or null, got {gate!r}.")
    if gate is not None and settings["route"] is not None:
        raise ValueError("gate and route are two ways to keep chunks out of questions they are not about. Set one.")
    for key in ("output_dir", "checkpoint", "base_model", "attention"):
        optional = key in ("base_model", "attention")
        if not (settings[key] is None and optional) and not (isinstance(settings[key], str) and settings[key]):
            raise ValueError(f"{key} should be a text{' or null' if optional else ''}, got {settings[key]!r}.")
    if settings["quantization"] not in (None, *QUANTIZATIONS):
        raise ValueError(
            f"quantization should be one of {', '.join(QUANTIZATIONS)} or null, got {settings['quantization']!r}."
        )
    if settings["dtype"] not in (None, *DTYPES):
        raise ValueError(f"dtype should be one of {', '.join(DTYPES)} or null, got {settings['dtype']!r}.")
    return settings


def read(settings: dict[str, Any]) -> "list[Document]":
    """The documents, if there is a checkpoint for them."""
    from hypernet.text.documents import read_documents

    checkpoint = Path(settings["checkpoint"]).expanduser()
    if not settings["checkpoint"].startswith("hub:") and not checkpoint.exists():
        raise ValueError(
            f"There is no checkpoint folder or file {checkpoint}. Name one with checkpoint=..., or train one: "
            "python train.py"
        )
    return read_documents(settings["document"])


def load(settings: dict[str, Any]) -> "DocToLoRA":
    """The model, once it is sure that what it makes can be saved; imports go from the quick to the slow."""
    from hypernet.adapters.adapter import check_destination

    check_destination(settings["output_dir"], overwrite=settings["overwrite"])
    device = choose_device(settings["device"])
    log.info("Loading %s on %s", settings["checkpoint"], device)
    from hypernet.base.base_model import silence_torchao_warnings

    silence_torchao_warnings()
    from hypernet.doc_to_lora import DocToLoRA

    return DocToLoRA.from_pretrained(
        settings["checkpoint"],
        base_model=settings["base_model"],
        device=device,
        dtype=settings["dtype"],
        quantization=settings["quantization"],
        attention=settings["attention"],
    )


def choose_device(name: str) -> str:
    """A device of this machine for cpu, cuda, cuda:1 ... or auto.

    Raises:
        ValueError: there is no such device here.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", str(name)):
        raise ValueError(f"device should be cpu, cuda or auto, got {name!r}.")
    if name == "cpu":
        return name
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(name.partition(":")[2] or 0) >= count:
        raise ValueError(
            f"device is {name}, but torch {torch.__version__} finds {count} CUDA GPUs. Set device=cpu or device=auto."
        )
    return name


def internalize(
    model: "DocToLoRA", documents: "Sequence[Document]", settings: dict[str, Any], watch: "Stopwatch"
) -> "LoRAAdapter":
    import torch
    from tqdm import tqdm

    bars: list[tqdm] = []

    def progress(done: int, total: int) -> None:
        if not done:
            watch.lap("read and chunk")  # chunking is done when the number of chunks is known
            bars.append(tqdm(desc="Internalizing", unit="chunk", total=total, disable=total < 2))
        bars[-1].update(done - bars[-1].n)

    try:
        adapter = model.internalize(
            documents, max_batch_tokens=settings["max_batch_tokens"], progress=progress
        )
        adapter = adapter.fused() if in_force_alike(settings) else adapter
    finally:
        for bar in bars:
            bar.close()
    if model.device.type == "cuda":
        torch.cuda.synchronize()  # so that the time is this stage's
    return adapter


def in_force_alike(settings: dict[str, Any]) -> bool:
    """Whether all chunks answer every question, so that they are told apart beforehand."""
    return settings["route"] is None and settings["gate"] is None


def answer_all(
    model: "DocToLoRA", adapter: "LoRAAdapter", documents: "Sequence[Document]", settings: dict[str, Any]
) -> dict[str, list[str]]:
    """Column of the table → answers."""
    ways = {WITHOUT: (None, None), WITH_ADAPTER: (adapter, None)}
    ways[IN_PROMPT] = (None, "\n\n".join(document.text.strip() for document in documents))
    if not settings["compare"]:
        ways = {WITH_ADAPTER: ways[WITH_ADAPTER]}
    how = {key: settings[key] for key in ("max_new_tokens", "route", "gate")}
    return {column: answer(model, settings["ask"], *way, **how) for column, way in ways.items()}


def answer(
    model: "DocToLoRA",
    questions: Sequence[str],
    adapter: "LoRAAdapter | None",
    document: str | None,
    *,
    max_new_tokens: int,
    route: int | None,
    gate: float | None,
) -> list[str]:
    """Greedy answers, each by `route` chunks of the adapter, None for all of them, or by all of them through a gate.

    Where prompt and answer exceed the base model's window, that instead of an answer.
    """
    window = getattr(model.base_model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    lengths = [num_tokens(model, model.layout.prompt(question, document)) for question in questions]
    fitting = [q for q, length in zip(questions, lengths, strict=True) if length + max_new_tokens <= window]
    how = {"documents": [document] * len(fitting), "max_new_tokens": max_new_tokens}
    if adapter is not None and route is not None:
        how |= {"join": "route", "top_k": route}
    if adapter is not None and gate is not None:
        how |= {"join": "gate", "gate_power": gate}
    texts = iter(model.generate(fitting, adapter, **how))
    return [
        next(texts)
        if length + max_new_tokens <= window
        else f"(does not fit: {length} tokens and {max_new_tokens} for the answer, the base model takes {window})"
        for length in lengths
    ]


def num_tokens(model: "DocToLoRA", text: str) -> int:
    return len(model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def report(
    model: "DocToLoRA",
    adapter: "LoRAAdapter",
    documents: "Sequence[Document]",
    settings: dict[str, Any],
    columns: dict[str, list[str]],
    seconds: dict[str, float],
) -> None:
    """Prints the table of answers, what the adapter is, and how to load it."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    output_dir, questions = settings["output_dir"], settings["ask"]
    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False, markup=False, emoji=False)
    if questions:
        table = Table(show_lines=True)
        for header in ("Question", *columns):
            table.add_column(header, overflow="fold")
        for row in zip(questions, *columns.values(), strict=True):
            table.add_row(*(Text(text or "(nothing)") for text in row))
        console.print(table)

    tokens = sum(num_tokens(model, document.text) for document in documents)
    read = documents[0].name if len(documents) == 1 else f"{len(documents)} documents"
    chunks = "1 chunk" if adapter.num_chunks == 1 else f"{adapter.num_chunks} chunks"
    source, folder = (json.dumps(text, ensure_ascii=False) for text in (model.base_model_source, output_dir))
    # Through the console too: it ends quietly when the reader of a pipe, such as head, has seen enough.
    for line in (
        f"Read     {read}: {tokens} tokens in {chunks}",
        f"Adapter  {output_dir}: rank {adapter.rank}, {human_bytes(adapter.num_bytes)}",
        f"Seconds  {', '.join(f'{stage} {value:.2f}' for stage, value in seconds.items())}",
        f"PEFT     PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({source}), {folder})",
    ):
        console.print(line, soft_wrap=True)
    if adapter.num_chunks > 1 and not in_force_alike(settings):
        console.print("         without gate and route, where chunks add up; leave both out to have them told apart.")


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


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Ends the process with one line on standard error instead of a traceback, for what the user can put right."""
    try:
        yield
    except KeyboardInterrupt:
        print("generate_adapter.py: interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, MemoryError, RuntimeError, HydraException, OmegaConfBaseException) as error:
        if (reason := explain(error)) is None:
            raise
        sys.exit("generate_adapter.py: " + " ".join(reason.split()))


def explain(error: Exception) -> str | None:
    """What is wrong and what to do, or None for a mistake of ours."""
    text = str(error)
    if isinstance(error, OverrideParseException):
        return (
            f"Cannot read the argument {error.override!r}. Settings are key=value, texts with special characters in "
            "double quotes, the whole argument in single quotes: 'ask=[\"Who, if anyone, taught her?\"]'. See --help."
        )
    if unknown := re.match(r"Could not override '(.+?)'", text):
        return no_such_setting(unknown[1])
    if ambiguous := re.match(r"Ambiguous value for argument '(.+?)=(.*)'", text):
        key, value = ambiguous.groups()
        return f"Several values need brackets: '{key}=[{value}]'. A comma in a value needs quotes: '{key}=\"{value}\"'."
    if isinstance(error, MemoryError) or re.search(r"out of memory|can't allocate memory", text):
        return "Out of memory. Lower max_batch_tokens, ask fewer questions at once, or set dtype=bfloat16."
    if isinstance(error, RuntimeError):
        return None
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"No space left on the disk of {error.filename or 'output_dir'}. Free some, or name another output_dir."
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.strerror}: {error.filename}. Check the path and its permissions, or name another output_dir."
    return text


@hydra.main(config_path="conf", config_name="generate_adapter", version_base="1.3")
def main(cfg: DictConfig) -> None:
    # Hydra prints what leaves this function in its own way.
    with errors_in_one_line():
        generate(cfg)


def run() -> None:
    """The command: `main` with the mistakes in its arguments told in one line too."""
    # Hydra then raises them instead of printing them.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with errors_in_one_line():
        for argument in sys.argv[1:]:
            name, _, value = argument.removeprefix("--").partition("=")
            if argument.startswith("--") and name in setting_names():
                raise ValueError(f"Settings have no dashes: write {name}={value or '...'} instead of {argument}.")
        main()


if __name__ == "__main__":
    # A terminal of another encoding than UTF-8 shows what it can.
    sys.stdout.reconfigure(errors="replace")
    run()
