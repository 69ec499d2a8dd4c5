"""Batches of encyclopedia articles that grow harder by stages, addressed by step, so that a run can resume anywhere.

curriculum = Curriculum(Encyclopedia("train"), [Stage(steps=400, batch_size=32), Stage(steps=800, num_entities=(1, 3))])
curriculum.records(step=17)                         # the same records on every machine
BaseModelBatches(curriculum, tokenizer)[17]         # packed rows: article, questions, restatement
DistillationBatches(curriculum, tokenizer, ...)[17] # chunks for the hypernetwork, questions with and without the
article
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from hypernet.chunking import chunk_document
from hypernet.data.collate import KINDS, ChatLayout, PackedRows, Segment, pack_row, pad_rows
from hypernet.data.encyclopedia import Encyclopedia, background_questions
from hypernet.data.records import UNKNOWN, Question, Record


class Stage(NamedTuple):
    """A run of steps with articles of similar size; a pair is an inclusive range, drawn from per step or article.

    All articles of one step share num_entities and facts_per_entity, so that rows need little padding.
    """

    steps: int
    batch_size: int = 32  # articles per step
    num_entities: tuple[int, int] = (1, 1)
    facts_per_entity: tuple[int, int] = (1, 4)
    num_distractors: tuple[int, int] = (0, 2)
    max_questions: int = 8  # per article
    num_background: int = 1  # background questions per article
    num_foreign: int = 0  # the article's questions asked about an entity it does not name (hypernetwork only)
    company: tuple[int, int] = (1, 1)  # documents whose adapters are joined, its own among them (hypernetwork only)
    unanswerable: float = 0.0  # chance that an article also gets a question it does not answer
    shared_relations: float = 0.0  # chance that an article's entities are of one kind and told the same relations
    restatement: float = 0.0  # chance that the article's sentences follow again in another order (base model only)


class Curriculum:
    """Stages one after the other."""

    def __init__(self, encyclopedia: Encyclopedia, stages: Sequence[Stage | dict]) -> None:
        self.encyclopedia = encyclopedia
        self.stages = [stage if isinstance(stage, Stage) else Stage(**stage) for stage in stages]
        if not self.stages:
            raise ValueError("A curriculum needs at least one stage; give steps and batch_size.")
        self.num_steps = sum(stage.steps for stage in self.stages)
        self._first_article = [0]
        for stage in self.stages:
            self._first_article.append(self._first_article[-1] + stage.steps * stage.batch_size)

    def stage(self, step: int) -> tuple[int, Stage, int]:
        """(index of the stage, the stage, step within it)."""
        for number, stage in enumerate(self.stages):
            if step < stage.steps:
                return number, stage, step
            step -= stage.steps
        raise IndexError(f"Step {step} is past the end of the curriculum.")

    def records(self, step: int) -> list[Record]:
        number, stage, local_step = self.stage(step)
        rng = self.encyclopedia.rng("step", step)
        num_entities = rng.randint(*stage.num_entities)
        num_facts = sum(rng.randint(*stage.facts_per_entity) for _ in range(num_entities))
        first = self._first_article[number] + local_step * stage.batch_size
        return [
            self._trimmed(
                rng,
                self.encyclopedia.record(
                    first + i,
                    num_entities=num_entities,
                    num_facts=num_facts,
                    num_distractors=rng.randint(*stage.num_distractors),
                    num_unanswerable=int(rng.random() < stage.unanswerable),
                    # Drawn only where it is asked for: the other stages' articles stay what they were.
                    shared_relations=stage.shared_relations > 0 and rng.random() < stage.shared_relations,
                ),
                stage.max_questions,
            )
            for i in range(stage.batch_size)
        ]

    @staticmethod
    def _trimmed(rng: random.Random, record: Record, max_questions: int) -> Record:
        answerable = [q for q in record.questions if q.kind == "document"]
        others = [q for q in record.questions if q.kind != "document"]
        return record._replace(questions=(*rng.sample(answerable, min(max_questions, len(answerable))), *others))


class _Batches(Dataset):
    """One whole batch per item; shared by the two trainings."""

    def __init__(self, curriculum: Curriculum, tokenizer: PreTrainedTokenizerBase) -> None:
        self.curriculum = curriculum
        self.tokenizer = tokenizer
        self.layout = ChatLayout.of(tokenizer)

    def __len__(self) -> int:
        return self.curriculum.num_steps

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    def _segments(self, asked: Sequence[tuple[Question, bool]]) -> list[Segment]:
        """Segments for (question, does it see the trunk); tokenized in one call."""
        before = ["" if sees else self.layout.before_user for _, sees in asked]
        separator = ["\n\n" if sees else "" for _, sees in asked]
        prompts = self._encode(
            [b + s + q.text + self.layout.after_user for b, s, (q, _) in zip(before, separator, asked, strict=True)]
        )
        answers = self._encode([self.layout.answer(q.answer) for q, _ in asked])
        return [
            Segment(prompt + answer, len(prompt), sees, KINDS.index(question.kind))
            for prompt, answer, (question, sees) in zip(prompts, answers, asked, strict=True)
        ]

    def _rows(
        self, trunks: Sequence[list[int]], asked: Sequence[Sequence[tuple[Question, bool]]], extra=None
    ) -> PackedRows:
        flat = iter(self._segments([pair for questions in asked for pair in questions]))
        rows = []
        for i, (trunk, questions) in enumerate(zip(trunks, asked, strict=True)):
            segments = [next(flat) for _ in questions]
            rows.append(pack_row(trunk, segments + (extra[i] if extra else [])))
        return pad_rows(rows, pad_id=self.tokenizer.pad_token_id)


class BaseModelBatches(_Batches):
    """Rows for the base model: the article, its questions, background questions with and without it, a restatement.

    A question of the article asked without the article is answered `UNKNOWN`.
    """

    def __init__(self, curriculum: Curriculum, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(curriculum, tokenizer)
        self.background = background_questions()

    def __getitem__(self, step: int) -> PackedRows:
        _, stage, _ = self.curriculum.stage(step)
        records = self.curriculum.records(step)
        rng = self.curriculum.encyclopedia.rng("base model", step)
        trunks = self._encode([self.layout.before_user + record.document for record in records])
        asked = []
        for record in records:
            background = [
                (question, rng.random() < 0.3) for question in rng.sample(self.background, stage.num_background)
            ]
            without = rng.choice(record.questions)._replace(answer=UNKNOWN, kind="unanswerable")
            asked.append([(question, True) for question in record.questions] + background + [(without, False)])
        orders = [rng.sample(record.sentences, len(record.sentences)) for record in records]
        restated = self._encode(["\n\n" + " ".join(order) for order in orders])
        kind = KINDS.index("restatement")
        extra = [[Segment(ids, 0, True, kind, 0.5)] if rng.random() < stage.restatement else [] for ids in restated]
        return self._rows(trunks, asked, extra)


class DistillationBatch(NamedTuple):
    """One step of context distillation for N documents of C chunks together.

    chunk_ids, chunk_mask: [C, T]; num_chunks: per document, [N] on the host.
    members: the documents that each row's adapter joins, its own first; [N] lists on the host.
    student: the questions alone. teacher: the same questions, those about the document behind it. The answer tokens of
        both come in the same order.
    """

    chunk_ids: Tensor
    chunk_mask: Tensor
    num_chunks: list[int]
    members: list[list[int]]
    student: PackedRows
    teacher: PackedRows

    def to(self, device: torch.device | str) -> "DistillationBatch":
        return DistillationBatch(
            self.chunk_ids.to(device),
            self.chunk_mask.to(device),
            self.num_chunks,
            self.members,
            self.student.to(device),
            self.teacher.to(device),
        )


class DistillationBatches(_Batches):
    """Chunks, questions without and questions with the article; see `DistillationBatch`.

    Background questions are those kept out of training (`held_out_background`) or the others.
    """

    def __init__(
        self,
        curriculum: Curriculum,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_chunk_tokens: int,
        held_out_background: bool = False,
    ) -> None:
        super().__init__(curriculum, tokenizer)
        self.max_chunk_tokens = max_chunk_tokens
        self.background = background_questions(held_out=held_out_background)

    def __getitem__(self, step: int) -> DistillationBatch:
        _, stage, _ = self.curriculum.stage(step)
        records = self.curriculum.records(step)
        rng = self.curriculum.encyclopedia.rng("distillation", step)
        asked = [
            [
                *record.questions,
                *rng.sample(self.background, stage.num_background),
                *self._foreign(rng, record, stage.num_foreign),
            ]
            for record in records
        ]
        members = self._members(rng, len(records), stage.company)
        return self.batch([record.document for record in records], asked, members=members)

    @staticmethod
    def _members(rng: random.Random, count: int, company: tuple[int, int]) -> list[list[int]]:
        # Joining costs no reading: every document of the step is read anyway, and chunks are joined by address.
        if tuple(company) == (1, 1):
            return [[i] for i in range(count)]
        sizes = [min(rng.randint(*company), count) for _ in range(count)]
        return [[i, *rng.sample([j for j in range(count) if j != i], size - 1)] for i, size in enumerate(sizes)]

    def _foreign(self, rng: random.Random, record: Record, count: int) -> list[Question]:
        # The article's own relations asked about somebody else: only the name tells that the article does not answer.
        # Questions of other articles hardly ever share a relation, and the adapter learned to ignore names.
        return [
            self.curriculum.encyclopedia.asked_of_another(rng, rng.choice(record.questions), document=record.document)
            for _ in range(count)
        ]

    def batch(
        self,
        documents: Sequence[str],
        asked: Sequence[Sequence[Question]],
        *,
        members: Sequence[Sequence[int]] | None = None,
    ) -> DistillationBatch:
        """One batch from documents and the questions asked about each.

        Args:
            members: the documents that each row's adapter joins; None: its own alone.
        """
        chunks = [
            chunk_document(document, self.tokenizer, max_chunk_tokens=self.max_chunk_tokens) for document in documents
        ]
        width = max(chunk.ids.shape[1] for chunk in chunks)
        pad = lambda tensor, value: torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=value)  # noqa: E731
        trunks = self._encode([self.layout.before_user + document for document in documents])
        return DistillationBatch(
            chunk_ids=torch.cat([pad(chunk.ids, self.tokenizer.pad_token_id) for chunk in chunks]),
            chunk_mask=torch.cat([pad(chunk.mask, False) for chunk in chunks]),
            num_chunks=[len(chunk.ids) for chunk in chunks],
            members=[[i] for i in range(len(documents))] if members is None else [list(row) for row in members],
            student=self._rows([[] for _ in documents], [[(q, False) for q in questions] for questions in asked]),
            teacher=self._rows(
                trunks, [[(q, q.kind in ("document", "unanswerable")) for q in questions] for questions in asked]
            ),
        )
