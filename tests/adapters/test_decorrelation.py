"""decorrelation: against inverses in float64, its limits, its gradients, and what it promises about other documents."""

import pytest
import torch

from hypernet.adapters.decorrelation import decorrelate_, decorrelated
from tests.adapters.test_adapter import assert_one_line_value_error

# Chunks, rank and width: rows fewer than the width, as many, and more (where the smaller system is solved).
SIZES = [(4, 3, 29), (5, 2, 10), (7, 3, 5), (1, 1, 1)]


def draw(num_chunks, rank, width, *, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(num_chunks, rank, width, generator=generator, dtype=torch.float64)
    documents = torch.randint(3, (num_chunks,), generator=generator)
    return (3 * A).to(dtype), documents


def by_inverse(A, documents, ridge):
    """The same from its formula, entry by entry and with inverses."""
    rows = A.double().flatten(0, 1)
    of = [int(document) for document in documents for _ in range(A.shape[1])]
    unit = torch.stack([row / row.norm() for row in rows])
    gram = torch.tensor([[float(a @ b) for b in unit] for a in unit], dtype=torch.float64)
    size = range(len(of))
    own = [[float(gram[i, j]) if of[i] == of[j] else 0.0 for j in size] for i in size]
    own = torch.tensor(own, dtype=torch.float64)
    ridge = ridge * torch.eye(len(of), dtype=torch.float64)
    mixed = (own + ridge) @ torch.linalg.inv(gram + ridge) @ unit
    return (mixed * rows.norm(dim=1, keepdim=True)).view(A.shape)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("ridge", [0.1, 2.0])
def test_it_is_the_formula(sizes, ridge):
    A, documents = draw(*sizes)
    expected = by_inverse(A, documents, ridge)
    torch.testing.assert_close(decorrelated(A, documents, ridge=ridge), expected, rtol=0, atol=1e-9)
    single = decorrelated(A.float(), documents, ridge=ridge)
    assert single.dtype == torch.float32
    # Each chunk by itself; and documents in a batch, which are told apart in another way.
    apart = decorrelated(A, ridge=ridge)
    torch.testing.assert_close(apart, by_inverse(A, torch.arange(len(A)), ridge), rtol=0, atol=1e-9)
    batch = decorrelated(A.expand(2, *A.shape), documents.expand(2, len(A)), ridge=ridge)
    torch.testing.assert_close(batch, expected.expand(2, *A.shape), rtol=0, atol=1e-9)
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("sizes", [*SIZES, (29, 3, 7), (5, 8, 3), (12, 2, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_in_place_and_in_pieces_it_is_the_same(sizes, dtype):
    A, _ = draw(*sizes, dtype=dtype)
    pool = torch.stack([A, torch.zeros_like(A)], dim=1)  # as an adapter's layers lie
    expected = decorrelated(A, ridge=0.7)
    assert decorrelate_(pool[:, 0], ridge=0.7).data_ptr() == pool.data_ptr()
    torch.testing.assert_close(pool[:, 0], expected, rtol=0 if dtype == torch.float64 else 1e-2, atol=1e-9)
    assert not pool[:, 1].any()


@pytest.mark.parametrize("sizes", SIZES)
def test_one_document_and_orthogonal_ones_stay_and_a_large_ridge_changes_little(sizes):
    A, documents = draw(*sizes)
    torch.testing.assert_close(decorrelated(A, torch.ones_like(documents), ridge=0.5), A, rtol=0, atol=1e-9)
    torch.testing.assert_close(decorrelated(A, documents, ridge=1e9), A, rtol=0, atol=1e-6)
    apart = torch.zeros(3, 2, 12, dtype=torch.float64)
    for chunk in range(3):
        apart[chunk, :, 4 * chunk : 4 * chunk + 4] = torch.randn(2, 4, dtype=torch.float64)
    torch.testing.assert_close(decorrelated(apart, torch.arange(3), ridge=0.5), apart, rtol=0, atol=1e-9)


def test_without_a_ridge_a_documents_own_input_is_answered_as_alone_and_by_nobody_else():
    A, _ = draw(5, 2, 31)
    documents = torch.tensor([0, 1, 1, 2, 0])
    out = decorrelated(A, documents, ridge=1e-9)
    for document in range(3):
        own = documents == document
        x = torch.randn(int(own.sum()) * 2, dtype=torch.float64) @ A[own].flatten(0, 1)
        torch.testing.assert_close(out[own] @ x, A[own] @ x, rtol=0, atol=1e-4)
        assert (A[~own] @ x).abs().max() > 1
        assert (out[~own] @ x).abs().max() < 1e-4


def test_chunks_may_come_in_any_order_with_padding_and_in_batches():
    A, documents = draw(5, 2, 9)
    expected = decorrelated(A, documents, ridge=0.7)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(decorrelated(A[order], documents[order], ridge=0.7), expected[order], rtol=0, atol=1e-9)
    padded = torch.cat([A, torch.zeros(2, 2, 9).double()])
    for number in (-1, int(documents[0])):
        out = decorrelated(padded, torch.cat([documents, torch.tensor([number] * 2)]), ridge=0.7)
        torch.testing.assert_close(out[:5], expected, rtol=0, atol=1e-9)
        assert not out[5:].any()
    other, its_documents = draw(5, 2, 9, seed=1)
    both = decorrelated(torch.stack([A, other]), torch.stack([documents, its_documents]), ridge=0.7)
    torch.testing.assert_close(both[0], expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(both[1], decorrelated(other, its_documents, ridge=0.7), rtol=0, atol=1e-9)


@pytest.mark.parametrize("sizes", [(3, 2, 11), (4, 2, 5)])
def test_gradients_are_those_of_the_formula(sizes):
    A, documents = draw(*sizes)
    A = torch.cat([A, torch.zeros_like(A[:1])]).requires_grad_()  # padding must not make them infinite
    documents = torch.cat([documents, documents.new_tensor([-1])])
    out = decorrelated(A, documents, ridge=0.3)
    (gradient,) = torch.autograd.grad(out[:-1].sin().sum(), A)
    assert gradient.isfinite().all() and not gradient[-1].any()
    real = A.detach()[:-1].requires_grad_()
    assert torch.autograd.gradcheck(lambda a: decorrelated(a, documents[:-1], ridge=0.3), (real,))
    (expected,) = torch.autograd.grad(decorrelated(real, documents[:-1], ridge=0.3).sin().sum(), real)
    torch.testing.assert_close(gradient[:-1], expected, rtol=0, atol=1e-9)


def test_half_precision_and_autocast_are_computed_in_float32():
    A, documents = draw(4, 3, 29, dtype=torch.bfloat16)
    out = decorrelated(A, documents, ridge=0.5)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, decorrelated(A.float(), documents, ridge=0.5).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        under = decorrelated(A.float(), documents, ridge=0.5)
    assert under.dtype == torch.float32 and torch.equal(under, decorrelated(A.float(), documents, ridge=0.5))


@pytest.mark.parametrize("ridge", [0, -1.0, float("nan")])
def test_a_ridge_is_above_zero(ridge):
    A, documents = draw(2, 1, 3)
    assert_one_line_value_error(lambda: decorrelated(A, documents, ridge=ridge), "a ridge above 0")
