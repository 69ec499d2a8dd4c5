"""Measures one cell: a task's cases answered by a method at a seed.

    rows = run_cell(task.cases(seed=0), method, seed=0, num_timed=2, num_profiled=1)

A module of its own, so that launchers which start other processes find it by name.
"""

import json
import time
import zlib
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from benchmarks.measuring.metrics import contains, rouge_l, token_f1
from benchmarks.measuring.rows import describe_run
from benchmarks.methods.base import Method
from benchmarks.tasks.base import Case, Task
from hypernet.base.base_model import load_base_model
from hypernet.base.catalog import known_name
from hypernet.cli.settings import choose_device
from hypernet.doc_to_lora import DocToLoRA
from hypernet.text.matching import exact_match


def is_base_model(source: str) -> bool:
    """Whether it is a fetched base model's name, or a base model's folder without a checkpoint."""
    return known_name(source) is not None or (Path(source) / "config.json").is_file()


class BaseModelAlone(DocToLoRA):
    """A base model without a hypernetwork, for methods that ask it with texts; those that need adapters fail."""

    @classmethod
    def load(cls, source: str, *, device: str) -> Self:
        base_model, tokenizer = load_base_model(source, device=device)
        # Of the smallest size there is; nothing reads it.
        model = cls.build(
            base_model=base_model,
            tokenizer=tokenizer,
            target_modules=["down_proj"],
            hypernetwork={"rank": 1, "aggregator": {"name": "outer_product", "inner_dim": 1}},
            context_encoder={"kind": "per_layer_activations"},
            max_chunk_tokens=128,
            base_model_source=source,
        )
        return model.to(device).eval().requires_grad_(False)

    def internalize(self, *_: Any, **__: Any) -> NoReturn:
        raise ValueError(
            f"{self.base_model_source} is a base model without a hypernetwork. Choose a method without adapters, or "
            "checkpoint=assets/tiny."
        )


@lru_cache(maxsize=1)
def load_model(checkpoint: str, device: str) -> DocToLoRA:
    """The checkpoint, once for all cells of a process."""
    if is_base_model(checkpoint):
        model = BaseModelAlone.load(checkpoint, device=device)
        model.generate(["Where?"])
        return model
    model = DocToLoRA.from_pretrained(checkpoint, device=device).eval().requires_grad_(False)
    model.generate(["Where?"], model.internalize("The first call of everything is slow."))
    return model


def build_task(settings: dict[str, Any] | DictConfig, model: DocToLoRA) -> Task:
    """The task that the settings describe; one that measures in the model's own tokens is given the model."""
    task = instantiate(settings, _convert_="all")
    return task(model=model) if isinstance(task, partial) else task


@lru_cache(maxsize=1)
def load_cases(settings: str, seed: int, checkpoint: str, device: str) -> tuple[Case, ...]:
    """The cases of the task that these settings, as JSON, describe.

    Kept for the sweep's next cell, which has another method: haystacks of many chunks take longer to make than to read.
    """
    return tuple(build_task(json.loads(settings), load_model(checkpoint, device)).cases(seed))


def question_rows(case: Case, method: Method, step: int | None) -> Iterator[dict[str, Any]]:
    """One row per question: answers, prediction and scores."""
    answers = method.answer(case.questions)
    for number, (question, answer) in enumerate(zip(case.questions, answers, strict=True)):
        rouge = rouge_l(answer.text, question.answers)
        row = {
            "kind": "question",
            "set": case.set,
            "case": case.name,
            "number": number,
            "step": step,
            "attributes": {**case.attributes, **(question.attributes or {})},
            "group": question.group,
            "question": question.text,
            "answers": list(question.answers),
            "prediction": answer.text,
            "fits": answer.fits,
            "prompt_tokens": answer.prompt_tokens,
            "exact_match": exact_match(answer.text, question.answers),
            "contains_answer": contains(answer.text, question.answers),
            "token_f1": token_f1(answer.text, question.answers),
            "rouge_l_precision": rouge.precision,
            "rouge_l_recall": rouge.recall,
            "rouge_l_f1": rouge.f1,
            "log_likelihood": answer.log_likelihood,
        }
        if question.old_answer is not None:
            row["old_answer"] = exact_match(answer.text, question.old_answer)
            row["contains_old_answer"] = contains(answer.text, question.old_answer)
            row["contains_neither"] = float(not row["contains_answer"] and not row["contains_old_answer"])
        yield row


def case_row(case: Case, method: Method, *, seed: int, timed: bool, profiled: bool) -> Iterator[dict[str, Any]]:
    """The question rows of a case, then its own row with what it cost."""

    def seeded() -> None:
        torch.manual_seed(zlib.crc32(f"{seed}/{case.set}/{case.name}".encode()))

    seeded()
    cost: dict[str, Any] = {}
    if profiled:
        cost["prepare_flops"] = method.prepare_flops(case)
        cost["prepare_peak_bytes"] = method.prepare_peak_bytes(case)
        seeded()
    started = time.perf_counter()
    method.prepare(case)
    if method.model.device.type == "cuda":
        torch.cuda.synchronize()
    cost["prepare_s"] = time.perf_counter() - started
    for step in method.steps:
        method.use(step)
        yield from question_rows(case, method, step)
    if timed:
        times = [method.timed_answer(question) for question in case.questions]
        cost["first_token_s"], cost["question_s"] = (sorted(t[i] for t in times)[len(times) // 2] for i in range(2))
        # Tokens after the first, over the time after it.
        rest = sum(t[1] - t[0] for t in times)
        cost["tokens_per_s"] = sum(t[2] - 1 for t in times) / rest if rest > 0 else None
    if profiled:
        cost["answer_flops"], cost["answer_peak_bytes"] = method.answer_cost(case.questions[0])
    yield {
        "kind": "case",
        "set": case.set,
        "case": case.name,
        "attributes": dict(case.attributes),
        "documents": len(case.documents),
        "document_tokens": sum(len(method.encode(document)) for document in case.documents),
        "questions": len(case.questions),
        "stored_bytes": method.stored_bytes(),
        "step_s": {step: method.seconds_at(step) for step in method.steps if step is not None},
        **cost,
    }


def run_cell(
    cases: Iterable[Case], method: Method, *, seed: int, num_timed: int, num_profiled: int
) -> list[dict[str, Any]]:
    """All rows of a cell but its summary.

    Args:
        cases: of a task at that seed.
        num_timed: cases of each set whose questions are also asked alone, for the clock.
        num_profiled: cases of each set whose FLOPs and memory are counted.
    """
    rows: list[dict[str, Any]] = []
    seen: dict[str, int] = {}
    for case in cases:
        place = seen[case.set] = seen.get(case.set, -1) + 1
        rows += case_row(case, method, seed=seed, timed=place < num_timed, profiled=place < num_profiled)
    return rows


def summary_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means by set after the last step; the report works from the questions."""
    sets: dict[str, dict[str, float]] = {}
    last = max((row["step"] or 0 for row in rows if row["kind"] == "question"), default=0)
    for name in dict.fromkeys(row["set"] for row in rows):
        chosen = [r for r in rows if r["kind"] == "question" and r["set"] == name and (r["step"] or 0) == last]
        sets[name] = {
            key: sum(row[key] for row in chosen) / len(chosen)
            for key in ("exact_match", "token_f1", "rouge_l_f1", "log_likelihood")
        } | {"questions": len(chosen)}
    return {"kind": "summary", "sets": sets}


def measure(cfg: DictConfig, config: dict[str, Any]) -> list[dict[str, Any]]:
    """All rows of the cell that the settings describe."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    started = time.perf_counter()
    device = choose_device(cfg.device)
    model = load_model(cfg.checkpoint, device)
    cases = load_cases(json.dumps(config["task"]), cfg.seed, cfg.checkpoint, device)
    method = instantiate(cfg.method, _convert_="all")(model=model, max_new_tokens=cfg.max_new_tokens)
    try:
        rows = run_cell(cases, method, seed=cfg.seed, num_timed=cfg.num_timed, num_profiled=cfg.num_profiled)
    finally:
        model.injector.clear()
    summary = summary_row(rows) | {"wall_s": time.perf_counter() - started, "run": describe_run(config)}
    return [*rows, summary]
