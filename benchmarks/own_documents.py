"""A real base model and documents of people: `python -m benchmarks.own_documents`

Every document becomes an adapter in one pass, and its questions are answered with it, without context, with another
document's adapter, with the one sentence that holds the answer chosen by truth (the oracle), with the untrained
hypernetwork's adapter (the closed form), and with the document in the prompt, in the best of a few wordings. Also
every sentence said by its own rows, several documents in one adapter, an article's first paragraphs, questions that the
base model answers anyway, text that it goes on with, passages that contradict what it knows, and seconds.
"""

import hashlib
import json
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import hydra

from hypernet.cli.scripts import Script
from hypernet.cli.settings import Count, OutputFile, Settings, Text

# What stands behind a question whose document is in the prompt; the best on `wording_file` is used.
WORDINGS = (
    "",
    " Answer in one sentence from the text.",
    " Quote the sentence of the text that answers.",
    " Answer with a few words from the text.",
)
METHODS = ("no_context", "other_document", "adapter", "oracle", "closed_form", "in_prompt")
_PAGE_TOKENS = 1000  # of a page of two
_CONTINUED = 40  # words of a text that are shown, and as many that follow


class Asked(NamedTuple):
    """A question about the document of this number, with the answers that count."""

    document: int
    question: str
    answers: list[str]


def drawn(cfg: "OwnDocumentsSettings", what: str, seed: int) -> tuple[list[str], list[Asked]]:
    """Documents of this seed, "paragraphs" or "notes" of kinds for evaluation, and questions about them."""
    rng = random.Random(f"own documents {what} {seed}")
    if what == "notes":
        from hypernet.data.notes import Notes

        source = Notes("test", seed=seed, num_unanswerable=(0, 0))
        records = [source.record(number) for number in range(cfg.documents // 2)]
        found = [(record.document, [(q.text, [q.answer]) for q in record.questions]) for record in records]
    else:
        from benchmarks.real_text import read_squad

        found = [(text, asked) for text, asked in read_squad(cfg.paragraphs_file) if asked]
        found = rng.sample(found, min(cfg.documents, len(found)))
    asked = [
        Asked(number, question, answers)
        for number, (_, questions) in enumerate(found)
        for question, answers in rng.sample(questions, min(cfg.questions_per_document, len(questions)))
    ]
    return [text for text, _ in found], asked


class Asking:
    """Answers of one model in batches, with a progress bar."""

    def __init__(self, model: Any, cfg: "OwnDocumentsSettings") -> None:
        self.model, self.cfg = model, cfg

    def __call__(
        self, label: str, asked: Sequence[tuple[str, Any, str | None]], *, join: str | None = None
    ) -> list[str]:
        """As `answer_all`; join as of `DocToLoRA.generate`."""
        from benchmarks.tiny_figures import answer_all

        settings = {"join": join, "max_new_tokens": self.cfg.max_new_tokens}
        return answer_all(self.model, asked, questions_per_batch=self.cfg.questions_per_batch, label=label, **settings)


def scored(answer: str, answers: Sequence[str]) -> dict[str, float]:
    from benchmarks.measuring.metrics import contains, token_f1

    return {"contains": contains(answer, answers), "f1": token_f1(answer, answers)}


def best_wording(ask: Asking) -> tuple[str, dict[str, float]]:
    """The wording whose answers contain the most, with the document in the prompt, and each one's share."""
    from benchmarks.real_text import read_squad

    rng = random.Random("own documents wording")
    found = rng.sample([(text, asked) for text, asked in read_squad(ask.cfg.wording_file) if asked], 40)
    asked = [(text, *rng.choice(questions)) for text, questions in found]
    shares = {}
    for wording in WORDINGS:
        answers = ask("wording", [(question + wording, None, text) for text, question, _ in asked])
        scores = [scored(answer, truth)["contains"] for answer, (_, _, truth) in zip(answers, asked, strict=True)]
        shares[wording] = statistics.mean(scores)
    return max(WORDINGS, key=lambda wording: shares[wording]), shares


@contextmanager
def untrained(model: Any) -> Iterator[None]:
    """The hypernetwork as it was before the first step, with the statistics that it was calibrated with: the closed
    form. Of adapters made inside, every question takes the chunk that fits best."""
    from hypernet.model.hypernetwork import HyperNetwork

    network = model.hypernetwork
    trained = {name: value.clone() for name, value in network.state_dict().items()}
    start = HyperNetwork(**network.config)
    calibrated = {name: value for name, value in network.named_buffers() if not name.endswith("min_match")}
    network.load_state_dict({**start.state_dict(), **calibrated})
    try:
        yield
    finally:
        network.load_state_dict(trained)


def with_documents(ask: Asking, what: str, seed: int, wording: str) -> Iterator[dict[str, Any]]:
    """Rows of all methods, a row for each question; of paragraphs also several in one adapter."""
    from hypernet.adapters.composition import select_chunks

    model = ask.model
    documents, asked = drawn(ask.cfg, what, seed)
    adapters = [model.internalize(text) for text in documents]

    def oracle(one: Asked) -> Any:
        adapter, text = adapters[one.document], documents[one.document].lower()
        starts = [place for answer in one.answers if (place := text.find(answer.lower())) >= 0] or [0]
        ends = [end for _, end in adapter.provenance["documents"][0]["chunks"]]
        return select_chunks(adapter, [next((n for n, end in enumerate(ends) if starts[0] < end), len(ends) - 1)])

    given = {
        "no_context": [(one.question, None, None) for one in asked],
        "other_document": [(one.question, adapters[(one.document + 1) % len(adapters)], None) for one in asked],
        "adapter": [(one.question, adapters[one.document], None) for one in asked],
        "oracle": [(one.question, oracle(one), None) for one in asked],
        "in_prompt": [(one.question + wording, None, documents[one.document]) for one in asked],
    }
    with untrained(model):
        plain = [model.internalize(text) for text in documents]
    sets = {what: given}
    for count in ask.cfg.joined if what == "paragraphs" else ():
        groups = [range(start, min(start + count, len(documents))) for start in range(0, len(documents), count)]
        groups = [group for group in groups if len(group) == count]
        joined = {number: index for index, group in enumerate(groups) for number in group}
        together = [model.internalize([documents[number] for number in group]) for group in groups]
        sets[f"{count} paragraphs"] = {
            "adapter": [(one.question, together[joined[one.document]], None) for one in asked if one.document in joined]
        }
    given["closed_form"] = [(one.question, plain[one.document], None) for one in asked]
    for name, methods in sets.items():
        of_set = (
            asked
            if name == what
            else [one for one in asked if one.document < len(documents) // int(name.split()[0]) * int(name.split()[0])]
        )
        for method, questions in methods.items():
            # The oracle's one chunk is used however close it is.
            join = "sum" if method == "oracle" else None
            with untrained(model) if method == "closed_form" else nullcontext():
                answers = ask(f"{name}, {method}", questions, join=join)
            yield from (_row(name, method, seed, one, answer) for one, answer in zip(of_set, answers, strict=True))


def _row(name: str, method: str, seed: int, one: Asked, answer: str) -> dict[str, Any]:
    return {
        "set": name,
        "method": method,
        "seed": seed,
        "document": one.document,
        "question": one.question,
        "answers": one.answers[:2],
        "prediction": answer,
        **scored(answer, one.answers),
    }


def by_length(ask: Asking, seed: int) -> Iterator[dict[str, Any]]:
    """Questions about the first paragraph of articles, of which the first one, two or four are one document."""
    from benchmarks.real_text import read_articles

    rng = random.Random(f"own documents length {seed}")
    articles = [article for article in read_articles(ask.cfg.paragraphs_file) if len(article) >= max(ask.cfg.lengths)]
    drawn = rng.sample(articles, min(ask.cfg.articles, len(articles)))
    asked = [
        Asked(number, question, answers)
        for number, article in enumerate(drawn)
        for question, answers in rng.sample(article[0][1], min(ask.cfg.questions_per_document, len(article[0][1])))
    ]
    for length in ask.cfg.lengths:
        texts = ["\n\n".join(text for text, _ in article[:length]) for article in drawn]
        adapters = [ask.model.internalize(text) for text in texts]
        name = f"article's first {length}"
        answers = ask(name, [(one.question, adapters[one.document], None) for one in asked])
        chunks = [adapter.num_chunks for adapter in adapters]
        for one, answer in zip(asked, answers, strict=True):
            yield {**_row(name, "adapter", seed, one, answer), "chunks": chunks[one.document]}


def left_alone(ask: Asking, seed: int) -> Iterator[dict[str, Any]]:
    """Questions without documents, known or not, each with the adapter of a paragraph: 1 where no chunk is close enough
    and the base model answers as without it. Of a hypernetwork that recites."""
    if ask.model.hypernetwork.recitation is None:
        return
    lines = Path(ask.cfg.known_file).read_text(encoding="utf-8").splitlines()
    rng = random.Random(f"own documents left alone {seed}")
    read = [json.loads(line) for line in rng.sample(lines, min(ask.cfg.known_questions, len(lines)))]
    documents, _ = drawn(ask.cfg, "paragraphs", seed)
    for number, text in enumerate(documents):
        asked = [one["question"] for one in read[number :: len(documents)]]
        if asked:
            scores = ask.model.routing_scores(asked, ask.model.internalize(text))
            for question, row in zip(asked, scores, strict=True):
                alone = float(not row.any())
                yield {"set": "left alone", "seed": seed, "document": number, "question": question, "alone": alone}


def continued(ask: Asking, seed: int) -> Iterator[dict[str, Any]]:
    """Nats for each token of how a text goes on that an adapter of another text costs."""
    lines = Path(ask.cfg.text_file).read_text(encoding="utf-8").splitlines()
    words = [line.split() for line in lines if len(line.split()) >= 2 * _CONTINUED]
    rng = random.Random(f"own documents continued {seed}")
    texts = rng.sample(words, min(ask.cfg.texts, len(words)))
    asked = [" ".join(text[:_CONTINUED]) for text in texts]
    said = [" ".join(text[_CONTINUED : 2 * _CONTINUED]) for text in texts]
    documents, _ = drawn(ask.cfg, "paragraphs", seed)
    made = [ask.model.internalize(text) for text in documents[: len(texts)]]
    adapters = [made[number % len(made)] for number in range(len(texts))]
    plain = ask.model.log_likelihoods(asked, said)
    adapted = ask.model.log_likelihoods(asked, said, adapters)
    for number, (p, q) in enumerate(zip(plain, adapted, strict=True)):
        tokens = len(ask.model.tokenizer(said[number])["input_ids"])
        yield {"set": "continued", "seed": seed, "document": number, "log_prob_lost": (p - q) / tokens}


def said(ask: Asking, what: str, seed: int) -> Iterator[dict[str, Any]]:
    """Each chunk of each document, chosen by truth, behind a question about any of them: 1 where the answer is its
    text, word for word. Of a hypernetwork that recites."""
    from hypernet.adapters.composition import select_chunks

    if ask.model.hypernetwork.recitation is None:
        return
    documents, asked = drawn(ask.cfg, what, seed)
    rng = random.Random(f"own documents said {what} {seed}")
    given, wanted = [], []
    for number, text in enumerate(documents):
        adapter = ask.model.internalize(text)
        questions = [one.question for one in asked if one.document == number]
        for chunk, (start, end) in enumerate(adapter.provenance["documents"][0]["chunks"]):
            given.append((rng.choice(questions), select_chunks(adapter, [chunk]), None))
            wanted.append((number, text[start:end].split()))
    answers = ask(f"{what} said", given, join="sum")
    for answer, (question, _, _), (number, words) in zip(answers, given, wanted, strict=True):
        whole = float(answer.split() == words)
        yield {"set": f"{what} said", "seed": seed, "document": number, "question": question, "whole": whole}


def unrelated(ask: Asking, seed: int) -> Iterator[dict[str, Any]]:
    """Questions that the base model answers without a document, asked with the adapter of a paragraph."""
    lines = Path(ask.cfg.known_file).read_text(encoding="utf-8").splitlines()
    rng = random.Random(f"own documents known {seed}")
    read = [json.loads(line) for line in rng.sample(lines, min(ask.cfg.known_questions, len(lines)))]
    answers = ask("known", [(one["question"], None, None) for one in read])
    found = [one for one, a in zip(read, answers, strict=True) if scored(a, one["answer"])["contains"]]
    # Once more, in the batches of those with an adapter: in bfloat16 an answer depends on what else is in its batch.
    known = list(zip(found, ask("unrelated, alone", [(one["question"], None, None) for one in found]), strict=True))
    documents, _ = drawn(ask.cfg, "paragraphs", seed)
    adapters = [ask.model.internalize(text) for text in documents[: len(known)]]
    given = [(one["question"], adapters[number % len(adapters)], None) for number, (one, _) in enumerate(known)]
    kept = ask("unrelated", given)
    plain = ask.model.log_likelihoods([q for q, _, _ in given], [a for _, a in known]) if known else []
    adapted = (
        ask.model.log_likelihoods([q for q, _, _ in given], [a for _, a in known], [x for _, x, _ in given])
        if known
        else []
    )
    for (one, before), after, p, q in zip(known, kept, plain, adapted, strict=True):
        tokens = max(1, len(ask.model.tokenizer(before)["input_ids"]))
        for method, answer, nats in (("no_context", before, 0.0), ("adapter", after, (p - q) / tokens)):
            yield {
                "set": "unrelated",
                "method": method,
                "seed": seed,
                "question": one["question"],
                "answers": one["answer"][:2],
                "prediction": answer,
                "log_prob_lost": nats,
                **scored(answer, one["answer"]),
            }


def conflicts(ask: Asking, seed: int, wording: str) -> Iterator[dict[str, Any]]:
    """Passages that say otherwise than what is true: whether the answer is the passage's."""
    lines = Path(ask.cfg.conflict_file).read_text(encoding="utf-8").splitlines()
    rng = random.Random(f"own documents conflicts {seed}")
    read = [json.loads(line) for line in rng.sample(lines, min(ask.cfg.conflicts, len(lines)))]
    passages = [one["fake_passages"][0]["passage"] for one in read]
    adapters = [ask.model.internalize(text) for text in passages]
    given = {
        "no_context": [(one["cleaned_question"], None, None) for one in read],
        "adapter": [(one["cleaned_question"], a, None) for one, a in zip(read, adapters, strict=True)],
        "in_prompt": [
            (one["cleaned_question"] + wording, None, text) for one, text in zip(read, passages, strict=True)
        ],
    }
    for method, asked in given.items():
        for one, answer in zip(read, ask(f"conflicts, {method}", asked), strict=True):
            yield {
                "set": "conflicts",
                "method": method,
                "seed": seed,
                "question": one["cleaned_question"],
                "answers": [one["fake_short_answer"]],
                "prediction": answer,
                "true_answer": scored(answer, [one["real_short_answer"]])["contains"],
                **scored(answer, [one["fake_short_answer"]]),
            }


def seconds(ask: Asking, load_s: float) -> dict[str, Any]:
    """A page of two: document to adapter, a warm question with it and without, per token."""
    from benchmarks.real_text import read_squad

    model, text = ask.model, ""
    for paragraph, _ in read_squad(ask.cfg.paragraphs_file):
        if len(model.tokenizer(text + paragraph, verbose=False)["input_ids"]) > _PAGE_TOKENS:
            break
        text += paragraph + "\n\n"
    made = []
    for _ in range(3):
        started = time.perf_counter()
        adapter = model.internalize(text)
        made.append(time.perf_counter() - started)
    per_token: dict[str, list[float]] = {"adapter": [], "no_context": []}
    for _ in range(5):
        for method, given in (("adapter", adapter), ("no_context", None)):
            started = time.perf_counter()
            (answer,) = model.generate(["What does the text say about it?"], given, max_new_tokens=32)
            tokens = 1 + len(model.tokenizer(answer)["input_ids"])
            per_token[method].append((time.perf_counter() - started) / tokens)
    return {
        "set": "seconds",
        "tokens": len(model.tokenizer(text, verbose=False)["input_ids"]),
        "chunks": adapter.num_chunks,
        "load_s": load_s,
        "internalize_s": statistics.median(made),
        "adapter_token_s": statistics.median(per_token["adapter"]),
        "no_context_token_s": statistics.median(per_token["no_context"]),
    }


def without_texts(row: dict[str, Any]) -> dict[str, Any]:
    """The row without question, answers and prediction, which hold the datasets' texts; a hash tells the question."""
    kept = {name: value for name, value in row.items() if name not in ("question", "answers", "prediction")}
    if "question" in row:
        kept["question"] = hashlib.sha256(row["question"].encode()).hexdigest()[:12]
    return kept


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Sets and methods down: questions, share that contains the answer, F1, each with its seeds' lowest and highest."""
    lines = ["| set | method | questions | contains | lowest | highest | F1 |", "|" + " --- |" * 2 + " ---: |" * 5]
    places = dict.fromkeys((row["set"], row["method"]) for row in rows if "method" in row)
    for name, method in places:
        own = [row for row in rows if row["set"] == name and row.get("method") == method]
        by_seed = [statistics.mean(r["contains"] for r in own if r["seed"] == s) for s in {r["seed"] for r in own}]
        lines.append(
            f"| {name} | {method.replace('_', ' ')} | {len(own)} | {statistics.mean(r['contains'] for r in own):.3f} | "
            f"{min(by_seed):.3f} | {max(by_seed):.3f} | {statistics.mean(r['f1'] for r in own):.3f} |"
        )
    return "\n".join(lines)


class OwnDocumentsSettings(Settings):
    checkpoint: Text
    seeds: list[int]
    documents: Count
    questions_per_document: Count
    joined: list[int]
    lengths: list[int]
    articles: Count
    paragraphs_file: Text
    wording_file: Text
    known_file: Text
    conflict_file: Text
    text_file: Text
    known_questions: Count
    texts: Count
    conflicts: Count
    questions_per_batch: Count
    max_new_tokens: Count
    with_texts: bool
    output: OutputFile | None


SCRIPT = Script("benchmarks.own_documents", OwnDocumentsSettings)


@hydra.main(config_path="../conf", config_name="own_documents", version_base="1.3")
@SCRIPT
def main(cfg: OwnDocumentsSettings) -> None:
    from benchmarks.measuring.rows import describe_run, write_rows
    from benchmarks.real_text import read_squad
    from hypernet.doc_to_lora import DocToLoRA

    for path in (cfg.paragraphs_file, cfg.wording_file):
        read_squad(path)  # before the model is loaded
    for path in (cfg.known_file, cfg.conflict_file, cfg.text_file):
        if not Path(path).is_file():
            raise ValueError(f"{path} is missing. Set known_file, conflict_file and text_file to files of that kind.")
    started = time.perf_counter()
    ask = Asking(DocToLoRA.from_pretrained(cfg.checkpoint), cfg)
    rows = [seconds(ask, time.perf_counter() - started)]
    wording, shares = best_wording(ask)
    rows.append({"set": "wording", "best": wording, "contains": shares})
    for seed in cfg.seeds:
        for what in ("paragraphs", "notes"):
            rows += with_documents(ask, what, seed, wording)
            rows += said(ask, what, seed)
        rows += by_length(ask, seed)
        rows += unrelated(ask, seed)
        rows += left_alone(ask, seed)
        rows += continued(ask, seed)
        rows += conflicts(ask, seed, wording)
        if cfg.output:  # what is done stays
            written = rows if cfg.with_texts else list(map(without_texts, rows))
            write_rows(cfg.output, written, run=describe_run(cfg.model_dump()), in_each=False)
        print(markdown(rows), flush=True)


if __name__ == "__main__":
    SCRIPT.run(main, Path(__file__).parents[1] / "conf/own_documents.yaml")
