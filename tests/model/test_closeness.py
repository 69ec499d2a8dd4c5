"""Closeness against the formula in float64, token by token, at odd sizes; its fit against NumPy; the bound."""

import math
import random
from collections import Counter

import numpy
import pytest
import torch

from hypernet.model.closeness import (
    Closeness,
    FoundByStep,
    _cut,
    _examples,
    bound_of,
    evidence,
    fit_closeness,
    mean_closeness,
    scores,
)

QUESTIONS, TOKENS, CHUNKS, LAYERS, KEY_DIM = 3, 5, 4, 2, 7
FIT_LAYERS, FIT_KEY_DIM = 2, 5


@pytest.fixture
def found():
    generator = torch.Generator().manual_seed(3)
    best = torch.rand(QUESTIONS, TOKENS, CHUNKS, generator=generator)
    weight = torch.rand(QUESTIONS, TOKENS, generator=generator) + 0.5
    weight[0, 3:] = weight[2, 0] = 0  # tokens that are not the question's own
    unit = torch.nn.functional.normalize(torch.randn(QUESTIONS, TOKENS, LAYERS, KEY_DIM, generator=generator), dim=-1)
    return best, weight, unit


def judge() -> Closeness:
    torch.manual_seed(1)
    result = Closeness(num_layers=LAYERS, key_dim=KEY_DIM, hidden=6)
    result.common_weight.normal_(std=0.1)
    result.common_bias.copy_(torch.tensor([0.3, 0.2]))
    result.token_scale[0].uniform_(), result.token_scale[1].uniform_(0.5, 2)
    result.whole_scale[0].uniform_(), result.whole_scale[1].uniform_(0.5, 2)
    return result.double()


def evidence_by_hand(best, weight, common):
    """One question: best [S, C], weight [S], common [S, 2] -> rows of own tokens, and the question's numbers."""
    own = [s for s in range(len(weight)) if weight[s] > 0]
    chunks = range(best.shape[1])
    score = [sum(weight[s] * max(best[s, c] - best[s].mean(), 1e-4) ** 1.5 for s in own) for c in chunks]
    mean = [sum(weight[s] * best[s, c] for s in own) / sum(weight[s] for s in own) for c in chunks]
    by_score, by_mean = max(chunks, key=lambda c: score[c]), max(chunks, key=lambda c: mean[c])
    rows = []
    for s in own:
        top, (mu, sigma) = best[s].max(), common[s]
        rows.append([top, best[s].mean(), best[s, by_score], best[s, by_mean], weight[s].log(), mu, sigma])
        rows[-1].append((top - mu) / sigma)
    close = sum(weight[s] * best[s].max() for s in own) / sum(weight[s] for s in own)
    first, second = sorted(score, reverse=True)[:2]
    whole = [close, max(mean), math.log1p(first), math.log1p(second), math.log(len(own)), math.log(best.shape[1])]
    return torch.tensor(rows), torch.tensor(whole)


def test_evidence_is_that_of_the_formula(found):
    best, weight, unit = (x.double() for x in found)
    common = judge().common(unit)
    tokens, whole = evidence(best, weight, common)
    for q in range(QUESTIONS):
        rows, numbers = evidence_by_hand(best[q], weight[q], common[q])
        torch.testing.assert_close(tokens[q][weight[q] > 0], rows.double(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(whole[q], numbers.double(), rtol=1e-5, atol=1e-6)


def test_log_odds_are_those_of_the_formula(found):
    best, weight, unit = (x.double() for x in found)
    module = judge()
    common = module.common(unit)
    got = module(best, weight, common)
    for q in range(QUESTIONS):
        rows, whole = evidence_by_hand(best[q], weight[q], common[q])
        rows = (rows.double() - module.token_scale[0]) / module.token_scale[1]
        whole = (whole.double() - module.whole_scale[0]) / module.whole_scale[1]
        h = [module.read(row) for row in rows]
        a = torch.stack([module.attend(one) for one in h]).softmax(0)
        v = torch.stack([module.say(one) for one in h])
        pooled = torch.cat([(a * v[:, :2]).sum(0), v[:, 2:].mean(0), whole])
        torch.testing.assert_close(got[q], module.judge(pooled)[0], rtol=1e-5, atol=1e-6)


def test_what_is_not_the_questions_own_changes_nothing(found):
    best, weight, unit = (x.double() for x in found)
    module = judge()
    before = module(best, weight, module.common(unit))
    best[weight == 0], unit[weight == 0] = 0.9, 5.0
    torch.testing.assert_close(module(best, weight, module.common(unit)), before)


def test_order_of_the_chunks_changes_nothing(found):
    best, weight, unit = (x.double() for x in found)
    module = judge()
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(
        module(best[..., order], weight, module.common(unit)), module(best, weight, module.common(unit))
    )


def test_one_chunk_has_scores_and_evidence(found):
    best, weight, unit = found
    module = judge().float()
    assert module(best[..., :1], weight, module.common(unit)).isfinite().all()
    assert scores(best[..., :1], weight).shape == (QUESTIONS, 1)
    want = (best[..., 0] * weight).sum(1) / weight.sum(1)
    torch.testing.assert_close(mean_closeness(best[..., :1], weight), want)


def test_deviation_stays_above_a_least_one():
    module = Closeness(num_layers=LAYERS, key_dim=KEY_DIM)
    module.common_bias.copy_(torch.tensor([0.3, -1.0]))
    assert module.common(torch.zeros(1, 1, LAYERS, KEY_DIM)).tolist() == [[[pytest.approx(0.3), pytest.approx(0.02)]]]


def test_hidden_below_one_is_refused():
    with pytest.raises(ValueError, match="hidden should be at least 1, got 0"):
        Closeness(num_layers=1, key_dim=1, hidden=0)


# The fit

COUNTS = (2, 3, 1)


def steps(number: int, seed: int = 0, *, own: float = 0.5) -> list[FoundByStep]:
    """Questions of six tokens; of those that are about a document two tokens find more there."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(number):
        row = torch.arange(len(COUNTS)).repeat_interleave(4)
        unit = torch.nn.functional.normalize(
            torch.randn(len(row), 6, FIT_LAYERS, FIT_KEY_DIM, generator=generator), dim=-1
        )
        best = 0.3 + 0.1 * torch.rand(len(row), 6, sum(COUNTS), generator=generator) + 0.2 * unit[:, :, 0, :1]
        start = 0
        for document, count in enumerate(COUNTS):
            best[row == document, :2, start : start + count] += own
            start += count
        weight = torch.rand(len(row), 6, generator=generator) + 0.5
        weight[::3, 5] = 0
        found.append(FoundByStep(best.clamp(min=0), weight, unit, row, COUNTS))
    return found


def judged(judge: Closeness, one: FoundByStep, document: int) -> torch.Tensor:
    best = one.best[..., one.documents()[document]]
    return judge(best, one.weight, judge.common(one.unit))


def test_questions_about_a_document_are_told_from_others():
    judge = Closeness(num_layers=FIT_LAYERS, key_dim=FIT_KEY_DIM, hidden=8)
    fit_closeness(judge, steps(12), seed=0, steps=200)
    (new,) = steps(1, seed=9)
    own = torch.cat([judged(judge, new, d)[new.row == d] for d in range(3)])
    other = torch.cat([judged(judge, new, d)[new.row != d] for d in range(3)])
    assert own.min() > 0 > other.max()
    assert not any(parameter.requires_grad for parameter in judge.parameters())


def test_nothing_is_told_apart_where_there_is_no_difference():
    judge = Closeness(num_layers=FIT_LAYERS, key_dim=FIT_KEY_DIM, hidden=8)
    fit_closeness(judge, steps(12, own=0.0), seed=0, steps=200)
    new = steps(20, seed=9, own=0.0)
    own = torch.cat([judged(judge, one, d)[one.row == d] for one in new for d in range(3)])
    other = torch.cat([judged(judge, one, d)[one.row != d] for one in new for d in range(3)])
    assert abs((own[:, None] > other).float().mean().item() - 0.5) < 0.1


def about_none(one: FoundByStep) -> FoundByStep:
    """The step's questions without what they found more in their own documents, and about none of them."""
    return one._replace(best=one.best.clamp(max=0.5), row=torch.full_like(one.row, -1))


def test_questions_about_no_document_are_never_own_examples():
    judge = Closeness(num_layers=FIT_LAYERS, key_dim=FIT_KEY_DIM)
    (one,) = steps(1)
    tokens, whole, asked, is_own = _examples(judge, about_none(one), random.Random(0))
    assert not is_own.any() and len(tokens) == len(whole) == len(asked) == len(is_own) == 8 * 3 * 5
    *_, is_own = _examples(judge, one, random.Random(0))
    assert is_own.float().mean() == 0.25


def test_questions_about_no_document_are_told_from_a_documents():
    judge = Closeness(num_layers=FIT_LAYERS, key_dim=FIT_KEY_DIM, hidden=8)
    asked = steps(12)
    fit_closeness(judge, [*asked, *map(about_none, asked)], seed=0, steps=200)
    (new,) = steps(1, seed=9)
    none = torch.cat([judged(judge, about_none(new), d) for d in range(3)])
    own = torch.cat([judged(judge, new, d)[new.row == d] for d in range(3)])
    assert (own[:, None] > none).float().mean() > 0.98
    assert own.mean() > 2 and none.mean() < -2


def test_other_documents_are_cut_to_runs_of_their_chunks():
    rng, chunks, runs = random.Random(0), slice(3, 8), Counter()
    for _ in range(4000):
        cut = _cut(chunks, rng)
        runs[cut.start, cut.stop] += 1
    assert set(runs) == {(i, j) for i in range(3, 8) for j in range(i + 1, 9)}
    assert 0.5 < runs[3, 8] / 4000 < 0.7  # left whole, or cut to its whole length


def test_what_any_document_has_is_the_ridge_regression():
    judge = Closeness(num_layers=FIT_LAYERS, key_dim=FIT_KEY_DIM, hidden=4)
    asked = steps(3)
    fit_closeness(judge, asked, seed=0, steps=1)
    x, y = [], []
    for one in asked:
        for q in range(len(one.row)):
            for s in range(6):
                if one.weight[q, s] > 0:
                    ends = one.documents()
                    others = [one.best[q, s, ends[d]].max().item() for d in range(3) if d != one.row[q]]
                    x.append([*one.unit[q, s].flatten().tolist(), 1.0])
                    y.append([numpy.mean(others), numpy.std(others, ddof=1)])
    x, y = numpy.array(x), numpy.array(y)
    penalty = numpy.diag([10.0] * (FIT_LAYERS * FIT_KEY_DIM) + [0.0])
    want = numpy.linalg.solve(x.T @ x + penalty, x.T @ y)
    got = torch.cat([judge.common_weight.view(-1, 2), judge.common_bias[None]]).double().numpy()
    numpy.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)


def test_the_same_seed_fits_the_same():
    found = []
    for _ in range(2):
        judge = Closeness(num_layers=FIT_LAYERS, key_dim=FIT_KEY_DIM, hidden=4)
        fit_closeness(judge, steps(4), seed=3, steps=20)
        found.append(judge.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_no_other_document_is_refused():
    one = steps(1)[0]
    alone = FoundByStep(one.best[:4, :, :2], one.weight[:4], one.unit[:4], one.row[:4], (2,))
    with pytest.raises(ValueError, match="questions beside several documents, got none"):
        fit_closeness(Closeness(num_layers=FIT_LAYERS, key_dim=FIT_KEY_DIM), [alone])


@pytest.mark.parametrize(
    ("near", "far", "share", "bound"),
    [
        ([3.0, 4.0, 5.0], [0.0, 1.0], 0.0, 3.0),
        ([3.0, 4.0, 5.0], [0.0, 1.0, 3.5, 2.0], 0.25, 3.0),
        ([3.0, 4.0, 5.0], [0.0, 1.0, 3.5, 2.0], 0.0, 4.0),
        ([0.0], [1.0, 2.0], 0.0, 2.0),
    ],
)
def test_bound_takes_at_most_that_share_of_others(near, far, share, bound):
    assert bound_of(torch.tensor(near), torch.tensor(far), share).item() == bound
