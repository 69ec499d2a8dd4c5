"""Corpus: what files, folders, tables and saved datasets give, how many, and what is told before and on the way."""

import hashlib
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hypernet.corpora.corpus import Corpus, Item
from hypernet.text.documents import read_documents

TEXTS = ["Norbach lies on the Palno.", "Café\r\nAgnes Möller, 1871.", "x" * 700]


@pytest.fixture(params=["parquet", "jsonl", "saved", "splits"])
def rows(request, tmp_path):
    """The texts as rows of each kind, in the column `body`."""
    path = tmp_path / f"rows.{request.param}"
    columns = {"number": list(range(3)), "body": TEXTS}
    if request.param == "parquet":
        pq.write_table(pa.table(columns), path, row_group_size=2)
    elif request.param == "jsonl":
        path.write_text("\n\n".join(json.dumps({"body": text}) for text in TEXTS) + "\n")
    else:
        made = datasets.Dataset.from_dict(columns)
        (datasets.DatasetDict(train=made) if request.param == "splits" else made).save_to_disk(path)
    return path


def test_rows_of_every_kind_are_documents(rows):
    corpus = Corpus([str(rows)], column="body")
    assert corpus.count() == 3
    items = list(corpus.items())
    assert [item.name for item in items] == [f"{rows.name}/{number}" for number in range(3)]
    documents = [item.document(item.data()) for item in items]
    assert [document.text for document in documents] == [text.replace("\r\n", "\n") for text in TEXTS]
    assert [document.sha256 for document in documents] == [hashlib.sha256(t.encode()).hexdigest() for t in TEXTS]


def test_missing_column_is_told_before_work_starts(rows):
    with pytest.raises(ValueError, match=r"has no column 'text', but (number, )?body\. Set --column"):
        Corpus([str(rows)]).count()


def test_missing_split_is_told_with_those_that_are_there(tmp_path):
    datasets.DatasetDict(test=datasets.Dataset.from_dict({"text": TEXTS})).save_to_disk(tmp_path / "d")
    with pytest.raises(ValueError, match="has no split 'train', but test. Set --split"):
        Corpus([str(tmp_path / "d")]).count()
    assert Corpus([str(tmp_path / "d")], split="test").count() == 3


def test_folder_gives_what_read_documents_reads(folder):
    corpus = Corpus([str(folder)])
    found = [item.document(item.data()) for item in corpus.items()]
    assert found == read_documents(str(folder)) and corpus.count() == len(found)


def test_folder_gives_tables_row_by_row(tmp_path):
    (tmp_path / "a.txt").write_text("One.")
    pq.write_table(pa.table({"text": ["Two.", "Three."]}), tmp_path / "b.parquet")
    (tmp_path / ".hidden.jsonl").write_text('{"text": "No."}')
    corpus = Corpus([str(tmp_path), str(tmp_path / "a.txt")])
    assert [item.data() for item in corpus.items()] == [b"One.", b"Two.", b"Three.", b"One."] and corpus.count() == 4


def test_rows_are_read_when_they_are_asked_for(tmp_path):
    path = tmp_path / "long.jsonl"
    with path.open("w") as lines:
        lines.writelines(f'{{"text": "Row {number}."}}\n' for number in range(20_000))
        lines.write("no JSON\n")
    items = Corpus([str(path)]).items()
    assert next(items) == Item("long.jsonl/0", text="Row 0.")
    assert "is no JSON" in list(items)[-1].problem


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ('{"text": null}', "It has None as text"),
        ('{"text": 7}', "It has 7 as text"),
        ("[1]", "It has None"),
        ("{", "no"),
    ],
)
def test_row_without_a_text_is_a_problem_of_its_own(tmp_path, row, says):
    (tmp_path / "r.jsonl").write_text(f'{{"text": "First."}}\n{row}\n{{"text": "Last."}}\n')
    first, wrong, last = Corpus([str(tmp_path / "r.jsonl")]).items()
    assert (first.text, last.text) == ("First.", "Last.")
    with pytest.raises(ValueError, match=says):
        wrong.data()


def test_half_characters_are_replaced_as_in_documents(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"text": "a\\ud800b"}\n')
    (item,) = Corpus([str(tmp_path / "r.jsonl")]).items()
    assert item.text == "a\ufffdb" and item.data()


def test_damaged_table_is_told_and_the_next_source_read(tmp_path):
    pq.write_table(pa.table({"text": TEXTS * 500}), tmp_path / "a.parquet", compression=None)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[4:2000] = bytes(1996)
    (tmp_path / "a.parquet").write_bytes(data)
    (tmp_path / "b.txt").write_text("Whole.")
    *_, problem, whole = Corpus([str(tmp_path)]).items()
    assert problem.problem.startswith(f"Cannot read {tmp_path / 'a.parquet'}: ") and whole.name == "b.txt"


@pytest.mark.parametrize(
    ("sources", "says"),
    [
        ([], "No documents given"),
        (["lost"], "There is no file or folder lost. Check the path; a dataset on the hub is hub:OWNER/NAME"),
        (["lost", "README.md", "gone"], "There is no file or folder lost.* There is no file or folder gone"),
        (["{}/none.jsonl"], "^No row in .*none.jsonl. Name a source with documents.$"),
        (["{}/other.jsonl"], "other.jsonl has no column 'text', nor any other. Set --column.$"),
        (["{}"], "No document in the folder"),
    ],
)
def test_what_is_not_there_is_one_line(tmp_path, sources, says):
    if sources == ["{}/none.jsonl"]:
        (tmp_path / "none.jsonl").write_text("\n")
    if sources == ["{}/other.jsonl"]:
        (tmp_path / "other.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=says) as caught:
        Corpus([source.format(tmp_path) for source in sources]).count()
    assert "\n" not in str(caught.value)


def test_table_that_is_none_counts_as_one_that_fails(tmp_path):
    (tmp_path / "a.parquet").write_text("no parquet")
    (tmp_path / "b.jsonl").write_text("no JSON\n")
    (tmp_path / "c.txt").write_text("Whole.")
    corpus = Corpus([str(tmp_path / name) for name in ("a.parquet", "b.jsonl", "c.txt")])
    table, row, whole = corpus.items()
    assert corpus.count() == 3 and whole.data() == b"Whole." and "is no JSON" in row.problem
    assert table.problem.startswith(f"Cannot read {tmp_path / 'a.parquet'}: ")
    assert table.problem.endswith(". Check the file.") and ".." not in table.problem.replace(str(tmp_path), "")


@pytest.mark.parametrize("wrong", range(3))
def test_row_that_is_not_utf_8_fails_alone(tmp_path, wrong):
    rows = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in TEXTS]
    rows[wrong] = b'{"text": "caf\xe9"}'
    (tmp_path / "r.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(rows))
    corpus = Corpus([str(tmp_path / "r.jsonl")])
    items = list(corpus.items())
    assert corpus.count() == 3 and [bool(item.problem) for item in items] == [n == wrong for n in range(3)]
    assert "'utf-8' codec can't decode byte 0xe9" in items[wrong].problem
    assert [item.text for item in items if not item.problem] == [t for n, t in enumerate(TEXTS) if n != wrong]


def test_hub_that_is_not_reached_is_a_problem_at_its_end():
    corpus = Corpus(["hub:nobody/nothing"])
    assert corpus.count() is None
    (item,) = corpus.items()
    assert item.problem.startswith("Could not read hub:nobody/nothing: ") and "\n" not in item.problem
