"""Adapters made of adapters: concatenate, weight, average, remove_document, select_chunks, scale, compress, pad.

No model is needed. How chunks are joined is `hypernet.adapters.joining` and `LoRAAdapter.fused`.

    both = concatenate([fenda, town])                 # the chunks of both; the hypernetwork's bias block counts once
    one = remove_document(both, "town.txt")           # bit-identical to an adapter that never had it
    weaker = weight(both, 0.5, document="fenda.txt")  # scales one document's chunks
    small, report = compress(both, 8)                 # the nearest adapter of rank 8, and how far it is

What was done stays in the provenance: a document's `weight` in its own entry, so that it goes where the document goes;
what was done to the adapter as a whole (scale, select_chunks, compress, pad) in the list `operations`.
"""

import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hypernet.adapters.adapter import LoRAAdapter, check_is_adapter


class ModuleError(NamedTuple):
    """How far one module's weights change from what they were to be. All of them with the scaling.

    Attributes:
        path: the module's.
        norm: Frobenius norm of the delta before.
        error: Frobenius norm of the difference, measured on the result, with its rounding to the adapter's dtype.
        optimal_error: what no matrix of that rank can be better than, sqrt(sigma_{r+1}² + sigma_{r+2}² + ...).
        spectral_bound: sigma_{r+1}, the most by which an output can be off for an input of length 1, before rounding.
    """

    path: str
    norm: float
    error: float
    optimal_error: float
    spectral_bound: float

    @property
    def relative_error(self) -> float:
        return self.error / self.norm if self.norm else 0.0


@dataclass(frozen=True)
class CompressionReport:
    """What `compress` lost: one ModuleError per module, and the total."""

    rank_before: int
    rank: int
    modules: tuple[ModuleError, ...]

    @property
    def relative_error(self) -> float:
        """Frobenius norm of all modules' differences over that of all their deltas."""
        norm = math.hypot(*(module.norm for module in self.modules))
        return math.hypot(*(module.error for module in self.modules)) / norm if norm else 0.0

    @property
    def worst(self) -> ModuleError:
        """The module with the largest relative error."""
        return max(self.modules, key=lambda module: module.relative_error)


def concatenate(adapters: Sequence[LoRAAdapter]) -> LoRAAdapter:
    """All adapters' chunks in one adapter, in order, each copied once, with one bias block; joined where it is used.

    Raises:
        TypeError: it is no list of adapters.
        ValueError: there is none; or they come from different hypernetworks, base models or targets; or one of them
            went through an operation that is final (`LoRAAdapter.check_open`).
    """
    first, *others = _some(adapters, "concatenate")
    return first.with_chunks_of(others)


def average(adapters: Sequence[LoRAAdapter]) -> LoRAAdapter:
    """All adapters' chunks, weighted by one over the number of adapters; the shared bias block as it is.

    Raises:
        ValueError: as `concatenate`.
    """
    return weight(concatenate(adapters), 1 / len(adapters))


def weight(adapter: LoRAAdapter, factor: float, *, document: str | int | None = None) -> LoRAAdapter:
    """Scales the chunks of one document, or of all of them; the new factor is kept as the documents' `weight`.

    The bias block belongs to the hypernetwork and stays, so weighted adapters can still be concatenated. Scale
    everything with `scale`.

    Args:
        adapter: what to weight.
        factor: on the chunks' B.
        document: name, sha256 (or a unique beginning of it) or index; None: all documents.

    Raises:
        ValueError: the factor is not finite; no or several documents are meant; or an operation was done that is final.
    """
    check_is_adapter(adapter)
    adapter.check_open("weighted")
    factor = _finite(factor, "factor")
    documents = adapter.provenance["documents"]
    if document is None:
        chosen, rows = list(range(len(documents))), slice(None)
    else:
        spans = adapter.chunk_spans()
        index = find_document(adapter, document)
        chosen, rows = [index], slice(*spans[index])
    B = {name: blocks.clone() for name, blocks in adapter.B.items()}
    for blocks in B.values():
        blocks[rows] *= factor
    documents = [
        {**entry, "weight": entry.get("weight", 1.0) * factor} if index in chosen else entry
        for index, entry in enumerate(documents)
    ]
    return replace(adapter, B=B, provenance=_derived(adapter, documents=documents))


def remove_document(adapter: LoRAAdapter, document: str | int) -> LoRAAdapter:
    """The adapter without one document: what remains is bit-identical to an adapter that never had it.

    Args:
        adapter: what to take it from.
        document: name, sha256 (or a unique beginning of it) or index.

    Raises:
        ValueError: no or several documents are meant; or an operation came before that is final.
    """
    check_is_adapter(adapter)
    adapter.check_open("freed of a document")
    spans = adapter.chunk_spans()
    index = find_document(adapter, document)
    start, end = spans[index]
    documents = [entry for place, entry in enumerate(adapter.provenance["documents"]) if place != index]
    return replace(
        adapter,
        A={name: torch.cat([A[:start], A[end:]]) for name, A in adapter.A.items()},
        B={name: torch.cat([B[:start], B[end:]]) for name, B in adapter.B.items()},
        provenance=_derived(adapter, documents=documents),
    )


def select_chunks(adapter: LoRAAdapter, chunks: Sequence[int], weights: Sequence[float] | None = None) -> LoRAAdapter:
    """The adapter of some chunks alone; documents of which none is left go out of the provenance.

    Args:
        chunks: which, ascending, numbered over all documents.
        weights: a factor on the B of each, kept among the operations; None leaves them.

    Raises:
        ValueError: a number is out of range, twice or out of order; there are more or fewer weights, or one is not
            finite; or an operation came before that is final.
    """
    check_is_adapter(adapter)
    adapter.check_open("cut down to some chunks")
    chunks = list(chunks)
    if chunks != sorted({*chunks}) or (chunks and not 0 <= chunks[0] <= chunks[-1] < adapter.num_chunks):
        raise ValueError(
            f"Expected chunks as ascending numbers from 0 to {adapter.num_chunks - 1}, each once, got {chunks}."
        )
    operation = None
    if weights is not None:
        weights = [_finite(weight, "weight") for weight in weights]
        if len(weights) != len(chunks):
            raise ValueError(f"Expected a weight for each of {len(chunks)} chunks, got {len(weights)}.")
        operation = {"operation": "select_chunks", "weights": weights}
    selected = adapter.of_chunks(chunks)  # a copy
    for rows in selected.B.values() if weights else ():
        rows *= torch.tensor(weights, dtype=rows.dtype, device=rows.device)[:, None, None, None]
    documents = [entry for entry in selected.provenance["documents"] if entry["chunks"]]
    return replace(selected, provenance=_derived(adapter, documents=documents, operation=operation))


def scale(adapter: LoRAAdapter, factor: float | Sequence[float]) -> LoRAAdapter:
    """Multiplies the whole delta, bias block included: all layers' by one number, or each layer's by its own.

    Linear in the factor: it goes to B alone. (On A and B alike it would be squared.)

    Args:
        adapter: what to scale; compressed ones too.
        factor: one number, or L numbers, one per layer of the base model.

    Raises:
        ValueError: a number is not finite, or there are not L of them.
    """
    check_is_adapter(adapter)
    num_layers = {len(target.paths) for target in adapter.targets}
    per_layer = isinstance(factor, Sequence)
    factors = [_finite(value, "factor") for value in (factor if isinstance(factor, Sequence) else [factor])]
    if per_layer and {len(factors)} != num_layers:
        raise ValueError(
            f"Expected one factor, or one for each of {' or '.join(map(str, sorted(num_layers)))} layers, got "
            f"{len(factors)}. Give one number to scale all layers alike."
        )

    def scaled(B: Tensor) -> Tensor:  # [..., L, R, d_out]
        # The factor has float32 or more, so a low precision B is rounded once.
        per_row = torch.tensor(factors, dtype=torch.promote_types(B.dtype, torch.float32), device=B.device)
        return (B * per_row[:, None, None]).to(B.dtype)

    return replace(
        adapter,
        B={name: scaled(B) for name, B in adapter.B.items()},
        bias_B={name: scaled(B) for name, B in adapter.bias_B.items()},
        provenance=_derived(adapter, operation={"operation": "scale", "factor": factors}),
    )


def compress(adapter: LoRAAdapter, rank: int) -> tuple[LoRAAdapter, CompressionReport]:
    """The nearest adapter of a given rank: for every module the truncated SVD of its whole delta, bias block included.

    QR of Aᵀ and Bᵀ leaves a core no larger than the total rank, whose SVD is that of the delta: the dense [d_out, d_in]
    matrix is never formed. All in float64, rounded to the adapter's dtype at the end; the singular values go half to A,
    half to B.

    Args:
        adapter: of any total rank; where that is no more than `rank`, nothing is lost. Its chunks are joined as the
            hypernetwork was trained (`LoRAAdapter.fused`); fuse it before for another way.
        rank: of the result, in every module; rows beyond a module's own rank are zero.

    Returns:
        An adapter without chunks whose bias block, of that rank, is all of it (so that no rank is wasted), and what was
        lost. The documents stay in its provenance, but cannot be removed, weighted or added to any more.

    Raises:
        ValueError: the rank is no positive integer, or a weight is not finite.

    Source: Eckart & Young 1936, https://doi.org/10.1007/BF02288367
    """
    check_is_adapter(adapter)
    _check_rank(rank)
    adapter = adapter.fused()
    A, B, modules = {}, {}, []
    for target in adapter.targets:
        A_all, B_all = (rows.detach() for rows in adapter.concatenated()[target.name])
        A_new = A_all.new_zeros(len(target.paths), rank, target.d_in)
        B_new = B_all.new_zeros(len(target.paths), rank, target.d_out)
        for module in target.modules():
            A_l = A_all[module.layer, :, : module.d_in].double()  # [n, d_in]
            B_l = B_all[module.layer, :, : module.d_out].double()
            if not (A_l.isfinite().all() and B_l.isfinite().all()):
                raise ValueError(f"The weights of {module.path} are not all finite. Generate the adapter again.")
            Q_A, R_A = torch.linalg.qr(A_l.T)
            Q_B, R_B = torch.linalg.qr(B_l.T)
            U, sigma, Vt = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
            kept = min(rank, len(sigma))
            root = sigma[:kept].sqrt()
            A_new[module.layer, :kept, : module.d_in] = (root[:, None] * (Vt[:kept] @ Q_A.T)).to(A_new.dtype)
            B_new[module.layer, :kept, : module.d_out] = (root[:, None] * (Q_B @ U[:, :kept]).T).to(B_new.dtype)

            # The difference, of rank n + r at most, once more through its small factors.
            _, R_A = torch.linalg.qr(torch.cat([A_l, A_new[module.layer, :kept, : module.d_in].double()]).T)
            _, R_B = torch.linalg.qr(torch.cat([B_l, -B_new[module.layer, :kept, : module.d_out].double()]).T)
            scaling = abs(adapter.scaling)
            modules.append(
                ModuleError(
                    path=module.path,
                    norm=scaling * sigma.norm().item(),
                    error=scaling * (R_B @ R_A.T).norm().item(),
                    optimal_error=scaling * sigma[kept:].norm().item(),
                    spectral_bound=scaling * (sigma[kept].item() if kept < len(sigma) else 0.0),
                )
            )
        A[target.name], B[target.name] = A_new, B_new
    report = CompressionReport(adapter.rank, rank, tuple(modules))
    entry = {
        "operation": "compress",
        "rank_before": adapter.rank,
        "rank": rank,
        "relative_error": report.relative_error,
        "largest_relative_error": report.worst.relative_error,
    }
    return _one_block(adapter, A, B, entry), report


def pad(adapter: LoRAAdapter, rank: int) -> LoRAAdapter:
    """The same delta, exactly, in one block of a larger rank: chunks and bias block, then rows of zeros.

    Chunks are joined as the hypernetwork was trained (`LoRAAdapter.fused`); fuse the adapter before for another way.
    For servers that take only certain ranks. Like a compressed adapter, it has no chunks any more.

    Raises:
        ValueError: the rank is no integer, or less than the adapter's.
    """
    check_is_adapter(adapter)
    _check_rank(rank)
    adapter = adapter.fused()
    if rank < adapter.rank:
        raise ValueError(
            f"Expected a rank of {adapter.rank} or more to pad to, got {rank}. Use compress() for a smaller one."
        )
    if rank == adapter.rank and adapter.num_chunks == 0:
        return adapter
    concatenated = adapter.concatenated()
    A, B = (
        {name: F.pad(both[index], (0, 0, 0, rank - adapter.rank)) for name, both in concatenated.items()}
        for index in range(2)
    )
    return _one_block(adapter, A, B, {"operation": "pad", "rank_before": adapter.rank, "rank": rank})


def find_document(adapter: LoRAAdapter, document: str | int) -> int:
    """Index of the document that is meant, in provenance["documents"].

    Args:
        adapter: what holds it.
        document: name, sha256 (or a unique beginning of it) or index.

    Raises:
        ValueError: no or several documents are meant; the message lists them.
    """
    check_is_adapter(adapter)
    documents = adapter.provenance["documents"]
    if isinstance(document, int) and not isinstance(document, bool):
        found = [document] if 0 <= document < len(documents) else []
    elif isinstance(document, str) and document:
        found = [index for index, entry in enumerate(documents) if entry.get("name") == document] or [
            index for index, entry in enumerate(documents) if str(entry.get("sha256")).startswith(document)
        ]
    else:
        found = []
    if len(found) == 1:
        return found[0]
    there = [f"{index}: {entry.get('name')} ({str(entry.get('sha256'))[:12]})" for index, entry in enumerate(documents)]
    if not found:
        raise ValueError(
            f"No document {document!r} in this adapter, which holds {', '.join(there) or 'none'}. Give a name, a "
            "sha256 or the beginning of one, or an index."
        )
    raise ValueError(
        f"{document!r} could be {len(found)} documents: {', '.join(there[index] for index in found)}. Give the index."
    )


def _derived(
    adapter: LoRAAdapter, *, documents: list[dict[str, Any]] | None = None, operation: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The adapter's provenance after a change: made now, with other documents or one more operation."""
    provenance = dict(adapter.provenance)
    if documents is not None:
        provenance["documents"] = documents
    if operation is not None:
        # The documents it was done to: others may join later.
        done_to = [entry.get("sha256") for entry in provenance["documents"]]
        provenance["operations"] = [*provenance.get("operations", ()), {**operation, "documents": done_to}]
    provenance["created"] = datetime.now(UTC).isoformat(timespec="seconds")
    return provenance


def _one_block(
    adapter: LoRAAdapter, A: dict[str, Tensor], B: dict[str, Tensor], operation: dict[str, Any]
) -> LoRAAdapter:
    """An adapter with no chunks and one bias block, A [L, R, d_in] and B [L, R, d_out] per target."""
    return replace(
        adapter,
        A={name: rows.new_zeros(0, *rows.shape) for name, rows in A.items()},
        B={name: rows.new_zeros(0, *rows.shape) for name, rows in B.items()},
        bias_A=A,
        bias_B=B,
        provenance=_derived(adapter, operation=operation),
    )


def _some(adapters: Sequence[LoRAAdapter], what: str) -> Sequence[LoRAAdapter]:
    if not isinstance(adapters, Sequence) or isinstance(adapters, str):
        raise TypeError(f"Expected a list of adapters to {what}, got {reprlib.repr(adapters)}.")
    if not adapters:
        raise ValueError(f"There is no adapter to {what}: the list is empty. Give at least one.")
    for adapter in adapters:
        check_is_adapter(adapter)
    return adapters


def _finite(value: float, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"Expected a finite number as {what}, got {value!r}.")
    return float(value)


def _check_rank(rank: int) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"Expected a rank of 1 or more, got {rank!r}.")
