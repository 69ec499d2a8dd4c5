"""How an adapter's chunks are joined where they are used: sum, ridge, gate or route; for training and for use.

The delta of joined chunks is a linear associative memory: the rows of A are its keys, those of B its values, and what
is read for one chunk's question also reads, a little, the rows of all others that are similar. With every chunk more
this cross-talk grows. Four ways to deal with it; an adapter holds its chunks as generated, whichever is taken:

    sum      nothing: Σ_c B_cᵀ A_c x
    ridge    the rows of A are separated once, by a ridge regression (`decorrelated`): one plain LoRA for any program
    gate     every token weights each chunk by a power of its routing score, module by module (`lora_delta`'s gate)
    route    every question gets the few chunks with the highest routing scores (`routing_scores`, `highest`)

Before, in every way, a passage that stands in several documents is taken once (`distinct`): its copies would answer
together, several times as strongly as one does. One that stands several times in one document is taken once by gate and
route; sum and ridge join a document's own chunks as in training, whatever they repeat.

    joining = Joining("ridge", ridge=8.0)
    A = decorrelated(A, documents, ridge=8.0)                          # [n, R, d_in], documents [n]
    A, B, slots = separated_slots(A, B, counts, members, ridge=8.0)    # in training: one list of slots for each row
    chunks, weights = highest(routing_scores(base_model, targets, A, prompts), top_k=2)

Sources: the optimal linear associative memory, Kohonen and Ruohonen 1973, https://doi.org/10.1109/TC.1973.5009138;
choosing whole LoRAs by the input, LoraRetriever, Zhao et al. 2024, https://arxiv.org/abs/2402.09997
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from hypernet.base.base_model import contiguous_states
from hypernet.base.targets import EndOfPass, LoRATarget

WAYS = ("sum", "ridge", "gate", "route")
# Of each way, its settings with what they are where they are not given; chosen on validation documents.
SETTINGS: dict[str, dict[str, float | int | None]] = {
    "sum": {},
    "ridge": {"ridge": None},
    "gate": {"gate_power": 1.25},
    "route": {"top_k": 2, "weight_power": 1.0},
}
COPY_COSINE = 0.9  # least cosine of two chunks' A and of their B that makes one a copy of the other
EPSILON = 1e-6  # length below which a row counts as zero, as in padding

_Weights = dict[str, Tensor]
"""Target name to [C, L, R, d]."""


@dataclass(frozen=True)
class Joining:
    """A way to join chunks, and its setting.

    Attributes:
        way: one of WAYS.
        ridge: above 0, of "ridge"; the larger, the nearer to the plain sum.
        gate_power: above 0, of "gate": the power of a chunk's routing score, relative to the highest one's, that
            weights the chunk.
        top_k: of "route": chunks for each question; all where there are fewer.
        weight_power: of "route": as gate_power, for the chosen chunks. 0: all that are chosen count alike.

    Raises:
        ValueError: unknown way, a setting of another way, or one out of range.
    """

    way: str = "sum"
    ridge: float | None = None
    gate_power: float | None = None
    top_k: int | None = None
    weight_power: float | None = None

    def __post_init__(self) -> None:
        if self.way not in WAYS:
            raise ValueError(f"Unknown way to join {self.way!r}. Use one of {', '.join(WAYS)}.")
        own = SETTINGS[self.way]
        for name in (field.name for field in fields(self) if field.name != "way"):
            value = getattr(self, name)
            if name not in own and value is not None:
                (of,) = (way for way, settings in SETTINGS.items() if name in settings)
                raise ValueError(f"{name} is a setting of join={of}, but join is {self.way}. Leave it out.")
            if name in own and value is None:
                object.__setattr__(self, name, own[name])
        if self.way == "ridge" and self.ridge is None:
            raise ValueError("join=ridge needs a ridge, such as 8.0: this hypernetwork was not trained with one.")
        for name in own:
            _check(name, getattr(self, name))

    def plain(self) -> dict[str, Any]:
        """The way and its own settings, ready for JSON."""
        return {"way": self.way, **{name: getattr(self, name) for name in SETTINGS[self.way]}}

    @property
    def is_plain_lora(self) -> bool:
        """Whether what is joined so is one LoRA for all questions, that any program can load."""
        return self.way in ("sum", "ridge")


def _check(name: str, value: Any) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if name == "top_k":
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"top_k should be a whole number, at least 1, got {value!r}.")
    elif name == "weight_power":
        if not is_number or value < 0:
            raise ValueError(f"weight_power should be a number, at least 0, got {value!r}.")
    elif not is_number or value <= 0:
        raise ValueError(f"{name} should be a number above 0, got {value!r}.")


# copies


@torch.no_grad()
def distinct(
    A: _Weights,
    B: _Weights,
    targets: Sequence[LoRATarget],
    *,
    passages: Sequence[object],
    documents: Sequence[int],
    weights: Sequence[float],
    within: bool = False,
) -> list[int]:
    """The chunks that are left, ascending, where of a passage that stands several times one copy is taken.

    Chunks of the same wording are copies if they also mean the same: in every module their keys agree, the rows of A,
    and their values, those of B, each with a cosine of COPY_COSINE or more, a chunk's rows taken as one vector. "She
    was born in 1985" is another fact in another article.

    Args:
        A, B: [C, L, R, d_in] and [C, L, R, d_out] by target name, as generated.
        passages: for each chunk what tells its wording from others; None is like no other.
        documents: for each chunk the number of its document.
        weights: for each document the factor on it. Of copies the one with the highest is taken, and others as long as
            all together have no more than 1: an average of equal adapters is each of them.
        within: also chunks of one document are copies; else of different ones alone.
    """
    numbers = {passage: number for number, passage in enumerate(passages)}
    wording = torch.tensor([i if passage is None else numbers[passage] for i, passage in enumerate(passages)])
    _, group, counts = wording.unique(return_inverse=True, return_counts=True)
    chunks = (counts[group] > 1).nonzero().flatten()
    of = torch.tensor(documents)[chunks]
    agree = (wording[chunks, None] == wording[chunks]) & (chunks[:, None] != chunks)
    if not within:
        agree &= of[:, None] != of
    for target in targets:
        for place in target.modules():
            for rows in (A[target.name], B[target.name]):
                unit = F.normalize(rows[chunks, place.layer].flatten(1).float(), dim=1)
                agree &= (unit @ unit.mT >= COPY_COSINE).cpu()
    factors, taken = torch.tensor(weights), torch.zeros(len(chunks), dtype=torch.bool)
    for number in factors[of].argsort(descending=True, stable=True):
        others = of[agree[number] & taken]
        same_document = bool((others == of[number]).any())
        total = factors[others.unique()].sum() + factors[of[number]]
        taken[number] = not len(others) or (not same_document and total <= 1 + EPSILON)
    copies = set(chunks[~taken].tolist())
    return [chunk for chunk in range(len(documents)) if chunk not in copies]


# ridge


def decorrelated(A: Tensor, documents: Tensor | None = None, *, ridge: float) -> Tensor:
    """The rows of A of several documents, or of several chunks of one, that are active together.

    With K the rows at length 1, G = K Kᵀ and G_d the same without what stands between different documents, K becomes
    (G_d + ridge I) (G + ridge I)⁻¹ K, and the rows get their lengths back. So nothing changes for one document alone,
    for documents whose rows are orthogonal, and for an infinite ridge, which is the plain sum. At a ridge of 0 and with
    independent rows, an input made of one document's rows gives what that document alone gives, and nothing of the
    others.

    Args:
        A: [..., n, R, d], the rows of n chunks.
        documents: [n] or [..., n], the number of the document that each chunk is of; None: each chunk is separated
            from all others. Chunks of padding are zero, whatever their number.
        ridge: above 0, in units of a row's squared length after it was brought to 1.

    Returns:
        As A, in its dtype, differentiable; computed in float32 at least. Its memory grows with n; with n² where
        documents has more than one axis.

    Raises:
        ValueError: the ridge is not above 0.
    """
    if not ridge > 0:
        raise ValueError(f'Expected a ridge above 0, got {ridge}. Use the way "sum" for the plain sum.')
    num_chunks, rank, width = A.shape[-3:]
    with torch.autocast(A.device.type, enabled=False):
        length, unit = _normalized(A)
        gram = None
        if num_chunks * rank <= width:
            gram = unit @ unit.mT
            solved = torch.cholesky_solve(unit, torch.linalg.cholesky(_plus(gram, ridge)))
        else:  # (K Kᵀ + r I)⁻¹ K = K (Kᵀ K + r I)⁻¹, and the smaller of the two is solved
            solved = torch.cholesky_solve(unit.mT, torch.linalg.cholesky(_plus(unit.mT @ unit, ridge))).mT
        mixed = _own(unit, solved, documents, num_chunks, gram=gram) + ridge * solved
    return (length * mixed).to(A.dtype).unflatten(-2, (num_chunks, rank))


@torch.no_grad()
def decorrelate_(A: Tensor, *, ridge: float) -> Tensor:
    """`decorrelated` of the chunks of one document, in place: [n, R, d], in memory for a few times d² whatever n is."""
    num_chunks, rank, width = A.shape
    if num_chunks * rank <= width:
        return A.copy_(decorrelated(A, ridge=ridge))
    blocks = A.split(max(1, width // rank))
    with torch.autocast(A.device.type, enabled=False):
        gram = ridge * torch.eye(width, dtype=torch.promote_types(A.dtype, torch.float32), device=A.device)
        for block in blocks:
            _add_gram(gram, block)
        factor = torch.linalg.cholesky(gram)
        for block in blocks:
            _solve(block, factor, ridge)
    return A


# Functions of their own, so that nothing of one block is held while the next is computed.


def _add_gram(gram: Tensor, block: Tensor) -> None:
    _, unit = _normalized(block)
    gram.addmm_(unit.mT, unit)


def _solve(block: Tensor, factor: Tensor, ridge: float) -> None:
    length, unit = _normalized(block)
    solved = torch.cholesky_solve(unit.mT, factor).mT
    mixed = _own(unit, solved, None, len(block)) + ridge * solved
    block.copy_((length * mixed).unflatten(-2, block.shape[:2]))


def _normalized(A: Tensor) -> tuple[Tensor, Tensor]:
    """[..., n, R, d] → the rows' lengths [..., n R, 1], and the rows at length 1 [..., n R, d]."""
    rows = A.flatten(-3, -2)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    length = (rows.square().sum(-1, keepdim=True) + EPSILON**2).sqrt()
    return length, rows / length


def _own(
    unit: Tensor, solved: Tensor, documents: Tensor | None, num_chunks: int, *, gram: Tensor | None = None
) -> Tensor:
    """G_d times the solved rows, [..., n R, d]; gram is G where it is there already."""
    rank = unit.shape[-2] // max(num_chunks, 1)
    if documents is None:
        chunks = unit.unflatten(-2, (num_chunks, rank))
        return ((chunks @ chunks.mT) @ solved.unflatten(-2, (num_chunks, rank))).flatten(-3, -2)
    of = documents.repeat_interleave(rank, dim=-1)
    if of.ndim > 1:
        gram = unit @ unit.mT if gram is None else gram
        return (gram * (of[..., :, None] == of[..., None, :])) @ solved
    result = torch.empty_like(solved)
    for document in of.unique():
        rows = unit[..., of == document, :]
        small_first = rows.shape[-2] <= rows.shape[-1]
        own = solved[..., of == document, :]
        result[..., of == document, :] = (rows @ rows.mT) @ own if small_first else rows @ (rows.mT @ own)
    return result


def _plus(matrix: Tensor, ridge: float) -> Tensor:
    return matrix + ridge * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


@torch.no_grad()
def separated(A: Tensor, chunk_counts: Sequence[int], *, ridge: float, done: Sequence[bool] = ()) -> Tensor:
    """What `decorrelated` makes of one adapter's rows: the chunks of each document first, then the documents.

    Args:
        A: [C, L, R, d_in], document after document; it stays as it is.
        chunk_counts: C altogether.
        done: for each document whether its own chunks were separated before; (): of none.

    Returns:
        As A. No more memory beyond it than one layer's needs, whatever the number of chunks in a document.
    """
    A = A.clone()
    start = 0
    for document, number in enumerate(chunk_counts):
        if number > 1 and not (done and done[document]):
            for layer in range(A.shape[1]):
                decorrelate_(A[start : start + number, layer], ridge=ridge)
        start += number
    if len(chunk_counts) < 2:
        return A
    documents = torch.repeat_interleave(torch.tensor(list(chunk_counts))).to(A.device)
    return decorrelated(A.transpose(0, 1), documents, ridge=ridge).transpose(0, 1).contiguous()


def separated_slots(
    A: _Weights,
    B: _Weights,
    chunk_counts: Sequence[int],
    members: Sequence[Sequence[int]],
    *,
    ridge: float | None,
) -> tuple[_Weights, _Weights, list[list[int]]]:
    """For rows that each join some of the documents: `separated` for every row, differentiably, in one pool of slots.

    Args:
        A, B: of all chunks together, document after document.
        chunk_counts: C altogether.
        members: the documents that each row joins.
        ridge: None: the plain sum.

    Returns:
        A and B of a pool of slots, and for each row the slots that it joins. Rows that join several documents have
        slots of their own: what they read depends on which documents are joined.
    """
    first = [sum(chunk_counts[:i]) for i in range(len(chunk_counts))]
    slots = [[first[i] + chunk for i in row for chunk in range(chunk_counts[i])] for row in members]
    if ridge is None:
        return A, B, slots
    A = _chunks_separated(A, chunk_counts, first, ridge)
    joined = [row for row, documents in enumerate(members) if len(set(documents)) > 1]
    if not joined:
        return A, B, slots
    device = next(iter(A.values())).device
    chosen, used = _padded([slots[row] for row in joined])
    of, _ = _padded([[i for i in members[row] for _ in range(chunk_counts[i])] for row in joined])
    chosen, used, of = chosen.to(device), used.to(device), of[:, None].to(device)
    end = len(next(iter(A.values())))
    joined_A, joined_B = {}, {}
    for name, rows in A.items():
        mixed = decorrelated(_taken(rows, chosen, used), of, ridge=ridge)
        joined_A[name] = torch.cat([rows, mixed.transpose(1, 2)[used]])
        joined_B[name] = torch.cat([B[name], B[name][chosen[used]]])
    for row in joined:
        slots[row] = list(range(end, end + len(slots[row])))
        end += len(slots[row])
    return joined_A, joined_B, slots


def _chunks_separated(A: _Weights, chunk_counts: Sequence[int], first: Sequence[int], ridge: float) -> _Weights:
    """The chunks of every document separated from one another."""
    several = [document for document, number in enumerate(chunk_counts) if number > 1]
    if not several:
        return A
    device = next(iter(A.values())).device
    slots, used = _padded([list(range(first[i], first[i] + chunk_counts[i])) for i in several])
    slots, used = slots.to(device), used.to(device)
    return {
        name: rows.index_copy(
            0, slots[used], decorrelated(_taken(rows, slots, used), ridge=ridge).transpose(1, 2)[used]
        )
        for name, rows in A.items()
    }


def _padded(lists: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Lists of numbers → [len(lists), longest] with zeros behind the shorter ones, and where they hold numbers."""
    rows = [torch.tensor(numbers) for numbers in lists]
    used = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)
    return pad_sequence(rows, batch_first=True), used


def _taken(rows: Tensor, slots: Tensor, used: Tensor) -> Tensor:
    """[slots, L, R, d] → [len(slots), L, longest, R, d], zeros where there is no slot."""
    return (rows[slots] * used[..., None, None, None]).transpose(1, 2)


# route


@torch.no_grad()
def last_inputs(
    base_model: nn.Module, targets: Sequence[LoRATarget], prompts: Sequence[Sequence[int]]
) -> dict[tuple[str, int], Tensor]:
    """What enters the target modules at each prompt's last token, by target name and layer: [Q, d_in].

    Args:
        base_model: as it is: an active adapter changes what enters.
        prompts: token ids, one list for each question.
    """
    device = next(base_model.parameters()).device
    rows = [torch.tensor(ids, device=device) for ids in prompts]
    last = torch.tensor([len(row) - 1 for row in rows], device=device)
    ids = pad_sequence(rows, batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    found: dict[tuple[str, int], Tensor] = {}
    hooks = []
    for target in targets:
        for place in target.modules():

            def read(_: nn.Module, args: tuple[Tensor], key: tuple[str, int] = (target.name, place.layer)) -> None:
                found[key] = args[0][torch.arange(len(last), device=device), last]

            hooks.append(base_model.get_submodule(place.path).register_forward_pre_hook(read))
    try:
        with contiguous_states(base_model):
            base_model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def prompt_inputs(
    base_model: nn.Module, targets: Sequence[LoRATarget], prompts: Sequence[Sequence[int]], *, layers: int
) -> dict[int, Tensor]:
    """What enters the one target module of the first layers at every token of each prompt, by layer: [Q, S, d_in].

    Prompts are padded on the right, where the inputs mean nothing.

    Args:
        base_model: as it is: an active adapter changes what enters.
        prompts: token ids, one list for each question.
        layers: how many; those behind them are not run.
    """
    device = next(base_model.parameters()).device
    rows = [torch.tensor(ids, device=device) for ids in prompts]
    ids = pad_sequence(rows, batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    with first_inputs(base_model, targets, layers=layers) as found:
        base_model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
    return found


@contextmanager
def first_inputs(base_model: nn.Module, targets: Sequence[LoRATarget], *, layers: int) -> Iterator[dict[int, Tensor]]:
    """Collects what enters the one target module of the first layers, by layer, in the one pass that runs inside.

    Layers behind them are not run: the `with` block ends there.
    """
    (target,) = targets
    found: dict[int, Tensor] = {}
    with ExitStack() as undo, suppress(EndOfPass):
        for place in islice(target.modules(), layers):

            def read(_: nn.Module, args: tuple[Tensor], layer: int = place.layer) -> None:
                found[layer] = args[0]
                if len(found) == layers:
                    raise EndOfPass

            hook = base_model.get_submodule(place.path).register_forward_pre_hook(read)
            undo.callback(hook.remove)
        yield found


def routing_scores(
    base_model: nn.Module, targets: Sequence[LoRATarget], A: _Weights, prompts: Sequence[Sequence[int]]
) -> Tensor:
    """How strongly each chunk's rows of A answer each prompt: the modules' geometric mean of ‖A_c x‖², [Q, C].

    x is what enters a module of the plain base model at the prompt's last token, where the answer begins. By the
    geometric mean one module in which a chunk's score is 0 rules the chunk out, however high its scores elsewhere are.

    Args:
        A: [C, L, R, d_in] by target name, as generated: separated rows are no keys of their chunks any more.
        prompts: token ids, one list for each question.
    """
    logs = []
    for (name, layer), x in last_inputs(base_model, targets, prompts).items():
        rows = A[name][:, layer, :, : x.shape[1]].to(x.device)  # [C, R, d_in]
        squares = (x.to(rows.dtype) @ rows.flatten(0, 1).mT).float().square().view(len(x), *rows.shape[:2]).sum(-1)
        logs.append(squares.clamp(min=torch.finfo(torch.float32).tiny).log())
    return torch.stack(logs).mean(0).exp()


def highest(scores: Tensor, *, top_k: int, weight_power: float = 1.0) -> tuple[list[list[int]], list[list[float]]]:
    """For each question the chunks with the highest scores, ascending by number, and a factor on the B of each.

    Args:
        scores: [Q, C], as of `routing_scores`.
        top_k: chunks for each question; all, if there are fewer.
        weight_power: the factor is the power of a chunk's score relative to the highest one's, so that one chosen for
            want of a better adds little. 0: all that are chosen count alike, and so do chunks that all have a score
            of 0.
    """
    chunks = scores.topk(min(top_k, scores.shape[1]), dim=1).indices.sort(dim=1).values
    chosen = scores.gather(1, chunks)
    best = chosen.amax(dim=1, keepdim=True)
    weights = torch.where(best > 0, chosen / best, 1.0) ** weight_power
    return chunks.tolist(), weights.tolist()
