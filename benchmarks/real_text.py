"""Real text end to end: SQuAD-format paragraphs → adapters → PEFT folders → answers: `python -m benchmarks.real_text`

Exact match and token F1 against the human answers, with the adapter, without context, with the wrong document's,
and with the paragraph in the prompt where it fits into the base model's window.
"""

import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra

from hypernet.cli.scripts import Script
from hypernet.cli.settings import Count, OutputFile, Settings, Text


def read_articles(path: str | Path) -> list[list[tuple[str, list[tuple[str, list[str]]]]]]:
    """For each article its paragraphs, (text, [(question, human answers)]), of a file in SQuAD's v1.1 JSON format.

    Raises:
        ValueError: the file is missing or not in this format.
    """
    try:
        data = json.loads(Path(path).read_bytes())["data"]  # bytes: with any byte order mark
        return [
            [
                (p["context"], [(qa["question"], [a["text"] for a in qa["answers"]]) for qa in p["qas"]])
                for p in article["paragraphs"]
            ]
            for article in data
        ]
    except OSError as error:
        raise ValueError(f"Cannot read {path}: {error.strerror}. Name a file in SQuAD's v1.1 JSON format.") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not in SQuAD's v1.1 JSON format ({type(error).__name__}: {error}).") from error


def read_squad(path: str | Path) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """As `read_articles`, the paragraphs of all articles in one list."""
    return [paragraph for article in read_articles(path) for paragraph in article]


def peft_difference(model: Any, adapter: Any, folder: Path, question: str) -> float:
    """Largest difference of the logits between the folder loaded by PEFT and the injected adapter, on one question."""
    import torch
    from peft import PeftModel

    adapter.save(folder, overwrite=True)
    ids = torch.tensor(model.layout.prompt_ids(model.tokenizer, [question]))
    with torch.no_grad():
        with model.injector.using(adapter):
            injected = model.base_model(ids).logits
        loaded = PeftModel.from_pretrained(model.base_model, folder)
        try:
            difference = (loaded(ids).logits - injected).abs().max().item()
        finally:
            loaded.unload()
    return difference


def evaluate(model: Any, cfg: "RealTextSettings") -> dict[str, Any]:
    """Counts, the largest PEFT difference, seconds, and exact match and F1 by method."""
    from tqdm import tqdm

    from benchmarks.measuring.metrics import token_f1
    from benchmarks.tiny_figures import answer_all
    from hypernet.text.matching import exact_match

    paragraphs = read_squad(cfg.squad_file)[: cfg.max_paragraphs]
    adapters, difference, seconds = [], 0.0, 0.0
    with tempfile.TemporaryDirectory() as scratch:
        for text, asked in tqdm(paragraphs, desc="paragraphs", file=sys.stderr):
            started = time.perf_counter()
            adapters.append(model.internalize(text))
            seconds += time.perf_counter() - started
            if cfg.peft:
                found = peft_difference(model, adapters[-1], Path(scratch) / "adapter", asked[0][0])
                # Not max(difference, found): a difference that is not a number would count as none.
                difference = difference if math.isnan(difference) or found <= difference else found
    window = model.base_model.config.get_text_config().max_position_embeddings
    flat = [(i, question, answers) for i, (_, asked) in enumerate(paragraphs) for question, answers in asked]
    length = {i: len(model.tokenizer(text, verbose=False)["input_ids"]) for i, (text, _) in enumerate(paragraphs)}
    fits = {i for i in length if length[i] + 64 <= window}
    methods = {
        "no_context": [(q, None, None) for i, q, _ in flat],
        "wrong_document": [(q, adapters[(i + 1) % len(adapters)], None) for i, q, _ in flat],
        "adapter": [(q, adapters[i], None) for i, q, _ in flat],
        "document_in_prompt": [(q, None, paragraphs[i][0] if i in fits else None) for i, q, _ in flat],
    }
    result: dict[str, Any] = {
        "paragraphs": len(paragraphs),
        "adapters": len(adapters),
        "chunks": sum(adapter.num_chunks for adapter in adapters),
        "tokens": sum(length.values()),
        "peft_logit_difference": difference if cfg.peft else None,
        "internalize_s": seconds,
        "questions": len(flat),
        "questions_fitting_window": sum(i in fits for i, _, _ in flat),
        "scores": {},
    }
    for method, asked in methods.items():
        answers = answer_all(model, asked, questions_per_batch=cfg.questions_per_batch, label=method)
        # Only paragraphs that fit the window are scored in the prompt; the number of questions says so.
        scored = [
            (answer, truth)
            for answer, (i, _, truth) in zip(answers, flat, strict=True)
            if method != "document_in_prompt" or i in fits
        ]
        result["scores"][method] = {
            "questions": len(scored),
            "exact_match": sum(float(exact_match(a, t)) for a, t in scored) / max(len(scored), 1),
            "token_f1": sum(float(token_f1(a, t)) for a, t in scored) / max(len(scored), 1),
        }
    return result


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table and a sentence of what was read, of the one row."""
    (result,) = rows
    lines = ["| method | questions | exact match | token F1 |", "| --- | ---: | ---: | ---: |"]
    lines += [
        f"| {method.replace('_', ' ')} | {s['questions']} | {s['exact_match']:.4f} | {s['token_f1']:.4f} |"
        for method, s in result["scores"].items()
    ]
    summary = (
        f"{result['adapters']} of {result['paragraphs']} paragraphs became adapters ({result['tokens']} tokens, "
        f"{result['chunks']} chunks, {result['internalize_s']:.1f} s)."
    )
    if result["peft_logit_difference"] is not None:
        summary += f" PEFT loaded every one; largest logit difference {result['peft_logit_difference']:.1e}."
    return "\n".join([*lines, "", summary])


class RealTextSettings(Settings):
    checkpoint: Text
    squad_file: Text
    max_paragraphs: Count | None
    peft: bool
    questions_per_batch: Count
    output: OutputFile | None


SCRIPT = Script("benchmarks.real_text", RealTextSettings)


@hydra.main(config_path="../conf", config_name="real_text", version_base="1.3")
@SCRIPT
def main(cfg: RealTextSettings) -> None:
    from benchmarks.measuring.rows import describe_run, write_rows
    from hypernet.doc_to_lora import DocToLoRA

    read_squad(cfg.squad_file)  # before the model is loaded
    model = DocToLoRA.from_pretrained(cfg.checkpoint)
    result = evaluate(model, cfg)
    if cfg.output:
        write_rows(cfg.output, [result], run=describe_run(cfg.model_dump()))
    print(markdown([result]))


if __name__ == "__main__":
    SCRIPT.run(main, Path(__file__).parents[1] / "conf/real_text.yaml")
