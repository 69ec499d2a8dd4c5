"""What a command prints in one line: a mistake that the user can put right, instead of a traceback; and a warning,
without the place in the code that it comes from."""

import errno
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it
BROKEN_PIPE = 141  # exit status where whoever reads the output has left, as shells have it
LESS = "Give it less at once, or a device with more memory."


def one_line(error: BaseException, *, less: str = LESS) -> str | None:
    """What is wrong and what to do; None for a mistake of ours, which keeps its traceback.

    Args:
        less: what to do where memory runs out.
    """
    if isinstance(error, MemoryError) or (
        # torch's class for this is a RuntimeError too; comparing texts needs no torch.
        isinstance(error, RuntimeError) and ("out of memory" in str(error) or "can't allocate memory" in str(error))
    ):
        return f"Out of memory. {less}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"No space left on the disk of {error.filename or 'the output'}. Free some, or name another folder."
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}. Check the path and its permissions, or name another one."
    if isinstance(error, (ValueError, OSError)):
        return " ".join(str(error).split())
    return None


@contextmanager
def one_line_warnings(name: str) -> Iterator[None]:
    """Within the block, whatever is warned of is a line on standard error, once for each text.

    Args:
        name: of the command, in front of the line.
    """
    before, seen = warnings.showwarning, set()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = " ".join(str(message).split())
        if text not in seen:
            seen.add(text)
            print(f"{name}: warning: {text}", file=sys.stderr)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before
