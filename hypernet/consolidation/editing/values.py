"""ValueSearch: the vector at the last token of a subject with which a base model gives the new answer, by gradient.

search = ValueSearch(steps=20)
delta = search(model, edits, path, replaces=True)     # [E, D]
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from hypernet.consolidation.editing.edits import Edit, EditRows, at_subjects, edit_rows, first_of
from hypernet.doc_to_lora import DocToLoRA


class ValueSearch:
    """δ* = argmin_δ  -1/P Σ_j log p(answer | prefix_j, question; m + δ) + kl_weight · KL(after ‖ before)(essence)

    m is what a layer gives at the subject's last token. The second term is on the first token of what the base model
    answers to the essence, a question after what the subject is. By Adam from δ = 0.

    Args:
        steps: at most; an edit is finished once its first term is below `enough`, in nats.
        lr: in units of m's root mean square.
        kl_weight: 0 leaves the second term out.
        max_norm: of δ, in units of ‖m‖; None: without bound.
        prefixes: read before the question, so that the answer holds behind other text too.
        essence: a question with {subject}.

    Raises:
        ValueError: a setting is out of its range, or the essence lacks its {subject}.

    Source: Meng et al. 2022, eq. 4, https://arxiv.org/abs/2202.05262.
    """

    def __init__(
        self,
        *,
        steps: int = 20,
        lr: float = 0.5,
        enough: float = 0.05,
        kl_weight: float = 0.0625,
        max_norm: float | None = None,
        prefixes: Sequence[str] = (),
        essence: str = "What is {subject}?",
    ) -> None:
        if steps < 1 or not 0 < lr < math.inf:
            raise ValueError(f"steps is {steps} and lr {lr}. Give at least one step, and a finite lr above 0.")
        if kl_weight < 0 or enough < 0 or (max_norm is not None and not max_norm > 0):
            raise ValueError(
                f"kl_weight is {kl_weight}, enough {enough}, max_norm {max_norm}. Give none below 0, and max_norm "
                "above it or null."
            )
        if "{subject}" not in essence:
            raise ValueError(f"essence is {essence!r}. Write {{subject}} where the subject stands.")
        self.steps, self.lr, self.enough, self.kl_weight, self.max_norm = steps, lr, enough, kl_weight, max_norm
        self.prefixes, self.essence = tuple(prefixes), essence

    def __call__(
        self,
        model: DocToLoRA,
        edits: Sequence[Edit],
        path: str,
        *,
        replaces: bool = False,
        directions: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """δ* of each edit, [E, D], by the weights that are in the base model now.

        Args:
            path: of the module whose output changes: a down projection or a block.
            replaces: every prompt gets the same vector, m of the question alone + δ; False: each its own m + δ.
            directions: path of a down projection → d of each edit, [E, d_in]: with n of these each gives a token with
                key k its own output + (kᵀd) δ / n, as W + δ dᵀ / n does; None: the module at `path` changes, at the
                subject's last token alone.
        """
        asked = [Edit(edit.subject, self._essence(edit), "") for edit in edits] if self.kl_weight else []
        rows = edit_rows(model, [*edits, *asked], self.prefixes)  # one forward pass for both terms
        own = at_subjects(model, rows, [path])[path][1]
        alone = own[rows.owners.diff(prepend=-torch.ones_like(rows.owners[:1])) > 0][: len(edits)]
        owners = rows.owners % len(edits)
        start = alone[owners] if replaces else own

        def changes(delta: Tensor) -> dict[str, Change]:
            if directions is None:
                return {path: at_places(rows, start + delta[owners])}
            each = delta[owners, None] / len(directions)
            return {name: _through(d[owners], each) for name, d in directions.items()}

        before = _answers(model, rows, {}).detach()
        facing = _first(rows) & (rows.owners >= len(edits))[:, None]
        answers = _answered(rows) & (rows.owners < len(edits))[:, None]
        # In units of the root mean square, so that one lr serves base models of any width.
        scale = alone.norm(dim=1, keepdim=True)
        unit = scale / alone.shape[1] ** 0.5
        free = torch.zeros_like(alone, requires_grad=True)
        optimizer = torch.optim.Adam([free], lr=self.lr)
        done = torch.zeros(len(edits), dtype=torch.bool, device=alone.device)
        found = torch.zeros_like(alone)
        for step in range(self.steps + 1):
            delta = self._bounded(unit * free, scale)
            after = _answers(model, rows, changes(delta))
            nll = self._mean(rows, answers, -_of_targets(after, rows), owners)
            found = torch.where(done[:, None], found, delta.detach())
            done = done | (nll.detach() < self.enough)
            if step == self.steps or bool(done.all()):
                break
            loss = nll[~done].sum()
            if asked:
                divergence = kl_div(before, after, reduction="none", log_target=True).sum(1)
                loss = loss + self.kl_weight * self._mean(rows, facing, divergence, owners)[~done].sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return found

    def _mean(self, rows: EditRows, wanted: Tensor, each: Tensor, owners: Tensor) -> Tensor:
        """Of values of answer tokens [N] the sum over those wanted, the mean over an edit's prompts, [E]."""
        where = _answered(rows)
        of_rows = each.new_zeros(len(owners)).index_add(0, where.nonzero()[:, 0], each * wanted[where])
        num_edits = int(owners.max()) + 1
        return of_rows.new_zeros(num_edits).index_add(0, owners, of_rows) / (1 + len(self.prefixes))

    def _essence(self, edit: Edit) -> str:
        return self.essence.replace("{subject}", edit.subject)

    def _bounded(self, delta: Tensor, scale: Tensor) -> Tensor:
        if self.max_norm is None:
            return delta
        # The zero vector has no gradient of its norm.
        norm = delta.square().sum(1, keepdim=True).add(1e-20).sqrt()
        return delta * (self.max_norm * scale / norm).clamp(max=1.0)


# Of what enters a module [R, S, d_in] and leaves it [R, S, D], what leaves it instead.
Change = Callable[[Tensor, Tensor], Tensor]


def at_places(rows: EditRows, values: Tensor) -> Change:
    """Vectors [R, D] in the place of a module's output at the subjects' last tokens."""
    index = torch.arange(len(rows.places), device=rows.places.device)
    return lambda _, output: output.index_put((index, rows.places), values.to(output))


def answer_nll(model: DocToLoRA, rows: EditRows, changes: Mapping[str, Change]) -> Tensor:
    """-log p of each row's answer, in nats, [R], with these modules, by their paths, changed."""
    each = -_of_targets(_answers(model, rows, changes), rows)
    return each.new_zeros(len(rows.places)).index_add(0, _answered(rows).nonzero()[:, 0], each)


def _through(directions: Tensor, delta: Tensor) -> Change:
    """Of d [R, d_in] and δ [R, 1, D], each row's."""
    return lambda keys, output: output + torch.einsum("rsd,rd->rs", keys, directions.to(keys))[..., None] * delta


def _answered(rows: EditRows) -> Tensor:
    """Where answer tokens are predicted, [R, S]."""
    return rows.rows.target_kind >= 0


def _first(rows: EditRows) -> Tensor:
    return _answered(rows) & (_answered(rows).cumsum(1) == 1)


def _of_targets(log_p: Tensor, rows: EditRows) -> Tensor:
    return log_p.gather(1, rows.rows.targets()[_answered(rows)][:, None])[:, 0]


def _answers(model: DocToLoRA, rows: EditRows, changes: Mapping[str, Change]) -> Tensor:
    """Log-probabilities where answer tokens are predicted, [N, V]."""
    where, head = _answered(rows), model.base_model.get_output_embeddings()
    model.injector.clear()
    with ExitStack() as undo:
        undo.callback(head.register_forward_pre_hook(lambda _, args: (args[0][where],)).remove)
        for path, change in changes.items():

            def put(_module: nn.Module, args: Any, output: Any, *, change: Change = change) -> Any:
                changed = change(args[0], first_of(output))
                return (changed, *output[1:]) if isinstance(output, tuple) else changed

            undo.callback(model.base_model.get_submodule(path).register_forward_hook(put).remove)
        logits: Tensor = model.base_model(input_ids=rows.rows.ids, use_cache=False).logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
