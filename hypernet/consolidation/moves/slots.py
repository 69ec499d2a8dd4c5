"""MemorySlots: some slots of a memory layer move."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from hypernet.base.packed_rows import PackedRows
from hypernet.base.product_keys import ProductKeyMemory, memory_layers
from hypernet.consolidation.moves.base import Examples
from hypernet.consolidation.moves.rows import Slices, check_examples, kl_terms, tfidf
from hypernet.doc_to_lora import DocToLoRA

SLOT_CHOICES = ("tfidf", "kl", "random")


class MemorySlots(Slices):
    """Values of some slots of the base model's memory layer. Its keys, and all else, stay the same to the bit.

    With c(i) the number of times that the lessons' tokens read slot i, and c_b(i) a background batch b's, as which each
    rehearsed question counts, those with the highest scores move:

        tfidf(i) = c(i) / Σ_j c(j) · log((|B| + 1) / (1 + Σ_b 1[c_b(i) > 0]))
        kl(i)    = p(i) log(p(i) / q(i)),  p(i) = c(i) / Σ_j c(j),  q(i) ∝ 1 + Σ_b c_b(i)

    Slots are chosen once, for all lessons; the source chooses them for each of its larger batches.

    Args:
        num_slots: of each memory layer.
        by: "tfidf", "kl", or "random" among those that the lessons read, the control.

    Raises:
        ValueError: an unknown choice, no slot; or, at the start, a base model without a memory layer, or a choice
            without examples.

    Source: Lin et al. 2025, https://arxiv.org/abs/2510.15103, and for KL Goyal et al. 2026,
    https://arxiv.org/abs/2604.05248
    """

    dim = 0

    def __init__(self, *, num_slots: int = 64, by: str = "tfidf") -> None:
        if by not in SLOT_CHOICES:
            raise ValueError(f"Slots are chosen by {', '.join(SLOT_CHOICES)}, not {by!r}.")
        if num_slots < 1:
            raise ValueError(f"num_slots is {num_slots}. Give at least 1.")
        super().__init__(num_slots)
        self.by = by

    @property
    def needs_background(self) -> bool:
        """Whether the choice is one against rehearsed questions."""
        return self.by != "random"

    def _scores(self, model: DocToLoRA, seed: int, examples: Examples) -> dict[str, Tensor]:
        memories = memory_layers(model.base_model)
        if not memories:
            raise ValueError(
                "The base model has no memory layer whose slots could move. Train one: "
                "python train.py experiment=tiny_memory_layer"
            )
        check_examples(examples, by=self.by, needs_background=self.needs_background)
        own = {path: reads.sum(0) for path, reads in _reads(model, memories, examples.lessons).items()}
        if self.by == "random":
            generator = torch.Generator().manual_seed(seed)
            drawn = {path: torch.rand(len(reads), generator=generator).to(reads) for path, reads in own.items()}
            return {f"{path}.values": drawn[path] * (reads > 0) for path, reads in own.items()}
        background = _reads(model, memories, examples.rehearsed)
        if self.by == "kl":
            return {f"{path}.values": kl_terms(own[path], c.sum(0), added=1.0) for path, c in background.items()}
        return {f"{path}.values": tfidf(own[path], c > 0) for path, c in background.items()}


@torch.no_grad()
def _reads(model: DocToLoRA, memories: dict[str, ProductKeyMemory], batches: Sequence[PackedRows]) -> dict[str, Tensor]:
    """How often each row's tokens read each slot, [rows, slots]."""
    found: dict[str, list[Tensor]] = {path: [] for path in memories}
    model.injector.clear()
    for rows in batches:
        inside = (rows.segments >= 0)[..., None, None]
        with ExitStack() as undo:
            for path, memory in memories.items():

                def count(memory: Any, args: Any, *, path: str = path) -> None:
                    slots, _ = memory.lookup(args[0])
                    reads = torch.zeros(len(slots), len(memory.values), device=slots.device)
                    ones = inside.expand_as(slots).flatten(1).float()  # noqa: B023
                    found[path].append(reads.scatter_add_(1, slots.flatten(1), ones))

                undo.callback(memory.register_forward_pre_hook(count).remove)
            model.base_model(input_ids=rows.ids, use_cache=False)
    return {path: torch.cat(parts) for path, parts in found.items()}
