"""The LoRA delta as Triton kernels: shrink, gate, expand, outer, and the ordered sums that finish the gradients.

A and B have one layout, [slots, R, d] with d contiguous, so forward and backward are the same kernels:

    forward    S = shrink(x, A)     y = expand(base, S, B)
    backward   U = shrink(dy, B)   dx = expand(None, U, A)   dA = outer(U, x)   dB = outer(S, dy)

Gated, G = gate(S) takes S's place in expand and outer, and gate_backward(S, U) that of U: two short kernels between the
others, over the pairs alone.

Rank row k of a run is row k % R of the pool slot that the k // R-th entry of its list names: ranks are concatenated by
address arithmetic, nothing is padded or copied. S holds the (token, rank row) pairs of all runs, one after the other.
What is shared is written by one program, or as partial sums that another kernel adds in a fixed order: no atomics, so
results are bit-equal from run to run.

Offsets are int64 (`table` is): slot 1,120 of a pool of 26 layers, rank 8, 9,216 wide already starts past 2^31.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .plan import DECODE_TILE_TOKENS, DECODE_TOKENS, TILE_TOKENS, TINY, Sizes

TILE_FIELDS = tl.constexpr(5)
PIECE_FIELDS = tl.constexpr(6)
LEAST = tl.constexpr(TINY)


@triton.jit
def _load(pointers, mask, COMPUTE: tl.constexpr):
    """Loads, zero where masked, in the type of the products. Interpreted bf16 arithmetic is wrong unless widened."""
    return tl.load(pointers, mask=mask, other=0.0).to(COMPUTE)


@triton.jit
def _entries(table, slots_at, entry, k, rank, R: tl.constexpr):
    """Slot of each rank row k of a run whose list begins at `entry`; rows past `rank` give slot 0."""
    return tl.load(table + slots_at + entry + k // R, mask=k < rank, other=0)


@triton.jit(do_not_specialize=["slots_at", "tiles_at", "plane_size"])
def shrink_kernel(
    x, W, S, table, slots_at, tiles_at, stride_x, stride_slot, stride_row, d, plane_size,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, PER_SPLIT: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S[t, k] = Σ_d x[t, d] W[row k, d] for one tile of tokens, one of rank rows and one part of d."""
    tile = table + tiles_at + tl.program_id(0) * TILE_FIELDS
    first, end = tl.load(tile), tl.load(tile + 1)
    entry, entries, pairs = tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4)
    rank = entries * R
    k = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    if (first >= end) | (tl.program_id(1) * BLOCK_R >= rank):
        return
    m = tl.arange(0, BLOCK_M)
    rows, columns = (first + m < end)[:, None], (k < rank)[:, None]
    slot = _entries(table, slots_at, entry, k, rank, R)
    # 64-bit offsets stay scalar where they can: a tile of them would fill the registers.
    x_rows = x + first * stride_x + m[:, None] * stride_x
    W_rows = W + (slot * stride_slot + (k % R) * stride_row)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    start = tl.program_id(2) * PER_SPLIT
    for offset in range(start, tl.minimum(start + PER_SPLIT, d), BLOCK_K):
        i = (offset + tl.arange(0, BLOCK_K))[None, :]
        x_tile = _load(x_rows + i, rows & (i < d), COMPUTE)
        W_tile = _load(W_rows + i, columns & (i < d), COMPUTE)
        acc += tl.dot(x_tile, tl.trans(W_tile), input_precision=PRECISION)
    S += tl.program_id(2).to(tl.int64) * plane_size + pairs * R
    tl.store(S + m[:, None] * rank.to(tl.int32) + k[None, :], acc, mask=rows & (k < rank)[None, :])


@triton.jit
def _load_S(S, offsets, mask, plane_size, PLANES: tl.constexpr):
    """A tile of S, its parts added in order."""
    tile = tl.load(S + offsets, mask=mask, other=0.0)
    for part in range(1, PLANES):
        tile += tl.load(S + part * plane_size + offsets, mask=mask, other=0.0)
    return tile


@triton.jit
def _energies(S, entry, entries, rows, row_starts, plane_size, R: tl.constexpr, PLANES: tl.constexpr):
    """e[t, entry] = Σ S² over the entry's R rows; -1 where there is none."""
    mask = rows & (entry < entries)
    e = tl.zeros(mask.shape, tl.float32)
    for r in range(R):
        S_tile = _load_S(S, row_starts + entry * R + r, mask, plane_size, PLANES)
        e += S_tile * S_tile
    return tl.where(mask, tl.maximum(e, LEAST), -1.0)


@triton.jit
def _highest(
    S, entries, rows, row_starts, plane_size,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """Each token's largest energy, and the first entry that has it."""
    most, at = tl.full((BLOCK_M,), LEAST, tl.float32), tl.zeros((BLOCK_M,), tl.int32)
    for offset in range(0, entries, BLOCK_E):
        entry = offset + tl.arange(0, BLOCK_E)[None, :]
        e = _energies(S, entry, entries, rows, row_starts, plane_size, R, PLANES)
        here, index = tl.max(e, axis=1, return_indices=True)
        at = tl.where(here > most, offset + index, at)
        most = tl.maximum(here, most)
    return most, at


@triton.jit
def _weights(e, most, mask, gate):
    """(e / most)^gate, 1 where there is no entry."""
    return tl.exp(gate * tl.log(tl.where(mask, e / most[:, None], 1.0)))


@triton.jit(do_not_specialize=["tiles_at", "plane_size", "gate"])
def gate_kernel(
    S, G, table, tiles_at, plane_size, gate,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """G[t, k] = (e / max e)^gate S[t, k] for one tile of tokens, with e the entry's Σ S²."""
    tile = table + tiles_at + tl.program_id(0) * TILE_FIELDS
    first, end, entries, pairs = tl.load(tile), tl.load(tile + 1), tl.load(tile + 3), tl.load(tile + 4)
    if first >= end:
        return
    entries = entries.to(tl.int32)
    S += pairs * R
    G += pairs * R
    m = tl.arange(0, BLOCK_M)
    rows, row_starts = (first + m < end)[:, None], (m * entries * R)[:, None]
    most, _ = _highest(S, entries, rows, row_starts, plane_size, R, BLOCK_M, BLOCK_E, PLANES)
    for offset in range(0, entries, BLOCK_E):
        entry = offset + tl.arange(0, BLOCK_E)[None, :]
        mask = rows & (entry < entries)
        e = _energies(S, entry, entries, rows, row_starts, plane_size, R, PLANES)
        w = _weights(e, most, mask, gate)
        for r in range(R):
            at = row_starts + entry * R + r
            tl.store(G + at, w * _load_S(S, at, mask, plane_size, PLANES), mask=mask)


@triton.jit
def _log_weights_gradient(
    S, U, scale, table, slots_at, list_at, entry, entries, rows, row_starts, most, plane_size, gate, scaling,
    R: tl.constexpr, PLANES_S: tl.constexpr, PLANES_U: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """e and w of the entries, f = scaling times the slot's scale, and w Σ S ∘ f U over the entry's rows."""
    mask = rows & (entry < entries)
    e = _energies(S, entry, entries, rows, row_starts, plane_size, R, PLANES_S)
    w = _weights(e, most, mask, gate)
    f = tl.zeros(mask.shape, tl.float32) + scaling
    if HAS_SCALE:
        slot = tl.load(table + slots_at + list_at + entry, mask=mask, other=0)
        f *= tl.load(scale + slot, mask=mask, other=0.0)
    total = tl.zeros(mask.shape, tl.float32)
    for r in range(R):
        at = row_starts + entry * R + r
        total += _load_S(S, at, mask, plane_size, PLANES_S) * _load_S(U, at, mask, plane_size, PLANES_U)
    return e, w, f, w * f * total


@triton.jit(do_not_specialize=["slots_at", "tiles_at", "plane_size", "gate", "scaling"])
def gate_backward_kernel(
    S, U, scale, dS, table, slots_at, tiles_at, plane_size, gate, scaling,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, PLANES_S: tl.constexpr, PLANES_U: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """The gradient of S from that of G, which is scaling scale[slot] U, for one tile of tokens."""
    tile = table + tiles_at + tl.program_id(0) * TILE_FIELDS
    first, end = tl.load(tile), tl.load(tile + 1)
    list_at, entries, pairs = tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4)
    if first >= end:
        return
    entries = entries.to(tl.int32)
    S += pairs * R
    U += pairs * R
    dS += pairs * R
    m = tl.arange(0, BLOCK_M)
    rows, row_starts = (first + m < end)[:, None], (m * entries * R)[:, None]
    most, highest = _highest(S, entries, rows, row_starts, plane_size, R, BLOCK_M, BLOCK_E, PLANES_S)
    total = tl.zeros((BLOCK_M,), tl.float32)  # Σ of the gradients of log w
    for offset in range(0, entries, BLOCK_E):
        entry = offset + tl.arange(0, BLOCK_E)[None, :]
        _, _, _, q = _log_weights_gradient(
            S, U, scale, table, slots_at, list_at, entry, entries, rows, row_starts, most, plane_size, gate, scaling,
            R, PLANES_S, PLANES_U, HAS_SCALE,
        )  # fmt: skip
        total += tl.sum(q, axis=1)
    for offset in range(0, entries, BLOCK_E):
        entry = offset + tl.arange(0, BLOCK_E)[None, :]
        mask = rows & (entry < entries)
        e, w, f, q = _log_weights_gradient(
            S, U, scale, table, slots_at, list_at, entry, entries, rows, row_starts, most, plane_size, gate, scaling,
            R, PLANES_S, PLANES_U, HAS_SCALE,
        )  # fmt: skip
        of_log_e = q - tl.where(entry == highest[:, None], total[:, None], 0.0)
        for r in range(R):
            at = row_starts + entry * R + r
            S_tile = _load_S(S, at, mask, plane_size, PLANES_S)
            U_tile = _load_S(U, at, mask, plane_size, PLANES_U)
            tl.store(dS + at, w * f * U_tile + 2.0 * gate * of_log_e / e * S_tile, mask=mask)


@triton.jit(do_not_specialize=["slots_at", "tiles_at", "plane_size", "scaling"])
def expand_kernel(
    base, S, W, scale, y, table, slots_at, tiles_at, stride_base, stride_slot, stride_row, d, plane_size, scaling,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, PLANES: tl.constexpr,
    HAS_BASE: tl.constexpr, HAS_SCALE: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y[t, n] = base[t, n] + scaling Σ_k scale[slot k] S[t, k] W[row k, n] for one tile of tokens and one of n."""
    tile = table + tiles_at + tl.program_id(0) * TILE_FIELDS
    first, end = tl.load(tile), tl.load(tile + 1)
    entry, entries, pairs = tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4)
    if first >= end:
        return
    rank = (entries * R).to(tl.int32)
    S += pairs * R
    m = tl.arange(0, BLOCK_M)
    n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    rows = (first + m < end)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for offset in range(0, rank, BLOCK_R):
        k = offset + tl.arange(0, BLOCK_R)
        slot = _entries(table, slots_at, entry, k, rank, R)
        S_tile = _load_S(S, m[:, None] * rank + k[None, :], rows & (k < rank)[None, :], plane_size, PLANES)
        if HAS_SCALE:
            S_tile *= tl.load(scale + slot, mask=k < rank, other=0.0)[None, :]
        W_tile = _load(
            W + (slot * stride_slot + (k % R) * stride_row)[:, None] + n, (k < rank)[:, None] & (n < d), COMPUTE
        )
        acc += tl.dot(S_tile.to(COMPUTE), W_tile, input_precision=PRECISION)
    mask = rows & (n < d)
    acc *= scaling
    if HAS_BASE:
        # Added once, in float32. Rows without slots keep their bits: -0.0 + 0.0 would be 0.0.
        before = tl.load(base + first * stride_base + m[:, None] * stride_base + n, mask=mask, other=0.0).to(tl.float32)
        acc = tl.where(rank > 0, before + acc, before)
    tl.store(y + first * d + m[:, None] * d + n, acc.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["slots_at", "pieces_at", "planes_at", "plane_size", "scaling"])
def outer_kernel(
    S, z, scale, dW, partial, table, slots_at, pieces_at, planes_at, stride_z, d, plane_size, scaling,
    R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, PLANES: tl.constexpr,
    HAS_SCALE: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dW[row k, i] = scaling scale[slot k] Σ_t S[t, k] z[t, i] over one piece of a run's tokens.

    Straight into dW where the piece is the slot's only use, else into the use's plane of `partial`, [planes, R, d].
    """
    piece = table + pieces_at + tl.program_id(0) * PIECE_FIELDS
    first, end = tl.load(piece), tl.load(piece + 1)
    entry, entries, pairs, use = tl.load(piece + 2), tl.load(piece + 3), tl.load(piece + 4), tl.load(piece + 5)
    rank = (entries * R).to(tl.int32)
    if (first >= end) | (tl.program_id(1) * BLOCK_R >= rank):
        return
    S += pairs * R
    z += first * stride_z
    k = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    i = (tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for offset in range(0, (end - first).to(tl.int32), BLOCK_T):
        t = offset + tl.arange(0, BLOCK_T)
        rows = (first + t < end)[:, None]
        S_tile = _load_S(S, t[:, None] * rank + k[None, :], rows & (k < rank)[None, :], plane_size, PLANES)
        z_tile = _load(z + t[:, None] * stride_z + i, rows & (i < d), COMPUTE)
        acc += tl.dot(tl.trans(S_tile.to(COMPUTE)), z_tile, input_precision=PRECISION)
    slot = _entries(table, slots_at, entry, k, rank, R)
    acc *= scaling
    if HAS_SCALE:
        acc *= tl.load(scale + slot, mask=k < rank, other=0.0)[:, None]
    plane = tl.load(table + planes_at + use + k // R, mask=k < rank, other=0)
    mask = (k < rank)[:, None] & (i < d)
    only = (plane < 0)[:, None]
    tl.store(dW + ((slot * R + k % R) * d)[:, None] + i, acc.to(dW.dtype.element_ty), mask=mask & only)
    tl.store(partial + ((plane * R + k % R) * d)[:, None] + i, acc, mask=mask & ~only)


@triton.jit(do_not_specialize=["plane_bounds_at", "use_bounds_at", "size"])
def ordered_sum_kernel(dW, partial, table, plane_bounds_at, use_bounds_at, size, BLOCK: tl.constexpr):
    """dW of the slots that outer_kernel left out: the sum of their planes, in order, or zero for a slot without use."""
    slot = tl.program_id(0).to(tl.int64)
    uses = tl.load(table + use_bounds_at + slot + 1) - tl.load(table + use_bounds_at + slot)
    if uses == 1:
        return
    i = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for plane in range(tl.load(table + plane_bounds_at + slot), tl.load(table + plane_bounds_at + slot + 1)):
        acc += tl.load(partial + plane * size + i, mask=i < size, other=0.0)
    tl.store(dW + slot * size + i, acc.to(dW.dtype.element_ty), mask=i < size)


@triton.jit(do_not_specialize=["pieces_at", "order_at", "plane_size"])
def scale_kernel(
    S, U, partial, table, pieces_at, order_at, plane_size,
    R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, PLANES_S: tl.constexpr, PLANES_U: tl.constexpr,
):  # fmt: skip
    """partial[position of the use] = Σ S ∘ U over one piece of tokens and the R rows of one entry."""
    piece = table + pieces_at + tl.program_id(0) * PIECE_FIELDS
    first, end = tl.load(piece), tl.load(piece + 1)
    entries, pairs, use = tl.load(piece + 3), tl.load(piece + 4), tl.load(piece + 5)
    if (first >= end) | (tl.program_id(1) >= entries):
        return
    acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    r = tl.arange(0, BLOCK_R)[None, :]
    for offset in range(0, end - first, BLOCK_T):
        t = (offset + tl.arange(0, BLOCK_T))[:, None]
        at = (pairs + t * entries + tl.program_id(1)) * R + r
        mask = (first + t < end) & (r < R)
        acc += _load_S(S, at, mask, plane_size, PLANES_S) * _load_S(U, at, mask, plane_size, PLANES_U)
    position = tl.load(table + order_at + use + tl.program_id(1))
    tl.store(partial + position, tl.sum(tl.sum(acc, axis=1), axis=0))


@triton.jit(do_not_specialize=["use_bounds_at", "scaling"])
def scale_sum_kernel(dscale, partial, table, use_bounds_at, scaling):
    """dscale[slot] = scaling Σ of its uses' partial sums, in order."""
    slot = tl.program_id(0).to(tl.int64)
    acc = 0.0
    for use in range(tl.load(table + use_bounds_at + slot), tl.load(table + use_bounds_at + slot + 1)):
        acc += tl.load(partial + use)
    tl.store(dscale + slot, (acc * scaling).to(dscale.dtype.element_ty))


@triton.jit(do_not_specialize=["size"])
def sum_parts_kernel(S, parts, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """S = the sum of its parts over d, in order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(S + i, _load_S(parts, i, i < size, size, PARTS), mask=i < size)


# --- Launches -----------------------------------------------------------------------------------------------------


_INTERPRETED = not isinstance(shrink_kernel, triton.runtime.JITFunction)


def interpreted() -> bool:
    """Whether Triton runs these kernels in Python, on tensors of any device."""
    return _INTERPRETED


def num_splits(num_tokens: int, d: int) -> int:
    """Parts into which shrink cuts the reduction over d, so that few tokens make enough programs for a whole GPU.

    From shapes alone. While decoding from d alone: a row's result must not depend on what else is in the batch.
    """
    if num_tokens <= DECODE_TOKENS:
        return max(1, min(16, d // 512))
    tiles = triton.cdiv(num_tokens, TILE_TOKENS)
    return max(1, min(8, d // 1024, triton.cdiv(264, tiles)))  # two programs for each of an H100's 132 processors


def _power_of_two(number: int, low: int, high: int) -> int:
    return max(low, min(high, triton.next_power_of_2(max(number, 1))))


class _Blocks:
    """Tile sizes, from shapes and types alone. No autotuning: its choice varies from run to run.

    tl.dot needs at least 16 on every side. float32 tiles are half as long as 16-bit ones, for the same shared memory.
    """

    def __init__(self, sizes: Sizes, rank: int, compute: torch.dtype) -> None:
        wide = compute == torch.float32
        longest = sizes.max_slots * rank
        decode = bool(sizes.decode)
        self.tokens = DECODE_TILE_TOKENS if decode else TILE_TOKENS
        # Decoding sums ranks in steps of one size, whatever the longest list of the batch is.
        self.expand_ranks = 64 if decode else _power_of_two(longest, 16, 64)
        self.shrink_ranks = _power_of_two(longest, 16, 64 if wide else 128)
        self.shrink_depth = (64 if wide else 128) if decode else (32 if wide else 64)
        self.expand_width = 128
        self.gate_entries = _power_of_two(sizes.max_slots, 1, 512 // self.tokens)  # more spill registers
        self.outer_tokens = 32 if wide else 64
        self.outer_ranks = _power_of_two(longest, 16, 64)
        self.outer_width = 64 if wide or decode else 128
        self.warps = 4 if longest <= 32 or decode else 8


def _compute(base_dtype: torch.dtype) -> tuple[torch.dtype, dict]:
    """Type of the products and its constants: the frozen layer's own 16-bit type, else float32 as torch is set to."""
    compute = base_dtype if base_dtype in (torch.float16, torch.bfloat16) and not interpreted() else torch.float32
    names = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    fast = torch.get_float32_matmul_precision() != "highest"
    return compute, {"COMPUTE": names[compute], "PRECISION": "tf32" if fast else "ieee"}


def _rows(tensor: Tensor) -> Tensor:
    """The tensor with its last axis contiguous; a copy only if it is not."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def shrink(x: Tensor, W: Tensor, S: Tensor, table: Tensor, sizes: Sizes, *, compute_like: torch.dtype) -> None:
    """S [parts, pairs * R] = x [T, d] times the rows of W [slots, R, d] that each token uses.

    While decoding, S keeps the parts of the reduction, which expand adds up: one launch less. Else S has one part, the
    sum: with many tokens expand would read the parts once for every tile of its output.
    """
    compute, how = _compute(compute_like)
    blocks, rank, d = _Blocks(sizes, W.shape[1], compute), W.shape[1], x.shape[1]
    depth, splits = blocks.shrink_depth, num_splits(len(x), d)
    per_split = triton.cdiv(triton.cdiv(d, splits), depth) * depth
    grid = (sizes.num_tiles, triton.cdiv(sizes.max_slots * rank, blocks.shrink_ranks), splits)
    if 0 in grid:
        return
    parts = S if splits == len(S) else torch.empty(splits, S.shape[1], dtype=S.dtype, device=S.device)
    shrink_kernel[grid](
        x, W, parts, table, sizes.slots, sizes.tiles, x.stride(0), W.stride(0), W.stride(1), d, S.shape[1],
        R=rank, BLOCK_M=blocks.tokens, BLOCK_R=blocks.shrink_ranks, BLOCK_K=depth, PER_SPLIT=per_split, **how,
        num_warps=blocks.warps, num_stages=3,
    )  # fmt: skip
    if parts is not S:
        grid = (triton.cdiv(S.shape[1], 1024),)
        sum_parts_kernel[grid](S, parts, S.shape[1], PARTS=splits, BLOCK=1024, num_warps=4)


def num_parts(num_tokens: int, d: int) -> int:
    """Rows of S: the parts of the reduction while decoding, else one."""
    return num_splits(num_tokens, d) if num_tokens <= DECODE_TOKENS else 1


def gated(S: Tensor, gate: float, rank: int, table: Tensor, sizes: Sizes) -> Tensor:
    """G [1, pairs * R]: each (token, slot) of S times its energy's power `gate`, in units of the token's largest."""
    G = torch.empty(1, S.shape[1], dtype=torch.float32, device=S.device)
    blocks = _Blocks(sizes, rank, torch.float32)
    if sizes.num_tiles and sizes.max_slots:
        gate_kernel[sizes.num_tiles,](
            S, G, table, sizes.tiles, S.shape[1], gate,
            R=rank, BLOCK_M=blocks.tokens, BLOCK_E=blocks.gate_entries, PLANES=len(S), num_warps=4,
        )  # fmt: skip
    return G


def gated_backward(
    S: Tensor, U: Tensor, scale: Tensor | None, scaling: float, gate: float, rank: int, table: Tensor, sizes: Sizes
) -> Tensor:
    """[1, pairs * R]: the gradient of S from U = dy Bᵀ, scale and scaling in it."""
    dS = torch.empty(1, S.shape[1], dtype=torch.float32, device=S.device)
    blocks = _Blocks(sizes, rank, torch.float32)
    if sizes.num_tiles and sizes.max_slots:
        gate_backward_kernel[sizes.num_tiles,](
            S, U, S if scale is None else scale, dS, table, sizes.slots, sizes.tiles, S.shape[1], gate, scaling,
            R=rank, BLOCK_M=blocks.tokens, BLOCK_E=blocks.gate_entries, PLANES_S=len(S), PLANES_U=len(U),
            HAS_SCALE=scale is not None, num_warps=4,
        )  # fmt: skip
    return dS


def expand(
    base: Tensor | None, S: Tensor, W: Tensor, scale: Tensor | None, scaling: float, y: Tensor, table: Tensor,
    sizes: Sizes, *, compute_like: torch.dtype,
) -> None:  # fmt: skip
    """y [T, d] = base + scaling (scale ∘ S) W; zero instead of base for None."""
    compute, how = _compute(compute_like)
    blocks, (_, rank, d) = _Blocks(sizes, W.shape[1], compute), W.shape
    grid = (sizes.num_tiles, triton.cdiv(d, blocks.expand_width))
    if 0 in grid:
        return
    expand_kernel[grid](
        y if base is None else base, S, W, S if scale is None else scale, y, table, sizes.slots, sizes.tiles,
        0 if base is None else base.stride(0), W.stride(0), W.stride(1), d, S.shape[1], scaling,
        R=rank, BLOCK_M=blocks.tokens, BLOCK_R=blocks.expand_ranks, BLOCK_N=blocks.expand_width, PLANES=len(S),
        HAS_BASE=base is not None, HAS_SCALE=scale is not None, **how, num_warps=blocks.warps,
        num_stages=1 if sizes.decode and len(S) == 1 else 2,  # two would spill float32 registers
    )  # fmt: skip


def outer(
    S: Tensor, z: Tensor, scale: Tensor | None, scaling: float, dW: Tensor, table: Tensor, sizes: Sizes,
    *, compute_like: torch.dtype,
) -> None:  # fmt: skip
    """dW [slots, R, d] = scaling scale ∘ Σ over each slot's tokens of S z, z [T, d]; zero for slots without tokens."""
    compute, how = _compute(compute_like)
    num_slots, rank, d = dW.shape
    blocks = _Blocks(sizes, rank, compute)
    partial = torch.empty(max(sizes.num_planes, 1), rank, d, dtype=torch.float32, device=dW.device)
    grid = (
        sizes.num_pieces,
        triton.cdiv(sizes.max_slots * rank, blocks.outer_ranks),
        triton.cdiv(d, blocks.outer_width),
    )
    if 0 not in grid:
        outer_kernel[grid](
            S, z, S if scale is None else scale, dW, partial, table, sizes.slots, sizes.pieces, sizes.planes,
            z.stride(0), d, S.shape[1], scaling,
            R=rank, BLOCK_T=blocks.outer_tokens, BLOCK_R=blocks.outer_ranks, BLOCK_D=blocks.outer_width, PLANES=len(S),
            HAS_SCALE=scale is not None, **how, num_warps=blocks.warps, num_stages=3,
        )  # fmt: skip
    if num_slots:
        ordered_sum_kernel[num_slots, triton.cdiv(rank * d, 1024)](
            dW, partial, table, sizes.plane_bounds, sizes.use_bounds, rank * d, BLOCK=1024, num_warps=4
        )


def scale_gradient(
    S: Tensor, U: Tensor, scaling: float, dscale: Tensor, rank: int, table: Tensor, sizes: Sizes
) -> None:
    """dscale [slots] = scaling Σ S ∘ U over each slot's pairs."""
    partial = torch.empty(max(sizes.num_uses, 1), dtype=torch.float32, device=S.device)
    if sizes.num_pieces and sizes.max_slots:
        scale_kernel[sizes.num_pieces, sizes.max_slots](
            S, U, partial, table, sizes.pieces, sizes.order, S.shape[1],
            R=rank, BLOCK_T=64, BLOCK_R=triton.next_power_of_2(rank), PLANES_S=len(S), PLANES_U=len(U), num_warps=4,
        )  # fmt: skip
    if len(dscale):
        scale_sum_kernel[len(dscale),](dscale, partial, table, sizes.use_bounds, scaling, num_warps=1)


# --- The op's two directions --------------------------------------------------------------------------------------


def forward(
    base: Tensor, x: Tensor, A: Tensor, B: Tensor, slot_scale: Tensor | None, scaling: float, gate: float,
    table: Tensor, S: Tensor, sizes: Sizes,
) -> Tensor:  # fmt: skip
    """y, and S [parts, pairs * R] filled in."""
    base, x, A, B = _rows(base), _rows(x), _rows(A), _rows(B)
    shrink(x, A, S, table, sizes, compute_like=base.dtype)
    y = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    G = gated(S, gate, A.shape[1], table, sizes) if gate else S
    expand(base, G, B, slot_scale, scaling, y, table, sizes, compute_like=base.dtype)
    return y


def backward(
    dy: Tensor, x: Tensor, S: Tensor, A: Tensor, B: Tensor, slot_scale: Tensor | None, scaling: float, gate: float,
    table: Tensor, sizes: Sizes, needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x, A, B and slot_scale where needed, else None."""
    dy, x, A, B = _rows(dy), _rows(x), _rows(A), _rows(B)
    like, dx, dA, dB, dscale, rank = dy.dtype, None, None, None, None, A.shape[1]
    G = gated(S, gate, rank, table, sizes) if gate and (needs[2] or needs[3]) else S
    if needs[2]:
        dB = torch.empty(B.shape, dtype=B.dtype, device=B.device)
        outer(G, dy, slot_scale, scaling, dB, table, sizes, compute_like=like)
    if needs[0] or needs[1] or needs[3]:
        U = torch.empty(num_parts(len(x), dy.shape[1]), S.shape[1], dtype=torch.float32, device=S.device)
        shrink(dy, B, U, table, sizes, compute_like=like)
        if needs[3]:
            dscale = torch.empty(slot_scale.shape, dtype=slot_scale.dtype, device=slot_scale.device)
            scale_gradient(G, U, scaling, dscale, rank, table, sizes)
        factors = slot_scale, scaling
        if gate and (needs[0] or needs[1]):
            U, factors = gated_backward(S, U, *factors, gate, rank, table, sizes), (None, 1.0)
        if needs[0]:
            dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            expand(None, U, A, *factors, dx, table, sizes, compute_like=like)
        if needs[1]:
            dA = torch.empty(A.shape, dtype=A.dtype, device=A.device)
            outer(U, x, *factors, dA, table, sizes, compute_like=like)
    return dx, dA, dB, dscale
