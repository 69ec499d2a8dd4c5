"""Files -> documents: name, text and hash of what was read, before anything is tokenized.

    document = read_document("report.md")        # or .txt, .html, .pdf; "-" reads standard input
    documents = read_documents(["notes/", "report.pdf"])

Text and Markdown are read as they are. HTML and PDF need the extra: pip install 'doc-to-lora[documents]'.
Whatever cannot be read is a ValueError of one line that says what to do.
"""

import codecs
import hashlib
import io
import logging
import os
import re
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hypernet.io.logs import log_kept_back
from hypernet.text.cleaning import visible, whole, without_hyphenation

log = logging.getLogger(__name__)

TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst")
HTML_SUFFIXES = (".html", ".htm", ".xhtml")
PDF_SUFFIXES = (".pdf",)
SUFFIXES = TEXT_SUFFIXES + HTML_SUFFIXES + PDF_SUFFIXES

_STANDARD_INPUT = "-"
_INSTALL = "pip install 'doc-to-lora[documents]'"
# Tab, line feed, vertical tab, form feed and carriage return, and C1's next line, are part of ordinary text.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")
_CONTROL_BYTES = bytes(code for code in range(0x20) if chr(code) not in "\t\n\v\f\r")
# A log with colours has a few control characters, a binary file about one in nine (29 of 256 byte values).
_MOST_CONTROL = 0.05
_MOST_NAMED = 5  # files in a line of the log

# What only a page begins with, after comments: <html> and <head> may be left out. A paragraph may begin Markdown too.
_HTML_START = re.compile(
    rb"(?is)(?:\s|<\?xml[^>]*>|<!--(?:(?!-->).)*-->)*<(?:!doctype\s+html|html|head|title|meta|body)[\s/>]"
)
_XHTML = re.compile(rb"(?:\xef\xbb\xbf)?\s*<\?xml\b")
_HTML_DROPPED = ["script", "style", "template", "noscript", "head", "title", "svg"]
_HTML_BLOCKS = frozenset(
    "address article aside blockquote body caption dd details div dl dt fieldset figcaption figure footer form h1 h2 "
    "h3 h4 h5 h6 header hr li main nav ol p pre section summary table tr ul".split()
)


class NoText(ValueError):
    """A document without text, or a folder without documents."""


class Document(NamedTuple):
    """What was read, and where from."""

    name: str
    """File name; below a folder that was asked for, the path from that folder; "standard input"."""
    text: str
    """The cleaned text with "\\n" line ends: what character spans count."""
    sha256: str
    """Of the raw bytes, in hexadecimal, as `sha256sum` prints it."""


def read_document(path: str | os.PathLike[str]) -> Document:
    """Reads one file, or standard input if the path is "-".

    The suffix decides how: HTML and PDF are turned into text, anything else is text in UTF-8, or in UTF-16 with a byte
    order mark. Standard input and files of other suffixes are HTML or PDF if they start as one. Line ends become
    "\\n"; stray control characters are dropped, halves of characters replaced, other blanks made spaces and invisible
    characters dropped, with a warning in the log. Words that a PDF breaks at line ends are put together.

    Raises:
        ValueError: one line with the remedy: no such file, a folder, no permission, nothing in it, binary, in another
            encoding, an encrypted PDF or one without text, or a missing package for HTML or PDF.
    """
    if os.fspath(path) == _STANDARD_INPUT:
        name, source, data = "standard input", "standard input", sys.stdin.buffer.read()
    else:
        path = Path(path)
        name, source, data = path.name, os.fspath(path), read_bytes(path)
    return document_of(name, data, source=source)


def document_of(name: str, data: bytes, *, source: str | None = None) -> Document:
    """What `read_document` makes of a file of this name and content; source: what errors call it. Raises as it."""
    source = name if source is None else source
    text = _clean(source, _extract(source, data))
    if not text.strip():
        raise NoText(f"{source!r} is empty: {len(data)} bytes without text. Give a document that has text.")
    return Document(_printable(name), text, hashlib.sha256(data).hexdigest())


def read_documents(paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Document]:
    """Reads files, folders and "-" (standard input), in the order given.

    A folder is searched for files with a suffix in SUFFIXES, also below it, in the order of their paths; hidden files
    and folders are left out, and links to folders not followed. A file that is named again, also by another spelling,
    by a link or with its folder, counts once, as a copy of it does later: a line of the log says so.

    Raises:
        ValueError: as read_document, and for no path at all, or a folder without documents.
    """
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not paths:
        raise ValueError("No document given. Name at least one file or folder, or - for standard input.")

    wanted: list[tuple[str | os.PathLike[str], str | None]] = []  # (path, name)
    for path in paths:
        if os.fspath(path) == _STANDARD_INPUT or not os.path.isdir(path):
            wanted.append((path, None))
        else:
            wanted += [(file, file.relative_to(path).as_posix()) for file in files_below(Path(path))]

    once: dict[str, tuple[str | os.PathLike[str], str | None]] = {}
    again = []
    for path, name in wanted:
        key = _STANDARD_INPUT if os.fspath(path) == _STANDARD_INPUT else os.path.realpath(path)
        if key in once:
            again.append(_printable(os.fspath(path)))
        else:
            once[key] = (path, name)
    if again:
        more = f" and {len(again) - _MOST_NAMED} more" if len(again) > _MOST_NAMED else ""
        log.warning("Documents named several times count once: %s%s.", ", ".join(again[:_MOST_NAMED]), more)

    documents = [(read_document(path), name) for path, name in once.values()]
    return [document._replace(name=_printable(name)) if name else document for document, name in documents]


def files_below(folder: Path, *, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """Files of these suffixes, in the order of their paths; not what is hidden, nor what is behind links to folders.

    Raises:
        ValueError: there is none, or a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise _unreadable(error.filename or folder, error)

    files = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    # Not pipes, which reading would wait for; a broken link is told where it is read.
    documents = [
        file for file in files if file.suffix.lower() in suffixes and (os.path.isfile(file) or not os.path.exists(file))
    ]
    if not documents:
        raise NoText(
            f"No document in the folder {os.fspath(folder)!r}: none of its {len(files)} files ends in "
            f"{', '.join(suffixes)}. Name the files themselves to read them as text."
        )
    return sorted(documents, key=lambda file: file.relative_to(folder).parts)


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """A file's content; raises ValueError: one line, it cannot be read."""
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise _unreadable(path, error) from error


def _unreadable(path: str | os.PathLike[str], error: Exception) -> ValueError:
    remedies: dict[type[Exception], str] = {
        FileNotFoundError: "Check the path.",
        IsADirectoryError: "Use read_documents to read all documents in it.",
        PermissionError: "Change its permissions (chmod u+r, and u+rx for folders) or run as a user who may read it.",
    }
    remedy = remedies.get(type(error), "Check the path.")
    reason = getattr(error, "strerror", None) or str(error)
    return ValueError(f"Cannot read {os.fspath(path)!r}: {reason}. {remedy}")


def _printable(name: str) -> str:
    """A file name may hold bytes that are no UTF-8; provenance files may not."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _extract(source: str, data: bytes) -> str:
    suffix = Path(source).suffix.lower()
    start = data[:1024].removeprefix(codecs.BOM_UTF8).lstrip()
    if suffix in PDF_SUFFIXES or (suffix not in SUFFIXES and start.lower().startswith(b"%pdf-")):
        return _pdf_text(source, data)
    if suffix in HTML_SUFFIXES or (suffix not in SUFFIXES and _HTML_START.match(start)):
        return _html_text(source, data)
    return _decode(source, data)


def _decode(source: str, data: bytes, *, declared: str | None = None) -> str:
    """Bytes -> text. A byte order mark decides, else the encoding the document declares, else it is UTF-8."""
    # UTF-32's little-endian mark starts with UTF-16's, so it comes first.
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        raise ValueError(f"{source!r} is in UTF-32. {_iconv(source, 'UTF-32')}")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    elif data.startswith(codecs.BOM_UTF8):
        encoding = "utf-8"
    elif b"\x00" in data:
        others = sum(data.count(byte) for byte in _CONTROL_BYTES if byte)
        maybe = f"; if it is UTF-16 without byte order mark: {_iconv(source, 'UTF-16LE')}"
        raise ValueError(
            f"{source!r} is binary (null byte at byte offset {data.index(0)}). Convert it to text first"
            f"{maybe if others <= _MOST_CONTROL * len(data) else '.'}"
        )
    else:
        encoding = declared or "utf-8"
    try:
        # Not "utf-8-sig": it counts the offset of an error from behind the mark.
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        if encoding != "utf-16" and sum(data.count(byte) for byte in _CONTROL_BYTES) > _MOST_CONTROL * len(data):
            raise ValueError(f"{source!r} is binary. Convert it to text first.") from error
        remedy = (
            f"It is damaged; to leave out the faulty bytes: {_iconv(source, 'UTF-16', '-c')}"
            if encoding == "utf-16"
            else f"If it is Windows-1252, convert it (else put its encoding there): {_iconv(source, 'WINDOWS-1252')}"
        )
        raise ValueError(
            f"{source!r} should be {encoding.upper()}, but is not at byte offset {error.start} "
            f"({error.reason}). {remedy}"
        ) from error
    except (LookupError, UnicodeError) as error:
        raise ValueError(
            f"{source!r} declares the encoding {encoding!r}, which is unknown. Correct the declaration, or convert the "
            "file to UTF-8 and declare that."
        ) from error


def _iconv(source: str, encoding: str, *options: str) -> str:
    command = " ".join(["iconv", *options, "-f", encoding, "-t", "UTF-8"])
    if source == "standard input":
        return f"{command} (in the pipe)"
    path = Path(source)
    return f"{command} {shlex.quote(source)} > {shlex.quote(os.fspath(path.with_suffix('.utf8' + path.suffix)))}"


def _clean(source: str, text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text, num_control = _CONTROL.subn("", text)
    if num_control > _MOST_CONTROL * (len(text) + num_control):
        raise ValueError(f"{source!r} is binary ({num_control} control characters). Convert it to text first.")
    if num_control:
        log.warning("%r: %d control characters dropped", source, num_control)
    return visible(whole(text, source), source)


def _html_text(source: str, data: bytes) -> str:
    """The text a reader sees: blocks apart by a blank line, list items and table rows on their own lines."""
    try:
        import html5lib  # type: ignore[import-untyped]  # noqa: F401  (BeautifulSoup takes it by its name)
        from bs4 import BeautifulSoup, MarkupResemblesLocatorWarning
        from bs4.dammit import EncodingDetector
        from bs4.element import PreformattedString
        from bs4.exceptions import ParserRejectedMarkup
    except ImportError as error:
        raise ValueError(
            f"Reading HTML ({source!r}) needs beautifulsoup4 and html5lib. Install them: {_INSTALL}"
        ) from error

    # Decoded here rather than by BeautifulSoup, which guesses, and differently where a detector package is installed.
    declared = (EncodingDetector.find_declared_encoding(data, is_html=True) or "utf-8").lower()
    # As browsers do: Latin-1 means Windows-1252 (https://encoding.spec.whatwg.org/#names-and-labels), and a declaration
    # that could be read byte by byte is not UTF-16 (https://html.spec.whatwg.org/multipage/parsing.html, "prescan").
    if declared in ("iso-8859-1", "latin-1", "latin1", "ascii", "us-ascii"):
        declared = "windows-1252"
    elif declared.startswith("utf-16"):
        declared = "utf-8"
    # html5lib builds the tree that browsers build, whichever tags are left out. XHTML leaves none out, and closes some
    # that HTML does not let one close: "<title/>" would make the whole page a title.
    parser = "html.parser" if _XHTML.match(data) or source.lower().endswith(".xhtml") else "html5lib"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MarkupResemblesLocatorWarning)  # a page may be as short as a file's name
            soup = BeautifulSoup(_decode(source, data, declared=declared), parser)
    except ParserRejectedMarkup as error:
        raise ValueError(f"{source!r} cannot be read as HTML ({_one_line(error)}). Save it as text.") from error

    for tag in soup.find_all(_HTML_DROPPED):
        tag.decompose()
    for string in soup.find_all(string=True):
        if isinstance(string, PreformattedString):  # comments, doctype and the like
            string.extract()
        elif string.find_parent("pre"):
            # Blanks are kept here. A null stands for them: _decode lets none through.
            string.replace_with(string.replace(" ", "\0").expandtabs(4))
        else:
            string.replace_with(re.sub(r"[ \t\r\n\f]+", " ", string))
    for tag in soup.find_all(True):
        if tag.name == "br":
            tag.replace_with("\n")
        elif tag.name in ("td", "th"):
            tag.append("\t")
        elif tag.name in _HTML_BLOCKS:
            line_end = "\n" if tag.name in ("li", "tr", "dt", "dd") else "\n\n"
            tag.insert(0, line_end + ("- " if tag.name == "li" else ""))
            tag.append(line_end)
    text = re.sub(r"[ \t]*\n *", "\n", re.sub(r" {2,}", " ", soup.get_text()))
    text = re.sub(r"(?m)^-\n+", "- ", text)  # a paragraph in a list item
    return re.sub(r"\n{3,}", "\n\n", text).strip().replace("\0", " ") + "\n"


def _pdf_text(source: str, data: bytes) -> str:
    try:
        from pypdf import PdfReader
        from pypdf.errors import DependencyError, FileNotDecryptedError
    except ImportError as error:
        raise ValueError(f"Reading PDF ({source!r}) needs pypdf. Install it: {_INSTALL}") from error
    try:
        with log_kept_back("pypdf") as faults:
            pages = [page.extract_text() for page in PdfReader(io.BytesIO(data)).pages]
    except (FileNotDecryptedError, DependencyError) as error:
        raise ValueError(
            f"{source!r} is an encrypted PDF. Decrypt it: qpdf --decrypt --password=... {_to_new_pdf(source)}"
        ) from error
    except Exception as error:  # pypdf lets many kinds through on a damaged file: KeyError, RecursionError, ...
        raise ValueError(
            f"{source!r} cannot be read as PDF ({_one_line(error)}). Try to repair it: qpdf {_to_new_pdf(source)}"
        ) from error
    num_blank = sum(not page.strip() for page in pages)
    if num_blank == len(pages):
        raise ValueError(
            f"{source!r} has no text on its {len(pages)} pages: scanned, most likely. Recognise the text: "
            f"ocrmypdf {_to_new_pdf(source)}"
        )
    if num_blank:
        log.warning("%r: %d of %d pages have no text", source, num_blank, len(pages))
    if faults:
        log.warning("%r: the PDF is faulty (%s); compare its text with the pages", source, " ".join(faults[0].split()))
    return without_hyphenation(visible("\n".join(pages), source))


def _to_new_pdf(source: str) -> str:
    if source == "standard input":
        return "in.pdf out.pdf"
    return f"{shlex.quote(source)} {shlex.quote(os.fspath(Path(source).with_suffix('.new.pdf')))}"


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
