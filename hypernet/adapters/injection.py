"""LoRAInjector: makes the frozen base model answer with adapters, without touching its modules or weights.

    injector = LoRAInjector(base_model, targets)
    with injector.using([adapter_1, None, adapter_2]):      # inference: one adapter, or none, for each sequence
        base_model.generate(...)
    injector.set(A, B, slots, scaling=scaling)              # training: stays until clear(), which comes after backward

Forward hooks stay on the target layers for good and read the injector's state: with none set they do nothing.
base_model.compile() works, with as many graphs as there are kinds of batches and adapters; make the injector first.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn

from hypernet.adapters.adapter import LoRAAdapter
from hypernet.base.targets import LayerTarget, LoRATarget
from hypernet.kernels.lora_delta import Plan, lora_delta


@dataclass(frozen=True)
class AdapterPool:
    """Adapters laid out for the layers they go to, made by `LoRAInjector.pool` or `set`.

    One slot list for all sequences if `shared`, else one per sequence. `ungated`: what a gate leaves alone.
    """

    A: dict[str, dict[int, Tensor]]  # target name, layer to the layer's pool, [slots, R, d_in]
    B: dict[str, dict[int, Tensor]]
    slots: list[list[int]]
    num_slots: int
    shared: bool
    scaling: float
    gate_power: float = 0.0
    ungated: "AdapterPool | None" = None
    plans: dict[tuple[int, torch.device], Plan] = field(default_factory=dict)  # by tokens per sequence

    def plan(self, x: Tensor) -> Plan:
        if self.shared:
            num_tokens = x.shape[:-1].numel()
        elif x.ndim == 3 and x.shape[0] == len(self.slots):
            num_tokens = x.shape[1]
        else:
            raise ValueError(
                f"{len(self.slots)} adapters are set, one per sequence, but the layer's input {list(x.shape)} has a "
                f"batch of {x.shape[0] if x.ndim == 3 else 'unknown size'}. Give one adapter (or None) per sequence, "
                "or one adapter for all."
            )
        key = (num_tokens, x.device)
        if key not in self.plans:
            lengths = [num_tokens] * len(self.slots)
            self.plans[key] = Plan.from_lists(lengths, self.slots, num_slots=self.num_slots, device=x.device)
        return self.plans[key]


class LoRAInjector:
    """Adds the adapters' delta to the outputs of a frozen model's target layers.

    The base model's module tree and state_dict stay as they are; with no adapter set its outputs are bit-identical.

    Args:
        base_model: the frozen model.
        targets: what `find_targets` found in it.
        answers_only: adapters act where answers are said, not on prompts: at each sequence's last token, which holds
            for a prompt and for one token after another behind it, or where `answering` says.

    Raises:
        ValueError: if a target's path is no nn.Linear of that shape in this model.
    """

    def __init__(self, base_model: nn.Module, targets: Sequence[LoRATarget], *, answers_only: bool = False) -> None:
        import torch._dynamo.config  # takes seconds, where transformers' models have not imported it already

        # torch.compile by default guards no hook nor what it reads: a compiled base model would go on as it was traced
        # first, without any adapter, and a layer with a hook would run the graph of one without.
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        self.targets = tuple(targets)
        self.answers_only = answers_only
        self._answering: Tensor | None = None
        self._active: AdapterPool | None = None
        self._modules = {
            target.name: [(place, _target_module(base_model, place)) for place in target.modules()]
            for target in self.targets
        }
        self._hooks = [
            module.register_forward_hook(partial(self._add_delta, name, place.layer))
            for name, modules in self._modules.items()
            for place, module in modules
        ]

    def set(
        self, A: dict[str, Tensor], B: dict[str, Tensor], slots: Sequence[Sequence[int]], *, scaling: float
    ) -> None:
        """Activates pools of LoRA blocks until `clear()`, differentiably.

        They must stay until after backward: checkpointed layers run their forward again there. With gradient
        checkpointing use use_reentrant=False; the reentrant kind walks back through whatever produced A and B once per
        layer, which torch refuses, unless A and B are leaves.

        Args:
            A, B: target name to pool, [slots, L, R, d_in] and [slots, L, R, d_out].
            slots: the slot ids of each sequence of the batch, in any order; an empty list means no adapter.
            scaling: factor on BA.

        Raises:
            ValueError: if names, shapes or ids do not fit.
        """
        names = {target.name for target in self.targets}
        if set(A) != names or set(B) != names:
            raise ValueError(
                f"Expected A and B for the targets {sorted(names)}, got {sorted(A)} and {sorted(B)}. "
                "Use the targets the injector was built with."
            )
        num_slots, _, rank, _ = next(iter(A.values())).shape
        for target in self.targets:
            layers = len(target.paths)
            expected = (num_slots, layers, rank, target.d_in), (num_slots, layers, rank, target.d_out)
            if (A[target.name].shape, B[target.name].shape) != expected:
                raise ValueError(
                    f"The pools of {target.name} do not fit: expected A {list(expected[0])} and B {list(expected[1])} "
                    f"([slots, L, R, d]), got {list(A[target.name].shape)} and {list(B[target.name].shape)}."
                )
        lists = [list(ids) for ids in slots]
        wrong = [ids for ids in lists if ids and not 0 <= min(ids) <= max(ids) < num_slots]
        if wrong:
            raise ValueError(f"Slot ids {wrong[0]} are not all in the pool: it has {num_slots} slots, from 0 on.")
        self._active = AdapterPool(
            A={target.name: _unbound(A[target.name], target, "d_in") for target in self.targets},
            B={target.name: _unbound(B[target.name], target, "d_out") for target in self.targets},
            slots=lists,
            num_slots=num_slots,
            shared=False,
            scaling=scaling,
        )

    def clear(self) -> None:
        """Back to the plain base model."""
        self._active = None

    @contextmanager
    def using(
        self, adapters: LoRAAdapter | None | Sequence[LoRAAdapter | None] | AdapterPool, *, gate_power: float = 0.0
    ) -> Iterator[None]:
        """The base model with these adapters inside the `with` block; afterwards what was active before.

        For inference: with gradient checkpointing, a backward pass after the block does not find the adapters any more.

        Args:
            adapters: what `pool` takes, or what it gave: then nothing is copied, and it has its own gate.
            gate_power: what `pool` takes.

        Raises:
            ValueError: as `pool`; on forward, if there is one adapter per sequence and the batch has another size.
        """
        active = adapters if isinstance(adapters, AdapterPool) else self.pool(adapters, gate_power=gate_power)
        previous, self._active = self._active, active
        try:
            yield
        finally:
            self._active = previous

    @contextmanager
    def answering(self, where: Tensor) -> Iterator[None]:
        """Inside the `with` block answers are said at these places, [N, S] bool; of use where adapters act there only.

        As adapters, the places must stay until after backward where layers are checkpointed.
        """
        previous, self._answering = self._answering, where
        try:
            yield
        finally:
            self._answering = previous

    def _in_answers(self, x: Tensor) -> Tensor:
        """x with zeros, which no adapter adds anything to, where no answer is said."""
        where = self._answering
        if where is not None and where.shape == x.shape[:-1]:
            return x * where.to(x.device)[..., None]
        if x.ndim < 3 or x.shape[1] == 1:
            return x
        return torch.cat([torch.zeros_like(x[:, :-1]), x[:, -1:]], dim=1)

    def remove(self) -> None:
        """Takes the hooks away: the base model is as it was before, and this injector is of no further use."""
        self.clear()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def pool(
        self, adapters: LoRAAdapter | None | Sequence[LoRAAdapter | None], *, gate_power: float = 0.0
    ) -> AdapterPool | None:
        """Copies adapters to the layers they go to. Kept, the result is activated and taken out again at no cost.

        Args:
            adapters: one adapter for all sequences of any batch, None for the plain base model, or one adapter or
                None for each sequence. The adapters may be on any device; a layer's weights are moved to the layer.
            gate_power: of a chunk's routing score, relative to the highest one's, that weights the chunk for every
                token, module by module (see `lora_delta`'s gate). The bias block is not weighted. 0: all chunks alike,
                as plain LoRA has them.

        Returns:
            The pool, for `using`; None if there is no adapter.

        Raises:
            ValueError: if an adapter is for other targets, or adapters differ in scaling; gated, if they differ in rank
                per chunk, or chunks are not as they were generated any more.
        """
        shared = adapters is None or isinstance(adapters, LoRAAdapter)
        adapters = [adapters] if adapters is None or isinstance(adapters, LoRAAdapter) else list(adapters)
        distinct = list({id(adapter): adapter for adapter in adapters if adapter is not None}.values())
        if not distinct:
            return None
        for adapter in distinct:
            if adapter.targets != self.targets:
                raise ValueError(
                    f"The adapter is for {_summary(adapter.targets)}, the injector for {_summary(self.targets)}, or "
                    "their paths differ. Use an adapter made for this base model and these target modules."
                )
        scalings = {adapter.scaling for adapter in distinct}
        if len(scalings) > 1:
            raise ValueError(
                f"Adapters used together must agree in scaling, got {sorted(scalings)}. Use adapters of one "
                "hypernetwork."
            )

        if gate_power:
            return self._gated(adapters, shared, gate_power)

        # Without documents and without a bias block, an adapter is the plain base model.
        distinct = [adapter for adapter in distinct if adapter.rank]
        if not distinct:
            return None

        # A slot has one rank for all. A block of a larger one, such as a compressed adapter's, is cut into several.
        rank = math.gcd(*(adapter.rank_per_chunk for adapter in distinct))
        # Every chunk is a slot; so is every bias block, once for all adapters that hold the same memory.
        parts: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
        num_slots, bias_slots, slots_of = 0, {}, {}
        for adapter in distinct:
            parts.append((adapter.A, adapter.B))
            per_block = adapter.rank_per_chunk // rank
            ids = list(range(num_slots, num_slots + adapter.num_chunks * per_block))
            num_slots += len(ids)
            slots_of[id(adapter)] = ids
            if not adapter.bias_rank:
                continue
            biases = [bias for blocks in (adapter.bias_A, adapter.bias_B) for bias in blocks.values()]
            key = tuple((bias.data_ptr(), bias.stride(), bias.dtype, bias.device) for bias in biases)
            if key not in bias_slots:
                bias_slots[key] = list(range(num_slots, num_slots + per_block))
                num_slots += per_block
                parts.append(
                    ({n: A[None] for n, A in adapter.bias_A.items()}, {n: B[None] for n, B in adapter.bias_B.items()})
                )
            slots_of[id(adapter)] = ids + bias_slots[key]

        def per_layer(index: int, width: str, name: str) -> dict[int, Tensor]:
            return {
                place.layer: torch.cat(
                    [
                        rearrange(
                            part[index][name][:, place.layer, :, : getattr(place, width)].to(module.weight.device),
                            "c (n r) d -> (c n) r d",
                            r=rank,
                        )
                        for part in parts
                    ]
                )
                for place, module in self._modules[name]
            }

        return AdapterPool(
            A={target.name: per_layer(0, "d_in", target.name) for target in self.targets},
            B={target.name: per_layer(1, "d_out", target.name) for target in self.targets},
            slots=[slots_of.get(id(adapter), []) for adapter in adapters],
            num_slots=num_slots,
            shared=shared,
            scaling=distinct[0].scaling,
        )

    def _gated(self, adapters: Sequence[LoRAAdapter | None], shared: bool, gate_power: float) -> AdapterPool | None:
        """A pool of the chunks, gated, and with it one of the shared blocks."""
        parts: dict[int, tuple[LoRAAdapter, LoRAAdapter]] = {}
        for adapter in adapters:
            if adapter is not None and id(adapter) not in parts:
                adapter.check_keys("gated")
                parts[id(adapter)] = (
                    replace(adapter, bias_A=_no_rows(adapter.bias_A, 1), bias_B=_no_rows(adapter.bias_B, 1)),
                    replace(adapter, A=_no_rows(adapter.A, 0), B=_no_rows(adapter.B, 0)),
                )
        ranks = {chunks.rank_per_chunk for chunks, _ in parts.values() if chunks.num_chunks}
        if len(ranks) > 1:
            raise ValueError(
                f"Adapters gated together must agree in rank per chunk, got {sorted(ranks)}. Use adapters of one "
                "hypernetwork."
            )
        chunks, blocks = (
            self.pool(given[0] if shared else given)
            for given in zip(*(parts.get(id(adapter), (None, None)) for adapter in adapters), strict=True)
        )
        return blocks if chunks is None else replace(chunks, gate_power=gate_power, ungated=blocks)

    def _add_delta(
        self, name: str, layer: int, module: nn.Module, inputs: tuple[Tensor], output: Tensor
    ) -> Tensor | None:
        active = self._active
        if active is None:
            return None  # torch keeps the output as it is
        (x,) = inputs
        if self.answers_only:
            x = self._in_answers(x)
        y = output.flatten(0, -2)
        for pool in filter(None, (active, active.ungated)):
            y = lora_delta(
                y,
                x.flatten(0, -2),
                pool.A[name][layer],
                pool.B[name][layer],
                pool.plan(x),
                scaling=pool.scaling,
                gate=pool.gate_power,
            )
        return y.view(output.shape)


def _summary(targets: Sequence[LoRATarget]) -> str:
    return ", ".join(f"{t.name} ({t.d_in} to {t.d_out}, {len(t.paths)} layers)" for t in targets)


def _no_rows(tensors: dict[str, Tensor], axis: int) -> dict[str, Tensor]:
    return {name: tensor.narrow(axis, 0, 0) for name, tensor in tensors.items()}


def _unbound(pool: Tensor, target: LoRATarget, width: str) -> dict[int, Tensor]:
    """[slots, L, R, d] to layer -> [slots, R, d of that layer]."""
    # One unbind for all layers: its backward stacks the layers' gradients, while indexing each layer would add up as
    # many pool-sized ones as there are layers.
    layers = pool.unbind(1)
    return {place.layer: layers[place.layer][..., : getattr(place, width)] for place in target.modules()}


def _target_module(base_model: nn.Module, place: LayerTarget) -> nn.Linear:
    try:
        module = base_model.get_submodule(place.path)
    except AttributeError as error:
        raise ValueError(
            f"{type(base_model).__name__} has no module {place.path!r}. "
            "Give the base model that these targets were found in, or find them in this one (find_targets)."
        ) from error
    if not isinstance(module, nn.Linear) or (module.in_features, module.out_features) != (place.d_in, place.d_out):
        raise ValueError(
            f"Expected {place.path!r} to be an nn.Linear from {place.d_in} to {place.d_out} features, got {module}. "
            "Give the base model that these targets were found in, or find them in this one (find_targets)."
        )
    return module
