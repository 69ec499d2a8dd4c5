"""OrthogonalSubspace: the directions with the smallest singular values move, the others are kept (PEFT's OSF)."""

from collections.abc import Mapping, Sequence

import torch
from peft import OSFConfig
from peft.tuners.osf import Linear as OSFLinear
from torch import Tensor, nn

from hypernet.base.targets import find_targets
from hypernet.consolidation.moves.base import Examples, value_of
from hypernet.consolidation.moves.low_rank import ATTENTION_AND_MLP
from hypernet.consolidation.weights import MovedWeights
from hypernet.doc_to_lora import DocToLoRA

_NAME = "moved"  # of PEFT's adapter


class OrthogonalSubspace:
    """W = U₁S₁V₁ + U₂S₂V₂ by singular values; U₂, S₂, V₂ move, and U₁, S₁, V₁, the largest ones, stay.

    The gradients of U₂ and V₂ are projected onto what is orthogonal to U₁ and V₁, by PEFT's hooks. AdamW, which scales
    every entry by itself, leaves that space again, a little in each step; plain gradient descent does not.

    Args:
        kept: share of the singular directions that stay, above 0 and below 1.
        target_modules: names of linear layers; all else stays the same to the bit.

    Raises:
        ValueError: kept is not between 0 and 1.

    Source: Nayak et al. 2025, https://arxiv.org/abs/2504.07097, as `peft.OSFConfig`
    """

    takes_adapters = False

    def __init__(self, *, kept: float = 0.5, target_modules: Sequence[str] = ATTENTION_AND_MLP) -> None:
        if not 0 < kept < 1:
            raise ValueError(f"kept is {kept}. Give a share between 0 and 1.")
        self.kept, self.target_modules = kept, tuple(target_modules)
        self._begun: dict[str, tuple[Tensor, OSFLinear]] = {}  # module path → weight at the start, its decomposition

    def start(
        self, model: DocToLoRA, weights: MovedWeights | None, *, seed: int, examples: Examples | None = None
    ) -> dict[str, Tensor]:
        given: Mapping[str, Tensor] = {} if weights is None else weights.tensors
        parameters: dict[str, Tensor] = {}
        self._begun = {}
        for target in find_targets(model.base_model, self.target_modules):
            for module in target.modules():
                weight = value_of(model, f"{module.path}.weight", given)
                linear = nn.Linear(module.d_in, module.d_out, bias=False, device="meta")
                linear.weight = nn.Parameter(weight, requires_grad=False)
                kept = max(1, round(self.kept * min(weight.shape)))
                layer = OSFLinear(linear, _NAME, config=OSFConfig(), effective_rank=kept)
                self._begun[module.path] = weight, layer
                moved = dict(layer.osf_svd_params[_NAME].named_parameters())
                parameters |= {f"{module.path}.{part}": moved[part] for part in ("U_low", "S_low", "V_low")}
        return parameters

    def tensors(self, model: DocToLoRA, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = {}
        for path, (weight, layer) in self._begun.items():
            U, S, V = (parameters[f"{path}.{part}"] for part in ("U_low", "S_low", "V_low"))
            at_start = (getattr(layer, f"_osf_{letter}_low_init")[_NAME] for letter in "USV")
            tensors[f"{path}.weight"] = weight + (_product(U, S, V) - _product(*at_start))
        return tensors

    def result(self, model: DocToLoRA, parameters: Mapping[str, Tensor]) -> MovedWeights:
        return MovedWeights({name: tensor.detach() for name, tensor in self.tensors(model, parameters).items()})


def _product(U: Tensor, S: Tensor, V: Tensor) -> Tensor:
    return torch.mm(U * S, V)
