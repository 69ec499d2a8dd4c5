"""lora_delta: the public function, its checks and the choice of implementation.

Callers never name an implementation. The environment variable D2L_LORA_DELTA overrides the choice for a process
("reference" or "triton"); what cannot be honoured raises.
"""

import os
from collections.abc import Callable

from torch import Tensor

from .plan import Plan
from .reference import lora_delta_reference

ENV_OVERRIDE = "D2L_LORA_DELTA"
IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {"reference": lora_delta_reference}


def lora_delta(
    base: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    plan: Plan,
    *,
    scaling: float,
    slot_scale: Tensor | None = None,
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

    Returns:
        base + scaling * (x Aᵀ) B, [T, d_out], in base's dtype: products accumulated and base added once in float32.
        Rows without slots are exactly base's; without any slot in the plan the result is `base` itself.

    Raises:
        ValueError: if shapes, pool size or devices do not fit, or D2L_LORA_DELTA asks for what is not there.

    Source: Hu et al. 2021, eq. 3, https://arxiv.org/abs/2106.09685; several adapters per segment by rank
        concatenation as in Doc-to-LoRA.
    """
    _check(base, x, A, B, plan, slot_scale)
    return IMPLEMENTATIONS[chosen_implementation(x)](base, x, A, B, plan, scaling=scaling, slot_scale=slot_scale)


def chosen_implementation(x: Tensor) -> str:
    """Name of the implementation that `lora_delta` runs for such an x: "reference", or what D2L_LORA_DELTA says."""
    name = os.environ.get(ENV_OVERRIDE) or "reference"
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"{ENV_OVERRIDE}={name} is not available; this version has {sorted(IMPLEMENTATIONS)}. "
            "Unset the variable or set it to one of these."
        )
    return name


def _check(base: Tensor, x: Tensor, A: Tensor, B: Tensor, plan: Plan, slot_scale: Tensor | None) -> None:
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
    if (plan.num_tokens, plan.num_slots) != (x.shape[0], A.shape[0]):
        raise ValueError(
            f"The plan is for {plan.num_tokens} tokens and {plan.num_slots} slots, but x has {x.shape[0]} tokens "
            f"and A has {A.shape[0]} slots. Build a new Plan for this batch."
        )
    if not x.device == base.device == A.device == B.device == plan.slots.device:
        raise ValueError(
            f"Expected everything on one device, got base on {base.device}, x on {x.device}, A on {A.device}, "
            f"B on {B.device}, plan on {plan.slots.device}. Move A and B, and build the Plan with device=x.device."
        )
