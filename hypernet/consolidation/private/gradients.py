"""UserGradients: the gradient of each user's loss by itself, on what the base model has read once.

gradients = UserGradients(model, rank=32, seed=0)
read = gradients.read(rows)                                          # one pass of the base model
found, losses = gradients(theta, read, owners=[0, 0, 1], num_users=2)       # [U, d], [U]
gradients.log_likelihoods(theta, read), gradients.result(theta)

What moves is B of a LoRA, W + BᵀA, of the last block's down projection. Nothing in front of it depends on theta, so a
round costs a final norm and a head on answer tokens alone. A stays as it was drawn: the weights are then linear in what
is trained, and noise in it is not multiplied with noise. All numbers are one vector, theta [d].

Source: A frozen for privacy: Sun et al. 2024, https://arxiv.org/abs/2403.12313, section 3
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from hypernet.base.base_model import logits_at
from hypernet.base.packed_rows import PackedRows
from hypernet.base.targets import find_blocks, find_targets
from hypernet.consolidation.weights import MovedWeights
from hypernet.doc_to_lora import DocToLoRA

_TOLERANCE = 1e-3  # of a logit, between both ways to compute it


class Reading(NamedTuple):
    """Of the answer tokens of some rows, N of them.

    inputs: A x of what the projection reads, [N, R]. residual: what stands in front of the final norm, [N, D].
    targets: the tokens themselves, [N]. row: of each its row, [N], ascending from 0.
    """

    inputs: Tensor
    residual: Tensor
    targets: Tensor
    row: Tensor

    @property
    def num_rows(self) -> int:
        return int(self.row[-1]) + 1 if len(self.row) else 0

    def rows(self, chosen: Sequence[int]) -> Self:
        """Some of the rows, in this order."""
        places = [(self.row == number).nonzero()[:, 0] for number in chosen]
        where = torch.cat(places)
        row = torch.repeat_interleave(torch.arange(len(chosen)), torch.tensor([len(own) for own in places]))
        return self._replace(
            inputs=self.inputs[where], residual=self.residual[where], targets=self.targets[where], row=row.to(where)
        )


class UserGradients:
    """Of one base model.

    Args:
        rank: of the LoRA. seed: of A. module: name of the down projection.

    Raises:
        ValueError: the rank is below 1, there is no such module, or something comes between it and the final norm.
    """

    def __init__(self, model: DocToLoRA, *, rank: int, seed: int = 0, module: str = "down_proj") -> None:
        if rank < 1:
            raise ValueError(f"rank is {rank}. Give at least 1.")
        decoder, blocks = find_blocks(model.base_model)
        (target,) = find_targets(model.base_model, [module], layers=[len(getattr(decoder, blocks)) - 1])
        (self._place,) = target.modules()
        norm = getattr(decoder, "norm", None)
        if not isinstance(norm, nn.Module):
            raise ValueError(f"{type(decoder).__name__} has no final `norm`, in front of which theta works.")
        self.model, self.rank, self._norm = model, rank, norm
        generator = torch.Generator().manual_seed(seed)
        A = torch.randn(rank, self._place.d_in, generator=generator) / self._place.d_in**0.5
        self._A = A.to(model.device)
        self._check()

    @property
    def size(self) -> int:
        """d."""
        return self.rank * self._place.d_out

    def start(self) -> Tensor:
        """theta of the base model itself, [d]."""
        return torch.zeros(self.size, device=self.model.device)

    @torch.no_grad()
    def read(self, rows: PackedRows) -> Reading:
        """What theta works on, of one row for each question with its answer."""
        where, kept = rows.target_kind >= 0, list[Tensor]()
        self.model.injector.clear()

        def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            kept.append(args[0][where].float())

        with ExitStack() as undo:
            for module in (self.model.base_model.get_submodule(self._place.path), self._norm):
                undo.callback(module.register_forward_pre_hook(keep).remove)
            logits_at(self.model.base_model, where, input_ids=rows.ids)
        read, residual = kept
        return Reading(read @ self._A.T, residual, rows.targets()[where], where.nonzero()[:, 0])

    def __call__(self, theta: Tensor, read: Reading, *, owners: Sequence[int], num_users: int) -> tuple[Tensor, Tensor]:
        """Gradients [U, d] and losses [U] of the users: the mean over a user's rows of the means over their answer
        tokens of -log p; 0 of a user without rows.

        Args:
            owners: of each row its user.
        """
        of_row = torch.tensor(owners, device=theta.device)
        delta = (read.inputs @ self._B(theta)).requires_grad_()
        per_token = nn.functional.cross_entropy(self._logits(read.residual + delta), read.targets, reduction="none")
        # A token's share of its user's loss.
        share = 1 / torch.bincount(read.row).to(per_token)[read.row]
        share = share / torch.bincount(of_row, minlength=num_users).to(per_token)[of_row][read.row]
        (slope,) = torch.autograd.grad((share * per_token).sum(), delta)
        owner = of_row[read.row]
        found = slope.new_zeros(num_users, self.rank, self._place.d_out)
        for user in owner.unique().tolist():
            # delta = inputs B, so dB = inputsᵀ slope.
            own = owner == user
            found[user] = read.inputs[own].T @ slope[own]
        losses = per_token.new_zeros(num_users).index_add(0, owner, (share * per_token).detach())
        return found.flatten(1), losses

    @torch.no_grad()
    def log_likelihoods(self, theta: Tensor, read: Reading) -> list[float]:
        """log p of each row's answer, in nats."""
        logits = self._logits(read.residual + read.inputs @ self._B(theta))
        of_tokens = logits.log_softmax(-1).gather(-1, read.targets[:, None])[:, 0]
        return of_tokens.new_zeros(read.num_rows).index_add(0, read.row, of_tokens).tolist()

    @torch.no_grad()
    def rightly(self, theta: Tensor, read: Reading) -> list[bool]:
        """Of each row whether greedy decoding gives its answer token for token."""
        logits = self._logits(read.residual + read.inputs @ self._B(theta))
        wrong = (logits.argmax(-1) != read.targets).float()
        return (wrong.new_zeros(read.num_rows).index_add(0, read.row, wrong) == 0).tolist()

    @torch.no_grad()
    def result(self, theta: Tensor) -> MovedWeights:
        """W + BᵀA."""
        name = f"{self._place.path}.weight"
        weight = self.model.base_model.get_parameter(name).detach()
        return MovedWeights({name: weight + (self._B(theta).T @ self._A).to(weight)})

    def _B(self, theta: Tensor) -> Tensor:
        """[R, D]."""
        return theta.view(self.rank, self._place.d_out)

    def _logits(self, residual: Tensor) -> Tensor:
        head = self.model.base_model.get_output_embeddings()
        return head(self._norm(residual.to(self.model.base_model.dtype))).float()

    @torch.no_grad()
    def _check(self) -> None:
        """ValueError unless both ways to put a theta in give the same logits."""
        ids = torch.arange(2, device=self.model.device)[None]
        theta = torch.randn(self.size, generator=torch.Generator().manual_seed(0)).to(self.model.device)
        kept: list[Tensor] = []
        self.model.injector.clear()

        def add(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            kept.append(inputs[0].float() @ self._A.T @ self._B(theta))
            return output + kept[0].to(output)

        def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            kept.append(args[0].float())

        with ExitStack() as undo:
            module = self.model.base_model.get_submodule(self._place.path)
            undo.callback(self._norm.register_forward_pre_hook(keep).remove)
            self.model.base_model(input_ids=ids, use_cache=False)
            before = kept.pop()
            undo.callback(module.register_forward_hook(add).remove)
            self.model.base_model(input_ids=ids, use_cache=False)
        if not torch.allclose(before + kept[0], kept[1], atol=_TOLERANCE, rtol=_TOLERANCE):
            raise ValueError(
                f"In {type(self.model.base_model).__name__} something comes between {self._place.path} and the final "
                "norm. Take a base model whose last block adds its down projection to the residual."
            )
