"""Rome: one fact, one layer, a change of rank 1; and random_like, the control of equal norm."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hypernet.consolidation.editing.edits import (
    Edit,
    Edited,
    Editor,
    at_subjects,
    edit_rows,
    editable,
    mean_by_owner,
)
from hypernet.consolidation.editing.moments import KeyMoments
from hypernet.consolidation.editing.values import ValueSearch
from hypernet.consolidation.weights import MovedWeights, installed
from hypernet.doc_to_lora import DocToLoRA


class Rome(Editor):
    """W' = W + (v* - W k*) uᵀ / (uᵀ k*), u = C⁻¹ k*: of all with W' k* = v* the one nearest to W over the keys of C.

    k* is the mean key over the search's prefixes, v* what the layer must give (`ValueSearch`). Several edits are made
    one after the other.

    Args:
        layer: of the block.
        moments: C of each layer.
        search: of v*.
        damping: added to C's diagonal, in units of its mean; for few texts.
        through_weight: v* is searched for as W' gives it, to every token the share that its key has; False: as eq. 4
            has it, at the subject's last token alone, whatever W' does to the others.

    Raises:
        ValueError: damping is below 0; at an edit, C is singular, or as `Editor.edit`.

    Source: Meng et al. 2022, eq. 2 to 4, https://arxiv.org/abs/2202.05262.
    """

    def __init__(
        self,
        *,
        layer: int,
        moments: KeyMoments,
        search: ValueSearch | None = None,
        damping: float = 1e-3,
        through_weight: bool = False,
    ) -> None:
        check_damping(damping)
        self.layer, self.moments, self.search, self.damping = layer, moments, search or ValueSearch(), damping
        self.through_weight = through_weight

    def edit(self, model: DocToLoRA, edits: Sequence[Edit], *, start: Edited | None = None) -> Edited:
        (path,) = editable(model, [self.layer])
        moment = damped(self.moments.of(model, [path])[path], self.damping)
        tensors = {} if start is None else dict(start.weights.tensors)
        edit_rows(model, edits)  # all that can be wrong with one is found before the first is made
        for edit in edits:
            with installed(model.base_model, tensors):
                rows = edit_rows(model, [edit], self.search.prefixes)
                keys, outputs = at_subjects(model, rows, [path])[path]
                key = mean_by_owner(keys, rows.owners)[0].double()
                weight = model.base_model.get_parameter(f"{path}.weight").detach()
                if self.through_weight:
                    direction = rank_one_direction(key, moment)
                    delta = self.search(model, [edit], path, directions={path: direction[None]})
                    value = weight.double() @ key + delta[0].double()
                else:
                    delta = self.search(model, [edit], path, replaces=True)
                    value = (outputs[0] + delta[0]).double() - _bias(model, path)
                change = rank_one(weight.double(), key, value, moment)
            tensors[f"{path}.weight"] = (weight.double() + change).to(weight.dtype)
        return Edited(MovedWeights(tensors))


def random_like(edited: Edited, norms: Mapping[str, float], *, seed: int) -> Edited:
    """Control: a random change of rank 1 in each of these weights.

    Args:
        edited: with the weights to be changed in it.
        norms: name of a weight → Frobenius norm of its change.
    """
    tensors, generator = dict(edited.weights.tensors), torch.Generator().manual_seed(seed)
    for name, norm in norms.items():
        weight = tensors[name].double()
        left, right = (torch.randn(size, generator=generator, dtype=weight.dtype) for size in weight.shape)
        change = torch.outer(left, right).to(weight.device) * (norm / (left.norm() * right.norm()))
        tensors[name] = (weight + change).to(tensors[name].dtype)
    return Edited(MovedWeights(tensors))


def _bias(model: DocToLoRA, path: str) -> Tensor | float:
    bias = dict(model.base_model.get_submodule(path).named_parameters()).get("bias")
    return 0.0 if bias is None else bias.detach().double()


def rank_one(weight: Tensor, key: Tensor, value: Tensor, moment: Tensor) -> Tensor:
    """W' - W of `Rome`, [d_out, d_in], from W [d_out, d_in], k* [d_in], v* [d_out] and C [d_in, d_in].

    Raises:
        ValueError: C is singular.
    """
    return torch.outer(value - weight @ key, rank_one_direction(key, moment))


def rank_one_direction(key: Tensor, moment: Tensor) -> Tensor:
    """u / (uᵀ k*) with u = C⁻¹ k*, [d_in]: the share of v* - W k* that W' gives a key is its product with this.

    Raises:
        ValueError: C is singular.
    """
    direction = solved(moment, key[:, None])[:, 0]
    return direction / (direction @ key)


def solved(moment: Tensor, right: Tensor) -> Tensor:
    """C⁻¹ B for a symmetric positive C.

    Raises:
        ValueError: C is singular.
    """
    factor, failed = torch.linalg.cholesky_ex(moment)
    if bool(failed):
        raise ValueError("C = E[kkᵀ] is singular: give more texts than a layer has keys, or damping above 0.")
    return torch.cholesky_solve(right, factor)


def damped(moment: Tensor, damping: float) -> Tensor:
    """C + damping · mean(diag C) · I."""
    return moment + damping * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype).to(moment)


def check_damping(damping: float) -> None:
    if not damping >= 0:
        raise ValueError(f"damping is {damping}. Give 0 or more.")
