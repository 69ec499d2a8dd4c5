"""What gradient steps after generation are worth: `python -m benchmarks.refining`

Paragraphs and notes, each kept in nine ways, and asked about: the generated adapter, alone and refined; a LoRA trained
from zero and a cartridge, for a few budgets, and least squares, all from the same questions that the base model wrote
about the document; the closed form; the kept prefix; the document in the prompt; nothing. Seconds are the processor's
since the document was known, of one thread. What is done stays: the same command goes on with the next document.
"""

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hydra

from benchmarks.refining.figures import markdown
from hypernet.cli.scripts import Script
from hypernet.cli.settings import Count, OutputFile, OutputFolder, Settings, Text


class _Drawn(NamedTuple):
    """What `own_documents.drawn` reads of its settings."""

    documents: int
    questions_per_document: int
    paragraphs_file: str


def of_document(
    model: Any, cfg: "RefiningSettings", text: str, asked: Sequence[tuple[str, list[str]]], moments: Any, *, seed: int
) -> Iterator[dict[str, Any]]:
    """A row for each method, budget and question: seconds, bytes, steps, and what the answer holds."""
    from benchmarks.own_documents import scored, untrained
    from benchmarks.refining.arms import Cartridge, FromZero, LeastSquares, taught, trained
    from hypernet.base.targets import find_targets
    from hypernet.refining import ask_about, refine

    questions = [question for question, _ in asked]

    def rows(
        method: str, answers: Sequence[str], *, seconds: float, num_bytes: int, budget: float = 0, steps: int = 0
    ) -> Iterator[dict[str, Any]]:
        for (question, truth), answer in zip(asked, answers, strict=True):
            yield {
                **{"method": method, "budget": budget, "seconds": seconds, "bytes": num_bytes, "steps": steps},
                **{"question": question, "prediction": answer, **scored(answer, truth)},
            }

    def said(adapter: Any = None, *, documents: Any = None, wording: str = "") -> list[str]:
        found = [question + wording for question in questions]
        return list(model.generate(found, adapter, documents=documents, max_new_tokens=cfg.max_new_tokens))

    yield from rows("no_context", said(), seconds=0, num_bytes=0)
    in_prompt = said(documents=[text] * len(questions), wording=cfg.wording)
    yield from rows("in_prompt", in_prompt, seconds=0, num_bytes=len(text.encode()))

    started = time.process_time()
    prefix = Cartridge(model, text)
    spent = time.process_time() - started
    answers = prefix.answers([question + cfg.wording for question in questions], max_new_tokens=cfg.max_new_tokens)
    yield from rows("kept_prefix", answers, seconds=spent, num_bytes=prefix.num_bytes)

    with untrained(model):
        started = time.process_time()
        plain = model.internalize(text)
        spent = time.process_time() - started
        yield from rows("closed_form", said(plain), seconds=spent, num_bytes=_bytes_of(plain))

    started = time.process_time()
    adapter = model.internalize(text)
    generated_s = time.process_time() - started
    yield from rows("adapter", said(adapter), seconds=generated_s, num_bytes=_bytes_of(adapter))

    started = time.process_time()
    written = ask_about(model, adapter, text, each=cfg.questions_per_chunk, seed=seed)
    written_s = time.process_time() - started
    started = time.process_time()
    refined = refine(model, adapter, text, steps=cfg.steps, questions=written, seed=seed)
    spent = generated_s + written_s + time.process_time() - started
    done = refined.provenance["operations"][-1]["steps"]
    yield from rows("refined", said(refined), seconds=spent, num_bytes=_bytes_of(refined), steps=done)

    started = time.process_time()
    lessons = taught(model, text, [question for _, question in written][: cfg.most_lessons], wording=cfg.wording)
    taught_s = written_s + time.process_time() - started
    zero = FromZero(model, rank=model.hypernetwork.rank, lr=cfg.lr, seed=seed)
    try:
        for budget, spent, steps in trained(zero, lessons, budgets=cfg.seconds, spent=taught_s, seed=seed):
            answers = zero.answers(questions, max_new_tokens=cfg.max_new_tokens)
            yield from rows("from_zero", answers, seconds=spent, num_bytes=zero.num_bytes, budget=budget, steps=steps)
    finally:
        zero.remove()

    started = time.process_time()
    cartridge = Cartridge(model, text, tokens=cfg.cartridge_tokens, lr=cfg.cartridge_lr)
    cut_s = time.process_time() - started
    answers = cartridge.answers(questions, max_new_tokens=cfg.max_new_tokens)
    yield from rows("cartridge", answers, seconds=cut_s, num_bytes=cartridge.num_bytes)
    for budget, spent, steps in trained(cartridge, lessons, budgets=cfg.seconds, spent=cut_s + taught_s, seed=seed):
        answers = cartridge.answers(questions, max_new_tokens=cfg.max_new_tokens)
        yield from rows("cartridge", answers, seconds=spent, num_bytes=cartridge.num_bytes, budget=budget, steps=steps)

    (target,) = find_targets(model.base_model, ["down_proj"])
    paths = [target.paths[layer] for layer in cfg.least_squares_layers]
    moments.of(model, paths)  # once for a base model, before the clock
    started = time.process_time()
    solved = LeastSquares(
        *(model, text, [question for _, question in written][: cfg.most_lessons], lessons),
        **{"moments": moments, "paths": paths, "ridge": cfg.ridge, "wording": cfg.wording},
    )
    spent = taught_s + time.process_time() - started
    answers = solved.answers(questions, max_new_tokens=cfg.max_new_tokens)
    yield from rows("least_squares", answers, seconds=spent, num_bytes=solved.num_bytes)


def _bytes_of(adapter: Any) -> int:
    """Of its rows that are used, in bfloat16."""
    parts = (*adapter.A.values(), *adapter.B.values())
    return 2 * sum(int((rows != 0).any(-1).sum()) * rows.shape[-1] for rows in parts)


class RefiningSettings(Settings):
    checkpoint: Text
    seeds: list[int]
    documents: Count
    questions_per_document: Count
    seconds: list[float]
    steps: Count
    questions_per_chunk: Count
    most_lessons: Count
    wording: str
    lr: float
    cartridge_tokens: Count
    cartridge_lr: float
    least_squares_layers: list[int]
    ridge: float
    paragraphs_file: Text
    moments_file: Text
    moments_texts: Count
    max_new_tokens: Count
    cells: OutputFolder
    output: OutputFile | None


SCRIPT = Script("benchmarks.refining", RefiningSettings)


@hydra.main(config_path="../../conf", config_name="refining", version_base="1.3")
@SCRIPT
def main(cfg: RefiningSettings) -> None:
    from benchmarks.measuring.cells import cell_path, identity_of, write_cell
    from benchmarks.measuring.rows import describe_run, write_rows
    from benchmarks.own_documents import drawn, without_texts
    from benchmarks.real_text import read_squad
    from hypernet.consolidation.editing.moments import KeyMoments
    from hypernet.doc_to_lora import DocToLoRA

    read_squad(cfg.paragraphs_file)  # before the model is loaded
    try:
        lines = Path(cfg.moments_file).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"Cannot read {cfg.moments_file}: {error.strerror}. Set moments_file to a text.") from error
    texts = [line for line in lines if len(line.split()) >= 40][: cfg.moments_texts]
    model = DocToLoRA.from_pretrained(cfg.checkpoint)
    moments = KeyMoments(texts, folder=Path(cfg.cells) / "moments")
    settings = cfg.model_dump(exclude={"seeds", "documents", "cells", "output"})
    identity = identity_of(settings, cfg.checkpoint)
    paths = []
    for seed in cfg.seeds:
        for what, documents in (("paragraphs", cfg.documents), ("notes", 2 * cfg.documents)):
            wanted: Any = _Drawn(documents, cfg.questions_per_document, cfg.paragraphs_file)
            found, asked = drawn(wanted, what, seed)
            for number, text in enumerate(found):
                path = cell_path(cfg.cells, task=what, method=f"document{number}", seed=seed, identity=identity)
                paths.append(path)
                if path.is_file():
                    continue
                of = [(one.question, one.answers) for one in asked if one.document == number]
                place = {"set": what, "seed": seed, "document": number}
                made = of_document(model, cfg, text, of, moments, seed=seed)
                write_cell(path, [without_texts({**place, **row}) for row in made])
                print(f"{what} {number} of seed {seed}", flush=True)
    rows = [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    if cfg.output:
        write_rows(cfg.output, rows, run=describe_run(cfg.model_dump()), in_each=False)
    print(markdown(rows), flush=True)


if __name__ == "__main__":
    SCRIPT.run(main, Path(__file__).parents[2] / "conf/refining.yaml")
