"""Question answering datasets as records: from the hub, from files in the same columns, or in SQuAD's own JSON format.

    QuestionAnswering("train", name="squad")                              # from the hub, through `datasets`
    QuestionAnswering("test", name="drop", path="drop.parquet")           # a file with that dataset's columns
    QuestionAnswering("train", path="my_questions.json")                  # SQuAD's format, v1.1 or v2.0

`accepted_answers` gives what a dataset is measured on, with every annotator's answer.

All questions about one document make one record. No two of train, validation and test share a document: a dataset's
own test split is ours, and what stands in it is left out of the others; where there is none, a hash of the document
decides. A row that cannot be used (a damaged line, a missing or empty field) is left out and counted.
"""

import codecs
import json
import logging
import random
import zlib
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from io import TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from transformers import PreTrainedTokenizerBase

from hypernet.data.drawing import Epochs
from hypernet.data.encyclopedia import SPLITS
from hypernet.data.records import UNKNOWN, Question, Record
from hypernet.data.sources import MAX_CORRUPT_ROWS, CorruptRows, count_tokens
from hypernet.io.hub import hub_asked_once

log = logging.getLogger(__name__)

LONG_BENCH = "zip://data/{}.jsonl::hf://datasets/zai-org/LongBench/data.zip"


class Columns(NamedTuple):
    """Where a dataset is and what its columns mean.

    hub: its name there, or data_files: what `datasets` reads as JSON lines.
    document: columns joined by a blank line. question, answers: columns, with a dot before a field of one.
    train, test: names of its splits; a test split's answers must be public. train None: it is for measuring alone.
    several: what several answers are: "alternatives", of which the first is taken, or "parts" of one (in training).
    empty: what no answer means: "unanswerable", or "hidden" (the question is left out).
    """

    hub: str | None
    document: tuple[str, ...]
    question: str
    answers: str
    train: str | None = "train"
    test: str | None = "validation"
    several: str = "alternatives"
    empty: str = "hidden"
    data_files: str | None = None


DATASETS = {
    "squad": Columns("rajpurkar/squad", ("context",), "question", "answers.text"),
    "squad_v2": Columns("rajpurkar/squad_v2", ("context",), "question", "answers.text", empty="unanswerable"),
    # Validation rows hold the answers of several annotators, training rows the spans of one.
    "drop": Columns("ucinlp/drop", ("passage",), "question", "answers_spans.spans", several="parts"),
    "ropes": Columns("allenai/ropes", ("background", "situation"), "question", "answers.text"),
    "pwc": Columns("sggetao/PwC", ("input",), "prompt", "answer", test="test"),
}
# The repository has no loading script any more; its archive holds a file of JSON lines for each task.
DATASETS |= {
    name: Columns(None, ("context",), "input", "answers", train=None, data_files=LONG_BENCH.format(name))
    for name in ("2wikimqa", "multifieldqa_en", "qasper")
}
_SQUAD = DATASETS["squad_v2"]  # what SQuAD's JSON is turned into


class QuestionAnswering:
    """Documents with questions; a `hypernet.data.sources.Source`. Nothing is read before the first record is asked for.

    Args:
        split: "train", "validation" (a tenth of what is trained on) or "test".
        tokenizer: what lengths are counted with; None counts words.
        name: one of `DATASETS`; None: path is in SQuAD's JSON format.
        path: a local file instead of the hub: .json in SQuAD's format, or .jsonl or .parquet in the columns of `name`.
        test_path: the file that the test split is taken from; None: a tenth of path's documents is.
        max_document_tokens: longer documents are left out.
        max_corrupt_rows: rows of a file or dataset that may be left out because they cannot be used.

    Raises:
        ValueError: an unknown name or split, or neither name nor path. When reading: the file or dataset is missing,
            damaged, lacks a column, has more corrupt rows than that, or no document for this split.
    """

    def __init__(
        self,
        split: str = "train",
        *,
        seed: int = 0,
        tokenizer: PreTrainedTokenizerBase | None = None,
        name: str | None = None,
        path: str | Path | None = None,
        test_path: str | Path | None = None,
        max_document_tokens: int | None = None,
        max_corrupt_rows: int = MAX_CORRUPT_ROWS,
    ) -> None:
        if split not in SPLITS[:3]:
            raise ValueError(f"Unknown split {split!r}; choose one of {', '.join(SPLITS[:3])}.")
        if name is not None and name not in DATASETS:
            raise ValueError(f"Unknown dataset {name!r}; choose one of {', '.join(DATASETS)}, or give a path alone.")
        if name is None and path is None:
            raise ValueError("Give the name of a dataset, or the path of a file in SQuAD's JSON format.")
        self.split = split
        self.seed = seed
        self.tokenizer = tokenizer
        self.name = name
        self.path = path
        self.test_path = test_path
        self.max_document_tokens = max_document_tokens
        self.max_corrupt_rows = max_corrupt_rows

    def record(self, index: int) -> Record:
        return self.records[self._order[index]]

    def num_tokens(self, index: int) -> int:
        return self._lengths[self._order[index]]

    def cross_document(self, rng: random.Random, record: Record) -> Question:
        """A question about another document."""
        if len(self.records) == 1:
            raise ValueError(
                f"{self._what} has a single document, so none is asked about another. Set num_cross_document: 0."
            )
        while (other := rng.choice(self.records)).document == record.document:
            pass
        return rng.choice(other.questions)._replace(answer=UNKNOWN, kind="cross_document")

    @cached_property
    def records(self) -> list[Record]:
        """Every document of this split once, in the dataset's order."""
        columns = DATASETS[self.name] if self.name else _SQUAD
        own_test = self.test_path is not None if self.path else columns.test is not None
        if self.path is None and columns.train is None:
            if self.split != "test":
                raise ValueError(f"{self.name} is for measuring alone and has no {self.split} split. Take split test.")
            found = self._read(columns, test=True)
        elif own_test:
            found = self._read(columns, test=True)
            if self.split != "test":
                test, found = found, self._read(columns, test=False)
                found = {document: questions for document, questions in found.items() if document not in test}
                found = {d: q for d, q in found.items() if (_bucket(d) == 1) == (self.split == "validation")}
        else:
            found = self._read(columns, test=False)
            buckets = {0: "test", 1: "validation"}
            found = {d: q for d, q in found.items() if buckets.get(_bucket(d), "train") == self.split}
        records = [Record((document,), tuple(questions)) for document, questions in found.items() if questions]
        if self.max_document_tokens is not None:
            sizes = count_tokens([record.document for record in records], self.tokenizer)
            short = [r for r, size in zip(records, sizes, strict=True) if size <= self.max_document_tokens]
            log.info("%s: %d of %d documents are too long", self._what, len(records) - len(short), len(records))
            records = short
        if not records:
            raise ValueError(
                f"{self._what} has no document for the {self.split} split. Give a larger file, test_path, or a larger "
                "max_document_tokens."
            )
        return records

    @cached_property
    def _lengths(self) -> list[int]:
        return count_tokens([record.document for record in self.records], self.tokenizer)

    @cached_property
    def _order(self) -> Epochs:
        return Epochs(len(self.records), self._what, self.split, self.seed)

    @property
    def _what(self) -> str:
        return str(self.path or self.name)

    def _read(self, columns: Columns, *, test: bool) -> dict[str, list[Question]]:
        """Document → its questions, in the dataset's order."""
        if self.path is None:
            rows = _hub_rows(columns, columns.test if test and columns.train else columns.train or "train")
            source = self.name
        else:
            source = self.test_path if test else self.path
            rows = file_rows(source)
        group = self.name or "squad"
        parts = columns.several == "parts" and not test

        def question(text: str, answers: tuple[str, ...]) -> Question:
            if not answers:
                return Question(text, UNKNOWN, "unanswerable", group)
            return Question(text, ", ".join(answers if parts else answers[:1]), "document", group)

        found = _by_document(rows, columns, CorruptRows(source, self.max_corrupt_rows))
        return {document: [question(*asked) for asked in questions.items()] for document, questions in found.items()}


def accepted_answers(
    name: str | None = None, *, path: str | Path | None = None
) -> dict[str, dict[str, tuple[str, ...]]]:
    """What a dataset is measured on: document → question → all its answers, any of which is right.

    A question that has no answer has `UNKNOWN`; documents without questions are left out.

    Args:
        name: one of `DATASETS`; None: path is in SQuAD's JSON format.
        path: a local file instead of the hub's test split, taken whole.

    Raises:
        ValueError: as `QuestionAnswering`.
    """
    QuestionAnswering("test", name=name, path=path)  # refuses what it does not know
    columns = DATASETS[name] if name else _SQUAD
    rows = file_rows(path) if path is not None else _hub_rows(columns, columns.test if columns.train else "train")
    found = _by_document(rows, columns, CorruptRows(path or name))
    result = {
        document: {text: answers or (UNKNOWN,) for text, answers in questions.items()}
        for document, questions in found.items()
        if questions
    }
    if not result:
        raise ValueError(f"{path or name} holds no question with an answer. Give another file, or the dataset's name.")
    return result


def _by_document(
    rows: Iterable[Mapping[str, Any] | ValueError], columns: Columns, corrupt: CorruptRows
) -> dict[str, dict[str, tuple[str, ...]]]:
    """Document → question → its answers, in the dataset's order; a question that comes twice is taken once.

    An unanswerable one has none; one whose answer is hidden is left out.
    """
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    num_good = 0
    for number, row in enumerate(rows):
        try:
            document, text, answers = _asked(row, columns, corrupt.what, number)
        except ValueError as error:
            corrupt.skip(str(error))
            continue
        num_good += 1
        questions = found.setdefault(document, {})
        if answers or columns.empty == "unanswerable":
            questions.setdefault(text, answers)
    corrupt.report(num_good=num_good)
    return {document: questions for document, questions in found.items() if document}


def _asked(
    row: Mapping[str, Any] | ValueError, columns: Columns, source: Any, number: int
) -> tuple[str, str, tuple[str, ...]]:
    """Document, question and its different answers; ValueError where the row is corrupt, said in a whole sentence."""
    if isinstance(row, ValueError):
        raise row

    def text(value: Any, column: str) -> str:
        if not isinstance(value, str):
            raise ValueError(f"Row {number} has {value!r:.60} as {column}, not a text.")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"Row {number} has half a character in {column}.") from None
        return value.strip()

    document = "\n\n".join(text(_field(row, column, source, number), column) for column in columns.document).strip()
    question = text(_field(row, columns.question, source, number), columns.question)
    if not question:
        raise ValueError(f"Row {number} has no question in {columns.question}.")
    answers = _field(row, columns.answers, source, number)
    if not isinstance(answers, (str, list, tuple, type(None))):
        raise ValueError(f"Row {number} has {answers!r:.60} as {columns.answers}, not one text or several.")
    answers = [answers] if isinstance(answers, str) else list(answers or [])
    return document, question, tuple(dict.fromkeys(text(answer, columns.answers) for answer in answers))


def _bucket(document: str) -> int:
    return zlib.crc32(document.encode()) % 10


def _field(row: Mapping[str, Any], column: str, source: Any, number: int) -> Any:
    value: Any = row
    for name in column.split("."):
        if not isinstance(value, Mapping) or name not in value:
            raise ValueError(
                f"{source} has no column {column} in row {number}; it has {', '.join(row)}. Give `name` the dataset "
                "whose columns these are."
            )
        value = value[name]
    return value


def file_rows(path: str | Path) -> Iterable[Mapping[str, Any] | ValueError]:
    """Rows of a local file: .jsonl and .parquet as they are, .json in SQuAD's format in the columns of squad_v2.

    In place of a row that cannot be read stands the error that says why.

    Raises:
        ValueError: no such file, or it cannot be read as what its suffix says.
    """
    path = Path(path)
    kind = {".json": "squad", ".jsonl": "json", ".parquet": "parquet"}.get(path.suffix.lower())
    if kind is None or not path.is_file():
        reason = "its suffix is none of .json, .jsonl, .parquet" if path.is_file() else "there is no such file"
        raise ValueError(f"Cannot read questions from {path}: {reason}. Check the path.")
    if kind == "squad":
        try:
            return list(_squad_rows(json.loads(path.read_bytes())))  # bytes: with any byte order mark
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is not in SQuAD's JSON format ({type(error).__name__}: {error}): it should hold data → "
                "paragraphs → context and qas. Rows of columns belong into a .jsonl file."
            ) from error
    if kind == "json":
        return _json_lines(path)
    return _load(kind, str(path), data_files=str(path), split="train")


def _json_lines(path: Path) -> Iterator[Mapping[str, Any] | ValueError]:
    """Read here and not by `datasets`, which gives up a file for one damaged line."""
    with path.open("rb") as file:
        for number, line in enumerate(_lines(file)):
            line = line.removeprefix(codecs.BOM_UTF8)  # files put together have one in the middle too
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # also bytes that are no UTF-8
                yield ValueError(f"Line {number + 1} is no JSON ({type(error).__name__}: {error}).")
                continue
            yield row if isinstance(row, dict) else ValueError(f"Line {number + 1} is no JSON object.")


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines in UTF-8 of a file that is in UTF-8, or in UTF-16 or UTF-32 with a byte order mark."""
    start = file.read(4)
    file.seek(0)
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):  # UTF-16's little-endian mark begins UTF-32's
        encoding = "utf-32"
    elif start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    else:
        yield from file
        return
    # Half a character is replaced, as in documents, so that no line after it is lost.
    with TextIOWrapper(file, encoding, errors="replace") as lines:
        for line in lines:
            yield line.encode()


def _squad_rows(content: Any) -> Iterator[dict[str, Any] | ValueError]:
    for article in content["data"]:
        for number, paragraph in enumerate(article["paragraphs"]):
            where = f"Paragraph {number} of {str(article.get('title'))!r:.60}"
            try:
                context, questions = paragraph["context"], list(paragraph["qas"])
            except (KeyError, TypeError) as error:
                yield ValueError(f"{where} lacks context or qas ({type(error).__name__}: {error}).")
                continue
            for asked in questions:
                try:
                    answers = [] if asked.get("is_impossible") else [answer["text"] for answer in asked["answers"]]
                    if answers or asked.get("is_impossible"):
                        yield {"context": context, "question": asked["question"], "answers": {"text": answers}}
                except (AttributeError, KeyError, TypeError) as error:
                    yield ValueError(f"{where} has a damaged question ({type(error).__name__}: {error}).")


def _hub_rows(columns: Columns, split: str) -> Iterable[Mapping[str, Any]]:
    if columns.data_files:
        return _load("json", columns.data_files, data_files=columns.data_files, split="train")
    return _load(columns.hub, columns.hub, split=split)


def _load(loader: str, what: str, **settings: Any) -> Iterable[Mapping[str, Any]]:
    from datasets import load_dataset  # takes a second, and few need it

    try:
        with hub_asked_once(what):
            return load_dataset(loader, **settings)
    except Exception as error:  # no network, no such dataset, a damaged file: datasets raises a dozen types for these
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"Could not read {what}: {reason}. Check the file, or the name and the network.") from error
