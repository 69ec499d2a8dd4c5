"""one_line: what a user can put right, as the one line that a command prints instead of a traceback."""

import errno

INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it
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
