"""The LoRA delta in plain torch, forward and backward: what the kernels are compared with, and what runs on a CPU.

One gather of the used slots, then two matrix products per run of tokens (two for the whole batch when all runs have the
same shape). Nothing is repeated per token.

For run g: S = x Aᵀ, y = base + scaling (f ∘ S) B, with f the slots' scale, repeated over their rows. Backward:
U = dy Bᵀ, dx = scaling (f ∘ U) A, dA = scaling f ∘ Uᵀx, dB = scaling f ∘ Sᵀdy, df = scaling Σ S ∘ U.

Gated, G = w ∘ S stands for S in y, dB and df, and the gradient of S that came from G for scaling f ∘ U in dx and dA;
w = (e / max e)^gate for each token and slot, with e = Σ S² over the slot's rows.
"""

from collections.abc import Iterator
from functools import wraps
from itertools import accumulate, pairwise
from math import prod

import torch
from torch import Tensor

from .plan import TINY, read_lists


class _Runs:
    """Views of tensors run by run, as [G, tokens or entries, ...] batches: one batch if all runs have one shape."""

    def __init__(self, host: Tensor, rank: int, device: torch.device) -> None:
        _, token_bounds, slot_bounds, slot_ids = read_lists(host)
        self.rank = rank
        self.lengths = [end - start for start, end in pairwise(token_bounds)]
        self.entries = [end - start for start, end in pairwise(slot_bounds)]
        self.ids = list(slot_ids)
        first = self.ids[: self.entries[0]] if self.entries else []
        if len(self.entries) > 1 and first and self.ids == first * len(self.entries):
            # All runs have the same slots: one run of all tokens, whose slots are gathered once.
            self.ids, self.entries, self.lengths = first, self.entries[:1], [sum(self.lengths)]
        self.slots = torch.tensor(self.ids, dtype=torch.long, device=device)
        self.uniform = len(set(self.lengths)) == 1 == len(set(self.entries))

    def tokens(self, rows: Tensor) -> Iterator[Tensor]:
        """[T, d] → [1, T_g, d] of each run, or [G, T_g, d]."""
        if self.uniform:
            return iter([rows.view(len(self.lengths), -1, rows.shape[1])])
        return (part[None] for part in rows.split(self.lengths))

    def gathered(self, pool: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
        """[slots, R, d] → [1, n R, d] of each run, or [G, n R, d]."""

        def take(start: int, end: int) -> Tensor:
            first, count = self.ids[start] if start < end else 0, end - start
            # Neighbours in the pool, as one adapter's are, need no copy.
            if self.ids[start:end] == list(range(first, first + count)):
                rows = pool.narrow(0, first, count)
            else:
                rows = pool.index_select(0, self.slots[start:end])
            return rows.to(dtype).reshape(-1, pool.shape[2])

        if self.uniform:
            used = take(0, len(self.ids))
            return iter([used.view(len(self.entries), -1, used.shape[1])])
        return (take(start, end)[None] for start, end in pairwise(accumulate(self.entries, initial=0)))

    def pairs(self, S: Tensor) -> Iterator[Tensor]:
        """Flat S → [1, T_g, n R] of each run, or [G, T_g, n R]."""
        if self.uniform:
            shape = len(self.lengths), self.lengths[0], self.entries[0] * self.rank
            return iter([S[: prod(shape)].view(shape)])
        sizes = [t * n * self.rank for t, n in zip(self.lengths, self.entries, strict=True)]
        parts = zip(S[: sum(sizes)].split(sizes), self.lengths, self.entries, strict=True)
        return (part.view(1, t, n * self.rank) for part, t, n in parts)

    def scales(self, slot_scale: Tensor | None, dtype: torch.dtype) -> Iterator[Tensor | None]:
        """[slots] → [1 or G, 1, n R] of each run; None for none."""
        if slot_scale is None:
            return iter([None] * (1 if self.uniform else len(self.lengths)))
        f = slot_scale.index_select(0, self.slots).to(dtype).repeat_interleave(self.rank)
        if self.uniform:
            return iter([f.view(len(self.entries), 1, -1)])
        return (part[None, None] for part in f.split([n * self.rank for n in self.entries]))

    def entry_slots(self) -> Iterator[Tensor]:
        """Slot ids of each run's entries, [n], or of all runs' together."""
        return iter([self.slots] if self.uniform else self.slots.split(self.entries))


def _times(rows: Tensor, scale: Tensor | None) -> Tensor:
    return rows if scale is None else rows * scale


def _weights(S: Tensor, gate: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of S [G, T, n, R]: w and e, [G, T, n, 1], and where e is largest, [G, T, 1, 1]."""
    e = S.square().sum(-1, keepdim=True).clamp(min=TINY)
    largest, highest = e.max(2, keepdim=True)
    return (e / largest).pow(gate), e, highest


def _gated(S: Tensor, rank: int, gate: float) -> Tensor:
    """G [G, T, n R] of S [G, T, n R]."""
    if not gate or not S.numel():
        return S
    slots = S.unflatten(2, (-1, rank))
    return (_weights(slots, gate)[0] * slots).flatten(2)


def _gated_backward(S: Tensor, dG: Tensor, rank: int, gate: float) -> Tensor:
    """The gradient of S from that of G."""
    if not gate or not S.numel():
        return dG
    S, dG = (rows.unflatten(2, (-1, rank)) for rows in (S, dG))
    w, e, highest = _weights(S, gate)
    q = w * (dG * S).sum(-1, keepdim=True)  # w dL/dw
    of_log_e = q.scatter_add(2, highest, -q.sum(2, keepdim=True))
    return (w * dG + 2 * gate * of_log_e / e * S).flatten(2)


def _in_full_precision(function):
    """Autocast would round A and B to 16 bit before the products."""

    @wraps(function)
    def wrapped(first: Tensor, *rest):
        with torch.autocast(device_type=first.device.type, enabled=False):
            return function(first, *rest)

    return wrapped


@_in_full_precision
def forward(
    base: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    slot_scale: Tensor | None,
    scaling: float,
    gate: float,
    host: Tensor,
) -> tuple[Tensor, Tensor]:
    """y [T, d_out] in base's dtype, and S = x Aᵀ of all (token, slot) pairs, flat, in float32 or wider."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    runs = _Runs(host, A.shape[1], x.device)
    wide_base, wide_x = base.to(dtype), x.to(dtype).contiguous()
    all_S, all_y = [], []
    for base_g, x_g, A_g, B_g, f_g in zip(
        runs.tokens(wide_base.contiguous()),
        runs.tokens(wide_x),
        runs.gathered(A, dtype),
        runs.gathered(B, dtype),
        runs.scales(slot_scale, dtype),
        strict=True,
    ):
        S = x_g @ A_g.mT
        # A run without slots has rank 0: its rows come out as base's, whatever x holds there.
        G = _times(_gated(S, A.shape[1], gate), f_g)
        all_y.append(torch.baddbmm(base_g, G, B_g, alpha=scaling).flatten(0, 1).to(base.dtype))
        all_S.append(S.flatten())
    if not all_y:
        return base.clone(), wide_x.new_empty(0)
    return (torch.cat(all_y), torch.cat(all_S)) if len(all_y) > 1 else (all_y[0], all_S[0])


@_in_full_precision
def backward(
    dy: Tensor,
    x: Tensor,
    S: Tensor,
    A: Tensor,
    B: Tensor,
    slot_scale: Tensor | None,
    scaling: float,
    gate: float,
    host: Tensor,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, A, B and slot_scale where needed, else None."""
    dtype = S.dtype
    runs = _Runs(host, A.shape[1], x.device)
    all_dx = []
    totals = (A, B, slot_scale)
    dA, dB, df = (
        tensor.new_zeros(tensor.shape, dtype=dtype) if needed else None
        for tensor, needed in zip(totals, needs[1:], strict=True)
    )
    for dy_g, x_g, S_g, A_g, B_g, f_g, slots_g in zip(
        runs.tokens(dy.to(dtype).contiguous()),
        runs.tokens(x.to(dtype).contiguous()),
        runs.pairs(S),
        runs.gathered(A, dtype),
        runs.gathered(B, dtype),
        runs.scales(slot_scale, dtype),
        runs.entry_slots(),
        strict=True,
    ):
        split = lambda rows: rows.unflatten(1, (rows.shape[1] // A.shape[1], A.shape[1]))  # noqa: E731
        U = dy_g @ B_g.mT
        G_g = _gated(S_g, A.shape[1], gate) if needs[2] or needs[3] else S_g
        if needs[3]:
            df.index_add_(0, slots_g, split((G_g * U).sum(1)).sum(-1).flatten(), alpha=scaling)
        if needs[2]:
            dB.index_add_(0, slots_g, split(torch.bmm(_times(G_g, f_g).mT, dy_g)).flatten(0, 1), alpha=scaling)
        U = _gated_backward(S_g, _times(U, f_g) * scaling, A.shape[1], gate)
        if needs[1]:
            dA.index_add_(0, slots_g, split(torch.bmm(U.mT, x_g)).flatten(0, 1))
        if needs[0]:
            all_dx.append(torch.bmm(U, A_g).flatten(0, 1).to(x.dtype))
    grads = (None if g is None else g.to(t.dtype) for g, t in zip((dA, dB, df), totals, strict=True))
    return torch.cat(all_dx) if needs[0] else None, *grads
