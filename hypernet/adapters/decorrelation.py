"""Joining chunks and documents so that none answers another's questions: a ridge regression over the rows of A.

    A = decorrelated(A, ridge=8.0)             # [n, R, d_in] → [n, R, d_in], the chunks of a document; B stays as it is
    A = decorrelated(A, documents, ridge=8.0)  # those of several documents, each as a whole; documents [n]

The delta of joined adapters is a linear associative memory: the rows of A are its keys, those of B its values, and what
is read for one chunk's question also reads, faintly, the rows of all others that look like its own. Their plain sum
adds these up with every chunk more. Here each chunk's rows are replaced by what answers its own rows as before and
those of the others as little as the ridge allows. Source of the idea: the optimal linear associative memory,
Kohonen and Ruohonen 1973, https://doi.org/10.1109/TC.1973.5009138
"""

import torch
from torch import Tensor

EPSILON = 1e-6  # length below which a row counts as zero, as in padding


def decorrelated(A: Tensor, documents: Tensor | None = None, *, ridge: float) -> Tensor:
    """The rows of A of several documents, or of several chunks of one, that are in force together.

    With K the rows at length 1, G = K Kᵀ and G_d the same without what stands between different documents, K becomes
    (G_d + ridge I) (G + ridge I)⁻¹ K, and the rows get their lengths back. So nothing changes for one document alone,
    for documents whose rows are orthogonal, and for an infinite ridge, which is the plain sum. At a ridge of 0 and with
    independent rows, an input made of one document's rows gives what that document alone gives, and nothing of the
    others.

    Args:
        A: [..., n, R, d], the rows of n chunks.
        documents: [n] or [..., n], the number of the document that each chunk is of; None: each chunk is told from all
            others. Chunks of padding are zero, whatever their number.
        ridge: above 0, in units of a row's squared length after it was brought to 1.

    Returns:
        As A, in its dtype, differentiable; computed in float32 at least. Its memory grows with n, but where documents
        has more axes than one with n².

    Raises:
        ValueError: the ridge is not above 0.
    """
    if not ridge > 0:
        raise ValueError(f"Expected a ridge above 0, got {ridge}. Leave decorrelation out for the plain sum.")
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
