"""Where a published checkpoint lies: on disk, or on the hub and in its cache.

find_published("hub:SakanaAI/doc-to-lora/gemma_demo")      # the Path of its pytorch_model.bin
"""

import re
from pathlib import Path

from hypernet.interop.published.messages import one_line

PUBLISHED_FILE = "pytorch_model.bin"
HUB_PREFIX = "hub:"


def is_published(source: str | Path) -> bool:
    """Whether `source` names a published checkpoint: hub:..., a file, or a folder that has one in it or below."""
    if str(source).startswith(HUB_PREFIX):
        return True
    path = Path(source).expanduser()
    return path.is_file() or bool(_direct(path) or _below(path))


def find_published(source: str | Path) -> Path:
    """The file of a published checkpoint, on disk or fetched from the hub (or its cache, without network).

    Args:
        source: the file; a folder with it, or with checkpoint-N folders (the highest N is taken); or
            hub:owner/repository/name, the folder `name` of a repository.

    Raises:
        ValueError: there is none, there are several, or the hub cannot be reached and the cache lacks it.
    """
    text = str(source)
    if text.startswith(HUB_PREFIX):
        owner, repository, *names = text.removeprefix(HUB_PREFIX).split("/") + ["", ""]
        name = "/".join(names).strip("/")
        parts = [owner, repository, *filter(None, name.split("/"))]
        if not all(re.fullmatch(r"[\w.-]+", part) and part.strip(".") for part in parts):
            raise ValueError(
                f"{text!r} names nothing on the hub. Write hub:owner/repository/name, such as "
                "hub:SakanaAI/doc-to-lora/gemma_demo."
            )
        folder = _fetch(f"{owner}/{repository}", name) / name
    else:
        folder = Path(source).expanduser()
    if folder.is_file():
        return folder
    if path := _direct(folder):
        return path
    if below := _below(folder):
        raise ValueError(
            f"{text} holds checkpoints in its folders {', '.join(below)}. Name one: {text.rstrip('/')}/{below[0]}"
        )
    raise ValueError(
        f"There is no {PUBLISHED_FILE} in {text}. Name the file, a folder with it, or hub:owner/repository/name."
    )


def _direct(folder: Path) -> Path | None:
    """PUBLISHED_FILE in the folder, or in the checkpoint-N with the highest N."""
    if (folder / PUBLISHED_FILE).is_file():
        return folder / PUBLISHED_FILE
    numbered = {
        int(match[1]): path
        for path in folder.glob(f"checkpoint-*/{PUBLISHED_FILE}")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.parent.name))
    }
    return numbered[max(numbered)] if numbered else None


def _below(folder: Path) -> list[str]:
    """Names of the folders in this one that hold a checkpoint."""
    return sorted(path.name for path in folder.glob("*/") if _direct(path)) if folder.is_dir() else []


def _fetch(repository: str, name: str) -> Path:
    from huggingface_hub import snapshot_download  # only this needs it

    try:
        # * matches / too, so that the file may lie in the folder itself or in a checkpoint-N.
        pattern = name if name.endswith(PUBLISHED_FILE) else f"{name}/*{PUBLISHED_FILE}".lstrip("/")
        return Path(snapshot_download(repository, allow_patterns=[pattern]))
    except Exception as error:  # the hub and its network raise a dozen types; all of them mean this
        raise ValueError(
            f"Cannot get {repository} from the hub ({one_line(error)}). Check the name and the network, or download "
            f"{PUBLISHED_FILE} elsewhere and name the file."
        ) from error
