"""Plan: which tokens use which adapter slots.

Built once per batch from Python ints, then reused by every layer, every target module, forward and backward:

    plan = Plan.from_lists([5, 0, 7, 2], [[0, 2], [1], [0, 2], []], num_slots=3)
    plan.token_bounds   # (0, 12, 14): the two neighbours with the same list became one run, the empty segment is gone
    plan.slot_ids       # (0, 2); run g owns slot_ids[slot_bounds[g]:slot_bounds[g + 1]]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Plan:
    """Runs of consecutive tokens and the slot list of each (compressed rows); G runs. Use `Plan.from_lists`.

    Attributes:
        cu_tokens: first token of each run and the number of tokens, int32 [G + 1].
        cu_slots: first entry of each run in `slots` and their number, int32 [G + 1].
        slots: slot ids of all runs, one after the other, int32 [cu_slots[-1]].
        token_bounds, slot_bounds, slot_ids: the same three as Python ints, so that no host code waits for the device.
        num_slots: size of the pool that the ids index.
    """

    cu_tokens: Tensor
    cu_slots: Tensor
    slots: Tensor
    token_bounds: tuple[int, ...]
    slot_bounds: tuple[int, ...]
    slot_ids: tuple[int, ...]
    num_slots: int

    @classmethod
    def from_lists(
        cls,
        segment_lengths: Sequence[int],
        slots: Sequence[Sequence[int]],
        *,
        num_slots: int,
        device: torch.device | str | None = None,
    ) -> Self:
        """Plan for segments that follow each other in the token axis.

        Consecutive segments with the same slot list become one run; empty segments vanish.

        Args:
            segment_lengths: tokens in each segment; 0 is allowed.
            slots: the slot ids of each segment, in any order. An empty list leaves the segment's rows as the base has
                them; an id that stands twice counts twice; segments may share ids.
            num_slots: size of the pool, so ids run from 0 to num_slots - 1.
            device: where the three tensors live (one copy); the CPU by default.

        Raises:
            ValueError: if the two sequences differ in length, a length is negative or an id is not in the pool.
        """
        if len(segment_lengths) != len(slots):
            raise ValueError(
                f"Expected one slot list per segment, got {len(segment_lengths)} segment lengths "
                f"and {len(slots)} slot lists."
            )
        token_bounds, slot_bounds, slot_ids = [0], [0], []
        previous = None
        for segment, (length, ids) in enumerate(zip(segment_lengths, slots, strict=True)):
            if length < 0:
                raise ValueError(f"Segment {segment} has length {length}; lengths are token counts, 0 or more.")
            if ids and not 0 <= min(ids) <= max(ids) < num_slots:
                raise ValueError(
                    f"Segment {segment} asks for slots {list(ids)}, but the pool has {num_slots}: "
                    f"ids must be in 0..{num_slots - 1}."
                )
            ids = tuple(ids)
            if length == 0:
                continue
            if ids == previous:
                token_bounds[-1] += length
                continue
            token_bounds.append(token_bounds[-1] + length)
            slot_ids.extend(ids)
            slot_bounds.append(len(slot_ids))
            previous = ids

        packed = torch.tensor(token_bounds + slot_bounds + slot_ids, dtype=torch.int32)
        if device is not None and torch.device(device).type == "cuda":
            # Pinned, so that the copy does not make the host wait for the work queued on the device.
            packed = packed.pin_memory().to(device, non_blocking=True)
        else:
            packed = packed.to(device)
        cu_tokens, cu_slots, slot_tensor = packed.split([len(token_bounds), len(slot_bounds), len(slot_ids)])
        return cls(
            cu_tokens=cu_tokens,
            cu_slots=cu_slots,
            slots=slot_tensor,
            token_bounds=tuple(token_bounds),
            slot_bounds=tuple(slot_bounds),
            slot_ids=tuple(slot_ids),
            num_slots=num_slots,
        )

    @property
    def num_runs(self) -> int:
        """G: runs of consecutive tokens with one slot list."""
        return len(self.token_bounds) - 1

    @property
    def num_tokens(self) -> int:
        return self.token_bounds[-1]

    @cached_property
    def uniform(self) -> bool:
        """Whether every run has the same number of tokens and the same, positive number of slots."""
        tokens = {end - start for start, end in pairwise(self.token_bounds)}
        slots = {end - start for start, end in pairwise(self.slot_bounds)}
        return len(tokens) == 1 and len(slots) == 1 and 0 not in slots
