"""Plan: which tokens use which adapter slots, and how the kernels share the work.

Built once per batch from Python ints, then reused by every layer, every target module, forward and backward:

    plan = Plan.from_lists([5, 0, 7, 2], [[0, 2], [1], [0, 2], []], num_slots=3)
    plan.token_bounds   # [0, 12, 14]: the two neighbours with the same list became one run, the empty segment is gone
    plan.slot_ids       # [0, 2]; run g owns slot_ids[slot_bounds[g]:slot_bounds[g + 1]]

What a kernel needs stands in one int64 tensor on the device, `table`; where in it, and how large, in `host` on the CPU.
Nothing ever waits for the device. For a CUDA graph, build plans of one `Capacity`: they have tables of one layout, and
`plan.copy_(other)` gives the captured kernels other work.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, Self

import torch
from torch import Tensor

# Up to so many tokens a plan is for decoding: small token tiles, and the reduction over d_in split between programs.
DECODE_TOKENS = 128
# Rows of a token tile; a tile never crosses the end of a run.
TILE_TOKENS, DECODE_TILE_TOKENS = 64, 16
# Tokens that one program of the weight gradients sums up; longer runs are cut into pieces, added in order afterwards.
PIECE_TOKENS = 1024
# Least energy of a gated slot, so that one that answers nothing has a weight and a gradient.
TINY = 1e-30


class Capacity(NamedTuple):
    """Largest plan that a captured CUDA graph is replayed with; the number of tokens and slots is fixed by the graph.

    max_runs: runs of consecutive tokens with one slot list. max_slots: entries of the longest list.
    """

    max_runs: int
    max_slots: int


class Sizes(NamedTuple):
    """The head of `Plan.host`: sizes of the batch, and where each section of `table` begins.

    tiles: [*, 5] first token, end, first entry in slots, number of entries n, number of (token, entry) pairs before.
    pieces: [*, 6] the same and the first use. planes, order: per use (piece, entry): which partial sum it writes, -1
    for none because the slot has no other use; and its position among all uses sorted by slot.
    plane_bounds, use_bounds: [slots + 1] where each slot's partial sums and uses begin.
    """

    num_tokens: int
    num_slots: int
    num_runs: int
    max_slots: int
    num_planes: int
    num_uses: int
    decode: int
    slots: int
    tiles: int
    num_tiles: int
    pieces: int
    num_pieces: int
    planes: int
    plane_bounds: int
    order: int
    use_bounds: int


@dataclass(frozen=True, eq=False)
class Plan:
    """Runs of consecutive tokens and the slot list of each; G runs. Use `Plan.from_lists`.

    Attributes:
        table: all that the kernels read, int64, on the device.
        pairs: no values, only a length: the number of (token, slot) pairs, so that shapes follow without reading it.
        host: `Sizes`, then token_bounds, slot_bounds and slot_ids, int64, on the CPU.
        has_slots: whether any token uses any slot.
        capacity: what the tables are padded to, or None.
    """

    table: Tensor
    pairs: Tensor
    host: Tensor
    has_slots: bool
    capacity: Capacity | None

    @classmethod
    def from_lists(
        cls,
        segment_lengths: Sequence[int],
        slots: Sequence[Sequence[int]],
        *,
        num_slots: int,
        device: torch.device | str | None = None,
        capacity: Capacity | None = None,
    ) -> Self:
        """Plan for segments that follow each other in the token axis.

        Consecutive segments with the same slot list become one run; empty segments vanish.

        Args:
            segment_lengths: tokens in each segment; 0 is allowed.
            slots: the slot ids of each segment, in any order. An empty list leaves the segment's rows as the base has
                them; an id that stands twice counts twice; segments may share ids.
            num_slots: size of the pool, so ids run from 0 to num_slots - 1.
            device: where the kernels' table lives (one copy); the CPU by default.
            capacity: pads the table for plans that follow each other in one captured CUDA graph.

        Raises:
            ValueError: if the two sequences differ in length, a length is negative, an id is not in the pool, or the
                plan is larger than the capacity.
        """
        token_bounds, slot_bounds, slot_ids = _runs(segment_lengths, slots, num_slots)
        num_tokens, num_runs = token_bounds[-1], len(token_bounds) - 1
        counts = [end - start for start, end in zip(slot_bounds, slot_bounds[1:], strict=False)]
        longest = max(counts, default=0)
        if capacity is not None and (num_runs > capacity.max_runs or longest > capacity.max_slots):
            raise ValueError(
                f"The plan has {num_runs} runs of at most {longest} slots, more than its capacity of "
                f"{capacity.max_runs} runs of {capacity.max_slots}. Give a larger Capacity and capture the graph again."
            )
        decode = num_tokens <= DECODE_TOKENS
        tile_tokens = DECODE_TILE_TOKENS if decode else TILE_TOKENS

        starts, ends = torch.tensor(token_bounds[:-1]), torch.tensor(token_bounds[1:])
        entries, per_run = torch.tensor(slot_bounds[:-1]), torch.tensor(counts)
        pairs_before = (per_run * (ends - starts)).cumsum(0) - per_run * (ends - starts)
        runs = torch.stack([starts, ends, entries, per_run, pairs_before]).long()
        # A run without slots has its rows copied, but sums up no gradients.
        tiles, pieces = _cut(runs, tile_tokens), _cut(runs[:, per_run > 0], PIECE_TOKENS)
        uses_per_piece = pieces[:, 3]
        first_use = uses_per_piece.cumsum(0) - uses_per_piece
        pieces = torch.cat([pieces, first_use[:, None]], dim=1)

        ids = torch.tensor(slot_ids, dtype=torch.long)
        num_uses = int(uses_per_piece.sum())
        piece_of_use = torch.arange(len(pieces)).repeat_interleave(uses_per_piece)
        slot_of_use = ids[pieces[piece_of_use, 2] + torch.arange(num_uses) - first_use[piece_of_use]]
        order = torch.empty(num_uses, dtype=torch.long)
        order[slot_of_use.argsort(stable=True)] = torch.arange(num_uses)
        use_counts = slot_of_use.bincount(minlength=num_slots)
        plane_counts = torch.where(use_counts > 1, use_counts, 0)
        use_bounds, plane_bounds = (torch.cat([c.new_zeros(1), c.cumsum(0)]) for c in (use_counts, plane_counts))
        # Uses of one slot are neighbours in `order`, so its planes are too.
        planes = plane_bounds[slot_of_use] + order - use_bounds[slot_of_use]
        planes[use_counts[slot_of_use] == 1] = -1

        num_pairs, num_planes, max_slots = int((per_run * (ends - starts)).sum()), int(plane_bounds[-1]), longest
        if capacity is not None:
            max_slots = capacity.max_slots
            num_pairs = num_tokens * max_slots
            most = lambda tokens: num_tokens // tokens + capacity.max_runs  # noqa: E731
            ids = _padded(ids, capacity.max_runs * max_slots)
            tiles, pieces = _padded(tiles, most(tile_tokens)), _padded(pieces, most(PIECE_TOKENS))
            num_planes = num_uses = len(pieces) * max_slots
            planes, order = _padded(planes, num_uses), _padded(order, num_uses)

        sections = (ids, tiles.flatten(), pieces.flatten(), planes, plane_bounds, order, use_bounds)
        at = [0, *accumulate(len(section) for section in sections)]
        sizes = Sizes(
            num_tokens=num_tokens,
            num_slots=num_slots,
            num_runs=num_runs,
            max_slots=max_slots,
            num_planes=num_planes,
            num_uses=num_uses,
            decode=int(decode),
            slots=at[0],
            tiles=at[1],
            num_tiles=len(tiles),
            pieces=at[2],
            num_pieces=len(pieces),
            planes=at[3],
            plane_bounds=at[4],
            order=at[5],
            use_bounds=at[6],
        )
        table = torch.cat(sections)
        if device is not None and torch.device(device).type == "cuda":
            # Pinned, so that the copy does not make the host wait for the work queued on the device.
            table = table.pin_memory().to(device, non_blocking=True)
        else:
            table = table.to(device)
        return cls(
            table=table,
            pairs=torch.empty(1, dtype=torch.int8).expand(num_pairs),
            host=torch.tensor([*sizes, *token_bounds, *slot_bounds, *slot_ids]),
            has_slots=capacity is not None or num_pairs > 0,
            capacity=capacity,
        )

    def copy_(self, other: Self) -> Self:
        """Takes over the work of another plan of the same capacity, in place: a captured CUDA graph then does that.

        Raises:
            ValueError: the plans have no capacity or another one, or are for other numbers of tokens or slots.
        """
        mine, theirs = (
            (plan.capacity, plan.num_tokens, plan.num_slots) if plan.capacity else None for plan in (self, other)
        )
        if mine is None or mine != theirs:
            raise ValueError(
                "Only plans of one capacity, number of tokens and number of slots can replace each other, got "
                f"{mine} and {theirs}. Build both with the same `capacity`."
            )
        self.table.copy_(other.table, non_blocking=True)
        # The grids belong to the capacity, but the reference implementation reads the lists.
        vars(self)["host"] = other.host
        return self

    @property
    def sizes(self) -> Sizes:
        return Sizes(*self.host[: len(Sizes._fields)].tolist())

    @property
    def num_runs(self) -> int:
        """G: runs of consecutive tokens with one slot list."""
        return self.sizes.num_runs

    @property
    def num_tokens(self) -> int:
        return self.sizes.num_tokens

    @property
    def num_slots(self) -> int:
        return self.sizes.num_slots

    @property
    def token_bounds(self) -> list[int]:
        """First token of each run and the number of tokens, G + 1 ints."""
        return read_lists(self.host)[1]

    @property
    def slot_bounds(self) -> list[int]:
        """First entry of each run in `slot_ids` and their number, G + 1 ints."""
        return read_lists(self.host)[2]

    @property
    def slot_ids(self) -> list[int]:
        return read_lists(self.host)[3]


def read_lists(host: Tensor) -> tuple[Sizes, list[int], list[int], list[int]]:
    """Sizes, token_bounds, slot_bounds, slot_ids of `Plan.host`."""
    numbers = host.tolist()
    sizes = Sizes(*numbers[: len(Sizes._fields)])
    rest, bounds = numbers[len(sizes) :], sizes.num_runs + 1
    return sizes, rest[:bounds], rest[bounds : 2 * bounds], rest[2 * bounds :]


def _runs(
    segment_lengths: Sequence[int], slots: Sequence[Sequence[int]], num_slots: int
) -> tuple[list[int], list[int], list[int]]:
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
    return token_bounds, slot_bounds, slot_ids


def _cut(runs: Tensor, tokens: int) -> Tensor:
    """Runs [5, G] (first token, end, first entry, entries, pairs before) → parts of at most so many tokens, [*, 5]."""
    first, end, entry, entries, pairs = runs
    parts = (end - first + tokens - 1) // tokens
    run = torch.arange(runs.shape[1]).repeat_interleave(parts)
    within = (torch.arange(len(run)) - (parts.cumsum(0) - parts)[run]) * tokens
    start = first[run] + within
    stop = torch.minimum(start + tokens, end[run])
    return torch.stack([start, stop, entry[run], entries[run], pairs[run] + within * entries[run]], dim=1)


def _padded(section: Tensor, length: int) -> Tensor:
    return torch.cat([section, section.new_zeros(length - len(section), *section.shape[1:])])
