"""benchmarks/screenshots.py: pictures are there completely or not at all, and errors are one line."""

import stat
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from benchmarks import screenshots


@pytest.fixture
def page(tmp_path) -> Path:
    path = tmp_path / "page.html"
    path.write_text("<html><head></head><main><h1>Page</h1></main></html>", encoding="utf-8")
    return path


def stand_in(folder: Path, body: str, monkeypatch) -> Path:
    """A program called chromium that does this; gives the file into which it writes its arguments."""
    program, given = folder / "chromium", folder / "given.txt"
    seen = f'for a in "$@"; do page=${{a#file://}}; done; cat "$page" > {folder}/seen.html\n'
    take_arguments = (
        f'{seen}echo "$@" >> {given}\nfor a in "$@"; do case $a in --screenshot=*) out=${{a#*=}};; esac; done\n'
    )
    program.write_text(f"#!/bin/sh\n{take_arguments}{body}\n", encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return given


def run(**settings: object) -> str | None:
    """The command's task with these settings; what it exits with."""
    try:
        screenshots.main.__wrapped__(OmegaConf.create({key: str(value) for key, value in settings.items()}))
    except SystemExit as stop:
        return stop.code
    return None


def test_screenshots_cover_light_desktop_and_dark_phone(page, tmp_path, monkeypatch) -> None:
    given = stand_in(tmp_path, 'printf picture > "$out"', monkeypatch)
    assert run(page=page, output_dir=tmp_path / "docs") is None
    assert sorted(path.name for path in (tmp_path / "docs").iterdir()) == [
        "benchmark-desktop.png",
        "benchmark-phone.png",
    ]
    desktop, phone = given.read_text(encoding="utf-8").splitlines()
    assert "preferredColorScheme=1" in desktop and "--window-size=1280," in desktop
    assert desktop.endswith(page.as_uri()) and not phone.endswith(page.as_uri())
    assert "main > :has(~ #length)" in (tmp_path / "seen.html").read_text(encoding="utf-8")
    assert "preferredColorScheme=0" in phone and "--window-size=390," in phone


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("echo broken >&2; exit 3", "made no picture of .*: broken"),
        ('head -c 400000 /dev/zero > "$out"', "would have 391 KiB, more than 200"),
    ],
)
def test_failing_browser_leaves_no_screenshot(page, tmp_path, monkeypatch, body, message) -> None:
    stand_in(tmp_path, body, monkeypatch)
    with pytest.raises(ValueError, match=message):
        screenshots.take(page, tmp_path / "docs/picture.png", screenshots.SHOTS[0])
    assert not list(tmp_path.glob("docs/*"))


def test_screenshots_without_browser_or_page_fail_with_one_line(page, tmp_path, monkeypatch) -> None:
    message = run(page=tmp_path / "none.html", output_dir=tmp_path)
    assert "No page at" in message and "python -m benchmarks.report" in message
    monkeypatch.setenv("PATH", str(tmp_path))
    message = run(page=page, output_dir=tmp_path)
    assert message.startswith("benchmarks.screenshots: Screenshots need one of chromium") and "\n" not in message
