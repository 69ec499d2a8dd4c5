"""Packed rows: the questions about one document in one sequence, with the document as their shared prefix or without.

Each question with its answer is a segment. A segment sees itself and, if wanted, the row's prefix (the document), never
another segment; its positions go on after what it sees. So a row gives exactly the logits of one prompt per question
(tested), while the document is read once.

    row = pack_row(document_ids, [Segment(question_ids + answer_ids, len(question_ids), True, kind=0), ...])
    batch = pad_rows([row, ...], pad_id=0)
    mask = batch.attention_mask(dtype)
    logits = base_model(input_ids=batch.ids, position_ids=batch.positions, attention_mask=mask).logits
"""

from collections.abc import Sequence
from os.path import commonprefix
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class Segment(NamedTuple):
    """A question with its answer inside a row.

    ids: all its tokens. num_prompt: how many of them come before the answer. sees_prefix: whether it attends to the
        row's prefix.
    kind: index into `QUESTION_KINDS`. weight: of each answer token in a loss.
    """

    ids: list[int]
    num_prompt: int
    sees_prefix: bool
    kind: int
    weight: float = 1.0


MIN_SHARED_TOKENS = 8

# Those of `hypernet.data.records.Question`, and "reordering": the document's sentences in another order.
QUESTION_KINDS = ("document", "unanswerable", "background", "cross_document", "reordering", "in_prompt")


class Row(NamedTuple):
    ids: Tensor  # [S]
    positions: Tensor  # [S]
    segments: Tensor  # [S] 0 = prefix, 1.. = segments
    sees_prefix: Tensor  # [S] bool
    target_kind: Tensor  # [S] kind of the answer token that the NEXT position holds, -1 where none is predicted
    target_weight: Tensor  # [S]


def shared_beginning(segments: Sequence[Segment]) -> tuple[list[int], list[Segment]]:
    """Segments that see no prefix, with what all their prompts begin with, such as a chat template, as their prefix.

    The logits are the same (tested); a template's default system prompt is longer than many a question. The last token
    of a prompt stays in its segment, since it predicts the answer. Beginnings below `MIN_SHARED_TOKENS` stay where they
    are: a prefix costs a call of attention of its own in every layer.

    Returns:
        (prefix, segments), the prefix empty where nothing is shared.
    """
    if len(segments) < 2 or any(segment.sees_prefix for segment in segments):
        return [], list(segments)
    shared = commonprefix([segment.ids[: max(segment.num_prompt - 1, 0)] for segment in segments])
    if (size := len(shared)) < MIN_SHARED_TOKENS:
        return [], list(segments)
    return list(shared), [
        segment._replace(ids=segment.ids[size:], num_prompt=segment.num_prompt - size, sees_prefix=True)
        for segment in segments
    ]


class PackedRows(NamedTuple):
    """A padded batch of rows, [N, S] each; see `Row`. Padding has the segment number -1."""

    ids: Tensor
    positions: Tensor
    segments: Tensor
    sees_prefix: Tensor
    target_kind: Tensor
    target_weight: Tensor

    def attention_mask(self, dtype: torch.dtype) -> Tensor:
        """Additive mask [N, 1, S, S]."""
        query, key = self.segments[:, :, None], self.segments[:, None, :]
        visible = (query == key) | ((key == 0) & self.sees_prefix[:, :, None])
        visible &= torch.ones(visible.shape[1:], dtype=torch.bool, device=visible.device).tril()
        mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]

    def targets(self) -> Tensor:
        """The token after each position, [N, S]; only meaningful where target_kind >= 0 or inside the prefix."""
        return self.ids.roll(-1, dims=1)

    def to(self, device: torch.device | str) -> "PackedRows":
        return PackedRows(*(tensor.to(device) for tensor in self))


def question_places(rows: PackedRows, *, before: int, after: int) -> list[tuple[int, list[int], int]]:
    """For each question with an answer its row, the columns of its own tokens, and the column that predicts the answer.

    Args:
        before, after: tokens of the prompt around the question.
    """
    found = []
    fields = (field.tolist() for field in (rows.segments, rows.positions, rows.target_kind))
    for row, (segments, positions, kinds) in enumerate(zip(*fields, strict=True)):
        columns: dict[int, list[int]] = {}
        for column, segment in enumerate(segments):
            if segment > 0:
                columns.setdefault(segment, []).append(column)
        for own in columns.values():
            first = next((column for column in own if kinds[column] >= 0), None)
            if first is None:
                continue
            last = positions[first] - after
            found.append((row, [c for c in own if c <= first and before <= positions[c] <= last], first))
    return found


def pack_row(prefix: Sequence[int], segments: Sequence[Segment]) -> Row:
    """One row; the prefix may be empty."""
    ids, positions, segment_ids, sees = list(prefix), list(range(len(prefix))), [0] * len(prefix), [True] * len(prefix)
    kinds, weights = [-1] * len(prefix), [0.0] * len(prefix)
    for number, segment in enumerate(segments, start=1):
        size, num_answer = len(segment.ids), len(segment.ids) - segment.num_prompt
        start = len(prefix) if segment.sees_prefix else 0
        ids += segment.ids
        positions += range(start, start + size)
        segment_ids += [number] * size
        sees += [segment.sees_prefix] * size
        # The last prompt token predicts the first answer token. A segment without a prompt is predicted from its own
        # first token on.
        kinds += (
            [-1] * (segment.num_prompt - 1) + [segment.kind] * num_answer + [-1]
            if segment.num_prompt
            else [segment.kind] * (size - 1) + [-1]
        )
        weights += [segment.weight] * size
    return Row(
        torch.tensor(ids),
        torch.tensor(positions),
        torch.tensor(segment_ids),
        torch.tensor(sees),
        torch.tensor(kinds),
        torch.tensor(weights),
    )


def pad_rows(rows: Sequence[Row], *, pad_id: int) -> PackedRows:
    """Rows of one batch, right-padded."""
    padding: tuple[float, ...] = (pad_id, 0, -1, False, -1, 0.0)  # as the fields of Row
    return PackedRows(
        *(
            pad_sequence([row[i] for row in rows], batch_first=True, padding_value=padding[i])
            for i in range(len(padding))
        )
    )
