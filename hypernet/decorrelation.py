"""Joining documents so that one does not answer the other's questions: a ridge regression over the rows of A.

    A = decorrelated(A, documents, ridge=2.0)     # [n, R, d_in], [n] → [n, R, d_in]; B stays as it is

The delta of joined adapters is a linear associative memory: the rows of A are its keys, those of B its values, and what
is read for one document's question also reads, faintly, the rows of all others that look like its own. Their plain sum
adds these up with every document more. Here each document's rows are replaced by what answers its own rows as before
and those of the others as little as the ridge allows. Source of the idea: the optimal linear associative memory,
Kohonen and Ruohonen 1973, https://doi.org/10.1109/TC.1973.5009138
"""

import torch
from torch import Tensor

EPSILON = 1e-6  # length below which a row counts as zero, as in padding


def decorrelated(A: Tensor, documents: Tensor, *, ridge: float) -> Tensor:
    """The rows of A of several documents that are in force together.

    With K the rows at length 1, G = K Kᵀ and G_d the same without what stands between different documents, K becomes
    (G_d + ridge I) (G + ridge I)⁻¹ K, and the rows get their lengths back. So nothing changes for one document alone,
    for documents whose rows are orthogonal, and for an infinite ridge, which is the plain sum. At a ridge of 0 and with
    independent rows, an input made of one document's rows gives what that document alone gives, and nothing of the
    others.

    Args:
        A: [..., n, R, d], the rows of n chunks.
        documents: [..., n], the number of the document that each chunk is of. Chunks of padding are zero, whatever
            their number.
        ridge: above 0, in units of a row's squared length after it was brought to 1.

    Returns:
        As A, in its dtype, differentiable; computed in float32 at least.

    Raises:
        ValueError: the ridge is not above 0.
    """
    if not ridge > 0:
        raise ValueError(f"Expected a ridge above 0, got {ridge}. Leave decorrelation out for the plain sum.")
    num_chunks, rank, width = A.shape[-3:]
    with torch.autocast(A.device.type, enabled=False):
        rows = A.flatten(-3, -2)
        rows = rows if rows.dtype == torch.float64 else rows.float()
        length = (rows.square().sum(-1, keepdim=True) + EPSILON**2).sqrt()
        unit = rows / length
        gram = unit @ unit.mT
        of = documents.repeat_interleave(rank, dim=-1)
        own = gram * (of[..., :, None] == of[..., None, :])
        size = num_chunks * rank
        if size <= width:
            solved = torch.cholesky_solve(unit, torch.linalg.cholesky(_plus(gram, ridge)))
        else:  # (K Kᵀ + r I)⁻¹ K = K (Kᵀ K + r I)⁻¹, and the smaller of the two is solved
            factor = torch.linalg.cholesky(_plus(unit.mT @ unit, ridge))
            solved = torch.cholesky_solve(unit.mT, factor).mT
        mixed = own @ solved + ridge * solved
    return (length * mixed).to(A.dtype).unflatten(-2, (num_chunks, rank))


def _plus(matrix: Tensor, ridge: float) -> Tensor:
    return matrix + ridge * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
