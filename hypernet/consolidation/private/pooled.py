"""PooledConsolidator: what many users have in common becomes weights, with a bound on what they tell of any one user.

pooled = PooledConsolidator(epsilon=4.0, delta=1e-3, mechanism="dp_sgd")
trained = pooled.train(model, {"alice": lessons_of_alice, "bob": lessons_of_bob, ...})
trained.weights, trained.epsilon, trained.noise

In each round every user in it computes a gradient on some of its lessons, which is clipped as a whole, so that nobody
counts more than `clip`; the clipped ones are summed, the server seeing the sum alone; Gaussian noise is added; and the
weights go one step. The unit of privacy is a user with all that it ever said.

dp_sgd     users of a round are drawn anew, each with `sampling_rate`; noise of each round by itself
dp_ftrl    users take turns, a round's share of them at a time; a tree's noise, which needs no sampling

Source: users instead of examples: McMahan et al. 2018, https://arxiv.org/abs/1710.06963, with its fixed denominator
"""

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hypernet.base.packed_rows import Segment, pack_row, pad_rows
from hypernet.consolidation.consolidator import Lesson
from hypernet.consolidation.private.accounting import Accountant, RenyiAccountant, Spending, noise_for, tree_sensitivity
from hypernet.consolidation.private.gradients import Reading, UserGradients
from hypernet.consolidation.private.noise import IndependentNoise, TreeNoise
from hypernet.consolidation.private.secure_sum import SecureSum
from hypernet.consolidation.weights import MovedWeights
from hypernet.doc_to_lora import DocToLoRA
from hypernet.text.tokens import framed_ids

MECHANISMS = ("dp_sgd", "dp_ftrl")
_BATCH = 64  # rows read at once


@dataclass(frozen=True)
class Pooled:
    """What came out.

    Attributes:
        theta: what was trained, see `UserGradients`; weights: with it.
        epsilon: by the accountant, of all users at `delta`; inf without noise.
        spending: what was accounted for; None without noise.
        noise: standard deviation of a number's noise in a round or a node, in clips.
        clipped: share of the gradients that were longer than the clip. losses: mean of a round, in nats a token.
    """

    weights: MovedWeights
    theta: Tensor
    epsilon: float
    delta: float
    spending: Spending | None
    noise: float
    clipped: float
    losses: list[float]
    seconds: float


class PooledConsolidator:
    """Trains on the lessons of many users.

    Args:
        epsilon: bound; inf adds no noise, and clips all the same. delta: below 1 / users.
        mechanism: see the module.
        clip: longest gradient of a user.
        rounds: of training. sampling_rate: of a round, the share of the users that is in it.
        lessons_per_user: of a round, drawn from a user's.
        lr, momentum: of the step, theta -= lr v, v = momentum v + (noisy sum) / (sampling_rate * users).
        rank: of what moves, see `UserGradients`.
        accountant: bounds epsilon; None: `RenyiAccountant`.
        secure: sums by `SecureSum`.
        seed: of all that is drawn.

    Raises:
        ValueError: an unknown mechanism, or a number that cannot be.
    """

    def __init__(
        self,
        *,
        epsilon: float = 8.0,
        delta: float = 1e-3,
        mechanism: str = "dp_sgd",
        clip: float = 1.0,
        rounds: int = 60,
        sampling_rate: float = 0.25,
        lessons_per_user: int = 2,
        lr: float = 1.0,
        momentum: float = 0.9,
        rank: int = 32,
        accountant: Accountant | None = None,
        secure: bool = True,
        seed: int = 0,
    ) -> None:
        if mechanism not in MECHANISMS:
            raise ValueError(f"mechanism is {mechanism!r}. Choose {' or '.join(MECHANISMS)}.")
        if not epsilon > 0 or not 0 < delta < 1:
            raise ValueError(f"epsilon is {epsilon} and delta {delta}. Give one above 0, and one between 0 and 1.")
        if not 0 < clip < math.inf or not 0 < lr < math.inf or not 0 <= momentum < 1:
            raise ValueError(f"clip {clip} and lr {lr} must be above 0 and finite, momentum {momentum} in [0, 1).")
        if rounds < 1 or lessons_per_user < 1 or not 0 < sampling_rate <= 1:
            raise ValueError(
                f"Give at least 1 round and lesson and a sampling rate in (0, 1], not {rounds}, {lessons_per_user} and "
                f"{sampling_rate}."
            )
        self.epsilon, self.delta, self.mechanism, self.clip = epsilon, delta, mechanism, clip
        self.rounds, self.sampling_rate, self.lessons_per_user = rounds, sampling_rate, lessons_per_user
        self.lr, self.momentum, self.rank = lr, momentum, rank
        self.accountant, self.secure, self.seed = accountant or RenyiAccountant(), secure, seed

    def train(self, model: DocToLoRA, users: Mapping[str, Sequence[Lesson]]) -> Pooled:
        """Weights from the lessons of all users, of which every one needs a question and an answer.

        Raises:
            ValueError: there are no users, one has no lesson, or delta is not below 1 / users.
        """
        started = time.perf_counter()
        if not users or not all(users.values()):
            raise ValueError(f"Pooling needs users with a lesson each; there are {len(users)}. Leave others out.")
        if self.epsilon < math.inf and self.delta * len(users) >= 1:
            raise ValueError(f"delta is {self.delta} for {len(users)} users. Give one below {1 / len(users):.1e}.")
        names = sorted(users)
        schedule = self.schedule(len(names))
        noise = 0.0 if self.epsilon == math.inf else self._noise(len(names))
        spending = self.spending(noise, len(names)) if noise else None
        gradients = UserGradients(model, rank=self.rank, seed=self.seed)
        read, rows_of = self._read(model, gradients, users)
        secure = SecureSum(size=gradients.size, seed=self.seed) if self.secure else None
        # Rounding to fixed point may lengthen a gradient, and what one user changes is what noise is measured in.
        std = noise * (self.clip + (secure.rounding if secure else 0.0))
        make = IndependentNoise if self.mechanism == "dp_sgd" else TreeNoise
        added = make(std=std, size=gradients.size, seed=self.seed)
        theta, velocity = gradients.start(), gradients.start()
        losses, lengths = [], []
        for step, present in enumerate(schedule, 1):
            total = torch.zeros(gradients.size)
            if present:
                found, loss, length = self._clipped(gradients, theta, read, [rows_of[names[i]] for i in present], step)
                losses.append(loss)
                lengths += length
                total = self._summed(secure, found, [names[i] for i in present], step)
            if spending is not None:
                total = total + added.at(step)
            mean = (total / (self.sampling_rate * len(names))).to(theta)
            velocity = self.momentum * velocity + mean
            theta = theta - self.lr * velocity
        epsilon = math.inf if spending is None else self.accountant.epsilon(spending, delta=self.delta)
        share = sum(length > self.clip for length in lengths) / max(1, len(lengths))
        seconds = time.perf_counter() - started
        return Pooled(gradients.result(theta), theta, epsilon, self.delta, spending, noise, share, losses, seconds)

    def schedule(self, num_users: int) -> list[list[int]]:
        """The users of each round."""
        rng = random.Random(f"{self.seed}/{self.mechanism}")
        if self.mechanism == "dp_sgd":
            return [[i for i in range(num_users) if rng.random() < self.sampling_rate] for _ in range(self.rounds)]
        order = rng.sample(range(num_users), num_users)
        size = max(1, round(self.sampling_rate * num_users))
        turns = math.ceil(num_users / size)
        return [order[size * (step % turns) : size * (step % turns + 1)] for step in range(self.rounds)]

    def spending(self, noise: float, num_users: int) -> Spending:
        """What noise of a round or a node, in clips, spends on so many users."""
        if self.mechanism == "dp_sgd":
            return Spending(noise, self.rounds, self.sampling_rate)
        return Spending.of_tree(noise=noise, participations=self._turns(num_users), rounds=self.rounds)

    def _turns(self, num_users: int) -> list[list[int]]:
        """The rounds of each user, from 1 on."""
        turns: list[list[int]] = [[] for _ in range(num_users)]
        for step, present in enumerate(self.schedule(num_users), 1):
            for user in present:
                turns[user].append(step)
        return turns

    def _noise(self, num_users: int) -> float:
        """Of a round or a node, in clips."""
        if self.mechanism == "dp_sgd":
            wanted = Spending(1.0, self.rounds, self.sampling_rate)
            return noise_for(self.epsilon, wanted, self.accountant, delta=self.delta)
        of_all = noise_for(self.epsilon, Spending(1.0, 1, 1.0), self.accountant, delta=self.delta)
        return of_all * tree_sensitivity(self._turns(num_users), rounds=self.rounds)

    def _read(
        self, model: DocToLoRA, gradients: UserGradients, users: Mapping[str, Sequence[Lesson]]
    ) -> tuple[Reading, dict[str, list[int]]]:
        """All lessons, each that is the same read once, and the rows of each user."""
        place: dict[tuple[str, str], int] = {}
        rows_of = {
            name: [place.setdefault((str(one.question), one.answer), len(place)) for one in lessons]
            for name, lessons in users.items()
        }
        return read_pairs(model, gradients, list(place)), rows_of

    def _clipped(
        self, gradients: UserGradients, theta: Tensor, read: Reading, users: Sequence[Sequence[int]], step: int
    ) -> tuple[Tensor, float, list[float]]:
        """Gradients [U, d] no longer than the clip, the mean loss, and how long each was."""
        rng = random.Random(f"{self.seed}/lessons/{step}")
        drawn = [rng.sample(own, min(self.lessons_per_user, len(own))) for own in users]
        owners = [place for place, own in enumerate(drawn) for _ in own]
        rows = read.rows([row for own in drawn for row in own])
        found, losses = gradients(theta, rows, owners=owners, num_users=len(users))
        return clipped(found, self.clip).cpu(), losses.mean().item(), found.norm(dim=1).tolist()

    def _summed(self, secure: SecureSum | None, vectors: Tensor, names: Sequence[str], step: int) -> Tensor:
        if secure is None:
            return vectors.sum(0)
        of_round = SecureSum(size=secure.size, seed=self.seed * 1_000_003 + step, fraction_bits=secure.fraction_bits)
        uploads = {name: of_round.upload(row.numpy(), name, names) for name, row in zip(names, vectors, strict=True)}
        return torch.from_numpy(of_round.total(uploads, names).astype(np.float32))


def clipped(vectors: Tensor, clip: float) -> Tensor:
    """Rows [U, d], those longer than `clip` shortened to it."""
    return vectors * (clip / vectors.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1.0)


def read_pairs(model: DocToLoRA, gradients: UserGradients, pairs: Sequence[tuple[str, str]]) -> Reading:
    """Questions with their answers as `UserGradients` takes them, a row each."""
    prompts = model.layout.prompt_ids(model.tokenizer, [question for question, _ in pairs])
    frame = model.layout.before_answer, model.layout.after_answer
    answers = framed_ids(model.tokenizer, [(frame[0], answer, frame[1]) for _, answer in pairs])
    parts: list[Reading] = []
    for start in range(0, len(pairs), _BATCH):
        both = zip(prompts[start : start + _BATCH], answers[start : start + _BATCH], strict=True)
        rows = [pack_row((), [Segment(prompt + answer, len(prompt), False, 0)]) for prompt, answer in both]
        read = gradients.read(pad_rows(rows, pad_id=model.tokenizer.pad_token_id or 0).to(model.device))
        parts.append(read._replace(row=read.row + start))
    return Reading(*(torch.cat(column) for column in zip(*parts, strict=True)))
