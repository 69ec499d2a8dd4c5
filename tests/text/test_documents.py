"""Documents: what is read from files, folders and standard input, and the one-line error for whatever cannot be."""

import hashlib
import io
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hypernet.text.documents import Document, read_document, read_documents

TEXT = "Der Leuchtturmwärter schrieb einen Brief – «今日» 🦄.\nZeile zwei.\n"


def write(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def feed(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def refusal(read, *args) -> str:
    """The message of the ValueError, which is one line."""
    with pytest.raises(ValueError) as error:
        read(*args)
    message = str(error.value)
    assert "\n" not in message and message.isprintable()
    return message


def make_pdf(*pages: str) -> bytes:
    """A PDF by hand: one line of Helvetica per page, none on a page without text."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", "", "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    kids = []
    for text in pages:
        stream = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET" if text else ""
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {len(objects)} 0 R "
            "/Resources << /Font << /F1 3 0 R >> >> >>"
        )
        kids.append(f"{len(objects)} 0 R")
    objects[1] = f"<< /Type /Pages /Count {len(pages)} /Kids [{' '.join(kids)}] >>"
    data, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        offsets.append(len(data))
        data += f"{number} 0 obj\n{body}\nendobj\n".encode("latin-1")
    xref = len(data)
    data += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n".encode()
    data += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    return data + f"trailer << /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{xref}\n%%EOF\n".encode()


# Text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le-bom", "utf-16-be-bom"])
@pytest.mark.parametrize("suffix", [".txt", ".md", ".rst", ".log", ""])
def test_text_is_read_in_utf8_and_utf16_with_its_hash(tmp_path, encoding, suffix):
    data = ("\ufeff" + TEXT).encode(encoding[:-4]) if encoding.endswith("-bom") else TEXT.encode(encoding)
    path = write(tmp_path / f"letter{suffix}", data)
    assert read_document(path) == Document(f"letter{suffix}", TEXT, hashlib.sha256(data).hexdigest())
    assert read_document(str(path)) == read_document(path)


def test_line_ends_are_normalised_but_the_hash_is_of_raw_bytes(tmp_path):
    data = b"one\r\ntwo\rthree\n\tfour\x0cfive"
    document = read_document(write(tmp_path / "a.txt", data))
    assert document.text == "one\ntwo\nthree\n\tfour\x0cfive"
    assert document.sha256 == hashlib.sha256(data).hexdigest()


def test_standard_input_is_read_as_bytes(monkeypatch):
    feed(monkeypatch, TEXT.encode("utf-16"))
    assert read_document("-") == Document("standard input", TEXT, hashlib.sha256(TEXT.encode("utf-16")).hexdigest())


def test_stray_control_characters_are_dropped_with_a_warning(tmp_path, caplog):
    path = write(tmp_path / "run.log", b"\x1b[31mred\x1b[0m " + b"and plain text " * 10 + b"\xc2\x9f")
    with caplog.at_level(logging.WARNING):
        text = read_document(path).text
    assert text == "[31mred[0m " + "and plain text " * 10
    assert "3 control characters dropped" in caplog.text


def test_invisible_characters_of_a_file_are_dropped_and_counted(tmp_path, caplog):
    data = "Ol\u00adwin\u00a0Cor\u2060ton\u202f\u200eNor\u00ad\nbach".encode()
    document = read_document(write(tmp_path / "a.txt", data))
    assert document == Document("a.txt", "Olwin Corton Norbach", hashlib.sha256(data).hexdigest())
    assert "a.txt': odd blanks read as spaces or line ends: 2, invisible characters dropped: 4" in caplog.text


def test_ordinary_text_gives_no_warning(tmp_path, caplog):
    read_document(write(tmp_path / "a.txt", TEXT))
    assert not caplog.records


@pytest.mark.parametrize(
    "data, offset, reason",
    [
        ("abc é".encode("latin-1"), 4, "unexpected end of data"),
        ("abc – x".encode("windows-1252"), 4, "invalid start byte"),
        (b"ab\xed\xa0\x80cd", 2, "invalid continuation byte"),  # a lone surrogate
        (b"\xef\xbb\xbfab\xff", 5, "invalid start byte"),
    ],
)
def test_another_encoding_is_refused_with_offset_and_iconv(tmp_path, data, offset, reason):
    path = write(tmp_path / "my file.txt", data)
    message = refusal(read_document, path)
    assert f"should be UTF-8, but is not at byte offset {offset} ({reason})" in message
    converted = str(path).replace("my file.txt", "my file.utf8.txt")
    assert f"iconv -f WINDOWS-1252 -t UTF-8 '{path}' > '{converted}'" in message


def test_suggested_iconv_command_makes_file_readable(tmp_path):
    if not shutil.which("iconv"):
        pytest.skip("needs iconv")
    message = refusal(read_document, write(tmp_path / "a b.txt", "naïve – text".encode("windows-1252")))
    subprocess.run(message[message.index("iconv -f") :], shell=True, check=True)
    assert read_document(tmp_path / "a b.utf8.txt").text == "naïve – text"


def test_damaged_utf16_and_utf32_are_refused(tmp_path):
    cut = write(tmp_path / "cut.txt", "text".encode("utf-16")[:-1])
    assert "should be UTF-16, but is not at byte offset" in refusal(read_document, cut)
    half = write(tmp_path / "half.txt", b"\xff\xfea\x00\x00\xd8b\x00")
    assert "iconv -c -f UTF-16 -t UTF-8" in refusal(read_document, half)
    wide = write(tmp_path / "wide.txt", "text".encode("utf-32"))
    assert "is in UTF-32. iconv -f UTF-32 -t UTF-8" in refusal(read_document, wide)


@pytest.mark.parametrize(
    "data",
    [
        b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
        b"PK\x03\x04\x14\x00\x06\x00",
        "text".encode("utf-16-le"),
        bytes(range(1, 256)) * 4,
        b"\x01\x02\x03text\x04\x05",
    ],
    ids=["png", "zip", "utf-16 without mark", "any byte but null", "control characters"],
)
def test_binary_files_are_refused(tmp_path, data):
    message = refusal(read_document, write(tmp_path / "a.txt", data))
    assert "is binary" in message and ("iconv" in message) == (data == "text".encode("utf-16-le"))


def test_null_byte_is_named_with_its_offset(tmp_path):
    message = refusal(read_document, write(tmp_path / "a.txt", b"abc\x00def"))
    assert "null byte at byte offset 3" in message and "iconv -f UTF-16LE -t UTF-8" in message


@pytest.mark.parametrize(
    "data", [b"", b" \n\t\r\n", b"\xef\xbb\xbf", b"\xff\xfe", "\u3000\u2028".encode(), "\u200b".encode()]
)
def test_blank_files_are_refused(tmp_path, data):
    assert f"is empty: {len(data)} bytes without text" in refusal(read_document, write(tmp_path / "a.txt", data))


def test_missing_and_unreadable_files_are_refused(tmp_path, monkeypatch):
    assert "No such file or directory. Check the path." in refusal(read_document, tmp_path / "none.txt")
    assert "Is a directory. Use read_documents" in refusal(read_document, tmp_path)
    assert "Not a directory. Check" in refusal(read_document, write(tmp_path / "a.txt", "text") / "b.txt")
    assert "null" in refusal(read_document, "a\0b.txt")
    assert "File name too long" in refusal(read_document, "x" * 5000)
    assert "No such file" in refusal(read_document, "line\nbreak.txt")

    def deny(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", deny)
    assert "a.txt': Permission denied. Change its permissions" in refusal(read_document, tmp_path / "a.txt")


# Several


def test_a_folder_is_read_recursively_without_hidden_files(tmp_path):
    names = ["b.txt", "a/z.md", "a/b/c.TXT", "a.rst", "a-b/1.txt"]
    for name in [*names, "image.png", "code.py", ".hidden.txt", ".git/config.txt", "a/.cache/x.md"]:
        write(tmp_path / name, f"text of {name}")
    documents = read_documents([tmp_path])
    assert [document.name for document in documents] == ["a/b/c.TXT", "a/z.md", "a-b/1.txt", "a.rst", "b.txt"]
    assert [document.text for document in documents] == [f"text of {document.name}" for document in documents]
    assert read_documents(tmp_path) == read_documents(str(tmp_path)) == documents


def test_files_folders_and_stdin_keep_given_order(tmp_path, monkeypatch):
    for name in ("z.txt", "folder/b.md", "folder/a.md"):
        write(tmp_path / name, name)
    feed(monkeypatch, b"piped")
    documents = read_documents([tmp_path / "z.txt", "-", tmp_path / "folder"])
    assert [document.name for document in documents] == ["z.txt", "standard input", "a.md", "b.md"]


def test_named_file_of_any_suffix_is_read(tmp_path):
    assert read_documents([write(tmp_path / "code.py", "print()")])[0].text == "print()"


def test_folder_without_documents_is_refused(tmp_path):
    assert "none of its 0 files ends in .txt" in refusal(read_documents, [tmp_path])
    write(tmp_path / "image.png", "x")
    message = refusal(read_documents, [tmp_path])
    assert str(tmp_path) in message and "none of its 1 files ends in .txt" in message


def test_bad_file_in_a_folder_is_named_with_its_path(tmp_path):
    write(tmp_path / "a.txt", "text")
    bad = write(tmp_path / "b/bad.txt", b"\x00")
    assert str(bad) in refusal(read_documents, [tmp_path])


def test_unlistable_folder_is_refused(tmp_path, monkeypatch):
    write(tmp_path / "a.txt", "text")

    def deny(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", deny)
    assert "Permission denied. Change its permissions" in refusal(read_documents, [tmp_path])


def test_no_path_is_refused():
    assert "No document given. Name at least one" in refusal(read_documents, [])


def test_file_named_again_counts_once(tmp_path, monkeypatch, caplog):
    path, other = write(tmp_path / "in/a.txt", "text"), write(tmp_path / "in/b.txt", "other")
    link = tmp_path / "link.txt"
    link.symlink_to(path)
    folder = path.parent
    again = [folder / ".." / "in" / "a.txt", os.path.relpath(path), link, folder]
    documents = read_documents([path, *again])
    assert [(document.name, document.text) for document in documents] == [("a.txt", "text"), ("b.txt", "other")]
    shown = ", ".join(map(str, [*again[:3], path]))
    assert caplog.messages == [f"Documents named several times count once: {shown}."]
    caplog.clear()
    read_documents([other] * 8)
    assert caplog.messages == [f"Documents named several times count once: {', '.join([str(other)] * 5)} and 2 more."]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"piped")))
    assert [document.text for document in read_documents(["-", "-"])] == ["piped"]


def test_missing_path_among_several_is_named(tmp_path):
    path = write(tmp_path / "a.txt", "text")
    assert "none.txt': No such file" in refusal(read_documents, [path, tmp_path / "none.txt"])


# HTML

HTML = """<!DOCTYPE html><html><head><title>Head</title><style>p {}</style></head><body>
<script>var x;</script><!-- comment -->
<h1>The   light-
house</h1><p>It is <b>tall</b>,<i> white</i> &amp; <a href="x">old</a>.<br>Built 1997.</p>
<ul><li>one</li><li><p>two</p></li></ul>
<table><tr><th>Year</th><th>Ships</th></tr><tr><td>1997</td><td>12</td></tr></table>
<pre>def f():
    return  1</pre>&#xD800;tail</body></html>"""


def test_html_gives_the_visible_text(tmp_path):
    pytest.importorskip("bs4")
    assert read_document(write(tmp_path / "a.html", HTML)).text == (
        "The light- house\n\nIt is tall, white & old.\nBuilt 1997.\n\n- one\n\n- two\n\nYear\tShips\n\n1997\t12\n\n"
        "def f():\n    return  1\n\n\ufffdtail\n"
    )


@pytest.mark.parametrize(
    "page, text",
    [
        ("<!DOCTYPE html><head><title>x</title><body><p>TEXT", "TEXT"),
        ("<html><head><style>p {}</style><p>TEXT", "TEXT"),
        ("<head><noscript><link></noscript><p>TEXT", "TEXT"),
        ("<title>x</title>TEXT", "TEXT"),
        ("<p>one<div>two</div><p>three", "one\n\ntwo\n\nthree"),
        ("<ul><li>one<li>two</ul>after", "- one\n\n- two\n\nafter"),
        ("<dl><dt>a<dd>b<dt>c<dd>d</dl>", "a\n\nb\n\nc\n\nd"),
        ("<table><thead><tr><th>A<th>B<tbody><tr><td>1<td>2</table>", "A\tB\n\n1\t2"),
        ("<p>TEXT<!-- open", "TEXT"),
    ],
)
def test_html_without_its_optional_tags_keeps_its_text(tmp_path, page, text):
    pytest.importorskip("html5lib")
    assert read_document(write(tmp_path / "a.html", page)).text == f"{text}\n"


@pytest.mark.parametrize("name, start", [("a.xhtml", "<html>"), ("a.html", '<?xml version="1.0"?>\n<html>')])
def test_xhtml_may_close_any_tag_in_itself(tmp_path, name, start):
    pytest.importorskip("html5lib")
    page = start + '<head><title/><script src="a.js"/></head><body><p>one <a id="x"/>two</p></body></html>'
    assert read_document(write(tmp_path / name, page)).text == "one two\n"


@pytest.mark.parametrize(
    "start", ["\n <!doctype HTML>", "<!-- saved --><HTML>", "<head><title>x</title>", "<meta charset=utf-8>", "<body>"]
)
def test_html_from_stdin_is_detected(monkeypatch, start):
    pytest.importorskip("html5lib")
    feed(monkeypatch, f"{start}<p>Text".encode())
    assert read_document("-").text == "Text\n"


def test_text_that_only_contains_tags_is_no_html(monkeypatch):
    feed(monkeypatch, b"<p align=center>\n\n# Title\n\n<header> is a tag\n")
    assert read_document("-").text == "<p align=center>\n\n# Title\n\n<header> is a tag\n"


@pytest.mark.parametrize("declared, encoding", [("latin-1", "cp1252"), ("koi8-r", "koi8-r"), ("utf-16", "utf-8")])
def test_html_is_decoded_as_it_declares(tmp_path, declared, encoding):
    pytest.importorskip("bs4")
    word = "Привет" if declared == "koi8-r" else "naïve – €"
    data = f'<html><head><meta charset="{declared}"></head><p>{word}</p>'.encode(encoding)
    assert read_document(write(tmp_path / "a.htm", data)).text == f"{word}\n"


def test_undecodable_or_empty_html_is_refused(tmp_path):
    pytest.importorskip("bs4")
    assert "should be UTF-8" in refusal(read_document, write(tmp_path / "a.html", b"<p>na\xefve</p>"))
    unknown = write(tmp_path / "b.html", b'<meta charset="klingon"><p>x</p>')
    assert "declares the encoding 'klingon', which is unknown" in refusal(read_document, unknown)
    blank = write(tmp_path / "c.html", b"<html><script>var x</script><p> &nbsp; </p></html>")
    assert "is empty" in refusal(read_document, blank)
    assert "is binary" in refusal(read_document, write(tmp_path / "d.html", b"<p>\x00</p>"))


def test_deeply_nested_html_is_read(tmp_path):
    pytest.importorskip("bs4")
    data = "<div>" * 1000 + "deep" + "</div>" * 1000
    assert read_document(write(tmp_path / "a.html", data)).text == "deep\n"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("text", ["https://example.org/a", "notes/a.txt"])
def test_html_as_short_as_an_address_is_read_without_a_warning(tmp_path, text):
    pytest.importorskip("bs4")
    assert read_document(write(tmp_path / "a.html", text.encode())).text == text + "\n"


# PDF


def test_pdf_gives_the_text_of_its_pages(tmp_path, caplog):
    pytest.importorskip("pypdf")
    data = make_pdf("The first page.", "", "The third page.")
    document = read_document(write(tmp_path / "a.pdf", data))
    assert document.text.split("\n") == ["The first page.", "", "The third page."]
    assert document.sha256 == hashlib.sha256(data).hexdigest()
    assert "1 of 3 pages have no text" in caplog.text


def test_pdf_words_broken_at_line_ends_are_put_together(tmp_path):
    pytest.importorskip("pypdf")
    path = write(tmp_path / "a.pdf", make_pdf("Olwin Cor-) Tj 0 -14 Td (ton taught.", "A light-", "house."))
    assert read_document(path).text == "Olwin Corton taught.\nA lighthouse."


def test_hyphens_at_line_ends_of_a_text_file_stay(tmp_path):
    assert read_document(write(tmp_path / "a.txt", "Cor-\nton")).text == "Cor-\nton"


def test_faulty_pdf_is_one_warning_of_ours(tmp_path, caplog, capfd):
    pytest.importorskip("pypdf")
    path = write(tmp_path / "a.pdf", b"junk\n" + make_pdf("The first page."))
    assert read_document(path).text == "The first page."
    (record,) = caplog.records
    assert record.name == "hypernet.text.documents" and "faulty (invalid pdf header" in record.getMessage()
    assert capfd.readouterr().err == ""


def test_pdf_from_stdin_is_detected(monkeypatch):
    pytest.importorskip("pypdf")
    feed(monkeypatch, make_pdf("Piped."))
    assert read_document("-").text == "Piped."


def test_pdf_without_text_encrypted_or_damaged_is_refused(tmp_path):
    pypdf = pytest.importorskip("pypdf")
    scanned = write(tmp_path / "scanned.pdf", make_pdf("", ""))
    assert "no text on its 2 pages" in (message := refusal(read_document, scanned)) and "ocrmypdf" in message

    writer = pypdf.PdfWriter(clone_from=io.BytesIO(make_pdf("Secret.")))
    writer.encrypt("password", algorithm="RC4-128")
    writer.write(tmp_path / "locked.pdf")
    assert "is an encrypted PDF. Decrypt it: qpdf --decrypt" in refusal(read_document, tmp_path / "locked.pdf")

    for name, data in {"cut": make_pdf("Text.")[:40], "empty": b"", "text": b"just text"}.items():
        assert "cannot be read as PDF" in refusal(read_document, write(tmp_path / f"{name}.pdf", data))


def test_pdf_locked_against_changes_is_read(tmp_path):
    pypdf = pytest.importorskip("pypdf")
    writer = pypdf.PdfWriter(clone_from=io.BytesIO(make_pdf("Open.")))
    writer.encrypt("", owner_password="owner", algorithm="RC4-128")
    writer.write(tmp_path / "open.pdf")
    assert read_document(tmp_path / "open.pdf").text == "Open."


@pytest.mark.parametrize("name, package", [("a.html", "bs4"), ("a.html", "html5lib"), ("a.pdf", "pypdf")])
def test_a_missing_package_is_named_with_its_install_command(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    message = refusal(read_document, write(tmp_path / name, "<p>x</p>"))
    assert message.endswith("pip install 'doc-to-lora[documents]'")
