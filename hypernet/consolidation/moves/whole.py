"""Everything, UpperBlocks: parameters of the base model move as they are."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

from hypernet.base.targets import find_blocks
from hypernet.consolidation.moves.base import Examples, value_of
from hypernet.consolidation.weights import MovedWeights
from hypernet.doc_to_lora import DocToLoRA


class _Whole(ABC):
    """Parameters of the base model that move as they are."""

    takes_adapters = False

    @abstractmethod
    def names(self, model: DocToLoRA) -> list[str]:
        """Of the parameters that move."""

    def start(
        self, model: DocToLoRA, weights: MovedWeights | None, *, seed: int, examples: Examples | None = None
    ) -> dict[str, Tensor]:
        given: Mapping[str, Tensor] = {} if weights is None else weights.tensors
        names = self.names(model)
        return {name: value_of(model, name, given).clone().requires_grad_() for name in names}

    def tensors(self, model: DocToLoRA, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(parameters)

    def result(self, model: DocToLoRA, parameters: Mapping[str, Tensor]) -> MovedWeights:
        return MovedWeights({name: tensor.detach().clone() for name, tensor in parameters.items()})


class Everything(_Whole):
    """Every weight of the base model; the result is a merged base model."""

    def names(self, model: DocToLoRA) -> list[str]:
        return [name for name, _ in model.base_model.named_parameters()]


class UpperBlocks(_Whole):
    """All blocks but the lowest ones.

    Args:
        num_frozen: blocks at the bottom that do not move, from none to all.
        embeddings: whether what lies outside of the blocks moves too: embeddings, last norm and head.

    Raises:
        ValueError: at the start, there are not that many blocks, or nothing would move.
    """

    def __init__(self, *, num_frozen: int = 2, embeddings: bool = False) -> None:
        self.num_frozen, self.embeddings = num_frozen, embeddings

    def names(self, model: DocToLoRA) -> list[str]:
        decoder, name = find_blocks(model.base_model)
        blocks = getattr(decoder, name)
        if not 0 <= self.num_frozen <= len(blocks):
            raise ValueError(
                f"num_frozen is {self.num_frozen}, the base model has {len(blocks)} blocks. Give 0 to {len(blocks)}."
            )
        if self.num_frozen == len(blocks) and not self.embeddings:
            raise ValueError(f"Nothing moves with all {len(blocks)} blocks frozen. Freeze fewer, or move embeddings.")
        upper, lower = (
            {id(parameter) for block in part for parameter in block.parameters()}
            for part in (blocks[self.num_frozen :], blocks[: self.num_frozen])
        )
        every = model.base_model.named_parameters()
        return [name for name, p in every if id(p) in upper or (self.embeddings and id(p) not in lower)]
