"""Files and folders that are there completely or not at all.

with replaced(path) as temporary:
    save_tensors(tensors, temporary)      # path changes only if the block ends well
with replaced_folder(directory) as folder:
    (folder / "notes.txt").write_text("...")  # so does directory
"""

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # seconds, and only `save_tensors` needs it
    from torch import Tensor


@contextmanager
def replaced(path: Path, *, mode: int = 0o644) -> Iterator[Path]:
    """A temporary name next to `path` that takes its place when the block ends well, and is removed if it fails.

    It keeps the permissions of what it replaces; a new file gets `mode`. An OSError about the temporary name names
    `path`.
    """
    temporary = path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex}")  # a name has at most 255 bytes
    try:
        yield temporary
        if path.exists():
            shutil.copymode(path, temporary)
        else:
            temporary.chmod(mode)
        temporary.replace(path)
    except OSError as error:
        if error.filename == str(temporary):  # a name that nobody has given
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replaced_folder(directory: Path) -> Iterator[Path]:
    """A folder next to `directory` that takes its place once the block is done, and vanishes if it fails."""
    made = [parent for parent in directory.parents if not parent.exists()]
    token = uuid.uuid4().hex
    new, old = (directory.with_name(f".{directory.name}.{token}.{suffix}") for suffix in ("new", "old"))
    try:
        new.mkdir(parents=True)
        yield new
        sync_folder(new)
        if directory.exists():
            directory.rename(old)
        new.rename(directory)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        if old.exists():
            old.rename(directory)
        for parent in made:
            # Only what is still empty: another process may have used it meanwhile.
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Waits until a folder's files are on the disk. A rename may reach it before the data does, so: before renaming."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_tensors(tensors: "dict[str, Tensor]", path: Path, *, metadata: dict[str, str] | None = None) -> None:
    """safetensors' save_file, raising OSError with the system's number where that raises a SafetensorError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        # safetensors puts the system's error into its text; callers look for an OSError.
        number = re.search(r"os error (\d+)", str(error))
        reason = " ".join(str(error).split())
        raise OSError(int(number[1]) if number else errno.EIO, reason, str(path.parent)) from error
