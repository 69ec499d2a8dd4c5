"""Checkpoints of the Doc-to-LoRA authors: located, read without executing anything, converted to a HyperNetwork."""

from hypernet.interop.published.convert import Published, read_published
from hypernet.interop.published.locate import find_published, is_published

__all__ = ["Published", "find_published", "is_published", "read_published"]
