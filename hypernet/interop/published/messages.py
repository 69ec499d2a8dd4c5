"""Texts of unknown length, shortened for error messages of one line."""

from typing import Any


def shortened(thing: Any) -> str:
    """One line of at most 200 characters."""
    text = " ".join(str(thing).split())
    return text if len(text) <= 200 else text[:200] + "..."


def one_line(error: Exception) -> str:
    """The first line of an error, without its full stop."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return shortened(reason).rstrip(".")
