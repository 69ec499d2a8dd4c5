"""LowRank: a LoRA in all blocks moves, and nothing else."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hypernet.adapters.adapter import LoRAAdapter, new_provenance
from hypernet.adapters.composition import compress
from hypernet.base.targets import find_targets
from hypernet.consolidation.moves.base import Examples
from hypernet.consolidation.weights import MovedWeights
from hypernet.doc_to_lora import DocToLoRA

ATTENTION_AND_MLP = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LowRank:
    """A LoRA, W + BᵀA, in all blocks; the result is an adapter that PEFT loads.

    Args:
        rank: of each module.
        target_modules: names of linear layers.

    Raises:
        ValueError: the rank is below 1.
    """

    takes_adapters = True

    def __init__(self, *, rank: int = 16, target_modules: Sequence[str] = ATTENTION_AND_MLP) -> None:
        if rank < 1:
            raise ValueError(f"rank is {rank}. Give at least 1.")
        self.rank, self.target_modules = rank, tuple(target_modules)

    def start(
        self, model: DocToLoRA, weights: MovedWeights | None, *, seed: int, examples: Examples | None = None
    ) -> dict[str, Tensor]:
        given = {} if weights is None or weights.adapter is None else self._by_path(weights.adapter)
        generator = torch.Generator().manual_seed(seed)
        parameters = {}
        for target in find_targets(model.base_model, self.target_modules):
            for module in target.modules():
                A = torch.randn(self.rank, module.d_in, generator=generator) / module.d_in**0.5
                B = torch.zeros(self.rank, module.d_out)
                if module.path in given:
                    # Rows that are not given stay random in A and zero in B.
                    for own, rows in zip((A, B), given[module.path], strict=True):
                        own[: len(rows)] = rows
                parameters[f"{module.path}.A"] = A.to(model.device).requires_grad_()
                parameters[f"{module.path}.B"] = B.to(model.device).requires_grad_()
        return parameters

    def _by_path(self, adapter: LoRAAdapter) -> dict[str, tuple[Tensor, Tensor]]:
        """Module path → A [r, d_in], B [r, d_out] of the nearest adapter of no more than this rank, scaling 1."""
        if adapter.rank > self.rank:
            adapter, _ = compress(adapter, self.rank)
        factor, found = adapter.scaling**0.5, {}
        for target in adapter.targets:
            A, B = adapter.concatenated()[target.name]
            for module in target.modules():
                rows = A[module.layer, :, : module.d_in], B[module.layer, :, : module.d_out]
                found[module.path] = (factor * rows[0].float(), factor * rows[1].float())
        return found

    def tensors(self, model: DocToLoRA, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = {}
        for path in (name.removesuffix(".A") for name in parameters if name.endswith(".A")):
            weight = model.base_model.get_parameter(f"{path}.weight")
            delta = parameters[f"{path}.B"].T @ parameters[f"{path}.A"]  # in float32, whatever the base model is in
            tensors[f"{path}.weight"] = weight + delta.to(weight.dtype)
        return tensors

    def result(self, model: DocToLoRA, parameters: Mapping[str, Tensor]) -> MovedWeights:
        targets = find_targets(model.base_model, self.target_modules)
        blocks: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}, "bias_A": {}, "bias_B": {}}
        for target in targets:
            for letter, width in (("A", target.d_in), ("B", target.d_out)):
                rows = torch.zeros(1, len(target.paths), self.rank, width)
                for module in target.modules():
                    own = parameters[f"{module.path}.{letter}"].detach().float().cpu()
                    rows[0, module.layer, :, : own.shape[1]] = own
                blocks[letter][target.name] = rows
                blocks[f"bias_{letter}"][target.name] = rows.new_zeros(len(target.paths), 0, width)
        provenance = new_provenance(
            [{"name": "consolidated memories", "sha256": None, "characters": 0, "chunks": [[0, 0]]}],
            generator=None,
            base_model_name=model.base_model_source,
            base_model_fingerprint=model.base_model_fingerprint,
        )
        provenance["operations"] = [{"operation": "fused"}]
        # The date would make the same weights another version.
        adapter = LoRAAdapter(targets=tuple(targets), scaling=1.0, provenance={**provenance, "created": ""}, **blocks)
        return MovedWeights.of_adapter(model.base_model, adapter.to(model.device))
