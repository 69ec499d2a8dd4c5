"""Corpus: documents of files, folders, tables and datasets, one after the other; none is read before it is asked for.

corpus = Corpus(["notes/", "rows.parquet", "hub:owner/name"], column="text")
corpus.count()                               # 1200, or None where only the end of a stream would tell
for item in corpus.items():
    document = item.document(item.data())    # name, cleaned text, SHA-256
"""

import codecs
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from hypernet.io.hub import hub_asked_once
from hypernet.text.cleaning import whole
from hypernet.text.documents import SUFFIXES, Document, document_of, files_below, read_bytes

if TYPE_CHECKING:
    from datasets import Dataset

HUB = "hub:"
TABLE_SUFFIXES = (".parquet", ".jsonl")
_ROWS_AT_ONCE = 256  # of a parquet file


class _Unreadable(ValueError):
    """A table or dataset that is damaged, or that may not be read."""


class Item(NamedTuple):
    """A document that is not read yet: a file, or the text of a row."""

    name: str
    path: str = ""
    """Of the file, absolute; "": it is a row."""
    text: str = ""
    problem: str = ""
    """Why the row has no text; "": it has."""

    def data(self) -> bytes:
        """What the document's SHA-256 is of: the file's bytes, or the row's text in UTF-8.

        Raises:
            ValueError: it cannot be read, or the row has no text.
        """
        if self.problem:
            raise ValueError(self.problem)
        return read_bytes(self.path) if self.path else self.text.encode(errors="surrogatepass")

    def document(self, data: bytes) -> Document:
        """Raises ValueError: as `read_document`."""
        return document_of(self.name, data, source=self.path or self.name)


@dataclass(frozen=True)
class Corpus:
    """Where documents come from.

    Args:
        sources: each a file; a folder, with what is below it; a .parquet or .jsonl file, a document a row; a dataset
            that `datasets` has saved to a folder; or hub:OWNER/NAME, hub:OWNER/NAME/CONFIGURATION, which is streamed.
        column: of rows, with the text.
        split: of datasets.
    """

    sources: Sequence[str]
    column: str = "text"
    split: str = "train"

    def count(self) -> int | None:
        """The documents altogether; None with a dataset on the hub, whose length only its end tells.

        What cannot be read counts as one: `items` gives its problem.

        Raises:
            ValueError: sources are not there, hold no document, or have no such column or split; it names all of them.
        """
        if not self.sources:
            raise ValueError("No documents given. Name a file, a folder, or hub:OWNER/NAME.")
        counts, problems = list[int | None](), list[str]()
        for source in self.sources:
            try:
                counts.append(self._count(source))
            except ValueError as error:
                problems.append(str(error))
        if problems:
            raise ValueError(" ".join(problems))
        if not any(count is None or count for count in counts):
            raise ValueError(f"No row in {', '.join(self.sources)}. Name a source with documents.")
        return None if None in counts else sum(count for count in counts if count is not None)

    def items(self) -> Iterator[Item]:
        """All documents in order. Where the rest of a source cannot be read, its last item has that as its problem."""
        for source in self.sources:
            try:
                yield from self._items(source)
            except ValueError as error:
                yield Item(source, problem=str(error))

    def anywhere(self) -> "Corpus":
        """With absolute paths, for processes in other directories."""
        paths = [s if s.startswith(HUB) else os.path.abspath(os.path.expanduser(s)) for s in self.sources]
        return replace(self, sources=paths)

    def _count(self, source: str) -> int | None:
        if source.startswith(HUB):
            return None
        path = Path(source).expanduser()
        if not path.exists():
            raise ValueError(
                f"There is no file or folder {source}. Check the path; a dataset on the hub is hub:OWNER/NAME."
            )
        if not _is_saved_dataset(path) and path.is_dir():
            return sum(self._count_rows(file) for file in files_below(path, suffixes=SUFFIXES + TABLE_SUFFIXES))
        return self._count_rows(path)

    def _count_rows(self, path: Path) -> int:
        try:
            if path.is_dir():
                return len(self._saved(path))
            match path.suffix.lower():
                case ".parquet":
                    with _table(path):
                        return int(self._parquet(path).metadata.num_rows)
                case ".jsonl":
                    with _table(path):
                        return self._count_lines(path)
        except _Unreadable:
            pass
        return 1

    def _count_lines(self, path: Path) -> int:
        number = 0
        first: Any = None
        for line in _lines(path):
            number += 1
            if first is None:
                with suppress(ValueError):  # such a row fails alone
                    first = json.loads(line.decode())
        if first is not None and not (isinstance(first, dict) and self.column in first):
            self._refuse_column(path, list(first) if isinstance(first, dict) else [])
        return number

    def _items(self, source: str) -> Iterator[Item]:
        if source.startswith(HUB):
            yield from self._streamed(source.removeprefix(HUB))
            return
        path = Path(source).expanduser()
        if _is_saved_dataset(path):
            for number, row in enumerate(self._saved(path).select_columns([self.column])):
                yield self._row(f"{path.name}/{number}", row)
        elif path.is_dir():
            for file in files_below(path, suffixes=SUFFIXES + TABLE_SUFFIXES):
                name = file.relative_to(path).as_posix()
                try:
                    yield from self._in_file(file, name)
                except ValueError as error:
                    yield Item(name, problem=str(error))
        else:
            yield from self._in_file(path, path.name)

    def _in_file(self, path: Path, name: str) -> Iterator[Item]:
        match path.suffix.lower():
            case ".parquet":
                with _table(path):
                    batches = self._parquet(path).iter_batches(batch_size=_ROWS_AT_ONCE, columns=[self.column])
                    rows = (row for batch in batches for row in batch.to_pylist())
                    yield from (self._row(f"{name}/{number}", row) for number, row in enumerate(rows))
            case ".jsonl":
                with _table(path):
                    for number, line in enumerate(_lines(path)):
                        try:
                            row = json.loads(line.decode())
                        except ValueError as error:
                            yield Item(f"{name}/{number}", problem=f"Row {number} of {path} is no JSON ({error}).")
                        else:
                            yield self._row(f"{name}/{number}", row)
            case _:
                yield Item(name, path=os.fspath(path.absolute()))

    def _row(self, name: str, row: Any) -> Item:
        text = row.get(self.column) if isinstance(row, dict) else None
        if isinstance(text, str):
            return Item(name, text=whole(text, name))  # JSON can spell halves of characters; Arrow holds none
        return Item(name, problem=f"It has {text!r:.60} as {self.column}, not a text. See --column.")

    def _parquet(self, path: Path) -> Any:
        from pyarrow.parquet import ParquetFile

        file = ParquetFile(path)
        if self.column not in file.schema_arrow.names:
            self._refuse_column(path, file.schema_arrow.names)
        return file

    def _saved(self, path: Path) -> "Dataset":
        from datasets import DatasetDict, load_from_disk  # takes a second

        with _table(path):
            found = load_from_disk(os.fspath(path))
        if isinstance(found, DatasetDict):
            if self.split not in found:
                raise ValueError(f"{path} has no split {self.split!r}, but {', '.join(found)}. Set --split.")
            found = found[self.split]
        if self.column not in found.column_names:
            self._refuse_column(path, found.column_names)
        return found

    def _streamed(self, name: str) -> Iterator[Item]:
        from datasets import load_dataset  # takes a second

        owner, _, rest = name.partition("/")
        repository, _, configuration = rest.partition("/")
        source = f"{owner}/{repository}" if rest else owner
        try:
            with hub_asked_once(source):
                rows = load_dataset(source, configuration or None, split=self.split, streaming=True)
            for number, row in enumerate(rows):
                yield self._row(f"{name}/{number}", row)
        except Exception as error:  # no network, no such dataset or split: datasets raises a dozen types for these
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise ValueError(
                f"Could not read {HUB}{name}: {reason}. Check the name, --split and the network."
            ) from error

    def _refuse_column(self, path: Path, columns: Sequence[str]) -> NoReturn:
        others = f"but {', '.join(columns)}" if columns else "nor any other"
        raise ValueError(f"{path} has no column {self.column!r}, {others}. Set --column.")


def _is_saved_dataset(path: Path) -> bool:
    one = (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    return one or (path / "dataset_dict.json").is_file()


def _lines(path: Path) -> Iterator[bytes]:
    """Those that are not blank, without a byte order mark."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines):
            if line := (line.removeprefix(codecs.BOM_UTF8) if number == 0 else line).strip():
                yield line


@contextmanager
def _table(path: Path) -> Iterator[None]:
    """What pyarrow, json and datasets raise on a damaged file, in one line."""
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError, ValueError, KeyError) as error:
        if isinstance(error, ValueError) and str(path) in str(error):  # ours
            raise
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise _Unreadable(f"Cannot read {path}: {reason}. Check the file.") from error
