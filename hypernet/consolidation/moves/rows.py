"""ChosenRows: some neurons of each feed-forward layer move; and what else moves in slices shares with it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import Tensor

from hypernet.base.packed_rows import PackedRows
from hypernet.base.targets import find_targets
from hypernet.consolidation.moves.base import Examples, value_of
from hypernet.consolidation.weights import MovedWeights, installed
from hypernet.doc_to_lora import DocToLoRA

ROW_CHOICES = ("random", "norm", "tfidf", "kl", "gradient")


class Slices(ABC):
    """Some slices of some weights along dimension `dim` move, those with the highest scores. All else stays to the bit.

    Args:
        number: of slices of each weight.
    """

    takes_adapters = False
    dim: ClassVar[int]

    def __init__(self, number: int) -> None:
        self.number = number
        self._begun: dict[str, tuple[Tensor, Tensor]] = {}  # name → weight at the start, slices that move

    @abstractmethod
    def _scores(self, model: DocToLoRA, seed: int, examples: Examples) -> dict[str, Tensor]:
        """Name of the weight → of each slice [n] how much it should move."""

    def start(
        self, model: DocToLoRA, weights: MovedWeights | None, *, seed: int, examples: Examples | None = None
    ) -> dict[str, Tensor]:
        given: Mapping[str, Tensor] = {} if weights is None else weights.tensors
        with installed(model.base_model, given):
            scores = self._scores(model, seed, examples or Examples())
        self._begun, parameters = {}, {}
        for name, of_slices in scores.items():
            weight = value_of(model, name, given)
            chosen = of_slices.sort(descending=True, stable=True).indices[: self.number].sort().values
            self._begun[name] = weight, chosen
            parameters[name] = weight.index_select(self.dim, chosen).requires_grad_()
        return parameters

    def tensors(self, model: DocToLoRA, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        begun = ((name, *self._begun[name]) for name in parameters)
        return {name: weight.index_copy(self.dim, chosen, parameters[name]) for name, weight, chosen in begun}

    def result(self, model: DocToLoRA, parameters: Mapping[str, Tensor]) -> MovedWeights:
        return MovedWeights({name: tensor.detach() for name, tensor in self.tensors(model, parameters).items()})


class ChosenRows(Slices):
    """Some neurons of each feed-forward layer: columns of its down projection W. All else stays the same to the bit.

    A neuron's contribution to a text is c(i) = Σ_tokens |h_i| ‖W[:, i]‖, with h the input of W. By "tfidf" those move
    that contribute much to the lessons and to few of the rehearsed questions B, each a background batch of its own; by
    "kl" those with the largest terms of KL(p ‖ q), p being the lessons' shares of contributions and q the background's:

        tfidf(i) = c(i) / Σ_j c(j) · log((|B| + 1) / (1 + Σ_b 1[c_b(i) > mean_j c_b(j)]))
        kl(i)    = p(i) log(p(i) / q(i)),  p(i) = c(i) / Σ_j c(j),  q(i) = Σ_b c_b(i) / Σ_b Σ_j c_b(j)

    The design's condition c_b(i) > 0 holds for every neuron of a gated layer, so that all would have an idf of 0.

    Args:
        num_rows: in each block.
        by: "random", the control that decides; "norm", those with the largest columns; "tfidf"; "kl"; or "gradient",
            those whose column of the gradient of -log p(answers of the lessons) is the longest.
        module: name of the down projection.

    Raises:
        ValueError: an unknown choice, no row; or, at the start, a choice by examples without them.

    Source: tf-idf over background batches as in Lin et al. 2025, https://arxiv.org/abs/2510.15103, and KL of usage as
    in Goyal et al. 2026, https://arxiv.org/abs/2604.05248; both have the slots of a memory layer in the place of
    neurons.
    """

    dim = 1

    def __init__(self, *, num_rows: int = 64, by: str = "random", module: str = "down_proj") -> None:
        if by not in ROW_CHOICES:
            raise ValueError(f"Rows are chosen by {', '.join(ROW_CHOICES)}, not {by!r}.")
        if num_rows < 1:
            raise ValueError(f"num_rows is {num_rows}. Give at least 1.")
        super().__init__(num_rows)
        self.by, self.module = by, module

    @property
    def needs_background(self) -> bool:
        """Whether the choice is one against rehearsed questions."""
        return self.by in ("tfidf", "kl")

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
        check_examples(examples, by=self.by, needs_background=self.needs_background)
        if self.by == "gradient":
            return _gradient_norms(model, names, examples.lessons)
        own, background = (_contributions(model, names, part) for part in examples)
        if self.by == "kl":
            return {name: kl_terms(own[name].sum(0), background[name].sum(0)) for name in names}
        active = {name: c > c.mean(1, keepdim=True) for name, c in background.items()}
        return {name: tfidf(own[name].sum(0), active[name]) for name in names}


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


def check_examples(examples: Examples, *, by: str, needs_background: bool) -> None:
    """Raises ValueError where a choice by examples lacks them."""
    if not examples.lessons or (needs_background and not examples.rehearsed):
        missing = "rehearsed questions: choose a rehearsal" if examples.lessons else "lessons to choose rows by"
        raise ValueError(f"Rows by {by} need {missing}, or take random ones.")


def tfidf(own: Tensor, active: Tensor) -> Tensor:
    """Of what the lessons use [n], and whether each background batch uses it [B, n]; see `ChosenRows`."""
    return own / own.sum() * (math.log(len(active) + 1) - (1.0 + active.sum(0)).log())


def kl_terms(own: Tensor, background: Tensor, *, added: float = 0.0) -> Tensor:
    """p log(p / q), their sum is KL(p ‖ q) in nats; of what lessons and background use, [n] each.

    Args:
        added: to each of the background's, where some of them are 0.
    """
    p, q = own / own.sum(), (background + added) / (background + added).sum()
    return torch.xlogy(p, p) - torch.xlogy(p, q)


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
