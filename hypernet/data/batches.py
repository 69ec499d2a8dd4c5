"""Records → tensors: whole batches of packed rows and chunks, one for each step of a curriculum.

BaseModelBatches(curriculum, tokenizer)[17]            # packed rows: article, questions, reordering
DistillationBatches(curriculum, tokenizer, ...)[17]    # chunks; questions without and with the article
"""

import random
import re
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from hypernet.base.packed_rows import QUESTION_KINDS, PackedRows, Segment, pack_row, pad_rows, shared_beginning
from hypernet.data.curriculum import Curriculum, Stage
from hypernet.data.encyclopedia import background_questions
from hypernet.data.records import UNKNOWN, Question
from hypernet.data.sources import count_tokens
from hypernet.text.chat import ChatLayout
from hypernet.text.chunking import Chunks, Frame, chunk_document
from hypernet.text.sentences import split_sentences
from hypernet.text.tokens import check_known, framed_ids


class _Batches(Dataset):
    """One whole batch per item; shared by the two trainings.

    With `num_embeddings`, of the base model, a text with a token beyond them is refused (`check_known`).
    """

    def __init__(
        self, curriculum: Curriculum, tokenizer: PreTrainedTokenizerBase, *, num_embeddings: int | None = None
    ) -> None:
        self.curriculum = curriculum
        self.tokenizer = tokenizer
        self.num_embeddings = num_embeddings
        self.layout = ChatLayout.of(tokenizer)

    def __len__(self) -> int:
        return self.curriculum.num_steps

    def _encode(self, framed: Sequence[tuple[str, str, str]]) -> list[list[int]]:
        ids = framed_ids(self.tokenizer, framed)
        check_known(ids, self.tokenizer, num_embeddings=self.num_embeddings)
        return ids

    def _segments(self, asked: Sequence[tuple[Question, bool]]) -> list[Segment]:
        """Segments for (question, does it see the prefix); tokenized in one call."""
        before_user, after_user, before_answer, after_answer = self.layout
        prompts = self._encode(
            [("", "\n\n" + q.text, after_user) if sees else (before_user, q.text, after_user) for q, sees in asked]
        )
        answers = self._encode([(before_answer, q.answer, after_answer) for q, _ in asked])
        # Tokenized again, a generated answer need not give the tokens that its log-probabilities belong to.
        answers = [list(q.stored.ids) if q.stored else ids for ids, (q, _) in zip(answers, asked, strict=True)]
        return [
            Segment(prompt + answer, len(prompt), sees, QUESTION_KINDS.index(question.kind))
            for prompt, answer, (question, sees) in zip(prompts, answers, asked, strict=True)
        ]

    def _rows(
        self, prefixes: Sequence[list[int]], asked: Sequence[Sequence[tuple[Question, bool]]], extra=None
    ) -> PackedRows:
        flat = iter(self._segments([pair for questions in asked for pair in questions]))
        rows = []
        for i, (prefix, questions) in enumerate(zip(prefixes, asked, strict=True)):
            segments = [next(flat) for _ in questions] + (extra[i] if extra else [])
            rows.append(pack_row(prefix, segments) if prefix else pack_row(*shared_beginning(segments)))
        return pad_rows(rows, pad_id=self.tokenizer.pad_token_id)


class BaseModelBatches(_Batches):
    """Rows for the base model: the article, its questions, background questions with and without it, a reordering.

    A question of the article asked without the article is answered `UNKNOWN`.
    """

    def __init__(
        self, curriculum: Curriculum, tokenizer: PreTrainedTokenizerBase, *, num_embeddings: int | None = None
    ) -> None:
        super().__init__(curriculum, tokenizer, num_embeddings=num_embeddings)
        self.background = background_questions()

    def __getitem__(self, step: int) -> PackedRows:
        _, stage, _ = self.curriculum.stage(step)
        records = self.curriculum.records(step)
        rng = self.curriculum.encyclopedia.rng("base model", step)
        prefixes = self._encode([(self.layout.before_user, record.document, "") for record in records])
        asked = []
        for record in records:
            background = [
                (question, rng.random() < 0.3) for question in rng.sample(self.background, stage.num_background)
            ]
            without = rng.choice(record.questions)._replace(answer=UNKNOWN, kind="unanswerable")
            asked.append([(question, True) for question in record.questions] + background + [(without, False)])
        orders = [rng.sample(record.sentences, len(record.sentences)) for record in records]
        reordered = self._encode([("", "\n\n" + " ".join(order), "") for order in orders])
        kind = QUESTION_KINDS.index("reordering")
        extra = [[Segment(ids, 0, True, kind, 0.5)] if rng.random() < stage.reordering else [] for ids in reordered]
        return self._rows(prefixes, asked, extra)


class StoredTopK(NamedTuple):
    """What the base model thought of answer tokens with the document in its prompt, worked out before training.

    where: [N, S] bool, positions of the student's rows that predict such a token. indices, log_probs: [N, S, k], its k
        most likely next tokens there; log-probability -inf fills up where fewer are stored, 0 elsewhere.
    """

    where: Tensor
    indices: Tensor
    log_probs: Tensor

    def to(self, device: torch.device | str) -> "StoredTopK":
        return StoredTopK(*(tensor.to(device) for tensor in self))


class DistillationBatch(NamedTuple):
    """One step of context distillation for N documents of C chunks together.

    chunk_ids, chunk_mask: [C, T]; chunk_counts: per document, [N] on the host.
    members: the documents that each row's adapter joins, its own first; lists on the host.
    student: a row per document, the questions alone. teacher: the same questions, those about the document behind it.
        The answer tokens of both come in the same order. Further rows may follow, the same in both: a document in the
        prompt, questions about it (kind "in_prompt"), and the adapter of other documents.
    answer_chunk: [N, S], at answer tokens of the student's rows the one chunk of the row's document that holds the
        answer, word for word; -1 elsewhere, and where no chunk does or several do.
    stored: the teacher's probabilities where they were stored; None where no question has any. The teacher's rows may
        then lack these questions.
    """

    chunk_ids: Tensor
    chunk_mask: Tensor
    chunk_counts: list[int]
    members: list[list[int]]
    student: PackedRows
    teacher: PackedRows
    answer_chunk: Tensor
    stored: StoredTopK | None = None

    @property
    def num_own_rows(self) -> int:
        """Rows that belong to the document of the same number; those with a document in the prompt come behind them."""
        return len(self.student.ids) - int((self.student.target_kind == QUESTION_KINDS.index("in_prompt")).any(1).sum())

    def to(self, device: torch.device | str) -> "DistillationBatch":
        return DistillationBatch(
            self.chunk_ids.to(device),
            self.chunk_mask.to(device),
            self.chunk_counts,
            self.members,
            self.student.to(device),
            self.teacher.to(device),
            self.answer_chunk.to(device),
            None if self.stored is None else self.stored.to(device),
        )


class DistillationBatches(_Batches):
    """Chunks, questions without and questions with the article; see `DistillationBatch`.

    Background questions are those kept out of training (`held_out_background`) or the others. With `skip_stored` the
    teacher's rows leave out questions whose probabilities were stored, and documents that no other question is about.
    """

    def __init__(
        self,
        curriculum: Curriculum,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_chunk_tokens: int,
        context_tokens: int = 0,
        frame: Frame | None = None,
        min_chunk_tokens: int | None = None,
        held_out_background: bool = False,
        skip_stored: bool = False,
        num_embeddings: int | None = None,
    ) -> None:
        super().__init__(curriculum, tokenizer, num_embeddings=num_embeddings)
        self.max_chunk_tokens = max_chunk_tokens
        self.context_tokens = context_tokens
        self.frame, self.min_chunk_tokens = frame, min_chunk_tokens
        self.skip_stored = skip_stored
        self.background = background_questions(held_out=held_out_background)

    def __getitem__(self, step: int) -> DistillationBatch:
        _, stage, _ = self.curriculum.stage(step)
        named = self.curriculum.named_records(step)
        rng = self.curriculum.encyclopedia.rng("distillation", step)
        asked = [
            [
                *record.questions,
                *rng.sample(self.background, stage.num_background),
                *(self.curriculum.cross_document(rng, name, record) for _ in range(stage.num_cross_document)),
            ]
            for name, record in named
        ]
        documents = [record.document for _, record in named]
        if stage.distractor_source is None:
            members = self._members(rng, len(named), stage.num_joined_documents)
        else:
            others = range(len(named), len(named) + stage.num_distractor_documents)
            members = [[i] for i in range(len(named))]
            for row in members:
                row += rng.choices(others, k=_log_uniform(rng, *stage.num_joined_documents) - 1)
            source = self.curriculum.sources[stage.distractor_source]
            first = step * stage.num_distractor_documents
            documents += [source.record(first + i).document for i in range(len(others))]
        chunks = None
        if stage.chunk_weights is not None:
            # Another random stream: documents and questions do not depend on how they are cut.
            rng = self.curriculum.encyclopedia.rng("chunks", step)
            chunks = [self._cut(rng, document, stage) for document in documents]
        in_prompt = self._in_prompt(step, asked, members, stage.num_in_prompt)
        return self.batch(documents, asked, members=members, chunks=chunks, in_prompt=in_prompt)

    def _in_prompt(
        self, step: int, asked: Sequence[Sequence[Question]], members: Sequence[Sequence[int]], count: int
    ) -> list[tuple[int, list[Question], list[int]]]:
        """Documents that stand in the prompt, with questions about them and with another row's adapter."""
        # Another random stream: what else is in the step does not depend on these.
        rng = self.curriculum.encyclopedia.rng("in prompt", step)
        result = []
        for document in rng.sample(range(len(asked)), min(count, len(asked))):
            others = [row for row in members if document not in row]
            about = [question for question in asked[document] if question.kind == "document"]
            if others and about:
                # Two questions: the row is then about as long as the others, which have more questions but no document.
                chosen = rng.sample(about, min(2, len(about)))
                chosen = [question._replace(kind="in_prompt", stored=None) for question in chosen]
                result.append((document, chosen, list(rng.choice(others))))
        return result

    @staticmethod
    def _members(rng: random.Random, count: int, num_joined_documents: tuple[int, int]) -> list[list[int]]:
        # Joining costs no reading: every document of the step is read anyway, and chunks are joined by address.
        if tuple(num_joined_documents) == (1, 1):
            return [[i] for i in range(count)]
        sizes = [min(rng.randint(*num_joined_documents), count) for _ in range(count)]
        return [[i, *rng.sample([j for j in range(count) if j != i], size - 1)] for i, size in enumerate(sizes)]

    def _cut(self, rng: random.Random, document: str, stage: Stage) -> list[Chunks]:
        """A document in a number of chunks drawn by the stage's weights, or as many of its least size as fit.

        Source: Charakorn et al. 2026, Doc-to-LoRA, appendix A, https://arxiv.org/abs/2602.15902
        """
        (wanted,) = rng.choices(range(1, len(stage.chunk_weights) + 1), stage.chunk_weights)
        # Blanks belong to the sentence after them, as they do to its first token.
        starts = [0, *(start - document[start - 1].isspace() for start, _ in split_sentences(document)[1:])]
        sentences = [document[start:end] for start, end in zip(starts, [*starts[1:], len(document)], strict=True)]
        sizes = count_tokens(sentences, self.tokenizer)
        pieces = random_pieces(rng, sizes, num_pieces=wanted, min_size=stage.min_chunk_tokens)
        cut = [self._chunk("".join(sentences[a:b])) for a, b in pieces]
        before = [starts[a] for a, _ in pieces]
        return [
            piece._replace(spans=tuple((start + offset, end + offset) for start, end in piece.spans))
            for piece, offset in zip(cut, before, strict=True)
        ]

    def _chunk(self, text: str) -> Chunks:
        chunks = chunk_document(
            text,
            self.tokenizer,
            max_chunk_tokens=self.max_chunk_tokens,
            context_tokens=self.context_tokens,
            frame=self.frame,
            min_chunk_tokens=self.min_chunk_tokens,
        )
        check_known(chunks.ids.tolist(), self.tokenizer, num_embeddings=self.num_embeddings)
        return chunks

    def batch(
        self,
        documents: Sequence[str],
        asked: Sequence[Sequence[Question]],
        *,
        members: Sequence[Sequence[int]] | None = None,
        chunks: Sequence[Sequence[Chunks]] | None = None,
        in_prompt: Sequence[tuple[int, Sequence[Question], Sequence[int]]] = (),
    ) -> DistillationBatch:
        """One batch from documents and the questions asked about each.

        Args:
            documents: those that are asked about first; more than `asked` has lists for are joined only.
            members: the documents that each row's adapter joins; None: its own alone.
            chunks: of each document, in pieces whose spans count from the document's beginning; None cuts it into as
                few as possible.
            in_prompt: (document, questions of the kind "in_prompt", members): rows with the document in the prompt and
                the members' adapters.
        """
        if chunks is None:
            chunks = [[self._chunk(document)] for document in documents]
        pieces = [piece for of_document in chunks for piece in of_document]
        width = max(piece.ids.shape[1] for piece in pieces)
        pad = lambda tensor, value: torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=value)  # noqa: E731
        prefixes = self._encode([(self.layout.before_user, document, "") for document in documents[: len(asked)]])
        student_asked = [[(question, False) for question in questions] for questions in asked]
        teacher_asked = [[(q, q.kind in ("document", "unanswerable")) for q in questions] for questions in asked]
        others = [[(question, True) for question in questions] for _, questions, _ in in_prompt]
        in_prompt_prefixes = [prefixes[document] for document, _, _ in in_prompt]
        if self.skip_stored:
            teacher_asked = [[pair for pair in row if not pair[0].stored] for row in teacher_asked]
            prefixes = [
                prefix if any(sees for _, sees in row) else []
                for prefix, row in zip(prefixes, teacher_asked, strict=True)
            ]
        student = self._rows([*([] for _ in asked), *in_prompt_prefixes], [*student_asked, *others])
        members = [[i] for i in range(len(asked))] if members is None else members
        spans = [[span for piece in of_document for span in piece.spans] for of_document in chunks]
        return DistillationBatch(
            chunk_ids=torch.cat([pad(piece.ids, self.tokenizer.pad_token_id) for piece in pieces]),
            chunk_mask=torch.cat([pad(piece.mask, False) for piece in pieces]),
            chunk_counts=[sum(len(piece.ids) for piece in of_document) for of_document in chunks],
            members=[list(row) for row in [*members, *(joined for _, _, joined in in_prompt)]],
            student=student,
            teacher=self._rows([*prefixes, *in_prompt_prefixes], [*teacher_asked, *others]),
            answer_chunk=answer_chunk(student, documents, spans, asked),
            stored=stored_top_k(student, asked),
        )


def _log_uniform(rng: random.Random, least: int, most: int) -> int:
    """A number from least to most, each by the logarithm of its distance to the next."""
    return min(int(least * ((most + 1) / least) ** rng.random()), most)


def random_pieces(rng: random.Random, sizes: Sequence[int], *, num_pieces: int, min_size: int) -> list[tuple[int, int]]:
    """Cuts a row of sizes into at most num_pieces runs of at least min_size altogether, at random places.

    Returns:
        [(start, end), ...] of the runs; one if even two do not fit.
    """
    before = [0, *accumulate(sizes)]
    for wanted in range(min(num_pieces, before[-1] // max(min_size, 1), len(sizes)), 1, -1):
        # How many runs of at least min_size still fit behind each border; then borders that leave enough for the rest.
        fits = [0] * len(before)
        for i in range(len(sizes) - 1, -1, -1):
            j = bisect_left(before, before[i] + min_size)
            fits[i] = 1 + fits[j] if j < len(before) else 0
        if fits[0] < wanted:
            continue
        borders = [0]
        for remaining in range(wanted - 1, 0, -1):
            first = bisect_left(before, before[borders[-1]] + min_size)
            # fits falls from left to right.
            usable = [i for i in range(first, len(sizes)) if fits[i] >= remaining]
            borders.append(rng.choice(usable))
        return list(pairwise([*borders, len(sizes)]))
    return [(0, len(sizes))]


def answer_chunk(
    student: PackedRows,
    documents: Sequence[str],
    spans: Sequence[Sequence[tuple[int, int]]],
    asked: Sequence[Sequence[Question]],
) -> Tensor:
    """Of each answer token of the student's rows the chunk that holds the answer; see `DistillationBatch`.

    Args:
        spans: (start, end) characters of each document's chunks.
    """
    result = torch.full_like(student.ids, -1)
    num_segments = int(student.segments.max()) + 1
    for row, (document, borders, questions) in enumerate(zip(documents, spans, asked, strict=False)):
        # Of each segment; the prefix's is 0, the padding's -1.
        chunk_of = torch.full((num_segments + 1,), -1)
        for number, question in enumerate(questions, start=1):
            if question.kind == "document":
                word_for_word = re.compile(rf"(?<!\w){re.escape(question.answer)}(?!\w)", re.IGNORECASE)
                found = {
                    chunk
                    for match in word_for_word.finditer(document)
                    for chunk, (start, end) in enumerate(borders)
                    if start <= match.start() and match.end() <= end
                }
                if len(found) == 1:
                    chunk_of[number] = found.pop()
        result[row] = chunk_of[student.segments[row]]
    return result.masked_fill(student.target_kind < 0, -1)


def stored_top_k(student: PackedRows, asked: Sequence[Sequence[Question]]) -> StoredTopK | None:
    """Stored answers' probabilities laid out as the student's rows are."""
    questions = [(row, number, q) for row, asked_of in enumerate(asked) for number, q in enumerate(asked_of, start=1)]
    k = max((q.stored.indices.shape[1] for _, _, q in questions if q.stored), default=0)
    if not k:
        return None
    shape = (*student.ids.shape, k)
    where = torch.zeros(shape[:2], dtype=torch.bool)
    indices, log_probs = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape)
    for row, number, question in questions:
        if question.stored:
            at = ((student.segments[row] == number) & (student.target_kind[row] >= 0)).nonzero()[:, 0]
            size = question.stored.indices.shape[1]
            where[row, at] = True
            indices[row, at, :size] = torch.as_tensor(question.stored.indices, dtype=torch.int32)
            log_probs[row, at] = -torch.inf
            log_probs[row, at, :size] = torch.as_tensor(question.stored.log_probs, dtype=torch.float32)
    return StoredTopK(where, indices, log_probs)
