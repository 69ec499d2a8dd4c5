"""read_chunks: any number of chunks to their LoRA matrices; memory beyond these does not grow with their number.

    A, B = read_chunks(rows, context_encoder, hypernetwork, max_batch_tokens=4096)

Chunks go through the base model in batches of at most `max_batch_tokens`. Each layer's features go to the hypernetwork
as soon as the base model has computed them and are dropped again: L maps never exist together. Only A and B grow.

`read_in_passes` reads them in passes of one shape, so that what a chunk becomes depends on no other chunk, to the bit.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor
from torch.nn.functional import pad

from hypernet.base.targets import EndOfPass
from hypernet.model.context_encoder import ContextEncoder, Recited, drop_context, with_context
from hypernet.model.hypernetwork import HyperNetwork
from hypernet.model.recitation import place_gains

log = logging.getLogger(__name__)

DEFAULT_BATCH_TOKENS = 4096
_LEAST_TOGETHER = 8  # chunks of a batch of `read_and_write`
WIDTH_STEP = 16  # tokens: `read_in_passes` pads chunks to a multiple of it

Weights = dict[str, Tensor]
"""Target name to [C, L, R, d]."""


@torch.no_grad()
def read_chunks(
    rows: Sequence[tuple[Tensor, Tensor]],
    context_encoder: ContextEncoder,
    hypernetwork: HyperNetwork,
    *,
    max_batch_tokens: int = DEFAULT_BATCH_TOKENS,
    num_fillers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Weights, Weights]:
    """LoRA matrices of every chunk, without gradients.

    A recitation's chunks are read by length, and those that miss a token a second time with gains (`place_gains`).

    Args:
        rows: (ids [T], mask [T]) per chunk, right-padded, on any device.
        max_batch_tokens: most tokens read at once, context and padding included; a longer chunk is read alone. Where
            memory runs out, it is halved and the batch is read again.
        num_fillers: so many of the last rows give a batch its shape and nothing else. With them batches have the rows
            that fit, as they come, and all are read a second time if one misses a token that is no filler.
        progress: called with (chunks done, chunks altogether), before the first batch and after each.

    Returns:
        A, B by target name, [C, L, R, d_in] and [C, L, R, d_out], contiguous per layer, on the hypernetwork's device.

    Raises:
        ValueError: max_batch_tokens below 1.
        MemoryError: a single chunk does not fit.
    """
    if isinstance(max_batch_tokens, bool) or not isinstance(max_batch_tokens, int) or max_batch_tokens < 1:
        raise ValueError(f"max_batch_tokens should be a whole number, at least 1, got {max_batch_tokens!r}.")
    parameter = next(hypernetwork.parameters())

    def empty(d: int, num_layers: int) -> Tensor:
        # Layers outermost in memory: A[:, layer] needs no copy to become a matrix.
        shape = (num_layers, len(rows), hypernetwork.rank, d)
        return torch.empty(shape, dtype=parameter.dtype, device=parameter.device).transpose(0, 1)

    A = {target.name: empty(target.d_in, len(target.paths)) for target in hypernetwork.targets}
    B = {target.name: empty(target.d_out, len(target.paths)) for target in hypernetwork.targets}
    lengths = [context_encoder.num_read(_length(mask)) for _, mask in rows]
    everything = range(len(rows))
    by_length = hypernetwork.recitation is not None and not num_fillers

    def in_batches(places: Sequence[int], gains: dict[int, Tensor], told: Callable[[int], None]) -> dict[int, Tensor]:
        """Reads these rows, and gives gains for those that miss a token."""
        nonlocal max_batch_tokens
        if by_length:
            places = sorted(places, key=lambda place: lengths[place])
        most = _together(len(places)) if by_length else len(places)
        done, missed = 0, {}
        while done < len(places):
            count = _fitting([lengths[place] for place in places[done : done + most]], max_batch_tokens)
            some = places[done : done + count]
            try:
                found = _read_batch(rows, some, gains, context_encoder, hypernetwork, A, B, max_batch_tokens)
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]
            else:
                missed.update({place: own for place, own in found.items() if place < len(rows) - num_fillers})
                done += count
                told(done)
                continue
            # Out here the failed batch's tensors are gone with the exception's frames.
            tokens = count * max(lengths[place] for place in some)
            if count == 1:
                raise MemoryError(
                    f"Out of memory: one chunk of {tokens} tokens does not fit on {parameter.device} ({reason}). "
                    "Lower max_chunk_tokens, or load the base model in bfloat16."
                )
            max_batch_tokens = max(1, tokens // 2)
            log.warning("Out of memory with %d tokens at once; going on with %d.", tokens, max_batch_tokens)
            if parameter.device.type == "cuda":
                torch.cuda.empty_cache()
        return missed

    def told(done: int) -> None:
        if progress:
            progress(done, len(rows))

    told(0)
    with context_encoder.kept():
        if missed := in_batches(everything, {}, told):
            in_batches(everything if num_fillers else [*missed], missed, lambda _: None)
    return A, B


def read_and_write(
    ids: Tensor,
    mask: Tensor,
    context_encoder: ContextEncoder,
    hypernetwork: HyperNetwork,
    *,
    keys_only: bool = False,
) -> tuple[Weights, Weights]:
    """A and B of chunks whose rows act while they are read, layer after layer; differentiable, but for what acts.

    For training: each chunk is read once, whatever the context encoder reads more of it, and no place has a gain.

    Args:
        ids, mask: [C, T], as of the context encoder.
        keys_only: end where the layers for keys do.
    """
    lengths = [_length(row) for row in mask]
    order = sorted(range(len(lengths)), key=lambda place: lengths[place])
    size = _together(len(order))
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    made = []
    for group in groups:
        width = lengths[group[-1]]
        made.append(_read_together(ids[group, :width], mask[group, :width], context_encoder, hypernetwork, keys_only))
    back = torch.tensor(order, device=ids.device).argsort()
    A, B = ({name: torch.cat([one[part][name] for one in made])[back] for name in made[0][part]} for part in (0, 1))
    return A, B


def _read_together(
    ids: Tensor, mask: Tensor, context_encoder: ContextEncoder, hypernetwork: HyperNetwork, keys_only: bool
) -> tuple[Weights, Weights]:
    layers: list[tuple[Weights, Weights]] = []
    with_gradient = torch.is_grad_enabled()
    write = _Writing(mask[:, context_encoder.unread :], hypernetwork, 1)

    def read(index: int, features: Tensor) -> Tensor | None:
        with torch.set_grad_enabled(with_gradient):
            made, added = write(index, features)
        if made is not None:
            layers.append(made)
            if keys_only:
                raise EndOfPass
        return added

    with suppress(EndOfPass):
        context_encoder.stream(ids, mask, read, readings=1)
    A, B = ({name: torch.cat([made[part][name] for made in layers], 1) for name in layers[0][part]} for part in (0, 1))
    return A, B


class _Writing:
    """Layer by layer A and B [C, l, R, d] of a recitation, and what they add to the module's output, [M C, T, d_out].

    Keys add nothing and are made when all of their layers were read, of which each token is kept from one.

    Args:
        mask: [C, T], of what is read.
        readings: M, how often each chunk is.
        gains: [C, T], as of `Recitation.saying`.
    """

    def __init__(self, mask: Tensor, hypernetwork: HyperNetwork, readings: int, gains: Tensor | None = None) -> None:
        assert hypernetwork.recitation is not None
        self.mask, self.readings, self.gains = mask, readings, gains
        self.part, self.scaling = hypernetwork.recitation, hypernetwork.scaling
        (self.target,) = hypernetwork.targets
        self._own: Tensor | None = None

    def __call__(self, index: int, features: Tensor) -> tuple[tuple[Weights, Weights] | None, Tensor | None]:
        name, d_in, d_out = self.target.name, self.target.d_in, self.target.d_out
        num_keys = self.part.num_key_layers
        if index >= num_keys:
            read, mask = drop_context(features.unflatten(0, (self.readings, -1)).transpose(0, 1), self.mask)
            gains = None if self.gains is None else drop_context(self.gains[:, None, :, None], self.mask)[0][:, 0, :, 0]
            A, B, found = self.part.saying(index, read, mask, gains)
            # Reading after reading again, as the base model has them.
            found = with_context(found, self.mask).transpose(0, 1)
            return ({name: A[:, None]}, {name: B[:, None]}), (self.scaling * found @ B.detach()).flatten(0, 1)
        read, mask = drop_context(features[: len(self.mask), None, :, :d_in], self.mask)
        if self._own is None:
            self._own = read.new_zeros(len(read), read.shape[2] - 1, d_in, dtype=torch.float32)
        turn = slice(index + 1, None, num_keys)
        self._own[:, index::num_keys] = read[:, 0, turn].masked_fill(~mask[:, turn, None], 0).float()
        if index < num_keys - 1:
            return None, None
        A = self.part.keys(self._own, mask)
        return ({name: A}, {name: A.new_zeros(*A.shape[:3], d_out)}), None


@torch.no_grad()
def read_in_passes(
    rows: Sequence[tuple[Tensor, Tensor]],
    context_encoder: ContextEncoder,
    hypernetwork: HyperNetwork,
    *,
    pass_chunks: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Weights, Weights]:
    """As `read_chunks`, and the same bits for a chunk whatever is read with it, before it or after it.

    A product of matrices rounds otherwise for another number of rows: of 300 sentences read alone and in one batch 148
    agree to the bit, the others to 3e-7. So every pass has `pass_chunks` rows padded to one of few widths, the last of
    them a filler of full width.

    Args:
        pass_chunks: rows of a pass, at least 2.
        progress: called with (chunks done, chunks altogether) after each pass.

    Raises:
        ValueError: pass_chunks below 2.
        MemoryError: as `read_chunks`.
    """
    if isinstance(pass_chunks, bool) or not isinstance(pass_chunks, int) or pass_chunks < 2:
        raise ValueError(f"pass_chunks should be a whole number, at least 2, got {pass_chunks!r}.")
    of_width: dict[int, list[int]] = {}
    for place, (_, mask) in enumerate(rows):
        of_width.setdefault(-(-_length(mask) // WIDTH_STEP) * WIDTH_STEP, []).append(place)
    A, B = read_chunks([], context_encoder, hypernetwork)
    A, B = (
        {n: part.new_empty(part.shape[1], len(rows), *part.shape[2:]).transpose(0, 1) for n, part in parts.items()}
        for parts in (A, B)
    )
    done = 0
    for width, places in of_width.items():
        read_tokens = width if hypernetwork.recitation is None else min(width, hypernetwork.recitation.max_tokens)
        unread, (beginning, _) = context_encoder.unread, rows[places[0]]
        filler = torch.full((width,), int(beginning[0])), torch.arange(width) >= max(unread, width - read_tokens)
        filler[0][:unread] = beginning[:unread]
        for start in range(0, len(places), pass_chunks - 1):
            chosen = places[start : start + pass_chunks - 1]
            num_fillers = pass_chunks - len(chosen)
            batch = [rows[place] for place in chosen] + [filler] * num_fillers
            tokens = max(1, pass_chunks * context_encoder.num_read(width))
            read = read_chunks(batch, context_encoder, hypernetwork, max_batch_tokens=tokens, num_fillers=num_fillers)
            for weights, parts in zip((A, B), read, strict=True):
                for name, part in parts.items():
                    weights[name][chosen] = part[: len(chosen)]
            done += len(chosen)
            if progress:
                progress(done, len(rows))
    return A, B


def _read_batch(
    rows: Sequence[tuple[Tensor, Tensor]],
    places: Sequence[int],
    gains: dict[int, Tensor],
    context_encoder: ContextEncoder,
    hypernetwork: HyperNetwork,
    A: Weights,
    B: Weights,
    max_batch_tokens: int,
) -> dict[int, Tensor]:
    """Fills A[:][places] and B[:][places] from these rows, as many maps together as stay within the budget.

    Args:
        gains: of rows that are read a second time, [T - unread] each.

    Returns:
        The gains of rows of a recitation that miss a token.
    """
    parameter = next(hypernetwork.parameters())
    width = max(_length(rows[place][1]) for place in places)

    def padded(parts: Sequence[Tensor], width: int, value: float) -> Tensor:
        return torch.stack([pad(part[:width], (0, max(0, width - len(part))), value=value) for part in parts])

    ids, mask = (padded([rows[place][i] for place in places], width, 0).to(parameter.device) for i in (0, 1))
    if hypernetwork.recitation is not None:
        assert isinstance(context_encoder, Recited)
        own = None
        if gains:
            width -= context_encoder.unread
            one = torch.ones(0, device=parameter.device)
            own = padded([gains.get(place, one) for place in places], width, 1)
        states = _recite(ids, mask, places, own, context_encoder, hypernetwork, A, B)
        if gains:
            return {}
        margins = context_encoder.margins(states, ids, mask)
        missed = (margins <= 0).any(1).tolist()
        return {place: row for place, row, misses in zip(places, place_gains(margins), missed, strict=True) if misses}

    # Short documents: several layers' maps make one call, which for 300 tokens takes a third less time than one each.
    per_call = max(1, max_batch_tokens // ids.numel()) if hypernetwork.num_maps > 1 else 1
    maps: list[Tensor] = []

    def read(index: int, features: Tensor) -> None:
        maps.append(features)
        if len(maps) < per_call and index + 1 < hypernetwork.num_maps:
            return
        layers = slice(index + 1 - len(maps), index + 1) if hypernetwork.num_maps > 1 else slice(None)
        # The base model may be in half precision; the hypernetwork decides its own type.
        generated = hypernetwork(*drop_context(torch.stack(maps, dim=1).to(parameter.dtype), mask), layers=layers)
        maps.clear()
        for weights, parts in zip((A, B), generated, strict=True):
            for name, part in parts.items():
                weights[name][places, layers] = part

    context_encoder.stream(ids, mask, read)
    return {}


def _recite(
    ids: Tensor,
    mask: Tensor,
    places: Sequence[int],
    gains: Tensor | None,
    context_encoder: Recited,
    hypernetwork: HyperNetwork,
    A: Weights,
    B: Weights,
) -> Tensor:
    """Fills A[:][places] and B[:][places] and gives the last states, as of `ContextEncoder.stream`."""
    write = _Writing(mask[:, context_encoder.unread :], hypernetwork, context_encoder.num_readings, gains)

    def read(index: int, features: Tensor) -> Tensor | None:
        made, added = write(index, features)
        for weights, parts in zip((A, B), made or ({}, {}), strict=True):
            for name, part in parts.items():
                weights[name][places, index + 1 - part.shape[1] : index + 1] = part
        return added

    states = context_encoder.stream(ids, mask, read)
    assert states is not None
    return states


def _length(mask: Tensor) -> int:
    """Tokens of a chunk with its context, without the padding behind it."""
    return int(mask.nonzero().max()) + 1


def _together(num_chunks: int) -> int:
    """Most chunks of a batch, of so many by length: sentences are of 10 to 56 tokens, and 84 of them in four batches
    are half of what one batch would pad."""
    return max(_LEAST_TOGETHER, -(-num_chunks // 4))


def _fitting(lengths: Sequence[int], max_batch_tokens: int) -> int:
    """How many of the first chunks fit into one batch, padded to the longest; at least one."""
    count, width = 0, 0
    for length in lengths:
        width = max(width, length)
        if count and width * (count + 1) > max_batch_tokens:
            break
        count += 1
    return count


def _is_out_of_memory(error: RuntimeError) -> bool:
    # On a GPU torch has a type for it; on a CPU the allocator raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
