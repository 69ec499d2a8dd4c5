"""Memit: many facts at once, spread over several layers; AlphaEdit: the same inside the null space of other keys."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hypernet.base.targets import find_blocks
from hypernet.consolidation.editing.edits import (
    Edit,
    Edited,
    Editor,
    EditRows,
    at_subjects,
    edit_rows,
    editable,
    mean_by_owner,
)
from hypernet.consolidation.editing.moments import KeyMoments
from hypernet.consolidation.editing.rome import check_damping, damped, solved
from hypernet.consolidation.editing.values import ValueSearch
from hypernet.consolidation.weights import MovedWeights, installed
from hypernet.doc_to_lora import DocToLoRA

_BATCH = 32  # edits whose values are searched at once


class Memit(Editor):
    """ΔW_l = Rᵀ K (weight · C + KᵀK)⁻¹ in each of the layers, from the lowest to the highest.

    The values z are searched for at the output of the highest layer's block (`ValueSearch`), by the weights before the
    edits. R holds, an edit a row, what is still missing there, z - h, divided by the number of layers from l to the
    highest; K the keys. Both are taken anew once the layers below have changed.

    Args:
        layers: of the blocks.
        moments: C of each layer.
        search: of z.
        weight: of what the layers do for other keys.
        damping: added to C's diagonal, in units of its mean.
        through_weight: δ is searched for as the layers give it, an equal part each, to every token the share that its
            keys have; it is divided among them so. False: as the paper has it, at the subject's last token alone.

    Raises:
        ValueError: weight is not above 0, or damping below it; at an edit as `Editor.edit`.

    Source: Meng et al. 2023, eq. 14 to 20 and algorithm 1, https://arxiv.org/abs/2210.07229.
    """

    def __init__(
        self,
        *,
        layers: Sequence[int],
        moments: KeyMoments,
        search: ValueSearch | None = None,
        weight: float = 100.0,
        damping: float = 1e-3,
        through_weight: bool = False,
    ) -> None:
        check_damping(damping)
        if not weight > 0:
            raise ValueError(f"weight is {weight}. Give more than 0.")
        self.layers, self.moments, self.search = tuple(layers), moments, search or ValueSearch()
        self.weight, self.damping, self.through_weight = weight, damping, through_weight

    def edit(self, model: DocToLoRA, edits: Sequence[Edit], *, start: Edited | None = None) -> Edited:
        paths = editable(model, self.layers)
        moments = self.moments.of(model, paths)
        tensors = {} if start is None else dict(start.weights.tensors)
        past = {} if start is None else dict(start.past)
        decoder, blocks = find_blocks(model.base_model)
        block = getattr(decoder, blocks)[max(self.layers)]
        top = next(path for path, module in model.base_model.named_modules() if module is block)
        rows, alone = edit_rows(model, edits, self.search.prefixes), edit_rows(model, edits)
        with installed(model.base_model, tensors):
            keys = self._keys(model, rows, paths)
            directions = self._directions(keys, moments, past) if self.through_weight else None
            delta = self._searched(model, edits, top, directions)
            target = at_subjects(model, alone, [top])[top][1] + delta
        for place, path in enumerate(paths):
            with installed(model.base_model, tensors):
                weight = model.base_model.get_parameter(f"{path}.weight").detach()
                if self.through_weight:
                    own, left = keys[path], delta.double() / len(paths)
                else:
                    own = self._keys(model, rows, [path])[path]
                    left = (target - at_subjects(model, alone, [top])[top][1]).double() / (len(paths) - place)
            change = self._change(path, left, own, moments[path], past)
            tensors[f"{path}.weight"] = (weight.double() + change).to(weight.dtype)
        return Edited(MovedWeights(tensors), past)

    @staticmethod
    def _keys(model: DocToLoRA, rows: EditRows, paths: Sequence[str]) -> dict[str, Tensor]:
        """Path → of each edit the mean over its prompts, [E, d_in], float64."""
        found = at_subjects(model, rows, paths)
        return {path: mean_by_owner(found[path][0], rows.owners).double() for path in paths}

    def _searched(
        self, model: DocToLoRA, edits: Sequence[Edit], top: str, directions: Mapping[str, Tensor] | None
    ) -> Tensor:
        found = []
        for begin in range(0, len(edits), _BATCH):
            part = slice(begin, begin + _BATCH)
            own = None if directions is None else {path: d[part] for path, d in directions.items()}
            found.append(self.search(model, edits[part], top, directions=own))
        return torch.cat(found)

    def _directions(
        self, keys: Mapping[str, Tensor], moments: Mapping[str, Tensor], past: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Path → d of each edit, [E, d_in], with ΔW = δ dᵀ if it were the only one."""
        one = torch.ones(1, 1, dtype=torch.float64, device=next(iter(keys.values())).device)
        return {
            path: torch.cat([self._change(path, one, key[None], moments[path], dict(past)) for key in own])
            for path, own in keys.items()
        }

    def _change(self, path: str, left: Tensor, keys: Tensor, moment: Tensor, past: dict[str, Tensor]) -> Tensor:
        return spread(left, keys, self.weight * damped(moment, self.damping))


class AlphaEdit(Memit):
    """Memit's layers and values, with ΔW_l = Rᵀ K P ((K_p ᵀK_p + KᵀK) P + weight · I)⁻¹.

    P projects on the null space of C: its eigenvectors with an eigenvalue below `threshold` of the largest, so that
    ΔW C = 0 up to these. K_p are the keys of the edits before.

    Args:
        layers, moments, search, through_weight: as `Memit`.
        threshold: between 0 and 1.
        weight: of ‖ΔW‖², in units of C's mean diagonal.

    Raises:
        ValueError: threshold is not between 0 and 1, or weight not above 0; at an edit, nothing is below the threshold,
            or as `Editor.edit`.

    Source: Fang et al. 2024, eq. 9 to 14, https://arxiv.org/abs/2410.02355.
    """

    def __init__(
        self,
        *,
        layers: Sequence[int],
        moments: KeyMoments,
        search: ValueSearch | None = None,
        threshold: float = 1e-2,
        weight: float = 1e-2,
        through_weight: bool = False,
    ) -> None:
        super().__init__(
            layers=layers, moments=moments, search=search, weight=weight, damping=0.0, through_weight=through_weight
        )
        if not 0 < threshold < 1:
            raise ValueError(f"threshold is {threshold}. Give a number between 0 and 1.")
        self.threshold = threshold
        self._projectors: dict[str, tuple[Tensor, Tensor]] = {}  # path → C, P

    def _change(self, path: str, left: Tensor, keys: Tensor, moment: Tensor, past: dict[str, Tensor]) -> Tensor:
        kept = self._projectors.get(path)
        if kept is None or not torch.equal(kept[0], moment):
            kept = self._projectors[path] = moment, null_space(moment, self.threshold)
        before = past.get(path, torch.zeros_like(moment))
        past[path] = before + keys.T @ keys
        return projected(left, keys, kept[1], before, self.weight * float(moment.diagonal().mean()))


def spread(left: Tensor, keys: Tensor, moment: Tensor) -> Tensor:
    """ΔW = Rᵀ K (C + KᵀK)⁻¹, [d_out, d_in], from R [E, d_out], K [E, d_in] and C [d_in, d_in].

    Raises:
        ValueError: the sum is singular.
    """
    return left.T @ solved(moment + keys.T @ keys, keys.T).T


def null_space(moment: Tensor, threshold: float) -> Tensor:
    """Projector [d, d] on the eigenvectors of C with an eigenvalue below `threshold` of the largest.

    Raises:
        ValueError: there is none.
    """
    values, vectors = torch.linalg.eigh(moment)
    low = vectors[:, values < threshold * values[-1]]
    if not low.shape[1]:
        raise ValueError(f"No eigenvalue of C is below {threshold} of the largest. Set threshold higher.")
    return low @ low.T


def projected(left: Tensor, keys: Tensor, projector: Tensor, past: Tensor, weight: float) -> Tensor:
    """ΔW = Rᵀ K P ((C_p + KᵀK) P + weight · I)⁻¹, [d_out, d_in], with C_p the sum of earlier kkᵀ, [d_in, d_in]."""
    system = (past + keys.T @ keys) @ projector + weight * torch.eye(len(past), dtype=past.dtype).to(past)
    return torch.linalg.solve(system.T, (left.T @ keys @ projector).T).T
