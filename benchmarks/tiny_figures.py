"""The figures of the shipped model on held-out articles, with its controls: `python -m benchmarks.tiny_figures`

Articles come from the encyclopedia's test split: no entity or invented name of training, and sentence forms that
training never showed. Every answer is generated; every row of the table has the same questions.
"""

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import hydra
from pydantic import Field

from hypernet.cli.scripts import Script
from hypernet.cli.settings import Count, Number, OutputFile, Settings, Text

METHODS = ("no_context", "wrong_document", "adapter", "document_in_prompt")


def held_out_articles(
    tokenizer: Any, *, seed: int, article_tokens: int, one_entity: int, many_entities: int
) -> dict[str, list]:
    """Test records by set, as many of each as asked for: "one entity" in up to article_tokens, "2-4 entities" in 2 to 4
    pieces of up to article_tokens.

    Sizes do not depend on the model's chunks, so figures of models that read differently can be compared.

    Raises:
        ValueError: such articles hardly occur.
    """
    from hypernet.data.encyclopedia import Encyclopedia
    from hypernet.text.chunking import chunk_document

    encyclopedia = Encyclopedia("test", seed=seed)
    wanted = {"one entity": (one_entity, range(1, 2)), "2-4 entities": (many_entities, range(2, 5))}
    sets: dict[str, list] = {name: [] for name in wanted}
    index = 0
    most = 100 * (one_entity + many_entities)
    while any(len(sets[name]) < number for name, (number, _) in wanted.items()):
        rng = encyclopedia.rng(index, "sizes")
        name = "one entity" if len(sets["one entity"]) < one_entity else "2-4 entities"
        entities = 1 if name == "one entity" else rng.randint(2, 4)
        facts = sum(rng.randint(2 if entities == 1 else 4, 6) for _ in range(entities))
        record = encyclopedia.record(index, num_entities=entities, num_facts=facts, num_distractors=rng.randint(0, 2))
        num_pieces = len(chunk_document(record.document, tokenizer, max_chunk_tokens=article_tokens).ids)
        if num_pieces in wanted[name][1]:
            sets[name].append(record)
        index += 1
        if index > most:
            raise ValueError(
                f"Of {most} articles hardly any about {name} has the size that article_tokens={article_tokens} asks "
                "for. An article about one entity has about 100 of the tiny tokenizer's tokens."
            )
    return sets


def answer_all(
    model: Any, asked: Sequence[tuple], *, questions_per_batch: int, label: str, **settings: Any
) -> list[str]:
    """Answers to (question, adapter or None, document or None), in order, in batches of prompts of similar length.

    Args:
        settings: of `DocToLoRA.generate`.
    """
    from tqdm import tqdm

    order = sorted(range(len(asked)), key=lambda i: len(asked[i][2] or ""))
    answers = [""] * len(asked)
    starts = range(0, len(order), questions_per_batch)
    for start in tqdm(starts, desc=label, leave=False, file=sys.stderr):
        batch = order[start : start + questions_per_batch]
        questions, adapters, documents = zip(*(asked[i] for i in batch), strict=True)
        found = model.generate(questions, list(adapters), documents=documents, **settings)
        for i, answer in zip(batch, found, strict=True):
            answers[i] = answer
    return answers


def evaluate(model: Any, cfg: "FiguresSettings") -> list[dict]:
    """One row per question, method and seed: set, document, question, answer, prediction, exact match."""
    return [{"seed": seed, **row} for seed in cfg.seeds for row in _of_seed(model, cfg, seed)]


def _of_seed(model: Any, cfg: "FiguresSettings", seed: int) -> list[dict]:
    from hypernet.data.encyclopedia import background_questions
    from hypernet.text.matching import exact_match

    sets = held_out_articles(
        model.tokenizer,
        seed=seed,
        article_tokens=cfg.article_tokens,
        one_entity=cfg.documents_one_entity,
        many_entities=cfg.documents_many_entities,
    )
    rows, all_adapters = [], []
    for name, records in sets.items():
        adapters = [model.internalize(record.document) for record in records]
        all_adapters += adapters
        asked = [(d, question) for d, record in enumerate(records) for question in record.questions]
        prompts = {
            "no_context": [(q.text, None, None) for _, q in asked],
            "wrong_document": [(q.text, adapters[(d + 1) % len(adapters)], None) for d, q in asked],
            "adapter": [(q.text, adapters[d], None) for d, q in asked],
            "document_in_prompt": [(q.text, None, records[d].document) for d, q in asked],
        }
        for method in METHODS:
            answers = answer_all(
                model, prompts[method], questions_per_batch=cfg.questions_per_batch, label=f"{seed}: {name}, {method}"
            )
            rows += [
                {
                    "set": name,
                    "method": method,
                    "document": f"{seed}/{d}",
                    "num_chunks": adapters[d].num_chunks,
                    "relation": question.group,
                    "question": question.text,
                    "answer": question.answer,
                    "prediction": answer,
                    "exact_match": float(exact_match(answer, question.answer)),
                }
                for (d, question), answer in zip(asked, answers, strict=True)
            ]
    for held_out, name in ((False, "background"), (True, "background, facts never protected in training")):
        questions = background_questions(held_out=held_out)
        questions = random.Random(seed).sample(questions, min(cfg.num_background, len(questions)))
        unrelated = [all_adapters[i % len(all_adapters)] for i in range(len(questions))]
        for method, adapters in (("no_context", [None] * len(questions)), ("unrelated_adapter", unrelated)):
            prompts = [(q.text, adapter, None) for q, adapter in zip(questions, adapters, strict=True)]
            answers = answer_all(model, prompts, questions_per_batch=cfg.questions_per_batch, label=f"{name}, {method}")
            rows += [
                {
                    "set": name,
                    "method": method,
                    "document": question.text,  # the same fact for every seed that asks about it
                    "relation": question.group,
                    "question": question.text,
                    "answer": question.answer,
                    "prediction": answer,
                    "exact_match": float(exact_match(answer, question.answer)),
                }
                for question, answer in zip(questions, answers, strict=True)
            ]
    return rows


def summarize(rows: Sequence[dict]) -> list[dict]:
    """Mean exact match per set and method with its interval over documents, and the share of the gap closed."""
    from benchmarks.measuring.metrics import bootstrap_interval, gap_closed

    summary = []
    for name in dict.fromkeys(row["set"] for row in rows):
        means = {}
        for method in dict.fromkeys(row["method"] for row in rows if row["set"] == name):
            chosen = [row for row in rows if row["set"] == name and row["method"] == method]
            values = [row["exact_match"] for row in chosen]
            means[method] = sum(values) / len(values)
            low, high = bootstrap_interval(values, groups=[row["document"] for row in chosen])
            summary.append(
                {
                    "set": name,
                    "method": method,
                    "questions": len(chosen),
                    "documents": len({row["document"] for row in chosen}),
                    "exact_match": means[method],
                    "low": low,
                    "high": high,
                }
            )
        if "adapter" in means:
            for row in summary:
                if row["set"] == name and row["method"] in ("wrong_document", "adapter"):
                    row["gap_closed"] = gap_closed(
                        means[row["method"]], floor=means["no_context"], ceiling=means["document_in_prompt"]
                    )
    return summary


def markdown(summary: Sequence[dict]) -> str:
    """The table as it stands in the model card and the documentation; low and high are the 95 % interval's ends."""
    from benchmarks.report.tables import Table, number

    cells = {
        "set": lambda row: row["set"],
        "method": lambda row: row["method"].replace("_", " "),
        "questions": lambda row: str(row["questions"]),
        "exact match": number("exact_match", 3),
        "low": number("low", 3),
        "high": number("high", 3),
        "share of the gap closed": number("gap_closed"),
    }
    return Table.of("", summary, cells).markdown()


class FiguresSettings(Settings):
    checkpoint: Text
    seeds: Annotated[list[Number], Field(min_length=1, description="a list of whole numbers, at least one")]
    article_tokens: Count
    documents_one_entity: Count
    documents_many_entities: Count
    num_background: Number
    questions_per_batch: Count
    output: OutputFile | None


SCRIPT = Script("benchmarks.tiny_figures", FiguresSettings)


@hydra.main(config_path="../conf", config_name="tiny_figures", version_base="1.3")
@SCRIPT
def main(cfg: FiguresSettings) -> None:
    from benchmarks.measuring.rows import describe_run, write_rows
    from hypernet.doc_to_lora import DocToLoRA

    model = DocToLoRA.from_pretrained(cfg.checkpoint)
    rows = evaluate(model, cfg)
    summary = summarize(rows)
    if cfg.output:
        run = describe_run(cfg.model_dump())
        write_rows(cfg.output, [{"kind": "summary", **row} for row in summary], run=run)
    print(markdown(summary))


if __name__ == "__main__":
    SCRIPT.run(main, Path(__file__).parents[1] / "conf/tiny_figures.yaml")
