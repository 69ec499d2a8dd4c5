"""Losses and token-level measures: tensors → tensors, no model inside.

`N` rows, `S` positions, `V` vocabulary, `P` predicted answer tokens. A row is one document's questions packed side by
side (`hypernet.base.packed_rows`), so means per row are means per document.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TINY_ENERGY = 1e-9  # an untrained B has none at all
KEY_SHARPNESS = 20.0  # of key_contrast; cosines of unrelated directions are of the size of d**-0.5


def answer_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target token.

    Args:
        logits: [P, V]. targets: [P].

    Returns:
        [P], float32.
    """
    return F.cross_entropy(logits.float(), targets, reduction="none")


def context_distillation_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student) of each predicted token, in nats.

    Args:
        student_logits, teacher_logits: [P, V]; no gradient flows into the teacher.

    Returns:
        [P], float32.

    Source: Charakorn et al. 2026, Doc-to-LoRA, section 3, https://arxiv.org/abs/2602.15902
    """
    student = student_logits.float().log_softmax(-1)
    teacher = teacher_logits.detach().float().log_softmax(-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def context_distillation_kl_topk(student_logits: Tensor, indices: Tensor, log_probs: Tensor) -> Tensor:
    """KL(teacher || student) of each predicted token where only the teacher's k most likely tokens were stored.

    All other tokens together count as one more outcome, so that a student is not rewarded for moving probability to
    them. Of all teachers with these k probabilities this is the smallest KL; with k = V it is the KL itself.

    Args:
        student_logits: [P, V].
        indices, log_probs: the teacher's tokens, all different, and their log-probabilities, [P, k]. -inf marks what
            only fills up the k, whatever its index.

    Returns:
        [P], float32.
    """
    student, log_p = student_logits.float().log_softmax(-1), log_probs.detach().float()
    stored = log_p > -torch.inf
    # The first token is always a stored one: what fills up must not hide token 0 from the rest.
    indices = torch.where(stored, indices, indices[:, :1]).long()
    p = log_p.exp()
    top = torch.where(stored, p * (log_p.masked_fill(~stored, 0) - student.gather(-1, indices)), 0).sum(-1)
    # Summed up over the tokens themselves: 1 - sum(q) would cancel where the student is sure.
    in_top = torch.zeros_like(student, dtype=torch.bool).scatter_(-1, indices, True)
    log_rest_q = student.masked_fill(in_top, torch.finfo(student.dtype).min).logsumexp(-1)
    # Rounding of what was stored may leave a little less than nothing.
    rest_p = -torch.expm1(log_p.logsumexp(-1).clamp(max=0))
    rest = torch.xlogy(rest_p, rest_p) - rest_p * log_rest_q
    return top + torch.where(stored.sum(-1) < student.shape[-1], rest, 0)


def hidden_state_distance(student_states: Tensor, teacher_states: Tensor) -> Tensor:
    """Squared distance of each token's hidden state from the teacher's, in units of the teacher's squared length.

    Args:
        student_states, teacher_states: [P, D], after the same block; no gradient flows into the teacher.

    Returns:
        [P], float32; 0 where they agree, 1 for a student of zeros.
    """
    teacher = teacher_states.detach().float()
    return (student_states.float() - teacher).square().sum(-1) / teacher.square().sum(-1).clamp(min=1e-12)


def key_contrast(
    keys: Tensor, inputs: Tensor, owner: Tensor, chunk_counts: Sequence[int], *, chunk: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Whether documents' rows of A are told by their own questions, and questions by their own document's rows.

    A row of A is a key that a module's input is compared with, and distillation alone is slow to put into it which
    entity a question is about: while an adapter holds one entity, the relation tells enough. Here a document's score
    for a question is the log-sum-exp of 20 × the cosines between its rows and the question's input, less the mean input
    of all; for each question the documents are contrasted, and for each document its questions with all others.

    Args:
        keys: [C, R, d], A of one module for all chunks, document after document.
        inputs: [Q, d], what enters the module at answer tokens; no gradient flows into it.
        owner: [Q], the document that the question is about; -1: none of them.
        chunk_counts: chunks of each document, C altogether.
        chunk: [Q], of the C chunks the one that holds the answer, which is then the question's own, and its document's
            other chunks are contrasted with it; -1: unknown, and all of its document's are its own. None: all unknown.

    Returns:
        Cross-entropy of each question that has an owner among the documents (or chunks), and the same of each question
        among the questions, others of its document (or chunk) left out, both [number of owned questions], float32.
    """
    chunk = torch.full_like(owner, -1) if chunk is None else chunk
    inputs = inputs.detach().float()
    inputs = F.normalize(inputs - inputs.mean(0), dim=-1)
    rows = torch.einsum("crd,qd->cqr", F.normalize(keys.float(), dim=-1), inputs) * KEY_SHARPNESS
    of_chunks = rows.logsumexp(-1)  # [C, Q]
    of_documents = torch.stack([chunks.logsumexp(0) for chunks in of_chunks.split(list(chunk_counts))])
    owned = owner >= 0
    question = owned.nonzero()[:, 0]
    group = torch.where(chunk < 0, len(of_chunks) + owner, chunk)[owned]
    own = torch.cat([of_chunks, of_documents])[group]  # [owned, Q]
    by_document = of_chunks.logsumexp(0)[owned] - own[torch.arange(len(question), device=owner.device), question]
    sibling = (owner == owner[owned][:, None]) & (_alike(chunk, chunk[owned][:, None]))
    sibling[torch.arange(len(question), device=owner.device), question] = False
    by_question = F.cross_entropy(own.masked_fill(sibling, -torch.inf), question, reduction="none")
    return by_document, by_question


def key_energies(
    keys: Tensor, inputs: Tensor, owner: Tensor, chunk_counts: Sequence[int], *, chunk: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """How much of what rows of A answer with is about their own document, by squared products with the inputs.

    `key_contrast` asks for one good row among a document's and takes the mean input off; here every row counts, with
    all that it responds to.

    Args:
        As of `key_contrast`; inputs are taken at unit length.

    Returns:
        -log of the own document's (or chunk's) share of all energy, for each question that has an owner, [number of
        owned questions]; and -log of the share of each row's energy that goes to its own document's (or chunk's)
        questions, the mean over a document's rows (or those of its chunks that have questions), [documents]. Both
        float32.
    """
    inputs = F.normalize(inputs.detach().float(), dim=-1)
    energy = torch.einsum("crd,qd->crq", keys.float(), inputs).square()
    document = torch.repeat_interleave(torch.tensor(list(chunk_counts), device=owner.device))
    by_question = _own_share(energy.sum(1).T, owner, chunk_counts, chunk)
    is_own = document[:, None] == owner  # [C, Q]
    if chunk is not None:
        is_own = is_own & _alike(chunk, torch.arange(len(document), device=owner.device)[:, None])
    own = (energy * is_own[:, None]).sum(-1)
    of_row = -((own + TINY_ENERGY) / (energy.sum(-1) + TINY_ENERGY)).log().mean(1)
    counted = torch.ones_like(of_row) if chunk is None else is_own.any(1).to(of_row)
    sums = of_row.new_zeros(2, len(chunk_counts)).index_add(1, document, torch.stack([of_row * counted, counted]))
    return by_question, sums[0] / sums[1].clamp(min=1)


def energy_share(
    A: Tensor, B: Tensor, inputs: Tensor, owner: Tensor, chunk_counts: Sequence[int], *, chunk: Tensor | None = None
) -> Tensor:
    """Whether the adapter of the document that is asked about is the loudest of all at its questions.

    Args:
        A, B: [C, R, d_in] and [C, R, d_out] of one module for all chunks, document after document.
        inputs: [P, d_in], what enters the module; no gradient flows into it. owner, chunk_counts, chunk: as of
            `key_contrast`.

    Returns:
        -log of the own document's (or chunk's) share of the sum of all chunks' squared deltas, for each position that
        has an owner, [number of owned positions], float32.
    """
    return _own_share(_squared_deltas(A, B, inputs), owner, chunk_counts, chunk)


def _alike(a: Tensor, b: Tensor) -> Tensor:
    """Whether both are the same chunk, or might be."""
    return (a == b) | (a < 0) | (b < 0)


def _own_share(energy: Tensor, owner: Tensor, chunk_counts: Sequence[int], chunk: Tensor | None) -> Tensor:
    """[P, C] energy of every chunk → -log of the owner's share, [number of owned positions]."""
    owned = owner >= 0
    document = torch.repeat_interleave(torch.tensor(list(chunk_counts), device=owner.device))
    energy = energy[owned]
    per_document = energy.new_zeros(len(energy), len(chunk_counts)).index_add(1, document, energy) + TINY_ENERGY
    own = per_document.gather(1, owner[owned][:, None])[:, 0]
    if chunk is not None:
        chunk = chunk[owned]
        of_chunk = energy.gather(1, chunk.clamp(min=0)[:, None])[:, 0] + TINY_ENERGY
        own = torch.where(chunk < 0, own, of_chunk)
    return -(own / per_document.sum(1)).log()


def _squared_deltas(A: Tensor, B: Tensor, inputs: Tensor) -> Tensor:
    """[P, C]: the squared length of every chunk's delta at every position, without `scaling`."""
    A, B = A.float(), B.float()
    rows = torch.einsum("crd,pd->pcr", A, inputs.detach().float())
    # Without the delta itself, which would be as wide as the model for each pair of position and chunk.
    return torch.einsum("pcr,crs,pcs->pc", rows, B @ B.mT, rows).clamp(min=0)


def silence(
    A: Tensor, B: Tensor, inputs: Tensor, outputs: Tensor, owner: Tensor, chunk_counts: Sequence[int], *, scaling: float
) -> Tensor:
    """How loud chunks are where nothing is asked about their document: what joined adapters add to each other.

    Distillation with one adapter in force leaves open what it does to questions about other documents, and rows of A
    that tell by the relation alone do much. Here each position is weighed against all documents at once.

    Args:
        A, B: [C, R, d_in] and [C, R, d_out] of one module for all chunks, document after document.
        inputs, outputs: what enters the module and what it gives at each position, [P, d_in] and [P, d_out]; no
            gradient flows into them.
        owner: [P], the document that the position's question is about; -1: none of them.
        chunk_counts: chunks of each document, C altogether. scaling: factor on BA.

    Returns:
        [P], float32: the squared length of a chunk's delta in units of the output's, mean over all chunks but the
        owner's; 0 where there are no others.
    """
    squared, outputs = _squared_deltas(A, B, inputs), outputs.detach().float()
    document = torch.repeat_interleave(torch.tensor(list(chunk_counts), device=owner.device))
    others = document[None] != owner[:, None]
    mean = (squared * others).sum(1) / others.sum(1).clamp(min=1)
    return scaling**2 * mean / outputs.square().sum(-1).clamp(min=1e-12)


def mean_absolute_weight(weights: Sequence[Tensor], chunk_counts: Sequence[int]) -> Tensor:
    """L1 of each document's generated weights: the mean absolute entry of all its chunks' matrices.

    Args:
        weights: tensors [C, ...] of all chunks, document after document; padding of narrow layers counts as zeros.
        chunk_counts: chunks of each document, C altogether.

    Returns:
        [number of documents], float32.
    """
    size = sum(w[0].numel() for w in weights)
    per_chunk = sum(w.float().abs().flatten(1).sum(1) for w in weights) / size
    return torch.stack([chunks.mean() for chunks in per_chunk.split(list(chunk_counts))])


def mean_per_document(values: Tensor, document: Tensor, num_documents: int) -> Tensor:
    """Mean over documents of each document's mean, so that a document with many answer tokens counts like any other.

    Args:
        values: [P]. document: [P], which document each value belongs to, 0 to num_documents - 1.

    Returns:
        A scalar; documents without values are left out of the mean. 0 if there are no values at all.
    """
    total = values.new_zeros(num_documents).index_add(0, document, values)
    count = values.new_zeros(num_documents).index_add(0, document, torch.ones_like(values))
    present = count > 0
    return (total / count.clamp(min=1)).sum() / present.sum().clamp(min=1)


def answers_right(predicted: Tensor, targets: Tensor, answer: Tensor) -> Tensor:
    """Whether every token of an answer is the most likely one: the answers that greedy decoding would get right.

    Args:
        predicted, targets: [P] token ids. answer: [P], which answer each token belongs to; any integers.

    Returns:
        [number of distinct answers] bool, in the order of `answer`'s sorted distinct values.
    """
    _, group = answer.unique(return_inverse=True)
    right = torch.ones(int(group.max()) + 1 if len(group) else 0, dtype=torch.int8, device=answer.device)
    return right.scatter_reduce(0, group, (predicted == targets).to(torch.int8), "amin").bool()
