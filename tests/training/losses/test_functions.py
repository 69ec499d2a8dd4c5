"""Losses and measures against hand-computed values, and teacher-forced answers against greedy decoding."""

import math

import pytest
import torch

from hypernet.base.packed_rows import Segment, pack_row, pad_rows
from hypernet.training.losses import (
    answer_nll,
    answers_right,
    answers_right_by_kind,
    attribution,
    context_distillation_kl,
    context_distillation_kl_topk,
    key_attribution,
    key_contrast,
    mean_absolute_weight,
    mean_per_document,
)


def logits_of(*probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


# Losses


def test_nll_of_known_probabilities():
    logits = logits_of([0.5, 0.25, 0.25], [0.1, 0.2, 0.7]) + 3  # a constant does not count
    losses = answer_nll(logits, torch.tensor([1, 2]))
    torch.testing.assert_close(losses, torch.tensor([math.log(4), -math.log(0.7)]))


def test_kl_is_taken_from_the_teachers_side():
    teacher, student = logits_of([0.5, 0.5], [0.9, 0.1]), logits_of([0.25, 0.75], [0.1, 0.9])
    expected = [0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75), 0.8 * math.log(9)]
    torch.testing.assert_close(context_distillation_kl(student, teacher), torch.tensor(expected))


def test_kl_is_zero_for_equal_distributions_else_positive():
    logits = torch.randn(7, 11) * 30
    assert context_distillation_kl(logits, logits.clone()).abs().max() == 0
    assert context_distillation_kl(logits + 5, logits).abs().max() < 1e-4
    assert (context_distillation_kl(torch.randn(7, 11), logits) > 0).all()


def test_kl_gradient_is_the_students_error_alone():
    student, teacher = torch.randn(5, 9, requires_grad=True), torch.randn(5, 9, requires_grad=True)
    context_distillation_kl(student, teacher).sum().backward()
    assert teacher.grad is None
    torch.testing.assert_close(student.grad, (student.softmax(-1) - teacher.softmax(-1)).detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_half_precision_logits_use_float32(dtype):
    student, teacher, targets = torch.randn(3, 400).to(dtype), torch.randn(3, 400).to(dtype), torch.arange(3)
    kl, nll = context_distillation_kl(student, teacher), answer_nll(student, targets)
    assert kl.dtype == nll.dtype == torch.float32
    torch.testing.assert_close(kl, context_distillation_kl(student.double(), teacher.double()).float())
    torch.testing.assert_close(nll, answer_nll(student.double(), targets).float())


def test_nll_of_certain_and_of_impossible_tokens():
    certain = torch.tensor([[0.0, -torch.inf]])
    assert answer_nll(certain, torch.tensor([0])) == 0
    assert answer_nll(certain, torch.tensor([1])) == torch.inf


# Generated weights


def test_l1_is_the_mean_over_all_chunks_entries():
    A, B = torch.full((3, 2, 4), -1.0), torch.full((3, 2, 8), 4.0)
    A[1:] = 3
    expected = [(8 * 1 + 16 * 4) / 24, (8 * 3 + 16 * 4) / 24]
    torch.testing.assert_close(mean_absolute_weight([A, B], [1, 2]), torch.tensor(expected))


# Chunks that hold the answers to the questions below, two of them unknown.
CHUNKS = torch.tensor([1, 3, -1, 5, -1, -1, 3])


@pytest.mark.parametrize("chunk", [None, CHUNKS])
def test_key_contrast_is_cross_entropy_in_both_directions(chunk):
    torch.manual_seed(0)
    chunk_counts, owner = [2, 1, 3], torch.tensor([0, 2, -1, 2, 0, -1, 2])  # document 1 has no question
    keys = torch.randn(6, 3, 5, dtype=torch.double, requires_grad=True)
    inputs = torch.randn(7, 5, dtype=torch.double, requires_grad=True)
    by_document, by_question = key_contrast(keys, inputs, owner, chunk_counts, chunk=chunk)

    centred = (inputs - inputs.mean(0)).detach()
    own = own_chunks(owner, chunk)

    def score(chunks, question):
        rows = keys[sorted(chunks)].flatten(0, 1)
        cosines = rows @ centred[question] / rows.norm(dim=-1) / centred[question].norm()
        return (20 * cosines).logsumexp(0)

    expected_d, expected_q = [], []
    for question, chunks in enumerate(own):
        if chunks:
            mine = score(chunks, question)
            rivals = [q for q in range(7) if q == question or not chunks & own[q]]
            expected_d.append(score(range(6), question) - mine)
            expected_q.append(torch.stack([score(chunks, q) for q in rivals]).logsumexp(0) - mine)
    for found, expected in ((by_document, expected_d), (by_question, expected_q)):
        torch.testing.assert_close(found, torch.stack(expected).float(), rtol=1e-4, atol=1e-5)
    got, wanted = (
        torch.autograd.grad(sum(value.sum() for value in values), keys)[0]
        for values in ((by_document, by_question), (torch.stack(expected_d), torch.stack(expected_q)))
    )
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    assert inputs.grad is None


def own_chunks(owner, chunk):
    """Each question's own of six chunks of three documents: the one with the answer, or all of its document's."""
    of_document = {-1: set(), 0: {0, 1}, 1: {2}, 2: {3, 4, 5}}
    chunks = owner.new_full(owner.shape, -1) if chunk is None else chunk
    return [{c} if c >= 0 else of_document[d] for d, c in zip(owner.tolist(), chunks.tolist(), strict=True)]


def test_key_contrast_of_own_and_of_other_directions():
    inputs = torch.eye(4)
    keys = (inputs - inputs.mean(0))[:, None]
    right = key_contrast(keys, inputs, torch.arange(4), [1] * 4)
    wrong = key_contrast(keys.roll(1, 0), inputs, torch.arange(4), [1] * 4)
    assert all(value.max() < 1e-6 for value in right) and all(value.min() > 5 for value in wrong)


def test_key_contrast_without_owned_questions_is_empty():
    nobody = torch.tensor([-1, -1])
    assert all(not len(value) for value in key_contrast(torch.ones(1, 2, 3), torch.ones(2, 3), nobody, [1]))


@pytest.mark.parametrize("chunk", [None, CHUNKS])
def test_key_attribution_is_shares_of_squared_products(chunk):
    """Reference: one product after the other, in double precision; gradients of the keys, too."""
    torch.manual_seed(0)
    chunk_counts, owner = [2, 1, 3], torch.tensor([0, 2, -1, 2, 0, 1, 2])
    keys = torch.randn(6, 3, 5, dtype=torch.double, requires_grad=True)
    inputs = torch.randn(7, 5, dtype=torch.double, requires_grad=True)
    of_chunk = [0, 0, 1, 2, 2, 2]
    unit = (inputs / inputs.norm(dim=1, keepdim=True)).detach()

    def score(chunk, row, question):
        return (keys[chunk, row] @ unit[question]) ** 2

    own = own_chunks(owner, chunk)
    by_question, by_document = [], []
    for q, chunks in enumerate(own):
        if chunks:
            of = [sum(score(c, r, q) for r in range(3)) for c in range(6)]
            by_question.append(-(sum(of[c] for c in chunks) / sum(of)).log())
    for d in range(3):
        shares = []
        for c in [c for c in range(6) if of_chunk[c] == d]:
            asked = [q for q in range(7) if c in own[q]]
            for r in range(3) if asked else ():
                of = torch.stack([score(c, r, q) for q in range(7)])
                shares.append(-(of[asked].sum() / of.sum()).log())
        by_document.append(sum(shares) / len(shares))
    found, expected = key_attribution(keys, inputs, owner, chunk_counts, chunk=chunk), (by_question, by_document)
    weights = [torch.arange(1.0, 7), torch.arange(1.0, 4)]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), torch.stack(theirs), rtol=1e-5, atol=1e-6)
    got, wanted = (
        torch.autograd.grad(sum((v * w).sum() for v, w in zip(values, weights, strict=True)), keys)[0]
        for values in (found, [torch.stack(values) for values in expected])
    )
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert inputs.grad is None


def test_key_attribution_of_orthogonal_keys():
    keys = torch.eye(4)[:, None]
    right = key_attribution(keys, torch.eye(4), torch.arange(4), [1] * 4)
    wrong = key_attribution(keys.roll(1, 0), torch.eye(4), torch.arange(4), [1] * 4)
    assert all(value.max() < 1e-6 for value in right) and all(value.min() > 5 for value in wrong)


@pytest.mark.parametrize("chunk", [None, torch.tensor([-1, 1, -1, 5, 3])])
def test_attribution_is_the_owners_share_of_squared_deltas(chunk):
    """Reference: every delta as a matrix, one position and chunk after the other; gradients of A and B, too."""
    torch.manual_seed(0)
    chunk_counts, owner = [2, 1, 3], torch.tensor([1, 0, -1, 2, 2])
    A, B = (torch.randn(6, 3, d, dtype=torch.float64, requires_grad=True) for d in (7, 5))
    x = torch.randn(5, 7, dtype=torch.float64)
    found = attribution(A, B, x, owner, chunk_counts, chunk=chunk)
    expected = []
    for p, chunks in enumerate(own_chunks(owner, chunk)):
        if chunks:
            squared = torch.stack([(B[c].T @ A[c] @ x[p]).square().sum() for c in range(6)])
            expected.append(-(squared[sorted(chunks)].sum() / squared.sum()).log())
    expected = torch.stack(expected)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    weights = torch.arange(1.0, 5)
    mine = torch.autograd.grad((found * weights).sum(), (A, B))
    theirs = torch.autograd.grad((expected * weights).sum(), (A, B))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_attribution_of_adapters_that_add_nothing_is_even():
    A, x = torch.randn(4, 2, 3), torch.randn(5, 3)
    values = attribution(A, torch.zeros(4, 2, 6), x, torch.tensor([0, 1, 2, 3, -1]), [1] * 4)
    torch.testing.assert_close(values, torch.full((4,), math.log(4)))


# Stored top-k


def top_k(teacher, k):
    log_probs, indices = teacher.float().log_softmax(-1).topk(k)
    return indices, log_probs


def test_topk_kl_counts_all_other_tokens_as_one_outcome():
    student = logits_of([0.4, 0.1, 0.2, 0.3])
    indices, log_probs = torch.tensor([[3, 0]]), torch.tensor([[0.6, 0.3]]).log()
    expected = 0.6 * math.log(0.6 / 0.3) + 0.3 * math.log(0.3 / 0.4) + 0.1 * math.log(0.1 / 0.3)
    torch.testing.assert_close(context_distillation_kl_topk(student, indices, log_probs), torch.tensor([expected]))


def test_topk_kl_of_every_token_is_the_whole_kl():
    student, teacher = torch.randn(6, 13, requires_grad=True), torch.randn(6, 13) * 4
    values = [context_distillation_kl_topk(student, *top_k(teacher, 13)), context_distillation_kl(student, teacher)]
    gradients = [torch.autograd.grad(value.sum(), student)[0] for value in values]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("k", [1, 2, 7, 12])
def test_topk_kl_is_bounded_by_full_kl_and_grows_with_k(k):
    student, teacher = torch.randn(50, 13), torch.randn(50, 13) * 3
    fewer, more = (context_distillation_kl_topk(student, *top_k(teacher, n)) for n in (k, k + 1))
    assert (fewer <= more + 1e-5).all() and (more <= context_distillation_kl(student, teacher) + 1e-5).all()
    assert (fewer >= -1e-5).all()


def test_topk_kl_gradient_of_the_rest_is_one_outcome():
    """Reference: the same sums written down plainly, in double precision."""
    student, teacher = torch.randn(9, 20, dtype=torch.double, requires_grad=True), torch.randn(9, 20) * 3
    indices, log_probs = top_k(teacher, 4)
    q, p = student.softmax(-1).gather(-1, indices), log_probs.double().exp()
    rest_q, rest_p = 1 - q.sum(-1), 1 - p.sum(-1)
    expected = (p * (p / q).log()).sum(-1) + rest_p * (rest_p / rest_q).log()
    values = context_distillation_kl_topk(student, indices, log_probs)
    torch.testing.assert_close(values, expected.float(), atol=1e-5, rtol=1e-4)
    gradients = [torch.autograd.grad(value.sum(), student)[0] for value in (values, expected)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_topk_kl_is_finite_for_certain_distributions():
    logits = torch.tensor([[100.0, 0, 0, -50], [0.0, 100, 0, 0]], requires_grad=True)
    sure = (torch.tensor([[0, 1], [0, 1]]), torch.tensor([[0.0, -100], [-1e-4, -9.2]]))
    loss = context_distillation_kl_topk(logits, *sure)
    loss.sum().backward()
    assert loss.isfinite().all() and logits.grad.isfinite().all() and abs(loss[0]) < 1e-6
    torch.testing.assert_close(loss[1].item(), 100.0, rtol=0.01, atol=0)
    # Stored in half precision, probabilities may add up to more than 1.
    more = context_distillation_kl_topk(torch.zeros(1, 5), torch.tensor([[2, 4]]), torch.tensor([[0.7, 0.301]]).log())
    assert more.isfinite().all()


def test_topk_kl_ignores_padding_entries():
    student, (indices, log_probs) = torch.randn(3, 9), top_k(torch.randn(3, 9), 3)
    filled = (torch.nn.functional.pad(indices, (0, 2)), torch.nn.functional.pad(log_probs, (0, 2), value=-torch.inf))
    torch.testing.assert_close(
        context_distillation_kl_topk(student, *filled), context_distillation_kl_topk(student, indices, log_probs)
    )


# Means


def test_mean_per_document_weighs_documents_alike():
    values, document = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 2])
    assert mean_per_document(values, document, 3) == (2 + 5) / 2  # document 1 has no values


def test_mean_per_document_ignores_token_order():
    values, document = torch.randn(50, dtype=torch.float64), torch.randint(7, (50,))
    expected = torch.stack([values[document == d].mean() for d in document.unique()]).mean()
    order = torch.randperm(50)
    torch.testing.assert_close(mean_per_document(values[order], document[order], 7), expected)


def test_mean_per_document_of_nothing_is_zero():
    values = torch.zeros(0, requires_grad=True)
    mean = mean_per_document(values, torch.zeros(0, dtype=torch.long), 4)
    mean.backward()
    assert mean == 0


# Right answers


@pytest.mark.parametrize("num_tokens", [0, 1, 37])
def test_answer_is_exact_if_all_its_tokens_are(num_tokens):
    predicted, targets = torch.randint(3, (2, num_tokens)).unbind()
    answer = torch.randint(-5, 12, (num_tokens,)) * 100
    expected = []
    for number in sorted(set(answer.tolist())):
        expected.append(all(p == t for p, t, a in zip(predicted, targets, answer, strict=True) if a == number))
    assert answers_right(predicted, targets, answer).tolist() == expected


@torch.no_grad()
def test_exact_answer_agrees_with_greedy_decoding(tiny_base_model, tiny_tokenizer):
    """Teacher-forced and generated answers agree: the shortcut that validation takes is exact."""
    prompts = tiny_tokenizer(
        [f"<|user|>Where is {name}?<|end|><|assistant|>" for name in ("A", "Norbach", "Vel", "it")]
    )
    segments, expected = [], []
    for i, prompt in enumerate(prompts["input_ids"]):
        ids = torch.tensor([prompt])
        output = tiny_base_model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
        generated = output[0, ids.shape[1] :].tolist()
        assert len(generated) == 5
        for changed in (None, i % 5, 4):
            answer = list(generated)
            if changed is not None:
                answer[changed] = (answer[changed] + 1) % 600
            segments.append(Segment(prompt + answer, len(prompt), False, kind=i % 2))
            expected.append(answer == generated)
    # Three rows of four answers, padded.
    rows = pad_rows([pack_row([], segments[start : start + 4]) for start in (0, 4, 8)], pad_id=0)
    mask = rows.attention_mask(torch.float32)
    logits = tiny_base_model(input_ids=rows.ids, position_ids=rows.positions, attention_mask=mask).logits
    right = answers_right_by_kind(rows, logits.argmax(-1)[rows.target_kind >= 0])
    assert list(right) == ["document", "unanswerable"]
    for kind, number in (("document", 0), ("unanswerable", 1)):
        assert right[kind].tolist() == [e for e, s in zip(expected, segments, strict=True) if s.kind == number]
    assert 0 < sum(expected) < len(expected)
