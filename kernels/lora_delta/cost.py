"""What applying adapters costs, from shapes alone: merged into the weights, delta first, or base and delta apart.

    cost = application_cost(num_tokens=4096, d_in=9216, d_out=2304, rank=64, num_adapters=8, machine=H100)
    cost.cheapest          # "delta first"
    cost.apart             # seconds

A roofline: a step takes as long as its bytes or its arithmetic, whichever is longer, plus its launches.
`benchmarks/kernel_speed.py` measures the three ways beside these figures.
"""

from typing import NamedTuple


class Machine(NamedTuple):
    """bytes_per_s: of a large copy, read and written. flops_per_s: of a large matrix product. launch_s: per kernel."""

    name: str
    bytes_per_s: float
    flops_per_s: float
    launch_s: float


# Calculated with, not measured by this project: 3.0 TB/s and 800 TFLOP/s in bf16.
H100 = Machine("NVIDIA H100", 3.0e12, 8.0e14, 5e-6)


class Floor(NamedTuple):
    """Bytes that must move and operations that must be done, each input read once and each output written once."""

    num_bytes: float
    flops: float

    def seconds(self, machine: Machine) -> float:
        return max(self.num_bytes / machine.bytes_per_s, self.flops / machine.flops_per_s)


class Cost(NamedTuple):
    """Seconds for each way of applying the adapters to one linear layer.

    merge: each adapter has its own copy of the weights, W + BA, whose making is shared by `steps`. delta_first: the
    delta is written, the base product accumulates onto it (addmm_); one rounding of the delta to the output's type, and
    no quantized base. apart: base product, then the delta added to its output.
    """

    merge: float
    delta_first: float
    apart: float

    @property
    def cheapest(self) -> str:
        return min(self._fields, key=lambda name: getattr(self, name)).replace("_", " ")


def delta_floor(
    *, num_tokens: int, d_in: int, d_out: int, rank: int, num_adapters: int, element_bytes: int = 2
) -> Floor:
    """Floor of `lora_delta` forward: x and base read, y written, A and B of every adapter read once."""
    weights = num_adapters * rank * (d_in + d_out)
    return Floor(element_bytes * (num_tokens * (d_in + 2 * d_out) + weights), 2 * num_tokens * rank * (d_in + d_out))


def delta_backward_floor(
    *, num_tokens: int, d_in: int, d_out: int, rank: int, num_adapters: int, element_bytes: int = 2
) -> Floor:
    """Floor of its gradients of x, A and B: dy and x read, dx written, A and B read and their gradients written."""
    weights = num_adapters * rank * (d_in + d_out)
    return Floor(
        element_bytes * (num_tokens * (2 * d_in + d_out) + 2 * weights), 4 * num_tokens * rank * (d_in + d_out)
    )


def application_cost(
    *,
    num_tokens: int,
    d_in: int,
    d_out: int,
    rank: int,
    num_adapters: int,
    steps: int = 1,
    element_bytes: int = 2,
    machine: Machine = H100,
) -> Cost:
    """Seconds per step of one adapted linear layer.

    Args:
        num_tokens: of the step, over all sequences.
        rank: of each adapter, all chunks together.
        num_adapters: distinct adapters in the step, with equal shares of the tokens.
        steps: how many steps use the adapters before they change.
        element_bytes: of weights and activations.

    Raises:
        ValueError: a size or `steps` below 1.
    """
    sizes = {"num_tokens": num_tokens, "d_in": d_in, "d_out": d_out, "rank": rank, "num_adapters": num_adapters}
    for name, size in {**sizes, "steps": steps}.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}.")
    weight, io = d_in * d_out, num_tokens * (d_in + d_out)
    base_flops = 2 * num_tokens * weight
    delta = delta_floor(**sizes, element_bytes=element_bytes)
    output = element_bytes * num_tokens * d_out

    def seconds(num_bytes: float, flops: float, launches: int) -> float:
        return Floor(num_bytes, flops).seconds(machine) + launches * machine.launch_s

    base = seconds(element_bytes * (weight + io), base_flops, 1)
    apart = base + seconds(*delta, 2)
    # The delta is written without a base to read; the product reads it instead, hidden where arithmetic is the limit.
    delta_first = seconds(delta.num_bytes - output, delta.flops, 2) + seconds(
        element_bytes * (weight + io) + output, base_flops, 1
    )
    # Weights are read and written, A and B read, once for each adapter; then one product per adapter.
    making = num_adapters * seconds(element_bytes * (2 * weight + rank * (d_in + d_out)), 2 * weight * rank, 1)
    merged = seconds(element_bytes * (num_adapters * weight + io), base_flops, num_adapters)
    return Cost(merge=making / steps + merged, delta_first=delta_first, apart=apart)
