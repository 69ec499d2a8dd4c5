"""Files that are there completely or not at all.

    with replaced(path) as temporary:
        save_tensors(tensors, temporary)      # path changes only if the block ends well
"""

import errno
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place when the block ends well, and is removed if it fails."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        if path.exists():
            shutil.copymode(path, temporary)
        else:
            temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(tensors: dict[str, Tensor], path: Path, *, metadata: dict[str, str] | None = None) -> None:
    """safetensors' save_file, raising OSError with the system's number where that raises an error of its own."""
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        # safetensors puts the system's error into its text; callers look for an OSError.
        number = re.search(r"os error (\d+)", str(error))
        reason = " ".join(str(error).split())
        raise OSError(int(number[1]) if number else errno.EIO, reason, str(path.parent)) from error
