"""GeneratedAdapter: nothing moves; what a hypernetwork generated is the result."""

from collections.abc import Mapping

from torch import Tensor

from hypernet.consolidation.moves.base import Examples
from hypernet.consolidation.weights import MovedWeights
from hypernet.doc_to_lora import DocToLoRA


class GeneratedAdapter:
    """No parameters, so that no step is made: the generated adapters that training would start from are its result.

    Raises:
        ValueError: at the start, there are no weights to start from.
    """

    takes_adapters = True

    def __init__(self) -> None:
        self._begun: MovedWeights | None = None

    def start(
        self, model: DocToLoRA, weights: MovedWeights | None, *, seed: int, examples: Examples | None = None
    ) -> dict[str, Tensor]:
        if weights is None:
            raise ValueError('GeneratedAdapter has no generated adapters to start from. Set start="adapters".')
        self._begun = weights
        return {}

    def tensors(self, model: DocToLoRA, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(self.result(model, parameters).tensors)

    def result(self, model: DocToLoRA, parameters: Mapping[str, Tensor]) -> MovedWeights:
        assert self._begun is not None
        return self._begun
