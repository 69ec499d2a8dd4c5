"""Splits the batch of one optimizer step by documents over micro-batches and processes, so that the means stay exact.

    parts = [split(batch, part, num_parts) for part in range(num_parts)]
    loss = sum(mean_over_part * part.share["document"] for part in parts)    # the mean over the whole batch

Each term of a loss is a mean over some count: documents that have such a question, tokens, or weights. A part's share
is its portion of that count, so the sum of mean × share over all parts is the mean over the step; so are the gradients.
"""

from typing import Any, NamedTuple

import torch

from hypernet.base.packed_rows import QUESTION_KINDS, PackedRows
from hypernet.data.batches import DistillationBatch, StoredTopK

ABOUT_DOCUMENT = (QUESTION_KINDS.index("document"), QUESTION_KINDS.index("unanswerable"))
_WHOLE = {"document": 1.0, "background": 1.0, "rows": 1.0, "answer_weight": 1.0, "document_tokens": 1.0}


class StepPart(NamedTuple):
    """What one process computes at once of an optimizer step.

    batch: as the whole one, with fewer documents.
    share: name of a mean's count → this part's portion of it, 0 to 1. "document" and "background" count rows with
        questions about their document and with other ones, "rows" those that have a document; "answer_weight" and
        "document_tokens" count tokens.
    num_parts: of the whole step, over all processes. is_last: of this process's parts.
    """

    batch: Any
    share: dict[str, float] = _WHOLE
    num_parts: int = 1
    is_last: bool = True

    @classmethod
    def of(cls, batch: Any) -> "StepPart":
        """A batch that was not split is the one part of its step."""
        return batch if isinstance(batch, StepPart) else cls(batch)

    def to(self, device: torch.device | str) -> "StepPart":
        return self._replace(batch=self.batch.to(device))


def split(batch: DistillationBatch | PackedRows, part: int, num_parts: int, *, is_last: bool = True) -> StepPart:
    """Part number `part` of a step's batch: neighbouring documents, as many as in any other part or one more.

    Raises:
        ValueError: there are fewer documents than parts, or the batch is of a kind that cannot be split.
    """
    if isinstance(batch, PackedRows):
        counts, num_documents = _row_counts(batch), len(batch.ids)
    elif isinstance(batch, DistillationBatch):
        counts, num_documents = _document_counts(batch), len(batch.student.ids)
    else:
        raise ValueError(
            f"A {type(batch).__name__} cannot be split; set trainer.accumulate_grad_batches and trainer.devices to 1."
        )
    if num_documents < num_parts:
        raise ValueError(
            f"A step of {num_documents} documents cannot be split into {num_parts} parts (processes × "
            "accumulate_grad_batches). Raise batch_size in the stages, or use fewer."
        )
    first, end = part * num_documents // num_parts, (part + 1) * num_documents // num_parts
    own = _rows(batch, first, end) if isinstance(batch, PackedRows) else _documents(batch, first, end)
    # A term that no document of the step has is 0 in every part.
    share = {name: float(c[first:end].sum() / c.sum()) if c.sum() else 0.0 for name, c in counts.items()}
    return StepPart(own, share, num_parts, is_last)


def _document_counts(batch: DistillationBatch) -> dict[str, torch.Tensor]:
    """For each row whether it has questions about its document, and others, and whether it has one, [N] each."""
    kind = batch.student.target_kind
    about = torch.isin(kind, torch.tensor(ABOUT_DOCUMENT, device=kind.device))
    return {
        "document": about.any(1).double(),
        "background": ((kind >= 0) & ~about).any(1).double(),
        "rows": (torch.arange(len(kind)) < batch.num_own_rows).double(),
    }


def _row_counts(rows: PackedRows) -> dict[str, torch.Tensor]:
    """What the base model's loss averages over, by row, [N] each."""
    answer = rows.target_kind >= 0
    return {
        "answer_weight": (rows.target_weight * answer).double().sum(1),
        "document_tokens": (document_targets(rows) & ~answer).double().sum(1),
    }


def document_targets(rows: PackedRows) -> torch.Tensor:
    """Positions inside the prefix whose next token belongs to it too, [N, S] bool."""
    document = (rows.segments == 0) & (rows.segments.roll(-1, dims=1) == 0)
    document[:, -1] = False
    return document


def _rows(rows: PackedRows, first: int, end: int) -> PackedRows:
    """Some rows, without the padding that only longer ones needed."""
    width = int((rows.segments[first:end] >= 0).sum(1).max())
    return PackedRows(*(tensor[first:end, :width] for tensor in rows))


def _documents(batch: DistillationBatch, first: int, end: int) -> DistillationBatch:
    """Some documents' rows, with every chunk that their adapters join."""
    members = batch.members[first:end]
    # Companions that have no row here come behind those that have one; rows without a document need companions alone.
    own = range(first, max(first, min(end, batch.num_own_rows)))
    needed = [*own, *sorted({m for row in members for m in row if m not in own})]
    place = {document: i for i, document in enumerate(needed)}
    start = [sum(batch.chunk_counts[:i]) for i in range(len(batch.chunk_counts))]
    chunks = torch.tensor([start[i] + c for i in needed for c in range(batch.chunk_counts[i])])
    chunk_mask = batch.chunk_mask[chunks]
    width = int(chunk_mask.any(0).nonzero().max()) + 1
    parts = {
        "chunk_ids": batch.chunk_ids[chunks, :width],
        "chunk_mask": chunk_mask[:, :width],
        "chunk_counts": [batch.chunk_counts[i] for i in needed],
        "members": [[place[m] for m in row] for row in members],
        "student": _rows(batch.student, first, end),
        "teacher": _rows(batch.teacher, first, end),
        "stored": None,
    }
    width = parts["student"].ids.shape[1]
    parts["answer_chunk"] = batch.answer_chunk[first:end, :width]
    if batch.stored is not None:
        parts["stored"] = StoredTopK(*(tensor[first:end, :width] for tensor in batch.stored))
    unknown = set(batch._fields) - set(parts)
    assert not unknown, f"splitting.py does not know how to split DistillationBatch.{unknown}"
    return DistillationBatch(**parts)
