"""merge, unmerge, merged: an adapter's delta added to the base model's own weights, and taken away again.

    with merged(base_model, adapter):     # afterwards the weights are bit-identical to before
        base_model.generate(...)
    merge(base_model, adapter)            # to be saved or served as a plain model
    unmerge(base_model, adapter)          # the weights of before, up to one rounding

A merged model costs nothing extra per token but answers with this one adapter only; `LoRAInjector` is for many.
`DocToLoRA` reads no document and uses no other adapter while one is merged.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hypernet.adapters.adapter import LoRAAdapter, check_is_adapter
from hypernet.base.targets import LayerTarget

# float8 and integers are storage formats of quantised weights: adding to them as they are would lose the delta.
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# On the base model, so that it follows copies of the weights: content id → hypernetwork whose bias block is in them.
_MERGED = "_merged_adapters"


def merge(base_model: nn.Module, adapter: LoRAAdapter) -> None:
    """Adds scaling * BᵀA of chunks and bias block to the target weights, in float32, rounded once to their dtype.

    One module's delta is dense at a time. Either all weights change or, on an error, none (up to rounding).

    Args:
        base_model: the model the adapter was made for, with plain floating point weights.
        adapter: on any device; of low precision, it is summed in float32 too. Its chunks are joined as the hypernetwork
            was trained (`LoRAAdapter.fused`); fuse it before for another way.

    Raises:
        ValueError: a target is missing, has another shape, is quantised, shared with another module or on the meta
            device; the adapter, or another one with the same bias block, is merged already; or a weight overflows.
    """
    check_is_adapter(adapter)
    adapter = adapter.fused()
    weights = _target_weights(base_model, adapter)
    already, identity = _merged_into(base_model), adapter.content_id()
    generator = adapter.provenance["generator"] if adapter.bias_rank else None  # no bias block counts twice
    if identity in already:
        raise ValueError("This adapter is merged into the base model already. Call unmerge() first to change it.")
    if generator is not None and generator in already.values():
        raise ValueError(
            f"An adapter of the same hypernetwork ({generator}) is merged into the base model already, and the bias "
            "block would count twice. Call unmerge() first, and merge their sum."
        )
    _add(weights, adapter, sign=1)
    setattr(base_model, _MERGED, {**already, identity: generator})


def unmerge(base_model: nn.Module, adapter: LoRAAdapter) -> None:
    """Takes away what `merge` added, exact to the rounding of the weights' dtype. For bit-exactness use `merged`.

    Raises:
        ValueError: the adapter is not merged into this base model; or as `merge`.
    """
    check_is_adapter(adapter)
    adapter = adapter.fused()
    weights = _target_weights(base_model, adapter)
    already, identity = _merged_into(base_model), adapter.content_id()
    if identity not in already:
        raise ValueError(
            f"This adapter is not merged into the base model, {len(already)} others are. Unmerge what was merged."
        )
    _add(weights, adapter, sign=-1)
    setattr(base_model, _MERGED, {key: value for key, value in already.items() if key != identity})


@contextmanager
def merged(base_model: nn.Module, adapter: LoRAAdapter) -> Iterator[None]:
    """The base model with the adapter merged inside the `with` block; then its original weights, bit by bit.

    Copies of the target weights are kept meanwhile, on their devices.

    Raises:
        ValueError: as `merge`.
    """
    check_is_adapter(adapter)
    weights = _target_weights(base_model, adapter)
    originals = [(weight, weight.detach().clone()) for _, _, weight in weights]
    already = _merged_into(base_model)
    merge(base_model, adapter)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, original in originals:
                weight.copy_(original)
        setattr(base_model, _MERGED, already)


def has_merged(base_model: nn.Module) -> bool:
    """Whether an adapter is merged into this base model."""
    return bool(_merged_into(base_model))


def _merged_into(base_model: nn.Module) -> dict[str, str | None]:
    return getattr(base_model, _MERGED, {})


def _add(weights: list[tuple[str, LayerTarget, Tensor]], adapter: LoRAAdapter, *, sign: int) -> None:
    done: list[tuple[Tensor, str, LayerTarget]] = []
    concatenated = adapter.concatenated()

    def add(weight: Tensor, name: str, module: LayerTarget, sign: int) -> Tensor:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        A, B = (rows[module.layer].to(weight.device, dtype) for rows in concatenated[name])
        delta = B[:, : module.d_out].T @ A[:, : module.d_in]
        return torch.add(weight.to(dtype), delta, alpha=sign * adapter.scaling).to(weight.dtype)

    with torch.no_grad():
        try:
            for name, module, weight in weights:
                changed = add(weight, name, module, sign)
                if not changed.isfinite().all():
                    raise ValueError(
                        f"{module.path}.weight would not be finite in {weight.dtype}: adapter or weight is not, or "
                        "the sum is too large. Merge into a bfloat16 or float32 model."
                    )
                weight.copy_(changed)
                done.append((weight, name, module))
        except BaseException:
            for weight, name, module in done:
                weight.copy_(add(weight, name, module, -sign))
            raise


def _target_weights(base_model: nn.Module, adapter: LoRAAdapter) -> list[tuple[str, LayerTarget, Tensor]]:
    """Target name, place and weight of every module the adapter is for, all of them fit to be changed in place."""
    hint = "Merge into the base model the adapter was made for."
    found: list[tuple[str, LayerTarget, Tensor]] = []
    for target in adapter.targets:
        for module in target.modules():
            try:
                layer = base_model.get_submodule(module.path)
            except AttributeError as error:
                raise ValueError(f"{type(base_model).__name__} has no module {module.path!r}. {hint}") from error
            if not isinstance(layer, nn.Linear):
                raise ValueError(f"Expected {module.path!r} to be an nn.Linear, got {type(layer).__name__}. {hint}")
            weight = layer._parameters.get("weight")
            # Quantised weights are tensor subclasses (torchao, bitsandbytes) or of integer dtype, parametrised ones are
            # no parameters of the layer.
            if type(weight) is not nn.Parameter or weight.dtype not in WEIGHT_DTYPES:
                what = type(layer).__name__ if weight is None else f"{type(weight).__name__} of {weight.dtype}"
                raise ValueError(
                    f"{module.path}.weight is quantised or not a plain parameter ({what}), so nothing can be added to "
                    "it. Load the base model without quantization, or use LoRAInjector."
                )
            if weight.is_meta:
                raise ValueError(f"{module.path}.weight is on the meta device: it has no values. Load it first.")
            if tuple(weight.shape) != (module.d_out, module.d_in):
                raise ValueError(
                    f"Expected {module.path}.weight of shape {[module.d_out, module.d_in]}, got {list(weight.shape)}. "
                    f"{hint}"
                )
            found.append((target.name, module, weight))
    _check_not_shared(base_model, {f"{module.path}.weight": weight for _, module, weight in found})
    return found


def _check_not_shared(base_model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Refuses weights whose memory other parameters or buffers use too: they would change with them."""

    def span(tensor: Tensor) -> tuple[torch.device, int, int]:
        # Up to the last element, so that views into one large buffer count as apart where they are.
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return tensor.device, tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize

    named = [*base_model.named_parameters(remove_duplicate=False), *base_model.named_buffers(remove_duplicate=False)]
    spans = [
        (*span(tensor), name)
        for name, tensor in named
        if tensor.numel() and type(tensor) in (nn.Parameter, Tensor) and not tensor.is_meta
    ]
    for name, weight in weights.items():
        device, start, end = span(weight)
        for other_device, other_start, other_end, other in spans:
            if other != name and other_device == device and other_start < end and start < other_end:
                raise ValueError(
                    f"{name} shares its memory with {other}, which would change too. Untie them (give one a copy), or "
                    "use LoRAInjector."
                )
