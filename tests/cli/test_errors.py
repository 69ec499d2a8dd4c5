"""one_line: what a user can put right, and what keeps its traceback."""

import errno

import pytest
import torch

from hypernet.cli.errors import one_line


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("rank should be\n8, got 3."), "rank should be 8, got 3."),
        (MemoryError(), "Out of memory. Give it less at once, or a device with more memory."),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "Out of memory. Give it less"),
        (OSError(errno.ENOSPC, "No space left on device", "a"), "No space left on the disk of a. Free some"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "Permission denied: a. Check the path"),
        (FileExistsError("a is not empty."), "a is not empty."),
    ],
)
def test_mistakes_of_users_become_one_line(error, says):
    line = one_line(error)
    assert line is not None and line.startswith(says) and "\n" not in line


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), TypeError("x"), AssertionError()])
def test_mistakes_of_ours_keep_their_traceback(error):
    assert one_line(error) is None
