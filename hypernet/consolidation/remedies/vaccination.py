"""Vaccination: a shift of all hidden states that is given while training, so that it is not learned."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hypernet.base.packed_rows import PackedRows
from hypernet.base.targets import find_blocks
from hypernet.consolidation.moves import Examples
from hypernet.consolidation.remedies.base import Remedy
from hypernet.doc_to_lora import DocToLoRA


class Vaccination(Remedy):
    """h ← h + α v behind one block while the student learns, and h again afterwards.

        v = mean h(answers of the lessons) - mean h(answers of rehearsed questions)

    with h the base model's output of the block where answer tokens are predicted, without memories. The source has
    answers with a trait and without it: what tells lessons from the rest is the trait here.

    Args:
        alpha: α; below 0 is the opposite, a control.
        layer: the block's number; None: the middle one.
        random: whether v is replaced by a random vector of the same norm, a control.

    Raises:
        ValueError: alpha is 0 or not finite; or, at the start, there is no such block, or examples are missing.

    Source: Chen et al. 2025, https://arxiv.org/abs/2507.21509 (preventative steering)
    """

    needs_background = True

    def __init__(self, *, alpha: float = 1.0, layer: int | None = None, random: bool = False) -> None:
        if not 0 < abs(alpha) < float("inf"):
            raise ValueError(f"alpha is {alpha}. Give a finite number other than 0, or no remedy.")
        self.alpha, self.layer, self.random = alpha, layer, random
        self._vector: Tensor | None = None

    def start(self, model: DocToLoRA, examples: Examples, *, seed: int) -> None:
        if not examples.lessons or not examples.rehearsed:
            raise ValueError("Vaccination needs lessons and rehearsed questions to tell them from: choose a rehearsal.")
        vector = mean_hidden(model, examples.lessons, self.layer) - mean_hidden(model, examples.rehearsed, self.layer)
        if self.random:
            drawn = torch.randn(len(vector), generator=torch.Generator().manual_seed(seed)).to(vector)
            vector = drawn * (vector.norm() / drawn.norm())
        self._vector = vector

    @contextmanager
    def around(self, model: DocToLoRA) -> Iterator[None]:
        assert self._vector is not None, "start comes first"
        with shifted(block_of(model, self.layer), self.alpha * self._vector):
            yield


def block_of(model: DocToLoRA, layer: int | None) -> nn.Module:
    """A block of the base model by its number; None: the middle one.

    Raises:
        ValueError: there is no such block.
    """
    decoder, name = find_blocks(model.base_model)
    blocks = getattr(decoder, name)
    layer = len(blocks) // 2 if layer is None else layer
    if not 0 <= layer < len(blocks):
        raise ValueError(f"layer is {layer}. Give a block's number, 0 to {len(blocks) - 1}.")
    block: nn.Module = blocks[layer]
    return block


@torch.no_grad()
def mean_hidden(model: DocToLoRA, batches: Sequence[PackedRows], layer: int | None) -> Tensor:
    """The base model's mean output of a block where answer tokens are predicted, [D]."""
    found: list[Tensor] = []
    model.injector.clear()
    for rows in batches:

        def keep(_module: object, _args: object, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            found.append(hidden[rows.target_kind >= 0])  # noqa: B023

        hook = block_of(model, layer).register_forward_hook(keep)
        try:
            model.base_model(input_ids=rows.ids, use_cache=False)
        finally:
            hook.remove()
    return torch.cat(found).mean(0)


@contextmanager
def shifted(block: nn.Module, shift: Tensor) -> Iterator[None]:
    """h ← h + shift behind a block, inside the `with` block."""

    def add(_module: object, _args: object, output: Any) -> Any:
        return (output[0] + shift, *output[1:]) if isinstance(output, tuple) else output + shift

    hook = block.register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()
