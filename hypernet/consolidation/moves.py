"""What may move in the base model: a LoRA, everything, the upper blocks, or chosen rows.

moves = LowRank(rank=16)
parameters = moves.start(base_model, None, seed=0)        # named leaves to be trained
moves.tensors(base_model, parameters)                      # the weights they make, differentiable
moves.result(model, parameters).save(folder, model)        # `MovedWeights`
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hypernet.adapters.adapter import LoRAAdapter, new_provenance
from hypernet.adapters.composition import compress
from hypernet.base.packed_rows import PackedRows
from hypernet.base.targets import find_blocks, find_targets
from hypernet.consolidation.weights import MovedWeights, installed
from hypernet.doc_to_lora import DocToLoRA

ROW_CHOICES = ("random", "norm", "tfidf", "gradient")
ATTENTION_AND_MLP = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


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
    """Some neurons of each feed-forward layer: columns of its down projection W. All else stays the same to the bit.

    A neuron's contribution to a text is c(i) = Σ_tokens |h_i| ‖W[:, i]‖, with h the input of W. By "tfidf" those move
    that contribute much to the lessons and to few of the rehearsed questions B, each a background batch of its own:

        tfidf(i) = c(i) / Σ_j c(j) · log((|B| + 1) / (1 + Σ_b 1[c_b(i) > mean_j c_b(j)]))

    The design's condition c_b(i) > 0 holds for every neuron of a gated layer, so that all would have an idf of 0.

    Args:
        num_rows: in each block.
        by: "random", the control that decides; "norm", those with the largest columns; "tfidf"; or "gradient", those
            whose column of the gradient of -log p(answers of the lessons) is the longest.
        module: name of the down projection.

    Raises:
        ValueError: an unknown choice, no row; or, at the start, a choice by examples without them.

    Source: tf-idf over background batches as in Lin et al. 2025, https://arxiv.org/abs/2510.15103, which has the slots
    of a memory layer in the place of neurons.
    """

    takes_adapters = False

    def __init__(self, *, num_rows: int = 64, by: str = "random", module: str = "down_proj") -> None:
        if by not in ROW_CHOICES:
            raise ValueError(f"Rows are chosen by {', '.join(ROW_CHOICES)}, not {by!r}.")
        if num_rows < 1:
            raise ValueError(f"num_rows is {num_rows}. Give at least 1.")
        self.num_rows, self.by, self.module = num_rows, by, module
        self._begun: dict[str, tuple[Tensor, Tensor]] = {}  # name → weight at the start, columns that move

    def start(
        self, model: DocToLoRA, weights: MovedWeights | None, *, seed: int, examples: Examples | None = None
    ) -> dict[str, Tensor]:
        given: Mapping[str, Tensor] = {} if weights is None else weights.tensors
        with installed(model.base_model, given):
            scores = self._scores(model, seed, examples or Examples())
        self._begun, parameters = {}, {}
        for name, of_rows in scores.items():
            weight = _value(model, name, given)
            chosen = of_rows.sort(descending=True, stable=True).indices[: self.num_rows].sort().values
            self._begun[name] = weight, chosen
            parameters[name] = weight[:, chosen].clone().requires_grad_()
        return parameters

    def _scores(self, model: DocToLoRA, seed: int, examples: Examples) -> dict[str, Tensor]:
        """Name of the weight → of each column [d_ff] how much it should move."""
        (target,) = find_targets(model.base_model, [self.module])
        names = [f"{module.path}.weight" for module in target.modules()]
        weights = {name: model.base_model.get_parameter(name).detach() for name in names}
        if self.by == "random":
            generator = torch.Generator().manual_seed(seed)
            return {n: torch.rand(w.shape[1], generator=generator).to(w.device) for n, w in weights.items()}
        if self.by == "norm":
            return {name: weight.norm(dim=0) for name, weight in weights.items()}
        if not examples.lessons or (self.by == "tfidf" and not examples.rehearsed):
            missing = "rehearsed questions: choose a rehearsal" if examples.lessons else "lessons to choose rows by"
            raise ValueError(f"Rows by {self.by} need {missing}, or take rows by random or norm.")
        if self.by == "gradient":
            return _gradient_norms(model, names, examples.lessons)
        own, background = (_contributions(model, names, part) for part in examples)
        return {name: _tfidf(own[name].sum(0), background[name]) for name in names}

    def tensors(self, model: DocToLoRA, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        begun = ((name, *self._begun[name]) for name in parameters)
        return {name: weight.index_copy(1, chosen, parameters[name]) for name, weight, chosen in begun}

    def result(self, model: DocToLoRA, parameters: Mapping[str, Tensor]) -> MovedWeights:
        return MovedWeights({name: tensor.detach() for name, tensor in self.tensors(model, parameters).items()})


@torch.no_grad()
def _contributions(model: DocToLoRA, names: Sequence[str], batches: Sequence[PackedRows]) -> dict[str, Tensor]:
    """c of each neuron in each row, [rows, d_ff]."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    model.injector.clear()
    for rows in batches:
        inside = (rows.segments >= 0)[..., None]
        with ExitStack() as undo:
            for name in names:
                module = model.base_model.get_submodule(name.removesuffix(".weight"))
                norms = model.base_model.get_parameter(name).float().norm(dim=0)

                def keep(_module: object, args: Any, *, name: str = name, norms: Tensor = norms) -> None:
                    found[name].append((args[0].float().abs() * inside).sum(1) * norms)  # noqa: B023

                undo.callback(module.register_forward_pre_hook(keep).remove)
            model.base_model(input_ids=rows.ids, use_cache=False)
    return {name: torch.cat(parts) for name, parts in found.items()}


def _tfidf(own: Tensor, background: Tensor) -> Tensor:
    """Of contributions [d_ff] to the lessons and [B, d_ff] to each background batch; see `ChosenRows`."""
    active = (background > background.mean(1, keepdim=True)).sum(0)
    return own / own.sum() * (math.log(len(background) + 1) - (1.0 + active).log())


def _gradient_norms(model: DocToLoRA, names: Sequence[str], batches: Sequence[PackedRows]) -> dict[str, Tensor]:
    """‖∂ Σ -log p(answer tokens) / ∂ W[:, i]‖ of each neuron, [d_ff]."""
    leaves = {name: model.base_model.get_parameter(name).detach().clone().requires_grad_() for name in names}
    model.injector.clear()
    for rows in batches:
        inputs = {"input_ids": rows.ids, "use_cache": False}
        logits = torch.func.functional_call(model.base_model, leaves, args=(), kwargs=inputs).logits
        where = rows.target_kind >= 0
        torch.nn.functional.cross_entropy(logits[where].float(), rows.targets()[where], reduction="sum").backward()
    found = {name: leaf.grad for name, leaf in leaves.items()}
    return {name: gradient.float().norm(dim=0) for name, gradient in found.items() if gradient is not None}


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
