"""Packed rows against one prompt per question, the chat layout, and where the answer tokens are."""

import copy

import pytest
import torch

from hypernet.base.packed_attention import packed_logits
from hypernet.base.packed_rows import QUESTION_KINDS, Segment, pack_row, pad_rows, shared_beginning
from hypernet.data.batches import DistillationBatches
from hypernet.data.curriculum import Curriculum, Stage
from hypernet.data.encyclopedia import Encyclopedia
from hypernet.data.records import Question
from hypernet.text.chat import ChatLayout

DOCUMENTS = [
    "Norbach was founded by Ilda Renwick. It makes tin boxes.",
    "Elmouth is a town.\n\nIt lies on the river Vel",
]
ASKED = [
    [
        Question("Who founded Norbach?", "Ilda Renwick"),
        Question("What is the capital of France?", "Paris", "background"),
        Question("When was Norbach founded?", "unknown", "unanswerable"),
        Question("What does Norbach make?", "tin boxes"),
    ],
    [Question("Which river flows through Elmouth?", "Vel"), Question("Is it hot?", "no, cold", "background")],
]


@pytest.fixture(scope="module")
def batches(tiny_tokenizer):
    curriculum = Curriculum(Encyclopedia("train"), [Stage(steps=1)])
    return DistillationBatches(curriculum, tiny_tokenizer, max_chunk_tokens=30)


@pytest.fixture(scope="module")
def batch(batches):
    return batches.batch(DOCUMENTS, ASKED)


@torch.no_grad()
def logits_of(base_model, rows):
    mask = rows.attention_mask(base_model.dtype)
    return base_model(input_ids=rows.ids, position_ids=rows.positions, attention_mask=mask, use_cache=False).logits


@torch.no_grad()
def logits_of_prompt(base_model, ids):
    return base_model(torch.tensor([ids])).logits[0]


# Packed rows say what separate prompts say


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_packed_rows_equal_one_prompt_per_question(tiny_base_model, tiny_tokenizer, batch, who, attention):
    tiny_base_model.set_attn_implementation(attention)
    layout, rows = ChatLayout.of(tiny_tokenizer), getattr(batch, who)
    logits = logits_of(tiny_base_model, rows)
    for row, (document, questions) in enumerate(zip(DOCUMENTS, ASKED, strict=True)):
        for number, question in enumerate(questions, start=1):
            sees = who == "teacher" and question.kind != "background"
            # The whole conversation in one text, tokenized in one go.
            text = layout.prompt(question.text, document if sees else None) + layout.answer(question.answer)
            ids = tiny_tokenizer(text)["input_ids"]
            own = rows.segments[row] == number
            assert rows.ids[row, own].tolist() == ids[-own.sum() :]
            expected = logits_of_prompt(tiny_base_model, ids)[-own.sum() :]
            torch.testing.assert_close(logits[row, own], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_shared_template_is_read_once_with_the_same_logits(tiny_base_model, tiny_tokenizer, batches, attention):
    """A system prompt before every question, as SmolLM2's template has it; forward and gradients."""
    tiny_base_model.set_attn_implementation(attention)
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "Elmouth is a town on the river Vel. It makes tin boxes.\n" + tokenizer.chat_template
    with_system = DistillationBatches(batches.curriculum, tokenizer, max_chunk_tokens=60)
    layout, rows = ChatLayout.of(tokenizer), with_system.batch(DOCUMENTS, ASKED).student
    assert (rows.segments == 0).sum(1).min() > 8
    weight = tiny_base_model.model.layers[-1].mlp.down_proj.weight.requires_grad_()
    logits = packed_logits(tiny_base_model, rows, rows.target_kind >= 0)
    texts = [(layout.prompt(q.text), layout.answer(q.answer)) for questions in ASKED for q in questions]
    expected = []
    for prompt, answer in texts:
        ids = tokenizer(prompt + answer)["input_ids"]
        size = len(ids) - len(tokenizer(prompt)["input_ids"])
        expected.append(tiny_base_model(torch.tensor([ids])).logits[0, -size - 1 : -1])
    expected = torch.cat(expected)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    slopes = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((logits * slopes).sum(), weight)
    torch.testing.assert_close(gradient, torch.autograd.grad((expected * slopes).sum(), weight)[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("prompts", "shared"),
    [
        (["a system prompt of no fewer words than: x", "a system prompt of no fewer words than: y"], 8),
        (
            ["a system prompt of no fewer words than:", "a system prompt of no fewer words than: y"],
            0,
        ),  # the last token answers
        (["of two words x", "of two words y"], 0),  # too few
        (["a system prompt of no fewer words than: x"], 0),
    ],
)
def test_shared_beginning_leaves_each_prompt_whole(prompts, shared):
    segments = [Segment([*prompt.split(), "end"], len(prompt.split()), False, 0) for prompt in prompts]
    prefix, rest = shared_beginning(segments)
    assert len(prefix) == shared and [s.sees_prefix for s in rest] == [bool(shared)] * len(segments)
    assert [[*prefix, *s.ids] for s in rest] == [s.ids for s in segments]
    assert [len(prefix) + s.num_prompt for s in rest] == [s.num_prompt for s in segments]
    assert min(s.num_prompt for s in rest) >= 1


def test_the_prefix_is_read_as_if_nothing_followed(tiny_base_model, tiny_tokenizer, batch):
    logits = logits_of(tiny_base_model, batch.teacher)
    for row, document in enumerate(DOCUMENTS):
        ids = tiny_tokenizer("<|user|>" + document)["input_ids"]
        prefix = batch.teacher.segments[row] == 0
        assert batch.teacher.ids[row, prefix].tolist() == ids
        torch.testing.assert_close(logits[row, prefix], logits_of_prompt(tiny_base_model, ids), rtol=0, atol=1e-5)


def test_segments_see_neither_each_other_nor_unwanted_prefix(tiny_base_model, batch):
    """Other tokens anywhere it must not look change nothing at all."""
    rows = batch.teacher
    before = logits_of(tiny_base_model, rows)[0]
    for number, question in enumerate(ASKED[0], start=1):
        own = rows.segments[0] == number
        hidden = ~own & (rows.segments[0] != 0) if question.kind != "background" else ~own
        changed = rows.ids.clone()
        changed[0, hidden] = (changed[0, hidden] + 7) % 600
        after = logits_of(tiny_base_model, rows._replace(ids=changed))[0]
        assert torch.equal(after[own], before[own])


def test_packed_row_padding_changes_nothing(tiny_base_model, batches, batch):
    for who in ("student", "teacher"):
        both = logits_of(tiny_base_model, getattr(batch, who))
        assert both.isfinite().all()
        for row in range(2):
            alone = getattr(batches.batch(DOCUMENTS[row : row + 1], ASKED[row : row + 1]), who)
            size = alone.ids.shape[1]
            for field, value in getattr(batch, who)._asdict().items():
                assert torch.equal(value[row, :size], getattr(alone, field)[0]), field
            torch.testing.assert_close(both[row, :size], logits_of(tiny_base_model, alone)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_mask_is_finite_and_of_given_dtype(batch, dtype):
    mask = batch.teacher.attention_mask(dtype)
    assert mask.dtype == dtype and mask.shape == (2, 1, *batch.teacher.ids.shape[1:] * 2)
    assert set(mask.unique().tolist()) == {0.0, torch.finfo(dtype).min}


def test_packed_mask_equals_handwritten_mask():
    row = pack_row([1, 2], [Segment([3, 4], 1, True, 0), Segment([5, 6, 7], 2, False, 2)])
    rows = pad_rows([row, pack_row([1] * 8, [])], pad_id=0)
    visible = rows.attention_mask(torch.float32)[0, 0] == 0
    assert [[int(x) for x in line] for line in visible] == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 1],
    ]
    assert rows.positions[0].tolist() == [0, 1, 2, 3, 0, 1, 2, 0]
    assert rows.target_kind[0].tolist() == [-1, -1, 0, -1, -1, 2, -1, -1]


# Which tokens are answers


def test_packed_targets_are_exactly_the_answer_tokens(tiny_tokenizer, batch):
    for rows in (batch.student, batch.teacher):
        predicted, kinds = rows.target_kind >= 0, rows.target_kind
        for row, questions in enumerate(ASKED):
            for number, question in enumerate(questions, start=1):
                here = predicted[row] & (rows.segments[row] == number)
                assert tiny_tokenizer.decode(rows.targets()[row, here]) == f" {question.answer}<|end|>"
                assert set(kinds[row, here].tolist()) == {QUESTION_KINDS.index(question.kind)}
        assert not predicted[rows.segments <= 0].any()


def test_student_and_teacher_answer_tokens_are_in_one_order(batch):
    student, teacher = batch.student, batch.teacher
    at = [rows.target_kind >= 0 for rows in (student, teacher)]
    assert torch.equal(student.targets()[at[0]], teacher.targets()[at[1]])
    assert torch.equal(student.target_kind[at[0]], teacher.target_kind[at[1]])
    assert torch.equal(at[0].nonzero()[:, 0], at[1].nonzero()[:, 0])


def test_a_segment_without_a_prompt_is_predicted_whole():
    row = pack_row([1, 2], [Segment([5, 6, 7], 0, True, 3, weight=0.5)])
    assert row.target_kind.tolist() == [-1, -1, 3, 3, -1]
    assert row.target_weight.tolist() == [0, 0, 0.5, 0.5, 0.5]


def test_packed_rows_move_to_a_device_together(batch):
    moved = batch.to("meta")
    tensors = [moved.chunk_ids, moved.chunk_mask, *moved.student, *moved.teacher]
    assert {tensor.device.type for tensor in tensors} == {"meta"} and moved.chunk_counts == batch.chunk_counts
