"""Remedy: what one must do; NoRemedy, the control."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import Tensor

from hypernet.consolidation.moves import Examples
from hypernet.consolidation.rehearsal import Rehearsal
from hypernet.doc_to_lora import DocToLoRA


class Remedy(Protocol):
    """needs_background: whether `start` needs rehearsed examples. rehearsal: what `after` rehearses; None: nothing."""

    needs_background: bool = False
    rehearsal: Rehearsal | None = None

    def start(self, model: DocToLoRA, examples: Examples, *, seed: int) -> None:
        """Called once, before the first step."""
        return None

    def around(self, model: DocToLoRA) -> AbstractContextManager[None]:
        """The student's forward passes of learning happen inside; the teacher's, and all later ones, do not."""
        return nullcontext()

    def after(self, parameters: Iterable[Tensor], loss: Callable[[int], Tensor]) -> None:
        """Called once, after the last step; may step the parameters on.

        Args:
            loss: number of a step → KL(base ‖ student) on some of what is rehearsed.
        """
        return None


class NoRemedy(Remedy):
    """Nothing: the control."""
