"""Closeness: whether a question is about what an adapter holds, from what its tokens find there.

judge = Closeness(num_layers=10, key_dim=256)
common = judge.common(unit)                        # [Q, S, L, K] -> [Q, S, 2]
judge(best, weight, common)                        # [Q, S, C], [Q, S], [Q, S, 2] -> [Q], log-odds
fit_closeness(judge, [FoundByStep(best, weight, unit, row, chunk_counts), ...])    # of training steps
bound_of(near, far)                                # from which log-odds on a question is about the adapter
"""

import random
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_POWER = 1.5  # of a question token's match: one that only this chunk answers counts for more than several that many do
_TOKEN, _WHOLE = 8, 6  # numbers of a token's evidence, and of a question's
_RIDGE = 10.0  # tokens' worth; between 1 and 100 held-out questions are fitted within .01 of R²
_TOGETHER = (1, 1, 2, 4, 8)  # documents in the adapter that is asked
_OTHERS = 3  # adapters without the question's document for one with it
_ABOUT_NONE = 8  # of a step's questions about no document, asked of each adapter
_CUT = 0.5  # of the other documents: to a run of their chunks, so that an adapter of a sentence or two is known as well
_WARMUP, _OWN, _LR = 50, 96, 3e-3
# Share of questions about other documents that may use a chunk. On held-out ones .97 of questions about paragraphs
# and .80 about notes are kept there; questions of no document at all are taken a third as often (.011 by paragraphs).
MOST_TAKEN = 0.03


class Closeness(nn.Module):
    """Log-odds that a question is about one of the chunks and not about something else.

    A token counts by what it finds here beyond what it would find in any document: "the" has a near key everywhere, a
    name that stands nowhere in the document has none. μ and σ, the mean and the standard deviation of its best cosine
    in other documents, are linear in the token's whitened input (R² .93 and .87 on held-out questions). Then

        h_s = MLP(b_s, its mean over the chunks, that of the two chunks found, log w_s, μ_s, σ_s, (b_s - μ_s) / σ_s),
        logit = MLP(Σ softmax(a(h)) v(h), mean v'(h), the question as a whole),

    with b_s the best cosine of all chunks. All numbers are in units of the deviation that they have over the questions
    by which `fit_closeness` fits this. It sees no word, only how well words are found, so that it
    does not learn the subjects or the style of the questions.

    Args:
        num_layers, key_dim: L, K, of the whitened inputs.
        hidden: width of the two MLPs.
    """

    def __init__(self, *, num_layers: int, key_dim: int, hidden: int = 32) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"hidden should be at least 1, got {hidden}.")
        self.common_weight: Tensor
        self.common_bias: Tensor
        self.token_scale: Tensor
        self.whole_scale: Tensor
        self.register_buffer("common_weight", torch.zeros(num_layers, key_dim, 2))
        self.register_buffer("common_bias", torch.tensor([0.0, 1.0]))
        self.register_buffer("token_scale", torch.tensor([[0.0], [1.0]]).repeat(1, _TOKEN))  # mean, deviation
        self.register_buffer("whole_scale", torch.tensor([[0.0], [1.0]]).repeat(1, _WHOLE))
        self.read = nn.Sequential(nn.Linear(_TOKEN, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU())
        self.attend = nn.Linear(hidden, 2)
        self.say = nn.Linear(hidden, 4)
        self.judge = nn.Sequential(nn.Linear(4 + _WHOLE, hidden), nn.GELU(), nn.Linear(hidden, 1))

    def common(self, unit: Tensor) -> Tensor:
        """μ and σ of each token, [Q, S, 2], of its whitened inputs [Q, S, L, K], each layer's of unit length."""
        found = torch.einsum("qslk, lkn -> qsn", unit, self.common_weight) + self.common_bias
        return torch.cat([found[..., :1], found[..., 1:].clamp(min=0.02)], dim=-1)

    def forward(self, best: Tensor, weight: Tensor, common: Tensor) -> Tensor:
        """[Q] of best cosines [Q, S, C], weights [Q, S], 0 of what is not the question's own, and μ, σ [Q, S, 2]."""
        return self.judged(*evidence(best, weight, common), weight > 0)

    def judged(self, tokens: Tensor, whole: Tensor, asked: Tensor) -> Tensor:
        """[Q] of `evidence`, [Q, S, 8] and [Q, 6], and of which tokens are the question's own, [Q, S] bool."""
        h = self.read((tokens - self.token_scale[0]) / self.token_scale[1])
        own = asked[..., None]
        attention = self.attend(h).masked_fill(~own, -1e4).softmax(1)
        first, second = self.say(h).chunk(2, dim=-1)
        means = (second * own).sum(1) / own.sum(1).clamp(min=1)
        whole = (whole - self.whole_scale[0]) / self.whole_scale[1]
        logit: Tensor = self.judge(torch.cat([(attention * first).sum(1), means, whole], dim=-1))[:, 0]
        return logit


def scores(best: Tensor, weight: Tensor) -> Tensor:
    """[Q, C] of best cosines [Q, S, C] and weights [Q, S]: what all chunks have in common, the mean over them, is taken
    off where there are several, and the rest added up to the power 1.5."""
    if best.shape[-1] > 1:
        # Not 0: the power has no slope there.
        best = (best - best.mean(-1, keepdim=True)).clamp(min=1e-4)
    return (best.pow(_POWER) * weight[..., None]).sum(1)


def mean_closeness(best: Tensor, weight: Tensor) -> Tensor:
    """[Q] of best cosines [Q, S, C] and weights [Q, S]: the weighted mean over the tokens of the highest of all."""
    return (best.amax(-1) * weight).sum(1) / weight.sum(1).clamp(min=1e-6)


def evidence(best: Tensor, weight: Tensor, common: Tensor) -> tuple[Tensor, Tensor]:
    """What `Closeness` reads of each token, [Q, S, 8], and of the question as a whole, [Q, 6]; shapes as there."""
    found = scores(best, weight)
    means = (best * weight[..., None]).sum(1) / weight.sum(1, keepdim=True).clamp(min=1e-6)  # [Q, C]
    top = best.amax(-1)

    def of_chunk(which: Tensor) -> Tensor:
        return best.gather(-1, which[:, None, None].expand(-1, best.shape[1], 1))[..., 0]

    mean, deviation = common.unbind(-1)
    tokens = [top, best.mean(-1), of_chunk(found.argmax(-1)), of_chunk(means.argmax(-1))]
    tokens += [weight.clamp(min=1e-6).log(), mean, deviation, ((top - mean) / deviation).clamp(-16, 16)]
    second = found.topk(min(2, found.shape[-1]), dim=-1).values
    asked = weight > 0
    whole = [mean_closeness(best, weight), means.amax(-1), second[:, 0].log1p(), second[:, -1].log1p()]
    whole += [asked.sum(1).clamp(min=1).log(), torch.full_like(top[:, 0], best.shape[-1]).log()]
    return torch.where(asked[..., None], torch.stack(tokens, -1), 0.0), torch.stack(whole, -1)


class FoundByStep(NamedTuple):
    """A step's questions beside all of its chunks. best [Q, S, C], weight [Q, S], unit [Q, S, L, K] as of `Recitation`;
    row [Q]: the document that each is about, -1 for none; chunk_counts: of the documents, C altogether."""

    best: Tensor
    weight: Tensor
    unit: Tensor
    row: Tensor
    chunk_counts: Sequence[int]

    def documents(self) -> list[slice]:
        return [slice(i, j) for i, j in pairwise([0, *accumulate(self.chunk_counts)])]


@torch.no_grad()
def fit_closeness(judge: Closeness, asked: Sequence[FoundByStep], *, seed: int = 0, steps: int = 1500) -> None:
    """Fits μ and σ by ridge regression, then the rest by the log-loss of own and other documents, weighed equally.

    Args:
        asked: of some hundred questions or more.
        steps: of AdamW, for the log-loss.

    Raises:
        ValueError: no step has two documents with questions.
    """
    asked = [one for one in asked if len(one.chunk_counts) > 1 and len(one.row)]
    if not asked:
        raise ValueError("Closeness is fitted to questions beside several documents, got none.")
    _fit_common(judge, asked)
    rng = random.Random(seed)
    rows = [_examples(judge, one, rng) for one in asked]
    longest = max(tokens.shape[1] for tokens, *_ in rows)
    tokens = torch.cat([F.pad(t, (0, 0, 0, longest - t.shape[1])) for t, *_ in rows])
    own_tokens = torch.cat([F.pad(m, (0, longest - m.shape[1])) for _, _, m, _ in rows])
    whole = torch.cat([w for _, w, _, _ in rows])
    is_own = torch.cat([y for *_, y in rows])
    for scale, values in ((judge.token_scale, tokens[own_tokens]), (judge.whole_scale, whole)):
        scale.copy_(torch.stack([values.mean(0), values.std(0).clamp(min=1e-3)]))
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in judge.modules():
            if isinstance(module, torch.nn.Linear):
                module.reset_parameters()
        judge.requires_grad_()
        optimizer = torch.optim.AdamW(judge.parameters(), _LR, weight_decay=0.05)
        groups = [(is_own == value).nonzero()[:, 0] for value in (True, False)]
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = _LR * min(1, (step + 1) / _WARMUP) * (1 - step / steps)
            losses = []
            for group, size in zip(groups, (_OWN, _OTHERS * _OWN), strict=True):
                some = group[torch.randint(len(group), (size,))].to(tokens.device)
                logits = judge.judged(tokens[some], whole[some], own_tokens[some])
                losses.append(F.binary_cross_entropy_with_logits(logits, is_own[some].to(logits)))
            optimizer.zero_grad()
            torch.stack(losses).mean().backward()
            optimizer.step()
        judge.requires_grad_(False)


def _fit_common(judge: Closeness, asked: Sequence[FoundByStep]) -> None:
    """μ and σ: what a token finds in any document, by the step's other ones, from its whitened input."""
    size = judge.common_weight[..., 0].numel() + 1
    device = judge.common_weight.device
    gram = torch.zeros(size, size, dtype=torch.float64, device=device)
    moment = torch.zeros(size, 2, dtype=torch.float64, device=device)
    for one in asked:
        per_document = torch.stack(
            [one.best[..., own].amax(-1) for own in one.documents()], dim=-1
        )  # [Q, S, documents]
        others = torch.arange(per_document.shape[-1], device=one.row.device) != one.row[:, None]
        counts = others.sum(1)[:, None]
        mean = (per_document * others[:, None]).sum(-1) / counts
        spread = ((per_document - mean[..., None]) * others[:, None]).square().sum(-1) / (counts - 1).clamp(min=1)
        own = one.weight > 0
        x = one.unit.float()[own].flatten(1)
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1).double()
        gram += x.mT @ x
        moment += x.mT @ torch.stack([mean, spread.sqrt()], -1)[own].double()
    penalty = torch.full((size,), _RIDGE, dtype=torch.float64, device=device)
    penalty[-1] = 0  # of the bias
    solved = torch.linalg.solve(gram + penalty.diag() + 1e-6 * torch.eye(size, device=device), moment)
    judge.common_weight.copy_(solved[:-1].view_as(judge.common_weight))
    judge.common_bias.copy_(solved[-1])


def _examples(judge: Closeness, one: FoundByStep, rng: random.Random) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`evidence` of each question beside adapters of one to eight documents with its own among them, and without:
    [N, S, 8], [N, 6], asked [N, S] and whether its own is there, [N]."""
    documents, common = one.documents(), judge.common(one.unit.float())
    found = []
    for row in one.row.unique().tolist():
        asked = (one.row == row).nonzero()[:, 0]
        others = [place for place in range(len(documents)) if place != row]
        for is_own, repeats in ((True, 1), (False, _OTHERS)):
            for number in _TOGETHER * repeats if row >= 0 or not is_own else ():
                drawn = [_cut(documents[place], rng) for place in rng.sample(others, min(number - is_own, len(others)))]
                drawn += [documents[row]] * is_own
                some = asked if row >= 0 else asked[rng.sample(range(len(asked)), min(_ABOUT_NONE, len(asked)))]
                best = torch.cat([one.best[some][..., chunks] for chunks in drawn], dim=-1)
                seen = evidence(best, one.weight[some], common[some])
                found.append((*seen, one.weight[some] > 0, torch.full((len(some),), is_own)))
    tokens, whole, asked_of, owned = (torch.cat(part) for part in zip(*found, strict=True))
    return tokens, whole, asked_of, owned


def _cut(chunks: slice, rng: random.Random) -> slice:
    if rng.random() >= _CUT:
        return chunks
    length = rng.randint(1, chunks.stop - chunks.start)
    start = rng.randint(chunks.start, chunks.stop - length)
    return slice(start, start + length)


def bound_of(near: Tensor, far: Tensor, most_taken: float = MOST_TAKEN) -> Tensor:
    """The least log-odds from which on a question uses a chunk: `most_taken` of those with another document do.

    Args:
        near, far: log-odds of questions with their own documents and with others.
    """
    bounds = torch.cat([near, far]).sort().values
    taken = (far >= bounds[:, None]).float().mean(1)
    allowed = bounds[taken <= most_taken]
    return allowed[0] if len(allowed) else bounds[-1]
