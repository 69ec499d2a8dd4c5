"""What may move in the base model: a LoRA, everything, the upper blocks, or chosen rows.

moves = LowRank(rank=16)
parameters = moves.start(base_model, None, seed=0)        # named leaves to be trained
moves.tensors(base_model, parameters)                      # the weights they make, differentiable
moves.result(model, parameters).save(folder, model)        # `MovedWeights`
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hypernet.adapters.adapter import LoRAAdapter, new_provenance
from hypernet.adapters.composition import compress
from hypernet.base.targets import find_blocks, find_targets
from hypernet.consolidation.weights import MovedWeights
from hypernet.doc_to_lora import DocToLoRA

ATTENTION_AND_MLP = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Moves(Protocol):
    """A choice of what is trained. takes_adapters: whether it can start from generated adapters."""

    takes_adapters: bool

    def start(self, model: DocToLoRA, weights: MovedWeights | None, *, seed: int) -> dict[str, Tensor]:
        """The leaves to be trained, at what `weights` holds; None: the base model's own."""
        ...

    def tensors(self, model: DocToLoRA, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameter name of the base model → its value."""
        ...

    def result(self, model: DocToLoRA, parameters: Mapping[str, Tensor]) -> MovedWeights: ...


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

    def start(self, model: DocToLoRA, weights: MovedWeights | None, *, seed: int) -> dict[str, Tensor]:
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


class _Whole(ABC):
    """Parameters of the base model that move as they are."""

    takes_adapters = False

    @abstractmethod
    def names(self, model: DocToLoRA) -> list[str]:
        """Of the parameters that move."""

    def start(self, model: DocToLoRA, weights: MovedWeights | None, *, seed: int) -> dict[str, Tensor]:
        given: Mapping[str, Tensor] = {} if weights is None else weights.tensors
        names = self.names(model)
        return {name: _value(model, name, given).clone().requires_grad_() for name in names}

    def tensors(self, model: DocToLoRA, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(parameters)

    def result(self, model: DocToLoRA, parameters: Mapping[str, Tensor]) -> MovedWeights:
        return MovedWeights({name: tensor.detach().clone() for name, tensor in parameters.items()})


class Everything(_Whole):
    """Every weight of the base model; the result is a merged base model."""

    def names(self, model: DocToLoRA) -> list[str]:
        return [name for name, _ in model.base_model.named_parameters()]


class UpperBlocks(_Whole):
    """All blocks but the lowest ones; embeddings stay.

    Args:
        num_frozen: blocks at the bottom that do not move.

    Raises:
        ValueError: nothing would move.
    """

    def __init__(self, *, num_frozen: int = 2) -> None:
        self.num_frozen = num_frozen

    def names(self, model: DocToLoRA) -> list[str]:
        decoder, name = find_blocks(model.base_model)
        blocks = getattr(decoder, name)
        if not 0 <= self.num_frozen < len(blocks):
            raise ValueError(f"num_frozen is {self.num_frozen}, the base model has {len(blocks)} blocks. Give fewer.")
        moving = {id(parameter) for block in blocks[self.num_frozen :] for parameter in block.parameters()}
        return [name for name, parameter in model.base_model.named_parameters() if id(parameter) in moving]


class ChosenRows:
    """Some neurons of each feed-forward layer: columns of its down projection.

    Args:
        num_rows: in each block.
        by: "random", the control that decides; or "norm", those with the largest columns.
        module: name of the down projection.

    Raises:
        ValueError: an unknown choice.
    """

    takes_adapters = False

    def __init__(self, *, num_rows: int = 64, by: str = "random", module: str = "down_proj") -> None:
        if by not in ("random", "norm"):
            raise ValueError(f"Rows are chosen by random or norm, not {by!r}.")
        self.num_rows, self.by, self.module = num_rows, by, module

    def start(self, model: DocToLoRA, weights: MovedWeights | None, *, seed: int) -> dict[str, Tensor]:
        given: Mapping[str, Tensor] = {} if weights is None else weights.tensors
        parameters: dict[str, Tensor] = {}
        self._seed = seed
        for name in self._names(model):
            columns = _value(model, name, given)[:, self._chosen(model, name)]
            parameters[name] = columns.clone().requires_grad_()
        self._start = {name: _value(model, name, given) for name in parameters}
        return parameters

    def _names(self, model: DocToLoRA) -> list[str]:
        (target,) = find_targets(model.base_model, [self.module])
        return [f"{module.path}.weight" for module in target.modules()]

    def _chosen(self, model: DocToLoRA, name: str) -> Tensor:
        weight = model.base_model.get_parameter(name).detach()
        number = min(self.num_rows, weight.shape[1])
        if self.by == "norm":
            return weight.norm(dim=0).topk(number).indices.sort().values
        generator = torch.Generator().manual_seed(self._seed + sum(name.encode()))
        return torch.randperm(weight.shape[1], generator=generator)[:number].sort().values.to(weight.device)

    def tensors(self, model: DocToLoRA, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: self._start[name].index_copy(1, self._chosen(model, name), columns)
            for name, columns in parameters.items()
        }

    def result(self, model: DocToLoRA, parameters: Mapping[str, Tensor]) -> MovedWeights:
        return MovedWeights({name: tensor.detach() for name, tensor in self.tensors(model, parameters).items()})


def _value(model: DocToLoRA, name: str, given: Mapping[str, Tensor]) -> Tensor:
    return given[name].detach() if name in given else model.base_model.get_parameter(name).detach()


def settings_of(part: Any) -> dict[str, Any]:
    """A part's class and plain settings, for a manifest."""
    plain = {name.lstrip("_"): value for name, value in vars(part).items() if _is_plain(value)}
    return {"class": type(part).__name__, **plain}


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, str | int | float)
