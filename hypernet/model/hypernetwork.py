"""HyperNetwork = aggregator + LoRA head: features of chunks to their LoRA matrices, the only thing that trains.

    hypernetwork = HyperNetwork(
        targets=find_targets(base_model, ["down_proj"]), feature_dim=192, num_maps=4, rank=8,
        aggregator={"name": "perceiver", "latent_dim": 128, "num_latents": 16, "num_blocks": 2},
    )
    A, B = hypernetwork(features, mask)      # [C, L, T, D], [C, T] -> name -> [C, L, R, d_in], [C, L, R, d_out]
    HyperNetwork(**hypernetwork.config)      # the same network with fresh weights

An aggregator is a class with `forward(features, mask) -> outputs` and `latent_dim`, entered in AGGREGATORS. One that
needs no latents gives A and B itself and takes the LoRA head's place, as `OuterProduct` does.
"""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from hypernet.base.targets import LoRATarget
from hypernet.model.lora_head import LoRAHead
from hypernet.model.outer_product import OuterProduct
from hypernet.model.perceiver import Perceiver
from hypernet.model.pooling import MeanPool
from hypernet.model.recitation import Recitation

# A closed list: checkpoints name the aggregator.
AGGREGATORS: dict[str, type[nn.Module]] = {
    "perceiver": Perceiver,
    "mean_pool": MeanPool,
    "outer_product": OuterProduct,
    "recitation": Recitation,
}
# What the network gives them; the rest are their settings.
GIVEN = ("targets", "feature_dim", "num_outputs", "rank")
HEAD_DEFAULTS = {"num_pre_head_blocks": 1, "pre_head_multiple": 4}


class HyperNetwork(nn.Module):
    """Generates one LoRA block of rank R per chunk, for every layer and target module.

    Args:
        targets: the modules to adapt, LoRATarget or a mapping with its fields; kept sorted by name, which is the order
            of the M axis.
        feature_dim: D, size of a token's features.
        num_maps: feature maps per chunk: one per adapted layer (each map yields its layer's weights) or one for all
            layers.
        rank: R, rank per chunk.
        scaling: factor on BA, not divided by the rank; None means 2 * rank**1.5, as in the published checkpoints.
        aggregator: {"name": key of AGGREGATORS, ...its sizes}.
        num_pre_head_blocks, pre_head_multiple: residual blocks before the head, and their hidden size in units of the
            latent size; None means 1 and 4. An outer product has no such head and takes neither.
        bias_block: train the block that all documents share; False leaves it at zero, so that an adapter adds nothing
            but what its chunks say.
        standardize_features: bring every feature of every map to mean 0 and variance 1, by the statistics that
            `calibrate` takes once before training; they are part of the state dict. A base model's states have a few
            large directions that all tokens share, and what tells one name from another is small compared with them.
            False: as in the published checkpoints.

    Attributes:
        config: plain dict (numbers, strings, lists) with every size spelled out; HyperNetwork(**config) has the same
            state dict keys.
        bias_A, bias_B: the bias block by target name, [L, R, d_in] and [L, R, d_out]; added once per adapter, whatever
            its chunk count.

    An untrained network gives B = 0 exactly: the base model answers as without it.

    The state dict of a Perceiver with its published sizes has the published shapes, and keys that differ in two
    prefixes: `aggregator.perceiver.*` there is `aggregator.*` here, everything else there is below `lora_head.` here.

    Raises:
        ValueError: unknown aggregator or size, settings of a head that there is none of, targets of unequal depth or
            repeated names, num_maps neither one nor the layer count.
    """

    def __init__(
        self,
        *,
        targets: Sequence[LoRATarget | Mapping[str, Any]],
        feature_dim: int,
        num_maps: int,
        rank: int = 8,
        scaling: float | None = None,
        aggregator: Mapping[str, Any],
        num_pre_head_blocks: int | None = None,
        pre_head_multiple: int | None = None,
        bias_block: bool = True,
        standardize_features: bool = False,
    ):
        super().__init__()
        self.targets = _checked_targets(targets)
        self.num_layers = len(self.targets[0].paths)
        if num_maps not in (1, self.num_layers):
            raise ValueError(
                f"num_maps must be 1 or the number of adapted layers, {self.num_layers}, got {num_maps}. "
                "Adapt as many layers as the context encoder has maps, or use one with a single map (early_exit)."
            )
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}.")
        self.feature_dim = feature_dim
        self.num_maps = num_maps
        for name, value in {"standardize_features": standardize_features, "bias_block": bias_block}.items():
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be true or false, got {value!r}.")
        self.rank = rank
        self.standardize_features = standardize_features
        if standardize_features:
            self.feature_mean: Tensor
            self.feature_std: Tensor
            self.register_buffer("feature_mean", torch.zeros(num_maps, feature_dim))
            self.register_buffer("feature_std", torch.ones(num_maps, feature_dim))
        self.scaling = 2 * rank**1.5 if scaling is None else float(scaling)

        aggregator_class, sizes = _aggregator_sizes(aggregator)
        given = {"num_pre_head_blocks": num_pre_head_blocks, "pre_head_multiple": pre_head_multiple}
        head = {name: value for name, value in given.items() if value is not None}
        self.aggregator: nn.Module | None
        self.lora_head: LoRAHead | OuterProduct | Recitation
        if aggregator_class in (OuterProduct, Recitation):
            whole: Any = aggregator_class
            if head:
                raise ValueError(
                    f"Aggregator {aggregator['name']!r} has no head behind it; leave {' and '.join(head)} out."
                )
            self.aggregator = None
            self.lora_head = whole(self.targets, feature_dim=feature_dim, rank=rank, **sizes)
        else:
            head = {**HEAD_DEFAULTS, **head}
            num_outputs = (self.num_layers // num_maps) * len(self.targets) * rank
            aggregator_module: Any = aggregator_class(feature_dim=feature_dim, num_outputs=num_outputs, **sizes)
            self.aggregator = aggregator_module
            self.lora_head = LoRAHead(self.targets, latent_dim=aggregator_module.latent_dim, rank=rank, **head)
        if not bias_block:
            for parameter in (*self.bias_A.parameters(), *self.bias_B.parameters()):
                parameter.requires_grad_(False).zero_()
        self.config: dict[str, Any] = {
            "targets": [target.plain() for target in self.targets],
            "feature_dim": feature_dim,
            "num_maps": num_maps,
            "rank": rank,
            "scaling": self.scaling,
            "aggregator": {"name": aggregator["name"], **sizes},
            **head,
            "bias_block": bias_block,
            "standardize_features": standardize_features,
        }

    @property
    def bias_A(self) -> nn.ParameterDict:
        return self.lora_head.bias_A

    @property
    def bias_B(self) -> nn.ParameterDict:
        return self.lora_head.bias_B

    @property
    def recitation(self) -> Recitation | None:
        """The part that makes a chunk be said, where that is what this network generates. Its rows of one layer act
        while the next layer's are made, they act in answers alone, and a question chooses among chunks by its keys."""
        return self.lora_head if isinstance(self.lora_head, Recitation) else None

    @property
    def bias_rank(self) -> int:
        """Rank of the block that documents share: R, or 0 without one."""
        return self.rank if self.config["bias_block"] else 0

    def parameter_counts(self) -> dict[str, int]:
        """Number of parameters: {"aggregator": ..., "lora_head": ..., "total": ...}, what there is of them."""
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in self.named_children()}
        return {**counts, "total": sum(counts.values())}

    @torch.no_grad()
    def at_rank(self, rank: int) -> "HyperNetwork":
        """This network with another number of rows per chunk, to be trained on from: a start, not a result.

        Fewer rows: the first ones. More: all of them in turn; the copies' queries are moved by a fifth of the queries'
        spread, drawn from torch's generator, so that they can part, and B is divided by the number of copies. Then the
        delta is about what it was.

        Raises:
            ValueError: the aggregator has no query for each row.
        """
        if self.aggregator is None:
            raise ValueError("An outer product's rows have no queries of their own; train it at that rank anew.")
        other = HyperNetwork(**{**self.config, "rank": rank, "scaling": None})
        rows = torch.arange(rank) % self.rank
        copies = rows.bincount(minlength=self.rank)[rows]
        state = other.state_dict()
        for name, value in self.state_dict().items():
            axes = [axis for axis in range(value.ndim) if value.shape[axis] != state[name].shape[axis]]
            for axis in axes:  # at most one: rows, or rows of every layer and target, rows last
                value = value.unflatten(axis, (-1, self.rank)).index_select(axis + 1, rows.to(value.device))
                if name.endswith("latents_q"):
                    moved = 0.2 * value.std() * torch.randn_like(value)
                    value = value + moved * (torch.arange(rank, device=value.device) >= self.rank)[:, None]
                if ".scaler_B." in name or ".bias_B." in name:
                    shape = [1] * (axis + 1) + [rank] + [1] * (value.ndim - axis - 2)
                    value = value * (self.scaling / other.scaling / copies).to(value).view(shape)
                value = value.flatten(axis, axis + 1)
            state[name] = value
        other.load_state_dict(state)
        return other.to(next(self.parameters()).device)

    @property
    def is_calibrated(self) -> bool:
        """Whether nothing is left to `calibrate`."""
        if self.recitation is not None:
            return self.recitation.is_calibrated
        return not self.standardize_features or bool((self.feature_std != 1).any())

    @torch.no_grad()
    def calibrate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Takes the features' mean and standard deviation from chunks like those to come.

        Args:
            batches: features [C, num_maps, T, D] with mask [C, T], as of `forward`.

        Raises:
            ValueError: this network does not standardize features, or there is no token.
        """
        if self.recitation is not None:
            self.recitation.calibrate(batches)
            return
        if not self.standardize_features:
            raise ValueError("This hypernetwork takes features as they are; build it with standardize_features=True.")
        count, total, squares = 0, torch.tensor(0.0), torch.tensor(0.0)
        for features, mask in batches:
            tokens = features.transpose(1, 2)[mask.bool()].double()  # [tokens, num_maps, D]
            count += len(tokens)
            total, squares = total + tokens.sum(0), squares + tokens.square().sum(0)
        if not count:
            raise ValueError("calibrate needs at least one token, got none.")
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=0).sqrt()
        # A feature that never changes says nothing: its rounding must not become the largest of all.
        self.feature_mean.copy_(mean)
        self.feature_std.copy_(torch.where(std > 1e-4 * mean.abs(), std, torch.ones_like(std)))

    def forward(
        self, features: Tensor, mask: Tensor, *, layers: slice = slice(None)
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """LoRA matrices of every chunk, each computed from that chunk alone.

        Args:
            features: [C, num_maps, T, D]. What stands where the mask is False is never read, it may be NaN.
            mask: [C, T], True (or 1) where there is a token.
            layers: with a map per layer, those whose maps the features are; only their matrices are given.

        Returns:
            A, B by target name, [C, L, R, d_in] and [C, L, R, d_out], without the bias block and without `scaling`; L
            is the number of `layers`.

        Raises:
            ValueError: if the shapes do not fit each other or the network, or a chunk has no token.
        """
        mask = mask.bool()
        num_maps = len(range(self.num_maps)[layers]) if self.num_maps > 1 else 1
        expected = (len(mask), num_maps, mask.shape[-1], self.feature_dim)
        if mask.ndim != 2 or features.shape != expected:
            raise ValueError(
                f"Wanted features [C, num_maps={num_maps}, T, D={self.feature_dim}] with mask [C, T], got "
                f"features {list(features.shape)} with mask {list(mask.shape)}. "
                "Use the context encoder this hypernetwork was made for."
            )
        if not mask.any(1).all():
            raise ValueError("Every chunk needs a token, but a row of the mask is all False. Leave empty chunks out.")

        if self.standardize_features:
            where = layers if self.num_maps > 1 else slice(None)
            features = (features - self.feature_mean[where, None]) / self.feature_std[where, None]
        if self.aggregator is None:
            return self.lora_head(features, mask, layers)
        latents = self.aggregator(
            rearrange(features, "c l t d -> (c l) t d"), repeat(mask, "c t -> (c l) t", l=num_maps)
        )
        # With one map per layer its outputs are that layer's (m r); with a single map they are all layers' (l m r).
        latents = rearrange(latents, "(c l) (k m r) h -> c (l k) m r h", l=num_maps, m=len(self.targets), r=self.rank)
        return self.lora_head(latents, layers)


def _checked_targets(targets: Sequence[LoRATarget | Mapping[str, Any]]) -> tuple[LoRATarget, ...]:
    made = [t if isinstance(t, LoRATarget) else LoRATarget.of(t) for t in targets]
    made.sort(key=lambda t: t.name)
    if not made:
        raise ValueError("HyperNetwork needs at least one target module, got none. Set target_modules.")
    names = [t.name for t in made]
    if len(set(names)) < len(names):
        raise ValueError(f"Each target module may be given once, got {names}.")
    depths = {t.name: len(t.paths) for t in made}
    if len(set(depths.values())) > 1:
        raise ValueError(f"All targets must occur in the same number of layers, got {depths}. Drop those that do not.")
    return tuple(made)


def _aggregator_sizes(aggregator: Mapping[str, Any]) -> tuple[type[nn.Module], dict[str, Any]]:
    """Class and all its sizes, defaults filled in: a checkpoint must not change when a default does."""
    sizes = dict(aggregator)
    name = sizes.pop("name", None)
    if name not in AGGREGATORS:
        raise ValueError(f"Unknown aggregator {name!r}: set aggregator's name to one of {sorted(AGGREGATORS)}.")
    parameters = inspect.signature(AGGREGATORS[name]).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.name not in GIVEN}
    unknown = sorted(set(sizes) - set(defaults))
    if unknown:
        raise ValueError(f"Aggregator {name!r} has no {', '.join(unknown)}; it has {', '.join(defaults)}.")
    return AGGREGATORS[name], {**defaults, **sizes}
