"""Moves: what one choice of what is trained must do, and the examples that it may depend on."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from hypernet.base.packed_rows import PackedRows
from hypernet.consolidation.weights import MovedWeights
from hypernet.doc_to_lora import DocToLoRA


class Examples(NamedTuple):
    """Prompts and answers as the student reads them, a row each: `lessons` on memories, and `rehearsed` ones."""

    lessons: Sequence[PackedRows] = ()
    rehearsed: Sequence[PackedRows] = ()


class Moves(Protocol):
    """A choice of what is trained. takes_adapters: whether it can start from generated adapters."""

    takes_adapters: bool

    def start(
        self, model: DocToLoRA, weights: MovedWeights | None, *, seed: int, examples: Examples | None = None
    ) -> dict[str, Tensor]:
        """The leaves to be trained, at what `weights` holds; None: the base model's own.

        Args:
            examples: what will be trained on, for a choice that depends on it.
        """
        ...

    def tensors(self, model: DocToLoRA, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameter name of the base model → its value."""
        ...

    def result(self, model: DocToLoRA, parameters: Mapping[str, Tensor]) -> MovedWeights: ...


def value_of(model: DocToLoRA, name: str, given: Mapping[str, Tensor]) -> Tensor:
    """A parameter's value among those that are given, or else the base model's own."""
    return given[name].detach() if name in given else model.base_model.get_parameter(name).detach()


def settings_of(part: Any) -> dict[str, Any]:
    """A part's class and plain settings, for a manifest."""
    plain = {name.lstrip("_"): value for name, value in vars(part).items() if _is_plain(value)}
    return {"class": type(part).__name__, **plain}


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, str | int | float)
