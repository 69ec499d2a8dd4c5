"""lora_delta: the public function, and the custom op behind it, which checks and picks the implementation.

Triton's kernels run on CUDA tensors, plain torch elsewhere. The environment variable D2L_LORA_DELTA overrides the
choice for a process ("reference" or "triton"); what cannot be honoured raises. Callers never name an implementation.
"""

import math
import os

import torch
from torch import Tensor

from . import reference
from .plan import Plan, Sizes

ENV_OVERRIDE = "D2L_LORA_DELTA"
IMPLEMENTATIONS = ("reference", "triton")


def lora_delta(
    base: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    plan: Plan,
    *,
    scaling: float,
    slot_scale: Tensor | None = None,
    gate: float = 0.0,
) -> Tensor:
    """Adds to a frozen linear layer's output the LoRA delta of each token's adapter slots.

    The slots of a run act as one adapter with their ranks concatenated, so their deltas add up.

    Args:
        base: output of the frozen layer, [T, d_out].
        x: its input, [T, d_in].
        A, B: pools of adapters, [slots, R, d_in] and [slots, R, d_out], any strides (usually `pool[:, layer]`).
        plan: which tokens use which slots; made for T tokens and this number of slots, on x's device.
        scaling: factor on BA. PEFT's `lora_alpha / r`.
        slot_scale: one more factor per slot, [slots], differentiable.
        gate: how much the slots of a token's list that x is not about are held back: each slot's delta is weighted by
            (e / max e)^gate, with e = ‖A x‖² of the slot, before slot_scale, and the largest of the list. 0: all alike.

    Returns:
        base + scaling * (x Aᵀ) B, [T, d_out], in base's dtype: products accumulated and base added once in float32.
        Rows without slots are exactly base's; without any slot in the plan the result is `base` itself. On a GPU the
        factors of a product are rounded to base's dtype if that has 16 bits, as the frozen layer's are.

    Gradients of base, x, A, B and slot_scale are deterministic; there is no second derivative.

    Raises:
        ValueError: if shapes, pool size or devices do not fit, gate is negative or no number, or D2L_LORA_DELTA asks
            for what is not there.

    Source: Hu et al. 2021, eq. 3, https://arxiv.org/abs/2106.09685; several adapters per segment by rank
        concatenation as in Doc-to-LoRA.
    """
    if not x.device == base.device == A.device == B.device == plan.table.device:
        raise ValueError(
            f"Expected everything on one device, got base on {base.device}, x on {x.device}, A on {A.device}, "
            f"B on {B.device}, plan on {plan.table.device}. Move A and B, and build the Plan with device=x.device."
        )
    if not 0 <= gate < math.inf:
        raise ValueError(f"gate should be a number of at least 0, got {gate}. 0 weights all slots alike.")
    if not plan.has_slots:
        _check(base, x, A, B, slot_scale, plan.sizes)
        return base
    return _forward(base, x, A, B, slot_scale, scaling, gate, plan.table, plan.pairs, plan.host)[0]


def chosen_implementation(x: Tensor) -> str:
    """Name of the implementation that `lora_delta` runs for such an x: "triton" on CUDA, "reference" elsewhere and for
    float64, or what D2L_LORA_DELTA says."""
    name = os.environ.get(ENV_OVERRIDE)
    if not name:
        return "triton" if x.is_cuda and x.dtype != torch.float64 else "reference"
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"{ENV_OVERRIDE}={name} is not available; this version has {', '.join(IMPLEMENTATIONS)}. "
            "Unset the variable or set it to one of these."
        )
    if name == "triton" and x.dtype == torch.float64:
        raise ValueError(f"{ENV_OVERRIDE}=triton sums up in float32, but x is float64. Unset the variable.")
    if name == "triton" and not x.is_cuda:
        from .kernels import interpreted

        if not interpreted():
            raise ValueError(
                f"{ENV_OVERRIDE}=triton needs CUDA tensors, got x on {x.device}. Unset the variable, or set "
                "TRITON_INTERPRET=1 before Python starts to have the kernels interpreted."
            )
    return name


def _sizes(host: Tensor) -> Sizes:
    return Sizes(*host[: len(Sizes._fields)].tolist())


@torch.library.custom_op("doc_to_lora::lora_delta", mutates_args=())
def _forward(
    base: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    slot_scale: Tensor | None,
    scaling: float,
    gate: float,
    table: Tensor,
    pairs: Tensor,
    host: Tensor,
) -> tuple[Tensor, Tensor]:
    """y, and S = x Aᵀ of all (token, slot) pairs for the backward pass, [parts, pairs * R]."""
    sizes = _sizes(host)
    _check(base, x, A, B, slot_scale, sizes)
    if chosen_implementation(x) == "reference":
        y, S = reference.forward(base, x, A, B, slot_scale, scaling, gate, host)
        # A plan with a capacity has room for larger ones.
        return y, torch.nn.functional.pad(S, (0, pairs.shape[0] * A.shape[1] - len(S)))[None]
    from . import kernels

    S = torch.empty(_S_shape(x, A, pairs), dtype=torch.float32, device=x.device)
    return kernels.forward(base, x, A, B, slot_scale, scaling, gate, table, S, sizes), S


def _S_shape(x: Tensor, A: Tensor, pairs: Tensor) -> tuple[int, int]:
    parts = 1
    if chosen_implementation(x) == "triton":
        from .kernels import num_parts

        parts = num_parts(*x.shape)
    return parts, pairs.shape[0] * A.shape[1]


@_forward.register_fake
def _(base, x, A, B, slot_scale, scaling, gate, table, pairs, host):
    S = x.new_empty(_S_shape(x, A, pairs), dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.empty_like(base, memory_format=torch.contiguous_format), S


@torch.library.custom_op("doc_to_lora::lora_delta_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    S: Tensor,
    A: Tensor,
    B: Tensor,
    slot_scale: Tensor | None,
    scaling: float,
    gate: float,
    table: Tensor,
    host: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, A, B and slot_scale; an empty tensor for each that is not needed."""
    needed = tuple(needs)
    if chosen_implementation(x) == "reference":
        grads = reference.backward(dy, x, S[0], A, B, slot_scale, scaling, gate, host, needed)
    else:
        from . import kernels

        sizes = _sizes(host)
        grads = kernels.backward(dy, x, S, A, B, slot_scale, scaling, gate, table, sizes, needed)
    return tuple(dy.new_empty(0) if grad is None else grad for grad in grads)


@_backward.register_fake
def _(dy, x, S, A, B, slot_scale, scaling, gate, table, host, needs):
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if needed else dy.new_empty(0)
        for tensor, needed in zip((x, A, B, slot_scale), needs, strict=True)
    )


def _keep(ctx, inputs, output) -> None:
    _, x, A, B, slot_scale, scaling, gate, table, _, host = inputs
    S = output[1]
    ctx.mark_non_differentiable(S)
    ctx.save_for_backward(x, S, A, B, slot_scale, table, host)
    ctx.scaling, ctx.gate = scaling, gate


def _differentiate(ctx, dy: Tensor, _) -> tuple[Tensor | None, ...]:
    x, S, A, B, slot_scale, table, host = ctx.saved_tensors
    needs = [needed for i, needed in enumerate(ctx.needs_input_grad[:5]) if i]
    settings = ctx.scaling, ctx.gate
    grads = _backward(dy, x, S, A, B, slot_scale, *settings, table, host, needs) if any(needs) else (None,) * 4
    dx, dA, dB, dscale = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    return dy if ctx.needs_input_grad[0] else None, dx, dA, dB, dscale, *[None] * 5


torch.library.register_autograd("doc_to_lora::lora_delta", _differentiate, setup_context=_keep)


def _check(base: Tensor, x: Tensor, A: Tensor, B: Tensor, slot_scale: Tensor | None, sizes: Sizes) -> None:
    fits = (
        base.ndim == x.ndim == 2
        and A.ndim == B.ndim == 3
        and A.shape[:2] == B.shape[:2]
        and x.shape == (base.shape[0], A.shape[2])
        and base.shape[1] == B.shape[2]
        and (slot_scale is None or slot_scale.shape == A.shape[:1])
    )
    if not fits:
        shapes = {"base": base, "x": x, "A": A, "B": B} | ({} if slot_scale is None else {"slot_scale": slot_scale})
        raise ValueError(
            "Expected base [T, d_out], x [T, d_in], A [slots, R, d_in], B [slots, R, d_out], slot_scale [slots], got "
            + ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in shapes.items())
            + "."
        )
    if (sizes.num_tokens, sizes.num_slots) != (x.shape[0], A.shape[0]):
        raise ValueError(
            f"The plan is for {sizes.num_tokens} tokens and {sizes.num_slots} slots, but x has {x.shape[0]} tokens "
            f"and A has {A.shape[0]} slots. Build a new Plan for this batch."
        )
