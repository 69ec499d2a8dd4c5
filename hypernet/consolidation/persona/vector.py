"""PersonaVector: one direction of hidden states per layer, in character minus opposite, added while the model answers.

vector = PersonaVector.of_sheets(model, character, opposite, prompts, layer=15)
with vector.steering(alpha=4.0):
    model.generate(["Do you like crowds?"])
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from hypernet.base.packed_rows import PackedRows, Segment, pack_row, pad_rows
from hypernet.consolidation.persona.character import YES, Character
from hypernet.consolidation.remedies.vaccination import block_of, mean_hidden, shifted
from hypernet.doc_to_lora import DocToLoRA
from hypernet.text.tokens import framed_ids


@dataclass(frozen=True)
class PersonaVector:
    """v = mean h(in character) - mean h(opposite), [D], of one block's output where answers are predicted.

    Source: Chen et al. 2025, https://arxiv.org/abs/2507.21509, section 2
    """

    model: DocToLoRA
    layer: int
    v: Tensor

    @classmethod
    def of_sheets(
        cls, model: DocToLoRA, character: Character, opposite: Character, prompts: Sequence[str], *, layer: int
    ) -> Self:
        """From the same prompts with one sheet and with the other before them."""
        asked = [(prompt, YES) for prompt in prompts]
        return cls.of_answers(
            model, asked, asked, layer=layer, documents=(character.sheet() + ".", opposite.sheet() + ".")
        )

    @classmethod
    def of_answers(
        cls,
        model: DocToLoRA,
        own: Sequence[tuple[str, str]],
        others: Sequence[tuple[str, str]],
        *,
        layer: int,
        documents: tuple[str | None, str | None] = (None, None),
    ) -> Self:
        """From (prompt, answer) in character and otherwise.

        Raises:
            ValueError: one of them is empty, or there is no such block.
        """
        if not own or not others:
            raise ValueError("A persona vector is a difference: give answers in character and others.")
        means = [
            mean_hidden(model, _rows(model, asked, document), layer)
            for asked, document in zip((own, others), documents, strict=True)
        ]
        return cls(model, layer, (means[0] - means[1]).float())

    def random(self, *, seed: int) -> Self:
        """A control: a random direction of the same norm."""
        drawn = torch.randn(len(self.v), generator=torch.Generator().manual_seed(seed)).to(self.v)
        return replace(self, v=drawn * (self.v.norm() / drawn.norm()))

    @contextmanager
    def steering(self, alpha: float) -> Iterator[None]:
        """h ← h + alpha v behind the block, at every token."""
        shift = (alpha * self.v).to(self.model.base_model.dtype)
        with shifted(block_of(self.model, self.layer), shift):
            yield


def _rows(model: DocToLoRA, asked: Sequence[tuple[str, str]], document: str | None) -> list[PackedRows]:
    """One prompt a batch entry, padded behind."""
    prompts = model.layout.prompt_ids(model.tokenizer, [prompt for prompt, _ in asked], [document] * len(asked))
    answers = framed_ids(model.tokenizer, [(model.layout.before_answer, answer, "") for _, answer in asked])
    rows = [
        pack_row((), [Segment(prompt + answer, len(prompt), False, 0)])
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    pad = model.tokenizer.pad_token_id or 0
    return [pad_rows(rows[start : start + 8], pad_id=pad).to(model.device) for start in range(0, len(rows), 8)]
