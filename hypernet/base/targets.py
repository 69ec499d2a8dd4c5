"""LoRATarget, find_targets: which linear layers of a base model get LoRA weights, found block by block.

    decoder, name = find_blocks(base_model)               # the text decoder and the name of its list of blocks
    targets = find_targets(base_model, ["down_proj"])     # one module per block, with its path and widths

Only the text decoder's blocks are looked through, so a vision tower below the same wrapper is never touched. A block
may lack a module (hybrid models) or have it in another width.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # takes seconds, and adapters need this module without it

# What attention and MLP modules are called where several projections are one matrix: asked-for name -> fused names.
_FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), ("qkv_proj", "query_key_value", "Wqkv", "c_attn", "att_proj")),
    **dict.fromkeys(("gate_proj", "up_proj"), ("gate_up_proj", "gate_and_up_proj", "dense_h_to_4h", "wi", "Wi")),
}


class LayerTarget(NamedTuple):
    """One linear module: layer (its place among the adapted blocks), module path, d_in, d_out."""

    layer: int
    path: str
    d_in: int
    d_out: int


class LoRATarget(NamedTuple):
    """One kind of linear layer that gets LoRA weights, in the blocks of the base model that have it."""

    name: str  # last part of the module path: "down_proj"
    paths: tuple[str | None, ...]  # module path in each adapted block, in order; None where a block has no such module
    d_in: int  # the widest block's
    d_out: int
    widths: tuple[tuple[int, int] | None, ...] | None = None  # (d_in, d_out) of each block; None: all are alike

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        """A target from its fields as JSON or YAML give them back.

        Raises:
            KeyError, TypeError, ValueError: the fields are no target's.
        """
        widths = fields.get("widths")
        target = cls(
            str(fields["name"]),
            tuple(None if path is None else str(path) for path in fields["paths"]),
            int(fields["d_in"]),
            int(fields["d_out"]),
            None if widths is None else tuple(pair and (int(pair[0]), int(pair[1])) for pair in widths),
        )
        if unknown := sorted(fields.keys() - set(cls._fields)):
            raise KeyError(f"a target has no {unknown[0]}")
        if target.widths is not None and len(target.widths) != len(target.paths):
            raise ValueError(f"{len(target.widths)} widths for {len(target.paths)} layers")
        return target

    def plain(self) -> dict[str, Any]:
        """The fields as lists and numbers, for YAML and JSON; `of` gives the target back."""
        fields = {**self._asdict(), "paths": list(self.paths)}
        widths = fields.pop("widths")
        return fields if widths is None else {**fields, "widths": [pair and list(pair) for pair in widths]}

    def modules(self) -> Iterator[LayerTarget]:
        """The modules that exist, in layer order."""
        for layer, path in enumerate(self.paths):
            if path is not None:
                width = self.widths[layer] if self.widths else None
                yield LayerTarget(layer, path, *(width or (self.d_in, self.d_out)))


class EndOfPass(Exception):
    """Raised by a hook: ends a forward pass whose rest nobody reads."""


def find_blocks(base_model: "PreTrainedModel") -> tuple[nn.Module, str]:
    """The text decoder of a causal LM and the name of its list of blocks: `layers`, `h`, ...

    Raises:
        ValueError: there is no nn.ModuleList with one entry per layer.
    """
    decoder = base_model.get_decoder()
    num_layers = base_model.config.get_text_config().num_hidden_layers
    for name, child in decoder.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == num_layers:
            return decoder, name
    raise ValueError(
        f"Found no list of {num_layers} blocks in {type(decoder).__name__}, "
        f"which has {[name for name, _ in decoder.named_children()]}. "
        "A decoder is needed whose blocks are one nn.ModuleList."
    )


def adapted_layers(base_model: "PreTrainedModel", wanted: Sequence[int] | float | None) -> list[int]:
    """Numbers of the text decoder's blocks to adapt.

    Args:
        wanted: the blocks, ascending from 0; or the share of all that is adapted, the last ones, above 0 and at most 1;
            None: all.

    Raises:
        ValueError: for blocks that there are not, or another share.
    """
    decoder, name = find_blocks(base_model)
    every = list(range(len(getattr(decoder, name))))
    if wanted is None:
        return every
    if type(wanted) is float and 0 < wanted <= 1:
        return every[-max(1, round(wanted * len(every))) :]
    if isinstance(wanted, Sequence) and not isinstance(wanted, str) and wanted and all(type(i) is int for i in wanted):
        if sorted({*wanted} & {*every}) == list(wanted):
            return list(wanted)
    raise ValueError(
        f"Wanted layers to adapt as an ascending list from 0 to {every[-1]}, or the share of the last ones such as "
        f"0.5, got {wanted}."
    )


def find_targets(
    base_model: "PreTrainedModel", target_modules: Sequence[str], *, layers: Sequence[int] | float | None = None
) -> list[LoRATarget]:
    """The nn.Linear modules with these names, at most one per block of the text decoder, sorted by name.

    Args:
        base_model: a transformers causal LM, also one below a multimodal wrapper, also quantised.
        target_modules: last parts of module paths, such as "down_proj".
        layers: the blocks to adapt, see `adapted_layers`.

    Raises:
        ValueError: for layers that there are not; for a name that no nn.Linear of a block has, that a block has more
            than once, or whose module several blocks share.
    """
    decoder, blocks_name = find_blocks(base_model)
    stem = next(path for path, module in base_model.named_modules() if module is decoder)
    stem = ".".join(filter(None, (stem, blocks_name)))
    blocks = getattr(decoder, blocks_name)
    layers = adapted_layers(base_model, layers)
    by_name: dict[str, list[tuple[int, str, nn.Linear]]] = {}
    for place, layer in enumerate(layers):
        for path, module in blocks[layer].named_modules():
            if isinstance(module, nn.Linear):
                entry = (place, f"{stem}.{layer}.{path}", module)
                by_name.setdefault(path.rpartition(".")[2], []).append(entry)

    # A string is a sequence of letters, and each would be looked up as a name.
    names = [target_modules] if isinstance(target_modules, str) else sorted(set(target_modules))
    if not names:
        raise ValueError(f"No target modules given. Set target_modules to some of {sorted(by_name)}.")
    return [_target(base_model, name, by_name, layers) for name in names]


def _target(
    base_model: nn.Module, name: str, by_name: Mapping[str, list[tuple[int, str, nn.Linear]]], layers: Sequence[int]
) -> LoRATarget:
    if not by_name:
        kinds = sorted({type(module).__name__ for module in base_model.modules() if hasattr(module, "weight")})
        raise ValueError(
            f"The blocks of {type(base_model).__name__} hold no nn.Linear, which alone can take LoRA weights; they are "
            f"made of {kinds}. Take another base model."
        )
    if name not in by_name:
        fused = sorted(set(_FUSED.get(name, ())) & set(by_name))
        hint = f"It is part of {fused[0]} here, one matrix for several projections. " if fused else ""
        raise ValueError(
            f"No nn.Linear named {name!r} in the blocks of {type(base_model).__name__}; they have {sorted(by_name)}. "
            f"{hint}Set target_modules to some of these."
        )
    paths: list[str | None] = [None] * len(layers)
    widths: list[tuple[int, int] | None] = [None] * len(layers)
    owner: dict[int, str] = {}
    for layer, path, module in by_name[name]:
        if paths[layer] is not None:
            raise ValueError(
                f"Layer {layers[layer]} has several modules named {name!r}, such as {paths[layer]} and {path}. "
                "Set target_modules to names that occur at most once in each layer."
            )
        if id(module) in owner:
            raise ValueError(
                f"{owner[id(module)]} and {path} are one and the same module, so their layers cannot get separate "
                "weights. Leave it out of target_modules."
            )
        owner[id(module)] = path
        paths[layer] = path
        widths[layer] = (module.in_features, module.out_features)
    found = [pair for pair in widths if pair is not None]
    d_in, d_out = (max(sizes) for sizes in zip(*found, strict=True))
    return LoRATarget(name, tuple(paths), d_in, d_out, None if len(set(found)) == 1 else tuple(widths))
