"""The Hugging Face hub, where it cannot be reached: what is in its cache is used, and what is not is told at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def hub_asked_once(source: str | Path) -> Iterator[None]:
    """Reads from the hub inside the block, or from its cache alone where it does not answer one question.

    By itself huggingface_hub asks six times for every file, with pauses of 23 s altogether and a line on each.

    Args:
        source: what is read; where it is on the disk, nothing is asked.
    """
    from huggingface_hub import constants, get_session  # half a second, and few need it

    before = constants.HF_HUB_OFFLINE
    if not before and not Path(source).exists():
        try:
            get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except Exception:  # whatever its HTTP library raises; that has changed twice
            # As by the variable of this name. transformers' local_files_only does not keep it from asking everywhere.
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
