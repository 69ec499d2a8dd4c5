"""A few documents that the shipped model reads, and the ids of their adapters from one process."""

from pathlib import Path

import pytest

from hypernet.corpora.corpus import Corpus
from hypernet.corpora.ingest import ingest
from hypernet.corpora.internalizer import Reader
from hypernet.data.encyclopedia import Encyclopedia

TINY = Path(__file__).parents[2] / "assets" / "tiny"
NUM_DOCUMENTS = 13


@pytest.fixture(scope="session")
def texts():
    entries = Encyclopedia("test")
    return [entries.record(i, num_facts=3 + i % 5).document for i in range(NUM_DOCUMENTS)]


@pytest.fixture(scope="session")
def folder(texts, tmp_path_factory):
    """Each text in a file, half of them below."""
    folder = tmp_path_factory.mktemp("documents")
    (folder / "below").mkdir()
    for number, text in enumerate(texts):
        folder.joinpath(*["below"] * (number % 2), f"{number:02}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def reader():
    return Reader(str(TINY), threads=1)


@pytest.fixture(scope="session")
def one_process(folder, reader, tmp_path_factory):
    """(the library's folder, its results)."""
    output = tmp_path_factory.mktemp("one") / "library"
    return output, list(ingest(Corpus([str(folder)]), str(output), reader=reader))


@pytest.fixture(scope="session")
def ids(one_process):
    return {result.id for result in one_process[1]}
