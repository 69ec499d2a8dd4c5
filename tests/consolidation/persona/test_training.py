"""Training on lines: the loss and a step of DPO and SFT against float64 by hand."""

import math

import numpy as np
import pytest
import torch

from hypernet.consolidation.persona.character import PersonaLine
from hypernet.consolidation.persona.last_block import Factors, LastBlock
from hypernet.consolidation.persona.training import PersonaTraining
from hypernet.consolidation.self_instruct.preference import Preference

LINES = [
    PersonaLine("Do you like crowds?", "No, never.", "Yes"),
    PersonaLine("Do you read?", "Yes", "No"),
    PersonaLine("Why?", "Yes", "No"),
]


@pytest.fixture
def block(make_doc_to_lora):
    return LastBlock(make_doc_to_lora())


def test_dpo_loss_by_hand():
    # beta .5, margins (1 - 0) - (-1 - 0) = 2 and (0 - 1) - (0 - 0) = -1
    chosen, rejected = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.0])
    loss = Preference(beta=0.5)(chosen, rejected, torch.tensor([0.0, 1.0]), torch.zeros(2))
    assert float(loss) == pytest.approx((math.log(1 + math.exp(-1.0)) + math.log(1 + math.exp(0.5))) / 2)


def log_p_of(block, read, A, B):
    """log p of rows in numpy, float64, and its slope by x' = Aᵀ B's output: rows → (value, gradient of delta)."""
    weight = block._norm.weight.detach().double().numpy()
    eps = block._norm.variance_epsilon
    head = block._head.double().numpy()
    x, residual = read.inputs.double().numpy(), read.residual.double().numpy()
    h = residual + x @ A.T @ B
    rms = np.sqrt((h**2).mean(-1, keepdims=True) + eps)
    logits = (h / rms * weight) @ head.T
    logits -= logits.max(-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    tokens = log_p[np.arange(len(x)), read.targets.numpy()]
    slope = -np.exp(log_p)
    slope[np.arange(len(x)), read.targets.numpy()] += 1
    normed = slope @ head * weight
    width = h.shape[-1]
    grad_h = normed / rms - h * (normed * h).sum(-1, keepdims=True) / (width * rms**3)
    value = np.zeros(read.num_rows)
    np.add.at(value, read.row.numpy(), tokens)
    return value, grad_h


@pytest.mark.parametrize("beta", [None, 0.5])
def test_gradient_is_that_of_float64_by_hand(block, beta):
    read = block.read_lines(LINES)
    rng = np.random.default_rng(0)
    A, B = rng.normal(size=(2, block.place.d_in)), rng.normal(size=(2, block.place.d_out)) * 0.1
    lora = Factors(*(torch.tensor(one, dtype=torch.float32, requires_grad=True) for one in (A, B)))
    number = len(LINES)
    values = [log_p_of(block, one, A, B) for one in read]
    before = [log_p_of(block, one, A, 0 * B)[0] for one in read]
    if beta is None:
        loss = -block.log_p(read[0], lora).mean()
        shares = [np.full(number, -1 / number), np.zeros(number)]
        expected = -values[0][0].mean()
    else:
        plain = [block.log_p(one) for one in read]
        loss = Preference(beta=beta)(*(block.log_p(one, lora) for one in read), *plain)
        margin = (values[0][0] - before[0]) - (values[1][0] - before[1])
        expected = np.log1p(np.exp(-beta * margin)).mean()
        share = beta / (1 + np.exp(beta * margin)) / number
        shares = [-share, share]
    loss.backward()
    grad_A, grad_B = np.zeros_like(A), np.zeros_like(B)
    for one, (_, grad_h), share in zip(read, values, shares, strict=True):
        slope, x = grad_h * share[one.row.numpy()][:, None], one.inputs.double().numpy()
        grad_A += (slope @ B.T).T @ x
        grad_B += (x @ A.T).T @ slope
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert np.allclose(lora.A.grad.numpy(), grad_A, atol=1e-4 * np.abs(grad_A).max())
    assert np.allclose(lora.B.grad.numpy(), grad_B, atol=1e-4 * np.abs(grad_B).max())


@pytest.mark.parametrize("preference", [None, Preference(beta=1.0)])
def test_training_makes_lines_likelier(block, preference):
    read = block.read_lines(LINES)
    lora = PersonaTraining(preference=preference, steps=30, lr=1e-2, batch_size=3).train(block, read)
    before, after = ([block.log_p(one, own) for one in read] for own in (None, lora))
    rise = (after[0] - before[0]) - (0 if preference is None else after[1] - before[1])
    assert (rise > 0.1).all()
    again = PersonaTraining(preference=preference, steps=30, lr=1e-2, batch_size=3).train(block, read)
    assert all(torch.equal(one, other) for one, other in zip(lora, again, strict=True))


def test_short_answers_train_as_whole_log_likelihoods_do(block, monkeypatch):
    place, _, _ = block.told_apart("Yes", "No")
    reads = [one.rows([1, 2])._replace(**cut(one.rows([1, 2]), place)) for one in block.read_lines(LINES)]
    training = PersonaTraining(preference=Preference(beta=1.0), steps=3, batch_size=2)
    short = training.train(block, tuple(reads))
    reads[1] = reads[1]._replace(inputs=reads[1].inputs + 1e-7)
    whole = training.train(block, tuple(reads))
    assert all(torch.allclose(one, other, atol=1e-3) for one, other in zip(short, whole, strict=True))


def cut(read, place):
    """The fields of a reading of each row's token of this number."""
    where = torch.tensor([int((read.row == row).nonzero()[place]) for row in range(read.num_rows)])
    fields = {name: getattr(read, name)[where] for name in ("inputs", "residual", "targets")}
    return {**fields, "row": torch.arange(len(where))}


@pytest.mark.parametrize("changes", [{"steps": 0}, {"lr": 0.0}, {"rank": 0}, {"lr": math.inf}])
def test_impossible_numbers_are_refused(changes):
    with pytest.raises(ValueError, match="should be above 0"):
        PersonaTraining(**changes)
