"""study: reads texts, has questions about them written and answered, and stores both in shards."""

import hashlib
import json
import logging
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from transformers import PreTrainedTokenizerBase

from hypernet.data.self_study.engines import Engine, load_engine
from hypernet.data.self_study.settings import StudySettings
from hypernet.data.self_study.shards import check_same, tokenizer_fingerprint, write_shard
from hypernet.data.sources import CorruptRows, TooManyCorruptRows
from hypernet.io.hub import hub_asked_once
from hypernet.text.chunking import chunk_document
from hypernet.text.documents import Document, read_documents

log = logging.getLogger(__name__)
T = TypeVar("T")

SHARD_FORMAT_VERSION = 1

# Said after a text; each question of a text is asked for in the next of these ways.
QUESTION_PROMPTS = (
    "Write one question that the text above answers. Give only the question.",
    "Which detail of the text above, such as a name, a number or a date, could one ask for? Give only the question.",
    "Write one question whose answer needs two different statements of the text above. Give only the question.",
    "Write one question about a reason or a consequence that the text above explains. Give only the question.",
    "Write one request to sum up a part of the text above, naming what it is about. Give only the request.",
)


class Passage(NamedTuple):
    """A chunk of a document: what is studied at once."""

    document: Document
    span: tuple[int, int]
    num_tokens: int

    @property
    def text(self) -> str:
        return self.document.text[slice(*self.span)].strip()


def study(settings: StudySettings, *, answerer: Engine | None = None, asker: Engine | None = None) -> list[Path]:
    """Makes the shards of this process that are missing.

    Args:
        answerer, asker: models that are loaded already; None loads those of the settings.

    Returns:
        The shards made now.

    Raises:
        ValueError: nothing to study, or a shard in output_dir was made with other settings.
    """
    folder = Path(settings.output_dir)
    answerer = answerer or load_engine(settings.base_model, settings)
    if asker is None:
        asker = load_engine(settings.questions_by, settings) if settings.questions_by else answerer
    provenance = {
        "format_version": SHARD_FORMAT_VERSION,
        "settings": settings.described(),
        "base_model_fingerprint": answerer.fingerprint,
        "questions_by_fingerprint": asker.fingerprint,
        "tokenizer_fingerprint": tokenizer_fingerprint(answerer.tokenizer),
        "prompts": QUESTION_PROMPTS,
    }
    provenance = json.loads(json.dumps(provenance))  # as it will be read again
    folder.mkdir(parents=True, exist_ok=True)
    made, number = [], -1
    for number, passages in enumerate(_in_groups(_passages(settings, answerer.tokenizer), settings.chunks_per_shard)):
        if number % settings.num_processes != settings.process_index:
            continue
        path = folder / f"shard-{number:05d}.parquet"
        if path.exists():
            check_same(path, provenance)
            continue
        sources = {passage.document.name: passage.document.sha256 for passage in passages}
        rows = list(_study_passages(settings, passages, answerer, asker, seed=_seed(settings.seed, number)))
        write_shard(path, rows, {**provenance, "sources": sources})
        log.info("%s: %d answers about %d chunks", path, len(rows), len(passages))
        made.append(path)
    if number < 0:
        raise ValueError("There is nothing to study: the dataset gave no text.")
    return made


def _in_groups(items: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    iterator = iter(items)
    while group := tuple(islice(iterator, size)):
        yield group


def _seed(*key: int | str) -> int:
    return zlib.crc32("/".join(map(str, key)).encode())


def _passages(settings: StudySettings, tokenizer: PreTrainedTokenizerBase) -> Iterator[Passage]:
    for document in _documents(settings):
        chunks = chunk_document(document.text, tokenizer, max_chunk_tokens=settings.max_chunk_tokens, add_affixes=False)
        for span, mask in zip(chunks.spans, chunks.mask, strict=True):
            if document.text[slice(*span)].strip():
                yield Passage(document, span, int(mask.sum()))


def _documents(settings: StudySettings) -> Iterator[Document]:
    if settings.documents:
        found: Iterator[Document] = iter(read_documents(settings.documents))
    else:
        found = _streamed(settings)
    yield from islice(found, settings.max_documents or None)


def _streamed(settings: StudySettings) -> Iterator[Document]:
    from datasets import load_dataset  # takes a second

    try:
        with hub_asked_once(settings.dataset):
            rows = load_dataset(
                settings.dataset, settings.dataset_config or None, split=settings.dataset_split, streaming=True
            )
        corrupt = CorruptRows(settings.dataset, settings.max_corrupt_rows)
        for number, row in enumerate(rows):
            text = row[settings.dataset_column]
            if not isinstance(text, str):
                corrupt.skip(f"Row {number} has {text!r:.60} as {settings.dataset_column}, not a text.")
            elif text.strip():
                sha256 = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
                yield Document(f"{settings.dataset}/{number}", text, sha256)
    except TooManyCorruptRows:
        raise
    except Exception as error:  # no network, no such dataset or column: datasets raises a dozen types for these
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(
            f"Could not read {settings.dataset}: {reason}. Check the name, dataset_column and the network."
        ) from error


def _study_passages(
    settings: StudySettings, passages: Sequence[Passage], answerer: Engine, asker: Engine, *, seed: int
) -> Iterator[dict[str, Any]]:
    """Rows of a shard; everything is written together, which is what batches are for."""
    ways = [QUESTION_PROMPTS[i % len(QUESTION_PROMPTS)] for i in range(settings.questions_per_chunk)]
    written = asker.write(
        asker.layout.prompt_ids(
            asker.tokenizer, ways * len(passages), [passage.text for passage in passages for _ in ways]
        ),
        max_new_tokens=settings.max_question_tokens,
        temperature=settings.question_temperature,
        seed=seed,
    )
    texts = map(asker.text, written)
    questions = [list(dict.fromkeys(filter(None, (clean_question(next(texts)) for _ in ways)))) for _ in passages]
    answers = iter(
        answerer.write(
            answerer.layout.prompt_ids(
                answerer.tokenizer,
                [question for asked in questions for question in asked],
                [passage.text for passage, asked in zip(passages, questions, strict=True) for _ in asked],
            ),
            max_new_tokens=settings.max_answer_tokens,
            temperature=settings.answer_temperature,
            seed=_seed(seed, "answers"),
        )
    )
    for number, (passage, asked) in enumerate(zip(passages, questions, strict=True)):
        pairs = [(question, ids) for question in asked if (ids := next(answers))]
        if not pairs:
            continue
        for (question, ids), stored in zip(pairs, answerer.top_k(passage.text, pairs, settings.top_k), strict=True):
            yield {
                "passage": number,
                "document": passage.text,
                "source": passage.document.name,
                "source_sha256": passage.document.sha256,
                "start": passage.span[0],
                "end": passage.span[1],
                "num_tokens": passage.num_tokens,
                "question": question,
                "answer": answerer.text(ids),
                "answer_ids": list(ids),
                "top_indices": stored.indices.ravel().tolist(),
                "top_log_probs": stored.log_probs.ravel().tolist(),
            }


def clean_question(text: str) -> str:
    """The first line that says something, without a list's number and quotation marks."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line.lstrip("0123456789.)-*# ").strip("\"'“” ")
