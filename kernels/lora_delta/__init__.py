"""LoRA with a list of adapter slots per segment of tokens: `lora_delta(base, x, A, B, plan, scaling=...)`.

    plan = Plan.from_lists([5, 7], [[0, 2], [1, 2]], num_slots=3)  # 5 tokens use slots 0 and 2, the next 7 use 1 and 2
    y = lora_delta(base, x, A, B, plan, scaling=45.25)  # [12, d_out] of x [12, d_in], A [3, R, d_in], B [3, R, d_out]

plan.py says which token uses which slots, reference.py is the maths in plain torch, kernels.py the same in Triton,
op.py the public function, which picks one of them; cost.py says when merging an adapter into the weights is cheaper,
budget.py what the kernels need of a GPU.
"""

from .op import lora_delta
from .plan import Capacity, Plan

__all__ = ["Capacity", "Plan", "lora_delta"]
