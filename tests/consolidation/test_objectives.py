"""Each objective against the formula in float64 by loops, with the gradient by finite differences."""

import math

import pytest
import torch

from hypernet.consolidation.objectives import Deep, DistilledTokens, OnPolicy, Supervised, TeacherKL


@pytest.fixture
def tokens():
    torch.manual_seed(3)
    student = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    return DistilledTokens(
        student=student,
        teacher=torch.randn(3, 7, dtype=torch.float64),
        targets=torch.tensor([6, 0, 2]),
        student_hidden=hidden,
        teacher_hidden=torch.randn(2, 3, 5, dtype=torch.float64),
    )


def probabilities(row):
    total = sum(math.exp(value) for value in row)
    return [math.exp(value) / total for value in row]


def kl_by_loops(p_rows, q_rows):
    values = []
    for p_row, q_row in zip(p_rows.tolist(), q_rows.tolist(), strict=True):
        p, q = probabilities(p_row), probabilities(q_row)
        values.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    return sum(values) / len(values)


def hidden_by_loops(tokens):
    per_block = []
    for own, wanted in zip(tokens.student_hidden.tolist(), tokens.teacher_hidden.tolist(), strict=True):
        pairs = [(a, b) for x, y in zip(own, wanted, strict=True) for a, b in zip(x, y, strict=True)]
        per_block.append(sum((a - b) ** 2 for a, b in pairs) / sum(b**2 for _, b in pairs))
    return sum(per_block) / len(per_block)


def reference(objective, tokens):
    if isinstance(objective, Supervised):
        rows = zip(tokens.student.tolist(), tokens.targets.tolist(), strict=True)
        return sum(-math.log(probabilities(row)[target]) for row, target in rows) / len(tokens.targets)
    if isinstance(objective, OnPolicy):
        return kl_by_loops(tokens.student, tokens.teacher)
    found = kl_by_loops(tokens.teacher, tokens.student)
    return found + objective.weight * hidden_by_loops(tokens) if isinstance(objective, Deep) else found


@pytest.mark.parametrize("objective", [Supervised(), TeacherKL(), OnPolicy(), Deep(weight=0.7)], ids=lambda o: type(o))
def test_objective_is_its_formula_and_gradient(tokens, objective):
    loss = objective(tokens)
    assert loss.item() == pytest.approx(reference(objective, tokens), rel=1e-12)
    loss.backward()
    moved = [tokens.student] + ([tokens.student_hidden] if objective.needs_hidden else [])
    for tensor in moved:
        place = (1,) * tensor.ndim
        gradient = tensor.grad[place].item()
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                tensor[place] += step
                values.append(reference(objective, tokens))
                tensor[place] -= step
        assert gradient == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-9)


def test_objective_without_a_difference_is_zero(tokens):
    same = DistilledTokens(tokens.student, tokens.student, tokens.targets, tokens.student_hidden, tokens.student_hidden)
    assert [objective(same).item() for objective in (TeacherKL(), OnPolicy(), Deep())] == [0, 0, 0]


def test_negative_weight_is_refused():
    with pytest.raises(ValueError, match="weight is -1. Give a number from 0 on."):
        Deep(weight=-1)
