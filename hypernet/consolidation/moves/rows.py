"""ChosenRows: some neurons of each feed-forward layer move."""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from hypernet.base.packed_rows import PackedRows
from hypernet.base.targets import find_targets
from hypernet.consolidation.moves.base import Examples, value_of
from hypernet.consolidation.weights import MovedWeights, installed
from hypernet.doc_to_lora import DocToLoRA

ROW_CHOICES = ("random", "norm", "tfidf", "gradient")


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
            weight = value_of(model, name, given)
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
