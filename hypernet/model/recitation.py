"""Recitation: rows that find a chunk by what is asked, and rows that make the base model say it, word by word.

network = Recitation(targets, feature_dim=d_in + 2 * d_out, rank=8)
A, B = network(features, mask)                     # [C, L, T, D], [C, T] -> name -> [C, L, R, d_in], [C, L, R, d_out]
scores, closeness = network.match(inputs, asked, A)           # [Q, C], [Q]
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypernet.base.targets import LoRATarget
from hypernet.model.closeness import Closeness, mean_closeness, scores
from hypernet.model.context_encoder import saying_places
from hypernet.model.key_reader import KeyReader

_SHRINKAGE = 0.05  # of the second moment's eigenvalues, in units of a standardized input's variance
_GOOD_MARGIN = 4.0  # of the next token's logit over the highest other one
_MOST_GAIN = 0.6  # on a place whose token is as far below as it should be above it, twice as much beyond
_LEAST_STD = 0.1  # of the mean standard deviation: an input that never changes must not become the largest


class Recitation(nn.Module):
    """The features are those of the chunk as the base model says it itself, in an answer (`Recited`).

    *Keys*, in the first layers: token t of the chunk, whose input to the module is x_t, has one row in one of them,

        a = P k,   k = unit(Pᵀ (x_t - μ)),

    with P Pᵀ the inverse of the inputs' second moment about their mean μ, as far as its largest directions go. B is 0
    there. A question finds the chunk by late interaction: each of its tokens counts with its best cosine. Learned are
    what the chunk's other tokens add to k (`KeyReader`), a map M behind it, a = P (1 + M) k, the weight exp(u · z) of a
    question's token whose whitened input is z, and each layer's gain; all start as if they were not there. Whether any
    chunk is asked about is said by `Closeness`, fitted when training ends.

    *Saying*, in the other layers: the state at place t, before the next token is said, has the row a_t and the value

        A = (Z Zᵀ + λ I)⁻¹ Z,   B_t = |h| g (V d + S h / |h|),

    where Z, [T, d_in], are the inputs of all places of the chunk, so that a_t answers 1 at its own place and 0 at the
    others; d is the direction that raises the next token's logit, h the state that enters the block. V, S and the gain
    g are learned, for each layer. A place has rows in several layers, as many as there is room for.

    Args:
        targets: one module in every layer.
        feature_dim: D = d_in + 2 d_out: input, state and direction.
        rank: R, rows per layer and chunk.
        num_key_layers: layers for keys, the first ones.
        key_dim: directions of P.
        key_reader: the settings of `KeyReader`; None: keys are not learned.
        closeness: those of `Closeness`; None: closeness is the weighted mean of the tokens' best cosines.
        ridge: λ in units of the mean squared length of Z's rows.
        max_copies: layers in which a place has rows, at most.

    Raises:
        ValueError: several targets, or sizes that do not fit.

    Source: a linear layer as key-value memory and the ridge regression, MEMIT, https://arxiv.org/abs/2210.07229; late
    interaction, ColBERT, https://arxiv.org/abs/2004.12832. That a chunk is stored as what the model itself would say,
    while the rows of earlier layers already act, and the learned values are ours.
    """

    def __init__(
        self,
        targets: Sequence[LoRATarget],
        *,
        feature_dim: int,
        rank: int,
        num_key_layers: int = 10,
        key_dim: int = 256,
        key_reader: Mapping[str, Any] | None = None,
        closeness: Mapping[str, Any] | None = None,
        ridge: float = 0.01,
        max_copies: int = 6,
    ) -> None:
        super().__init__()
        if len(targets) != 1:
            raise ValueError(f"A recitation adapts one module of every block, got {[t.name for t in targets]}.")
        (target,) = self.targets = tuple(targets)
        num_layers, wanted = len(target.paths), target.d_in + 2 * target.d_out
        if feature_dim != wanted:
            raise ValueError(
                f"A recitation of {target.name} needs features of width {wanted}, got {feature_dim}. Set the context "
                "encoder's kind to recited."
            )
        if not 0 < num_key_layers < num_layers or key_dim < 1 or max_copies < 1 or not ridge > 0:
            raise ValueError(
                f"Of {num_layers} layers num_key_layers={num_key_layers} leave none for one part, or "
                f"key_dim={key_dim}, max_copies={max_copies} or ridge={ridge} is not above 0."
            )
        self.num_layers, self.num_key_layers, self.rank = num_layers, num_key_layers, rank
        self.ridge, self.max_copies = ridge, max_copies
        self.input_mean: Tensor
        self.input_std: Tensor
        self.metric: Tensor
        self.min_match: Tensor
        """Least closeness of a question, below which no chunk is used; found when training ends."""
        self.register_buffer("min_match", torch.full((), -torch.inf))
        self.register_buffer("input_mean", torch.zeros(num_key_layers, target.d_in))
        self.register_buffer("input_std", torch.zeros(num_layers, target.d_in))
        self.register_buffer("metric", torch.zeros(num_key_layers, target.d_in, min(key_dim, target.d_in)))
        key_dim = self.metric.shape[-1]
        self.key_reader, self.closeness = None, None
        if closeness is not None:
            # No step trains it: it is fitted when training ends.
            self.closeness = Closeness(num_layers=num_key_layers, key_dim=key_dim, **closeness).requires_grad_(False)
        if key_reader is not None:
            sizes = {"num_layers": num_key_layers, "key_dim": key_dim, "max_tokens": num_key_layers * rank}
            self.key_reader = KeyReader(**sizes, **key_reader)
            self.key_maps = nn.Parameter(torch.zeros(num_key_layers, key_dim, key_dim))
            self.token_weights = nn.Parameter(torch.zeros(num_key_layers, key_dim))
            self.log_key_gain = nn.Parameter(torch.zeros(num_key_layers))
        num_saying = num_layers - num_key_layers
        self.values = nn.Parameter(torch.eye(target.d_out).repeat(num_saying, 1, 1))
        self.states = nn.Parameter(torch.zeros(num_saying, target.d_out, target.d_out))
        self.log_gain = nn.Parameter(torch.full((num_saying,), 0.25).log())
        self.bias_A = nn.ParameterDict({target.name: nn.Parameter(torch.zeros(num_layers, 0, target.d_in))})
        self.bias_B = nn.ParameterDict({target.name: nn.Parameter(torch.zeros(num_layers, 0, target.d_out))})

    @property
    def max_tokens(self) -> int:
        """Most tokens of a chunk: with more, some would be in no row."""
        num_saying = self.num_layers - self.num_key_layers
        return self.rank * min(self.num_key_layers, num_saying) - (num_saying <= self.num_key_layers)

    @property
    def is_calibrated(self) -> bool:
        return bool(self.input_std.any())

    @torch.no_grad()
    def calibrate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Takes μ, P and the inputs' standard deviations from chunks like those to come.

        Args:
            batches: features [C, L, T, D] with mask [C, T], as of `forward`.

        Raises:
            ValueError: there is no token.
        """
        (target,), keys = self.targets, self.num_key_layers
        count, device = 0, self.metric.device
        total = torch.zeros(self.num_layers, target.d_in, dtype=torch.float64, device=device)
        squares = torch.zeros_like(total)
        moment = torch.zeros(keys, target.d_in, target.d_in, dtype=torch.float64, device=device)
        for features, mask in batches:
            x = features[..., : target.d_in].transpose(1, 2)[mask.bool()].double()  # [tokens, L, d_in]
            count += len(x)
            total += x.sum(0)
            squares += x.square().sum(0)
            for layer in range(keys):  # one at a time: a batched inverse of this size fails in oneMKL
                moment[layer] += x[:, layer].mT @ x[:, layer]
        if not count:
            raise ValueError("calibrate needs at least one token, got none.")
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=0).sqrt()
        std += _LEAST_STD * std.mean(-1, keepdim=True)
        self.input_std.copy_(std)
        self.input_mean.copy_(mean[:keys])
        for layer in range(keys):
            covariance = moment[layer] / count - mean[layer][:, None] * mean[layer]
            covariance = covariance / std[layer][:, None] / std[layer]
            eigenvalues, directions = torch.linalg.eigh(covariance)
            largest = slice(-self.metric.shape[-1], None)
            scaled = directions[:, largest] * (eigenvalues[largest].clamp(min=0) + _SHRINKAGE).rsqrt()
            self.metric[layer] = scaled / std[layer][:, None]

    def forward(
        self, features: Tensor, mask: Tensor, layers: slice = slice(None)
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A, B by target name, [C, L, R, d_in] and [C, L, R, d_out].

        Args:
            features: [C, L, T, D] of these layers. What stands where the mask is False is never read.
            mask: [C, T] bool: the place before the chunk's first token, its tokens, and the token that ends an answer.
            layers: those that the features belong to; L is their number.

        Raises:
            ValueError: a chunk has more tokens than `max_tokens`.
        """
        (target,) = self.targets
        self._check_length(mask)
        features = features.masked_fill(~mask[:, None, :, None], 0).float()
        rows_A, rows_B = [], []
        numbers = range(self.num_layers)[layers]
        if num_keys := sum(number < self.num_key_layers for number in numbers):
            if num_keys < self.num_key_layers:
                raise ValueError(f"Keys need the first {self.num_key_layers} layers together, got {num_keys} of them.")
            x = features[:, :num_keys, :, : target.d_in]
            keys = self.keys(
                torch.stack([x[:, place % num_keys, place + 1] for place in range(x.shape[2] - 1)], 1), mask
            )
            rows_A.append(keys)
            rows_B.append(keys.new_zeros(*keys.shape[:3], target.d_out))
        for place in range(num_keys, len(numbers)):
            A, B, _ = self.saying(numbers[place], features[:, place, None], mask)
            rows_A.append(A[:, None])
            rows_B.append(B[:, None])
        return {target.name: torch.cat(rows_A, 1)}, {target.name: torch.cat(rows_B, 1)}

    def _check_length(self, mask: Tensor) -> None:
        longest = int(mask.sum(1).max()) - 2
        if longest > self.max_tokens:
            raise ValueError(
                f"A chunk has {longest} tokens, a recitation of rank {self.rank} holds {self.max_tokens}. Lower "
                "max_chunk_tokens, or raise the rank."
            )

    def keys(self, x: Tensor, mask: Tensor) -> Tensor:
        """A of the layers for keys, [C, num_key_layers, R, d_in].

        Args:
            x: [C, T - 1, d_in], what enters the module at the places behind the first, that of token t in layer t mod
                num_key_layers.
            mask: [C, T], as of `forward`.
        """
        self._check_length(mask)
        room = self.num_key_layers * self.rank
        is_token = torch.zeros(len(mask), room, dtype=torch.bool, device=mask.device)
        is_token[:, : mask.shape[1] - 2] = mask[:, 2:][:, :room]  # the last one ends the answer
        x = F.pad(x[:, :room].float(), (0, 0, 0, max(0, room - x.shape[1])))

        def by_layer(rows: Tensor, of_layer: Tensor) -> Tensor:
            """[C, T, d] and [num_key_layers, d, k] -> [C, T, k], each token by its layer's."""
            rows = rows.unflatten(1, (self.rank, self.num_key_layers))
            return torch.einsum("crld, ldk -> crlk", rows, of_layer).flatten(1, 2)

        with torch.autocast(x.device.type, enabled=False):
            k = F.normalize(by_layer(x - self.input_mean.repeat(self.rank, 1), self.metric), dim=-1)
            if self.key_reader is not None:
                longest = max(1, int(is_token.sum(1).max()))
                read = is_token[:, :longest] | ~is_token[:, :1]  # a chunk without tokens would be read as NaN
                k = F.normalize(k + F.pad(self.key_reader(k[:, :longest], read), (0, 0, 0, room - longest)), dim=-1)
                k = k + by_layer(k, self.key_maps)
            A = by_layer(k * is_token[..., None], self.metric.mT)
        return A.unflatten(1, (self.rank, self.num_key_layers)).transpose(1, 2)

    def saying(
        self, layer: int, features: Tensor, mask: Tensor, gains: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A [C, R, d_in] and B [C, R, d_out] of one of the other layers, and A x at each place, [C, M, T, R].

        Args:
            features: [C, M, T, D], of each of M readings.
            mask: [C, T], as of `forward`.
            gains: [C, T], a factor on B for each place; None: 1.
        """
        (target,) = self.targets
        says = saying_places(mask)
        x = features[..., : target.d_in].masked_fill(~says[:, None, :, None], 0).float()
        rest = features[:, 0, :, target.d_in :].masked_fill(~says[..., None], 0).float()
        with torch.autocast(features.device.type, enabled=False):
            state, direction = rest.split(target.d_out, dim=-1)
            A, B, places, found = self._saying(layer, x, state, direction, says)
            return A, B if gains is None else B * gains.gather(1, places)[..., None], found

    def _saying(
        self, layer: int, x: Tensor, state: Tensor, direction: Tensor, says: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        number = layer - self.num_key_layers
        counts = says.sum(1).tolist()
        tables = [
            placed(count, self.num_layers - self.num_key_layers, self.rank, self.max_copies)[number] for count in counts
        ]
        places = torch.tensor(tables, device=x.device)  # [C, R], -1 where a row is not used
        used = (places >= 0)[..., None]
        places = places.clamp(min=0)

        def taken(tokens: Tensor) -> Tensor:
            return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))

        with torch.no_grad():
            readings = x.shape[1]
            Z = (x / self.input_std[layer]).flatten(1, 2)
            gram = Z @ Z.mT
            size = gram.diagonal(dim1=1, dim2=2).sum(1, keepdim=True) / (readings * says.sum(1, keepdim=True))
            penalty = torch.diag_embed(torch.where(says.repeat(1, readings), self.ridge * size, size))
            wanted = (F.one_hot(places, says.shape[1]).float() * used).repeat(1, 1, readings)
            solved = torch.cholesky_solve(wanted.mT, torch.linalg.cholesky(gram + penalty)).mT
            found = (gram @ solved.mT).unflatten(1, (readings, -1))  # A x, of 2 T numbers each instead of d_in
            A = solved @ Z / self.input_std[layer]
            lengths = state.norm(dim=-1)
            typical = torch.stack([row[own].median() for row, own in zip(lengths, says, strict=True)])
        unit = F.normalize(taken(state), dim=-1)
        B = taken(direction) @ self.values[number] + unit @ self.states[number]
        return A, self.log_gain[number].exp() * typical[:, None, None] * B * used, places, found

    def match(self, inputs: Mapping[int, Tensor], asked: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        """How well each question fits each chunk: the `scores` of its `best_cosines`, and how close it is to any.

        Args:
            inputs, asked, A: as of `best_cosines`.

        Returns:
            [Q, C] and [Q].
        """
        best, weight, unit = self.compared(inputs, asked, A)
        return scores(best, weight), self.close(best, weight, unit)

    def close(self, best: Tensor, weight: Tensor, unit: Tensor) -> Tensor:
        """Closeness [Q] of what `compared` gives, also of some of the chunks alone."""
        if self.closeness is None:
            return mean_closeness(best, weight)
        logit: Tensor = self.closeness(best, weight, self.closeness.common(unit))
        return logit

    def whitened(self, inputs: Mapping[int, Tensor]) -> Tensor:
        """Inputs by key layer [Q, S, d_in] -> [Q, S, num_key_layers, key_dim], of unit length in each layer."""
        found = [(x.float() - self.input_mean[layer]) @ self.metric[layer] for layer, x in sorted(inputs.items())]
        return F.normalize(torch.stack(found, dim=2), dim=-1, eps=1e-6)

    def best_cosines(self, inputs: Mapping[int, Tensor], asked: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        """Of each token of a question the highest cosine with a key of each chunk, at least 0, and how much it counts.

        Args:
            inputs: by key layer what enters the module at the questions' tokens, [Q, S, d_in].
            asked: which of them are the question's own, [Q, S] bool.
            A: [C, L, R, d_in], as generated.

        Returns:
            [Q, S, C], and weights [Q, S], 0 of what is not the question's own.
        """
        return self.compared(inputs, asked, A)[:2]

    def compared(self, inputs: Mapping[int, Tensor], asked: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `best_cosines`, and the whitened inputs [Q, S, num_key_layers, key_dim] that it went by."""
        best: Tensor | None = None
        units = []
        for layer, x in sorted(inputs.items()):
            centred = x.float() - self.input_mean[layer]
            whitened = centred @ self.metric[layer]
            lengths = whitened.norm(dim=-1, keepdim=True).clamp(min=1e-6)
            units.append(whitened / lengths)
            found = torch.einsum("qsd, crd -> qscr", centred / lengths, A[:, layer].to(centred)).amax(-1)
            if self.key_reader is not None:
                found = found * self.log_key_gain[layer].exp()
            best = found if best is None else torch.maximum(best, found)
        assert best is not None
        unit = torch.stack(units, dim=2)
        return best.clamp(min=0), self.weights(unit, asked), unit

    def weights(self, unit: Tensor, asked: Tensor) -> Tensor:
        """[Q, S], as of `best_cosines`, from what `whitened` gives."""
        if self.key_reader is None:
            return asked.float()
        return torch.einsum("qslk, lk -> qs", unit, self.token_weights).exp() * asked

    def best_of_keys(self, unit: Tensor, keys: Tensor) -> Tensor:
        """What `best_cosines` gives for A = P k, at key_dim / d_in of its work.

        Args:
            unit: as `whitened` gives it.
            keys: k, [C, num_key_layers, R, key_dim].

        Returns:
            [Q, S, C].
        """
        best = torch.einsum("qslk, clrk -> lqscr", unit, keys).amax(-1)
        if self.key_reader is not None:
            best = best * self.log_key_gain.exp()[:, None, None, None]
        return best.amax(0).clamp(min=0)


def place_gains(margins: Tensor) -> Tensor:
    """Factors on B, at least 1: where the next token's logit is less than 4 above the highest other one, more.

    g = 1 + 0.6 min(2, (4 - margin) / 4). Of 153 sentences of SQuAD paragraphs, said word for word behind their own
    question, 5 were missed without it and none with it.

    Args:
        margins: [C, T], infinite where nothing is said.
    """
    return 1 + _MOST_GAIN * ((_GOOD_MARGIN - margins) / _GOOD_MARGIN).clamp(0, 2)


@lru_cache(maxsize=512)
def placed(num_places: int, num_layers: int, rank: int, max_copies: int) -> tuple[tuple[int, ...], ...]:
    """For each layer the places that have a row in it, -1 for a row that is not used: [num_layers][rank].

    Every place has rows in as many layers as there is room for, `max_copies` at most, spread over the depth.
    """
    layers: list[list[int]] = [[] for _ in range(num_layers)]
    copies = min(max_copies, max(1, num_layers * rank // max(num_places, 1)))
    for copy in range(copies):
        for place in range(num_places):
            first = place + copy * num_layers // copies
            for layer in ((first + step) % num_layers for step in range(num_layers)):
                if len(layers[layer]) < rank and place not in layers[layer]:
                    layers[layer].append(place)
                    break
    return tuple(tuple(row + [-1] * (rank - len(row))) for row in layers)
