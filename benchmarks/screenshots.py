"""Two pictures of the report for the documentation: `python -m benchmarks.screenshots`

    python -m benchmarks.screenshots page=outputs/results.html output_dir=docs

Writes benchmark-desktop.png (1280 pixels wide, light) and benchmark-phone.png (390 wide, dark). Needs Chromium or
Chrome on the PATH.
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import hydra

from hypernet.cli.scripts import Script
from hypernet.cli.settings import OutputFolder, Settings, Text
from hypernet.io.files import replaced

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
MAX_KIB = 200
TIMEOUT_S = 120


class Shot(NamedTuple):
    """width, height: in pixels. dark: what the reader prefers. figure: where the picture begins; "": the page's top."""

    name: str
    width: int
    height: int
    dark: bool
    figure: str = ""


SHOTS = (Shot("benchmark-desktop.png", 1280, 880, False), Shot("benchmark-phone.png", 390, 1200, True, "length"))


def browser() -> str:
    """Path of the first browser found.

    Raises:
        ValueError: there is none.
    """
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise ValueError(
            f"Screenshots need one of {', '.join(BROWSERS)} on the PATH; install it (apt install chromium)."
        )
    return found


def take(page: Path, output: Path, shot: Shot) -> None:
    """Writes what a reader with this window and preference sees of the page, completely or not at all.

    Raises:
        ValueError: no page, no browser, the browser fails, or the picture is larger than 200 KiB.
    """
    if not page.is_file():
        raise ValueError(f"No page at {page}; write it with python -m benchmarks.report page={page}.")
    with tempfile.TemporaryDirectory() as profile:
        picture, shown = Path(profile) / shot.name, page.resolve()
        if shot.figure:
            # A headless browser does not paint a page that was scrolled, so what stands before is left out.
            shown = Path(profile) / "page.html"
            hidden = f"<style>main > :has(~ #{shot.figure}) {{ display: none; }}</style></head>"
            text = page.read_text(encoding="utf-8")
            shown.write_text(text.replace("</head>", hidden, 1), encoding="utf-8")
        command = [
            *(browser(), "--headless", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1"),
            # Blink's numbers: 0 is dark, 1 is light.
            f"--blink-settings=preferredColorScheme={0 if shot.dark else 1}",
            f"--window-size={shot.width},{shot.height}",
            f"--user-data-dir={profile}/profile",
            f"--screenshot={picture}",
            *(["--no-sandbox"] if os.geteuid() == 0 else []),  # root cannot run Chromium in one; the page is ours
            shown.as_uri(),
        ]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise ValueError(f"{command[0]} took more than {TIMEOUT_S} s for {page}; try again.") from None
        if run.returncode or not picture.is_file():
            reason = (run.stderr.strip() or f"exit status {run.returncode}").splitlines()[-1]
            raise ValueError(f"{command[0]} made no picture of {page}: {reason}")
        if (size := picture.stat().st_size / 1024) > MAX_KIB:
            raise ValueError(f"{shot.name} would have {size:.0f} KiB, more than {MAX_KIB}; lower its height in SHOTS.")
        output.parent.mkdir(parents=True, exist_ok=True)
        with replaced(output) as unfinished:
            shutil.copyfile(picture, unfinished)


class ScreenshotSettings(Settings):
    page: Text
    output_dir: OutputFolder


SCRIPT = Script("benchmarks.screenshots", ScreenshotSettings)


@hydra.main(config_path="../conf/benchmark", config_name="screenshots", version_base="1.3")
@SCRIPT
def main(cfg: ScreenshotSettings) -> None:
    for shot in SHOTS:
        output = Path(cfg.output_dir) / shot.name
        take(Path(cfg.page), output, shot)
        print(output)


if __name__ == "__main__":
    SCRIPT.run(main, Path(__file__).parents[1] / "conf/benchmark/screenshots.yaml")
