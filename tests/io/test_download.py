"""Downloads: what pip's settings mean, going on after breaks and kills, files that are not the wanted one."""

import base64
import hashlib
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

import hypernet.io.download
from hypernet.io.download import DownloadError, PinnedFile, download, pip_settings, sha256_of, sources
from tests.package_index import PackageIndex

CONTENT = np.random.default_rng(0).bytes(400_001)
WHEEL = "small_model-1.0-py3-none-any.whl"
WANTED = PinnedFile("small-model", WHEEL, hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))
NOWHERE = "http://127.0.0.1:9/simple"  # the discard port: nothing listens


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(hypernet.io.download.time, "sleep", lambda seconds: None)


@pytest.fixture
def index():
    with PackageIndex({"small-model": {"other-2.0.whl": b"x", WANTED.name: CONTENT}}) as index:
        yield index


def test_file_arrives_whole(index, tmp_path):
    assert download(WANTED, tmp_path, settings=index.settings).read_bytes() == CONTENT
    assert [path for path, _ in index.requests] == ["/simple/small-model/", f"/files/small-model/{WANTED.name}"]


def test_broken_connection_goes_on_where_it_broke(index, tmp_path):
    index.cut_after = 150_000
    assert download(WANTED, tmp_path, settings=index.settings).read_bytes() == CONTENT
    starts = [int(asked.removeprefix("bytes=").rstrip("-")) for asked in index.ranges_asked]
    # Of a block of 64 KiB that is cut off nothing need be kept.
    assert len(starts) > 2 and starts == sorted(set(starts)) and starts[1] >= 2 * 2**16


def test_connection_that_brings_nothing_is_given_up(index, tmp_path):
    index.cut_after = 0
    with pytest.raises(DownloadError, match=r"127.0.0.1:\d+/simple/small-model/: (cannot be reached|.* broke)"):
        download(WANTED, tmp_path, settings=index.settings)
    assert len(index.ranges_asked) == 5


def test_killed_download_goes_on(index, tmp_path, monkeypatch):
    index.seconds_per_block = 0.01
    monkeypatch.undo()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    child = multiprocessing.get_context("fork").Process(
        target=download, args=(WANTED, tmp_path), kwargs={"settings": index.settings}
    )
    child.start()
    part = tmp_path / f"{WANTED.name}.part"
    until = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size >= 2**16):
        assert time.monotonic() < until and child.is_alive()
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    had = part.stat().st_size
    assert child.exitcode == -signal.SIGKILL and 0 < had < len(CONTENT)
    index.seconds_per_block = 0
    assert download(WANTED, tmp_path, settings=index.settings).read_bytes() == CONTENT
    assert index.ranges_asked[-1] == f"bytes={had}-"


def test_server_without_ranges_sends_all_again(index, tmp_path):
    index.ranges = False
    (tmp_path / f"{WANTED.name}.part").write_bytes(CONTENT[:1000])
    assert download(WANTED, tmp_path, settings=index.settings).read_bytes() == CONTENT


def test_wrong_beginning_is_received_again(index, tmp_path):
    (tmp_path / f"{WANTED.name}.part").write_bytes(b"\0" * 1000)
    assert download(WANTED, tmp_path, settings=index.settings).read_bytes() == CONTENT
    assert index.ranges_asked == ["bytes=1000-", "bytes=0-"]


def test_complete_part_is_not_asked_for_again(index, tmp_path):
    (tmp_path / f"{WANTED.name}.part").write_bytes(CONTENT)
    download(WANTED, tmp_path, settings=index.settings)
    assert index.ranges_asked == []


@pytest.mark.parametrize("change", [lambda c: c[:-1] + b"?", lambda c: c + b"?", lambda c: b"?" * (len(c) + 200_000)])
def test_another_file_is_refused_and_removed(index, tmp_path, change):
    index.files["small-model"][WANTED.name] = change(CONTENT)
    with pytest.raises(DownloadError, match=f"sent another {WANTED.name}: sha256 .* wanted {WANTED.sha256[:12]}"):
        download(WANTED, tmp_path, settings=index.settings)
    assert not list(tmp_path.iterdir())


def test_next_source_is_asked_after_one_that_fails(index, tmp_path):
    with PackageIndex({"small-model": {WANTED.name: CONTENT[::-1]}}) as wrong, PackageIndex({}) as empty:
        settings = {"index-url": wrong.address, "extra-index-url": f"{NOWHERE} {empty.address} {index.address}"}
        assert download(WANTED, tmp_path, settings=settings).read_bytes() == CONTENT


def test_each_source_has_its_reason(index, tmp_path):
    index.status = 403
    with PackageIndex({}) as empty:
        settings = {"index-url": NOWHERE, "extra-index-url": f"{empty.address}\n{index.address}"}
        with pytest.raises(DownloadError) as error:
            download(WANTED, tmp_path, settings=settings)
    text = str(error.value)
    assert "9/simple/small-model/: cannot be reached; " in text and "answers 403 Forbidden" in text
    assert f"does not have {WANTED.name}" in text and "\n" not in text


def test_server_error_is_tried_again(index, tmp_path):
    index.status = 503
    with pytest.raises(DownloadError, match="answers 503 Service Unavailable"):
        download(WANTED, tmp_path, settings=index.settings)
    assert len(index.requests) == 4


def test_password_of_an_address_is_used_and_not_shown(index, tmp_path):
    index.password = base64.b64encode(b"me:secret").decode()
    with_password = index.address.replace("//", "//me:secret@")
    assert download(WANTED, tmp_path, settings={"index-url": with_password}).is_file()
    (tmp_path / f"{WANTED.name}.part").unlink()
    with pytest.raises(DownloadError, match="answers 401") as error:
        download(WANTED, tmp_path, settings={"index-url": index.address.replace("//", "//me:hidden@")})
    assert "hidden" not in str(error.value)


@pytest.mark.parametrize("kind", ["folder", "page", "index"])
def test_folders_and_pages_of_this_machine_are_sources(kind, tmp_path):
    shelf = tmp_path / "a shelf" / "small-model"
    shelf.mkdir(parents=True)
    (shelf / WANTED.name).write_bytes(CONTENT)
    (shelf.parent / "links.html").write_text(f'<base href="small-model/"><a href="{WANTED.name}#sha256=0">wheel</a>')
    settings = {
        "folder": {"no-index": "1", "find-links": shelf.as_uri()},
        "page": {"no-index": "true", "find-links": (shelf.parent / "links.html").as_uri()},
        "index": {"index-url": shelf.parent.as_uri()},
    }[kind]
    target = tmp_path / "target"
    target.mkdir()
    assert download(WANTED, target, settings=settings).read_bytes() == CONTENT


def test_without_any_source_the_settings_are_named(tmp_path):
    with pytest.raises(DownloadError, match="name no index"):
        download(WANTED, tmp_path, settings={"no-index": "yes"})


def test_sources_are_asked_in_the_order_of_pip():
    settings = {"extra-index-url": "\nhttps://b/simple\nhttps://c/simple/", "find-links": "/d e"}
    assert sources({}, "p") == ["https://pypi.org/simple/p/"]
    assert sources(settings, "p")[2:] == ["https://pypi.org/simple/p/", "https://b/simple/p/", "https://c/simple/p/"]
    assert sources({**settings, "no-index": "1", "find-links": "/d"}, "p") == ["/d"]


def test_settings_are_those_of_pip(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\nindex-url = https://a/simple\ntimeout = 7\nextra-index-url =\n    https://b/simple\n"
        "    https://c/simple\n[download]\ntimeout = 8\n[install]\ntimeout = 9\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    monkeypatch.setenv("PIP_INDEX_URL", "https://d/simple")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pip.py").write_text("raise SystemExit('not pip')")
    found = pip_settings()
    assert found["index-url"] == "https://d/simple" and found["timeout"] == "8"
    assert found["extra-index-url"].split() == ["https://b/simple", "https://c/simple"]


def test_settings_without_pip_are_those_of_the_environment(monkeypatch):
    monkeypatch.setattr(hypernet.io.download.sys, "executable", "/bin/false")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://b/simple")
    assert pip_settings()["extra-index-url"] == "https://b/simple"


def test_certificate_that_nobody_signed_is_named(monkeypatch, tmp_path):
    def untrusted(*_, **__):
        raise hypernet.io.download.requests.exceptions.SSLError("certificate verify failed")

    monkeypatch.setattr(hypernet.io.download.requests.Session, "get", untrusted)
    with pytest.raises(DownloadError, match="certificate is not trusted.*PIP_CERT"):
        download(WANTED, tmp_path, settings={})


def test_full_disk_keeps_what_has_come(index, tmp_path, monkeypatch):
    """The error is the system's; what was received is still a beginning."""
    import resource

    def full() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            download(WANTED, tmp_path, settings=index.settings)
        except OSError as error:
            os._exit(0 if error.strerror else 3)
        os._exit(4)

    child = multiprocessing.get_context("fork").Process(target=full)
    child.start()
    child.join()
    part = tmp_path / f"{WANTED.name}.part"
    assert child.exitcode == 0 and part.read_bytes() == CONTENT[: part.stat().st_size]
    assert sha256_of(download(WANTED, tmp_path, settings=index.settings)) == WANTED.sha256
