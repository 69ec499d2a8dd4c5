"""study: reads texts, has questions about them written and answered, and stores both in shards."""

import hashlib
import json
import logging
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from transformers import PreTrainedTokenizerBase

from hypernet.data.qa import accepted_answers
from hypernet.data.records import UNKNOWN
from hypernet.data.self_study.engines import Engine, load_engine
from hypernet.data.self_study.settings import StudySettings
from hypernet.data.self_study.shards import STORED_KINDS, check_same, tokenizer_fingerprint, write_shard
from hypernet.data.sources import CorruptRows, TooManyCorruptRows, count_tokens
from hypernet.io.hub import hub_asked_once
from hypernet.text.chunking import chunk_document
from hypernet.text.documents import Document, read_documents

log = logging.getLogger(__name__)
T = TypeVar("T")

SHARD_FORMAT_VERSION = 2

# Said after a text; each question of a text is asked for in the next of these ways.
QUESTION_PROMPTS = (
    "Write one question that the text above answers. Give only the question.",
    "Which detail of the text above, such as a name, a number or a date, could one ask for? Give only the question.",
    "Write one question whose answer needs two different statements of the text above. Give only the question.",
    "Write one question about a reason or a consequence that the text above explains. Give only the question.",
    "Write one request to sum up a part of the text above, naming what it is about. Give only the request.",
)


class Passage(NamedTuple):
    """A chunk of a document: what is studied at once.

    asked: the questions that came with it, and the answers that are right; None: they are written.
    """

    document: Document
    span: tuple[int, int]
    num_tokens: int
    asked: Mapping[str, tuple[str, ...]] | None = None

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
        folder.mkdir(parents=True, exist_ok=True)
        write_shard(path, rows, {**provenance, "sources": sources})
        given = sum(len(passage.asked or ()) for passage in passages)
        of = f" to {given} questions" if given else ""
        log.info("%s: %d answers%s about %d chunks", path, len(rows), of, len(passages))
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
    if settings.questions:
        yield from _with_questions(settings, tokenizer)
        return
    for document in _documents(settings):
        chunks = chunk_document(document.text, tokenizer, max_chunk_tokens=settings.max_chunk_tokens, add_affixes=False)
        for span, mask in zip(chunks.spans, chunks.mask, strict=True):
            if document.text[slice(*span)].strip():
                yield Passage(document, span, int(mask.sum()))


def _with_questions(settings: StudySettings, tokenizer: PreTrainedTokenizerBase) -> Iterator[Passage]:
    """Texts that are one chunk, with what the file asks about them."""
    path = Path(settings.questions)
    name = None if path.suffix.lower() == ".json" else "squad_v2"
    found = accepted_answers(name, path=path)
    sizes = count_tokens(list(found), tokenizer)
    fit = [(text, size) for text, size in zip(found, sizes, strict=True) if size <= settings.max_chunk_tokens]
    if len(fit) < len(found):
        log.info("%s: %d of %d texts are too long, see --max-chunk-tokens", path, len(found) - len(fit), len(found))
    for number, (text, size) in enumerate(fit[: settings.max_documents or None]):
        document = Document(f"{path.name}/{number}", text, hashlib.sha256(text.encode()).hexdigest())
        yield Passage(document, (0, len(text)), size, found[text])


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
    """Rows of a shard; everything is written together, which is what batches are for.

    A file's question that has no answer is answered without the text; other answers should hold the file's.
    """
    questions = (
        [list(passage.asked or ()) for passage in passages]
        if settings.questions
        else _written_questions(settings, passages, asker, seed=seed)
    )
    asked = [(passage, question) for passage, of in zip(passages, questions, strict=True) for question in of]
    written = answerer.write(
        answerer.layout.prompt_ids(
            answerer.tokenizer,
            [question for _, question in asked],
            [None if _is_unanswerable(passage, question) else passage.text for passage, question in asked],
        ),
        max_new_tokens=settings.max_answer_tokens,
        temperature=settings.answer_temperature,
        seed=_seed(seed, "answers"),
    )
    answers = iter(written)
    for number, (passage, of) in enumerate(zip(passages, questions, strict=True)):
        pairs = [(question, ids) for question in of if (ids := next(answers))]
        if settings.kept_answers == "right":
            pairs = [(question, ids) for question, ids in pairs if _is_right(passage, question, answerer.text(ids))]
        for kind in STORED_KINDS:
            of_kind = [pair for pair in pairs if _is_unanswerable(passage, pair[0]) == (kind == "unanswerable")]
            if not of_kind:
                continue
            text = None if kind == "unanswerable" else passage.text
            stored = answerer.top_k(text, of_kind, settings.top_k)
            for (question, ids), best in zip(of_kind, stored, strict=True):
                yield {
                    "passage": number,
                    "document": passage.text,
                    "source": passage.document.name,
                    "source_sha256": passage.document.sha256,
                    "start": passage.span[0],
                    "end": passage.span[1],
                    "num_tokens": passage.num_tokens,
                    "question": question,
                    "kind": kind,
                    "answer": answerer.text(ids),
                    "answer_ids": list(ids),
                    "top_indices": best.indices.ravel().tolist(),
                    "top_log_probs": best.log_probs.ravel().tolist(),
                }


def _written_questions(
    settings: StudySettings, passages: Sequence[Passage], asker: Engine, *, seed: int
) -> list[list[str]]:
    """The different ones that `asker` writes about each passage."""
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
    return [list(dict.fromkeys(filter(None, (clean_question(next(texts)) for _ in ways)))) for _ in passages]


def _is_unanswerable(passage: Passage, question: str) -> bool:
    return passage.asked is not None and passage.asked[question] == (UNKNOWN,)


def _is_right(passage: Passage, question: str, answer: str) -> bool:
    """Whether the answer holds one that is right, word for word; there is nothing to hold for a written question."""
    if passage.asked is None or _is_unanswerable(passage, question):
        return True
    return any(re.search(rf"(?<!\w){re.escape(r)}(?!\w)", answer, re.IGNORECASE) for r in passage.asked[question])


def clean_question(text: str) -> str:
    """The first line that says something, without a list's number and quotation marks."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line.lstrip("0123456789.)-*# ").strip("\"'“” ")
