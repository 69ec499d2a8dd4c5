"""The LoRA delta in plain torch: what every other implementation is compared with, and the one that runs on a CPU.

One gather of the used slots, then two matrix products per run of tokens (two for the whole batch when all runs have the
same shape). Nothing is repeated per token; autograd gives the gradients.
"""

from itertools import pairwise

import torch
from torch import Tensor

from .plan import Plan


def lora_delta_reference(
    base: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    plan: Plan,
    *,
    scaling: float,
    slot_scale: Tensor | None = None,
) -> Tensor:
    """Same arguments and result as `lora_delta` (op.py), which checks them."""
    if not plan.slot_ids:
        return base
    dtype = torch.promote_types(x.dtype, torch.float32)
    num_runs, (num_tokens, d_in), d_out = plan.num_runs, x.shape, B.shape[-1]
    # Autocast would round A and B to 16 bit before the products.
    with torch.autocast(device_type=x.device.type, enabled=False):
        A = A.index_select(0, plan.slots).to(dtype)
        B = B.index_select(0, plan.slots).to(dtype)
        if slot_scale is not None:
            A = A * slot_scale.index_select(0, plan.slots).to(dtype)[:, None, None]
        wide_base, x = base.to(dtype), x.to(dtype)

        if plan.uniform:
            S = torch.bmm(x.reshape(num_runs, -1, d_in), A.view(num_runs, -1, d_in).mT)
            y = torch.baddbmm(wide_base.reshape(num_runs, -1, d_out), S, B.view(num_runs, -1, d_out), alpha=scaling)
            return y.view(num_tokens, d_out).to(base.dtype)

        lengths = [end - start for start, end in pairwise(plan.token_bounds)]
        ranks = [(end - start) * A.shape[1] for start, end in pairwise(plan.slot_bounds)]
        runs = zip(
            wide_base.split(lengths),
            x.split(lengths),
            A.view(-1, d_in).split(ranks),
            B.view(-1, d_out).split(ranks),
            strict=True,
        )
        # A run without slots has rank 0: its rows come out as base's, whatever x holds there.
        y = [torch.addmm(base_g, x_g @ A_g.mT, B_g, alpha=scaling) for base_g, x_g, A_g, B_g in runs]
        return torch.cat(y).to(base.dtype)
