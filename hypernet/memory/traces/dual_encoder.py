"""DualEncoder: a question and a memory to vectors, by two small towers on the base model's input embeddings.

encoder = DualTraining(seed=0).train(BaseModelEmbedder(base_model, tokenizer), examples)
embedder = DualEmbedder(base, encoder)                     # an Embedder, for `Retriever` and `Memory.open`
encoder.save(folder / "encoder.safetensors"); DualEncoder.load(folder / "encoder.safetensors")

Before training both towers are the base model's own embedder, so training starts from its ranking. A memory's label is
how much likelier it made the answer: softmax over a prompt's memories of log p(answer) - log p(answer without it).

Source: leave-one-out likelihoods as labels: Izacard et al. 2022, https://arxiv.org/abs/2208.03299, section 2.2 (LOOP)
"""

import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hypernet.io.files import replaced, save_tensors
from hypernet.memory.embedding import BaseModelEmbedder, Vectors
from hypernet.memory.traces.kept import DUAL
from hypernet.memory.traces.trace_store import Example

_BATCH = 256  # texts at once


class Tower(nn.Module):
    """v = Σ_t w_t exp(u·e_t) e_t over a text's tokens, w as of `BaseModelEmbedder`, to unit length; then
    v + W₂ gelu(W₁ v), to unit length. u and W₂ begin at 0.

    Args:
        dim: D, of the embeddings. hidden_dim: of W₁ v.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.token = nn.Linear(dim, 1, bias=False)
        self.up, self.down = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, dim)
        for zero in (self.token.weight, self.down.weight, self.down.bias):
            nn.init.zeros_(zero)

    def forward(self, embedded: Tensor, weights: Tensor) -> Tensor:
        """[N, T, D], [N, T] with 0 for padding → [N, D]."""
        scaled = weights * self.token(nn.functional.normalize(embedded, dim=-1))[..., 0].exp()
        mean = nn.functional.normalize(torch.einsum("ntd,nt->nd", embedded, scaled), dim=-1, eps=1e-12)
        moved = mean + self.down(nn.functional.gelu(self.up(mean)))
        return nn.functional.normalize(moved, dim=-1, eps=1e-12)


class DualEncoder(nn.Module):
    """A tower for questions and one for memories."""

    def __init__(self, *, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.dim, self.hidden_dim = dim, hidden_dim
        self.question, self.memory = Tower(dim, hidden_dim), Tower(dim, hidden_dim)

    @property
    def sha256(self) -> str:
        """Of the weights."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """There completely or not at all."""
        with replaced(path) as temporary:
            save_tensors({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, temporary)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads what `save` wrote."""
        tensors: Mapping[str, Tensor] = load_file(path)
        hidden_dim, dim = tensors["question.up.weight"].shape
        encoder = cls(dim=dim, hidden_dim=hidden_dim)
        encoder.load_state_dict(tensors)
        return encoder.eval()


class DualEmbedder:
    """The towers as an `Embedder`: `embed` for memories, `embed_questions` for questions.

    Raises:
        ValueError: the encoder is for embeddings of another width.
    """

    def __init__(self, base: BaseModelEmbedder, encoder: DualEncoder) -> None:
        if encoder.dim != base.dim:
            raise ValueError(f"The encoder reads embeddings of width {encoder.dim}, the base model has {base.dim}.")
        self._base, self._encoder = base, encoder
        self.name = f"{base.name}{DUAL}{encoder.sha256[:16]}"

    def embed(self, texts: Sequence[str]) -> Vectors:
        return self._embedded(self._encoder.memory, texts)

    def embed_questions(self, questions: Sequence[str]) -> Vectors:
        return self._embedded(self._encoder.question, questions)

    def _embedded(self, tower: Tower, texts: Sequence[str]) -> Vectors:
        found = [np.zeros((0, self._encoder.dim), np.float32)]
        with torch.no_grad():
            for start in range(0, len(texts), _BATCH):
                found.append(tower(*self._base.tokens(texts[start : start + _BATCH])).numpy())
        return np.concatenate(found)


@dataclass(frozen=True, kw_only=True)
class DualTraining:
    """How the towers are trained: cross-entropy between the labels and softmax(cosine / temperature) over the memories
    of all questions in a batch.

    Attributes:
        steps, batch_size, lr: of Adam; questions in a step; the rate falls to 0 as a cosine.
        temperature: of cosines. label_temperature: of effects, in nats.
        min_effect: nats by which the best memory of a question must have moved the answer; others teach nothing.
        hidden_dim: of the towers. seed: of all that is drawn.
    """

    steps: int = 200
    batch_size: int = 32
    lr: float = 3e-3
    temperature: float = 0.05
    label_temperature: float = 1.0
    min_effect: float = 1.0
    hidden_dim: int = 384
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "hidden_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}. Give at least 1.")
        for name in ("lr", "temperature", "label_temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}. Give a finite number above 0.")

    def usable(self, examples: Sequence[Example]) -> list[Example]:
        """Those that say which memory was the right one."""
        return [one for one in examples if len(one.texts) > 1 and max(one.effects) >= self.min_effect]

    def train(self, base: BaseModelEmbedder, examples: Sequence[Example]) -> DualEncoder:
        """The same examples in the same order give the same weights, to the bit.

        Raises:
            ValueError: none of the examples is usable.
        """
        examples = self.usable(examples)
        if not examples:
            raise ValueError(
                f"No trace says which memory an answer came from: none with two memories moved it by {self.min_effect} "
                "nats. Record more."
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            encoder = DualEncoder(dim=base.dim, hidden_dim=self.hidden_dim)
        optimizer = torch.optim.Adam(encoder.parameters(), lr=self.lr)
        for step in range(self.steps):
            rng = random.Random(f"{self.seed}/{step}")
            drawn = rng.sample(examples, min(self.batch_size, len(examples)))
            texts = list(dict.fromkeys(text for one in drawn for text in one.texts))
            questions = encoder.question(*base.tokens([one.question for one in drawn]))
            cosines = questions @ encoder.memory(*base.tokens(texts)).T
            labels = targets(drawn, texts, temperature=self.label_temperature)
            loss = nn.functional.cross_entropy(cosines / self.temperature, labels)
            for group in optimizer.param_groups:
                group["lr"] = self.lr * (0.5 + 0.5 * math.cos(math.pi * step / self.steps))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return encoder.eval()


def targets(examples: Sequence[Example], texts: Sequence[str], *, temperature: float) -> Tensor:
    """[Q, M]: of each question softmax(effect / temperature) over its own memories, 0 for the others."""
    place = {text: number for number, text in enumerate(texts)}
    labels = torch.zeros(len(examples), len(texts))
    for row, one in enumerate(examples):
        shares = (torch.tensor(one.effects) / temperature).softmax(0)
        labels[row].index_add_(0, torch.tensor([place[text] for text in one.texts]), shares)
    return labels


def shuffled(examples: Sequence[Example], *, seed: int) -> list[Example]:
    """The same with each question's effects in another order: a control that has seen as much and learned nothing."""
    rng = random.Random(f"shuffled/{seed}")
    return [one._replace(effects=tuple(rng.sample(one.effects, len(one.effects)))) for one in examples]
