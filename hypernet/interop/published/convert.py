"""Checkpoints in the format of the Doc-to-LoRA authors, checked and fitted to a base model.

    published = read_published(find_published("hub:SakanaAI/doc-to-lora/gemma_demo"))
    hypernetwork, context_encoder = published.fitted(base_model)

`hypernet.interop.checkpoints` converts such a file to safetensors and YAML, once.
"""

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hypernet.base.targets import LoRATarget, find_targets
from hypernet.interop.published.locate import PUBLISHED_FILE
from hypernet.interop.published.messages import one_line, shortened
from hypernet.interop.published.unpickler import PlainConfig, Refused, WrongFile, load_plain
from hypernet.model.hypernetwork import HyperNetwork

log = logging.getLogger(__name__)

PUBLISHED_KINDS = ("per_layer_activations", "early_exit", "embed_only")  # of context encoders
HEAD_DIM = 128  # the format has no place for another
MAX_LAYERS = 1000


class Published(NamedTuple):
    """What a published checkpoint holds, checked: it fits together, and HyperNetwork can express it.

    base_model: hub name or path of the base model it was trained with. targets: name to (d_in, d_out). num_layers: L.
    context_encoder: {"kind": ..., "layer_idx": ...} as recorded. sizes: HyperNetwork's arguments without targets.
    weights: HyperNetwork's state dict, float32.
    """

    path: Path
    base_model: str
    context_encoder: dict[str, Any]
    targets: dict[str, tuple[int, int]]
    num_layers: int
    sizes: dict[str, Any]
    weights: dict[str, Tensor]

    def fitted(self, base_model: nn.Module, *, name: str = "this base model") -> tuple[HyperNetwork, dict[str, Any]]:
        """The hypernetwork with the targets' paths in this base model, and the context encoder's settings.

        Args:
            base_model: a transformers causal LM; its weights are not read, it may be on the meta device.
            name: what errors call it.

        Raises:
            ValueError: it has another number of layers, another width, or lacks a target.
        """
        config = base_model.config.get_text_config()
        wanted = {"layers": self.num_layers, "hidden size": self.sizes["feature_dim"]}
        found = {"layers": config.num_hidden_layers, "hidden size": config.hidden_size}
        if wanted != found:
            raise self._misfit(name, _listed(wanted), _listed(found))
        targets = find_targets(base_model, list(self.targets))
        for target in targets:
            d_in, d_out = self.targets[target.name]
            if None in target.paths or target.widths is not None or (target.d_in, target.d_out) != (d_in, d_out):
                uneven = target.widths is not None or None in target.paths
                got = "not the same in all layers" if uneven else f"[{target.d_in} -> {target.d_out}]"
                raise self._misfit(name, f"{target.name} [{d_in} -> {d_out}]", got)
        encoder = dict(self.context_encoder)
        if encoder["kind"] == "early_exit":
            # The authors cut the list of blocks with [:layer_idx], where None is the whole model.
            encoder["layer_idx"] = len(range(self.num_layers)[: encoder["layer_idx"]])
        return _network(self.sizes, targets, self.weights), encoder

    def _misfit(self, name: str, wanted: str, found: str) -> ValueError:
        return ValueError(
            f"The checkpoint {self.path} was made for {self.base_model} with {wanted}, but {name} has {found}. "
            "Give the base model it was trained with."
        )


def read_published(path: str | Path) -> Published:
    """Reads a published checkpoint file, executing nothing of it.

    Args:
        path: the file, see `find_published`.

    Raises:
        ValueError: it is no such file, is cut off or changed, asks for anything but plain data and tensors, or
            describes a hypernetwork that this package cannot express.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"There is no file {path}. Name a {PUBLISHED_FILE}.")
    try:
        content = load_plain(path)
    except Refused as error:
        raise ValueError(
            f"{path} is refused: {shortened(error)}, which no Doc-to-LoRA checkpoint needs. "
            "Nothing of it was executed. Get the file from its authors."
        ) from error
    except WrongFile as error:
        raise ValueError(f"{path} {shortened(error)}") from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged zip or pickle fails in a dozen ways; all of them mean this
        raise ValueError(f"{path} is damaged or cut off ({one_line(error)}). Copy or download it again.") from error
    try:
        return _interpreted(path, content)
    except WrongFile as error:
        raise ValueError(f"{path} {shortened(error)}") from error
    except MemoryError:
        raise
    except Exception as error:  # a config that holds something unforeseen
        raise ValueError(f"{path} cannot be understood ({one_line(error)}). Get the file from its authors.") from error


_PERCEIVER = "aggregator.perceiver."
_ENCODER = _PERCEIVER + "encoder."
_COMPILED = "_orig_mod."


def _interpreted(path: Path, content: Any) -> Published:
    """The tensors under HyperNetwork's names, and its sizes, read off the tensors and compared with the configs."""
    tensors, base_model, config, encoder = _parts(content)
    lora, aggregator = config.get("lora_config"), config.get("aggregator_config")
    if not isinstance(lora, PlainConfig) or not isinstance(aggregator, PlainConfig):
        raise WrongFile("has no lora_config or aggregator_config in hypernet_config, as every published file has.")
    kind = _aggregator_and_encoder(config, aggregator, encoder, base_model)

    def shape(key: str, ndim: int) -> tuple[int, ...]:
        if key not in tensors or tensors[key].ndim != ndim or 0 in tensors[key].shape:
            got = list(tensors[key].shape) if key in tensors else "nothing"
            raise WrongFile(f"should have {key} with {ndim} axes, got {got}. Is it a Doc-to-LoRA checkpoint?")
        return tuple(tensors[key].shape)

    names = sorted(key.removeprefix("bias_A.") for key in tensors if key.startswith("bias_A."))
    if not names:
        raise WrongFile("has no bias_A.<target>, so its target modules are unknown. Is it a Doc-to-LoRA checkpoint?")
    widths = {name: (shape(f"bias_A.{name}", 3)[2], shape(f"bias_B.{name}", 3)[2]) for name in names}
    num_layers, rank, _ = shape(f"bias_A.{names[0]}", 3)
    if num_layers > MAX_LAYERS:
        raise WrongFile(f"is for a base model with {num_layers} layers, which there is none of. Download it again.")
    projection, feature_dim = shape(_PERCEIVER + "modality_projection.gate_proj.weight", 2)
    num_latents, latent_dim = shape(_ENCODER + "latents_q", 2)
    num_outputs = shape(_PERCEIVER + "decoder.latents_q", 2)[0]
    layers = _count(tensors, _ENCODER + "layers.")
    is_cross = [f"{_ENCODER}layers.{i}.input_context_layernorm.weight" in tensors for i in range(layers)]
    num_blocks = sum(is_cross)
    per_block = layers // num_blocks if num_blocks else 0
    if not num_blocks or is_cross != [i % per_block == 0 for i in range(layers)]:
        raise WrongFile("has encoder layers in another order than a cross-attention and its self-attentions, repeated.")
    shared = bool(aggregator.get("shared_weights"))
    pre_head = _count(tensors, "layers.")
    tensors = _unshared_pre_head(tensors, pre_head, num_layers)
    hidden = shape("layers.0.layers.1.weight", 3)[2] if pre_head else 4 * latent_dim

    def multiple(size: int, unit: int, what: str) -> int:
        if size % unit:
            raise WrongFile(f"has {what} {size}, which is no multiple of {unit}, so it cannot be expressed.")
        return size // unit

    first = f"{_ENCODER}layers.0."
    queries = {len(names) * rank: num_layers, num_layers * len(names) * rank: 1}
    if num_outputs not in queries:
        raise WrongFile(
            f"has {num_outputs} output queries; it should have one for each of {len(names)} targets and {rank} ranks "
            f"(and {num_layers} layers). per_rank_gen=false is not supported."
        )
    sizes = {
        "feature_dim": feature_dim,
        "num_maps": queries[num_outputs],
        "rank": rank,
        "scaling": _scaling(lora),
        "aggregator": {
            "name": "perceiver",
            "latent_dim": latent_dim,
            "num_latents": num_latents,
            "num_blocks": num_blocks,
            "num_self_attention_blocks": per_block - 1,
            "share_blocks": shared,
            "num_heads": multiple(shape(first + "self_attn.q_proj.weight", 2)[0], HEAD_DIM, "query size"),
            "num_kv_heads": multiple(shape(first + "self_attn.k_proj.weight", 2)[0], HEAD_DIM, "key size"),
            "head_dim": HEAD_DIM,
            "mlp_multiple": multiple(shape(first + "mlp.gate_proj.weight", 2)[0], latent_dim, "MLP size"),
            "projection_multiple": multiple(projection, feature_dim, "projection size"),
        },
        "num_pre_head_blocks": pre_head,
        "pre_head_multiple": multiple(hidden, latent_dim, "pre-head size"),
    }
    if (kind == "per_layer_activations") != (sizes["num_maps"] > 1) and num_layers > 1:
        raise WrongFile(f"has output queries for {sizes['num_maps']} feature maps, which {kind} does not give.")
    _compare(config, lora, aggregator, sizes, widths, num_layers)

    # Placeholders: where the targets lie is known once there is a base model.
    targets = [
        LoRATarget(name=name, paths=tuple(str(i) for i in range(num_layers)), d_in=d_in, d_out=d_out)
        for name, (d_in, d_out) in widths.items()
    ]
    try:
        with torch.device("meta"):
            network = HyperNetwork(targets=targets, **sizes)
    except ValueError as error:
        raise WrongFile(f"cannot be expressed: {one_line(error)}") from error
    weights = _renamed(tensors, network, limit=path.stat().st_size)
    if config.get("use_bias") is False:
        # The authors' code then leaves the bias block out; with B = 0 it adds nothing here.
        for name in names:
            weights[f"lora_head.bias_B.{name}"] = torch.zeros_like(weights[f"lora_head.bias_B.{name}"])
    return Published(
        path=path,
        base_model=base_model,
        context_encoder={"kind": kind} | ({"layer_idx": encoder.get("layer_idx")} if kind == "early_exit" else {}),
        targets=widths,
        num_layers=num_layers,
        sizes=sizes,
        weights=weights,
    )


def _parts(content: Any) -> tuple[dict[str, Tensor], str, PlainConfig, PlainConfig]:
    if not isinstance(content, dict):
        raise WrongFile("does not hold a dict of tensors, as a Doc-to-LoRA checkpoint does. Name another file.")
    tensors: dict[str, Tensor] = {}
    other = dict(content)
    for key, value in content.items():
        if isinstance(value, Tensor):
            name = key.replace(_COMPILED, "")
            if name in tensors:
                raise WrongFile(f"has {name} twice, with and without {_COMPILED}. Get the file from its authors.")
            tensors[name] = other.pop(key)
    base_model, config, encoder = (
        other.pop(key, None) for key in ("base_model_name_or_path", "hypernet_config", "ctx_encoder_args")
    )
    kinds = (
        ("base_model_name_or_path", base_model, str),
        ("hypernet_config", config, PlainConfig),
        ("ctx_encoder_args", encoder, PlainConfig),
    )
    for key, value, kind in kinds:
        if not isinstance(value, kind):
            raise WrongFile(f"has no {key}, so it is not a Doc-to-LoRA checkpoint. Name another file.")
    if other:
        raise WrongFile(f"also holds {shortened(min(other))}, which is unknown here. Is it a Doc-to-LoRA checkpoint?")
    return tensors, base_model, config, encoder


def _aggregator_and_encoder(config: PlainConfig, aggregator: PlainConfig, encoder: PlainConfig, base_model: str) -> str:
    """The context encoder's kind; refuses what the configs say and this package has not."""
    if (kind := aggregator.get("aggregator_type")) not in (None, "perceiver"):
        raise WrongFile(f"has the aggregator {shortened(kind)}; only perceiver is supported.")
    if config.get("extra_modules"):
        raise WrongFile("also generates norms (extra_modules), which is not supported.")
    kind = encoder.get("ctx_encoder_type")
    if kind not in PUBLISHED_KINDS:
        raise WrongFile(f"has the context encoder {shortened(kind)}; there are {', '.join(PUBLISHED_KINDS)}.")
    reader = encoder.get("ctx_encoder_model_name_or_path")
    if reader not in (None, base_model):
        raise WrongFile(f"reads documents with {shortened(reader)} instead of its base model, which is not supported.")
    layer_idx, last = encoder.get("layer_idx"), encoder.get("ctx_encoder_last_layer")
    if kind == "early_exit" and layer_idx is not None and (type(layer_idx) is not int or abs(layer_idx) > 10_000):
        raise WrongFile("has an early_exit whose layer_idx is no number of a layer.")
    if kind == "per_layer_activations" and last not in (None, aggregator.get("num_layers")):
        raise WrongFile("reads fewer layers than its base model has (ctx_encoder_last_layer), which is not supported.")
    if encoder.get("quantize_ctx_encoder") is True:
        log.warning(
            "This checkpoint was trained on features of a 4-bit base model; here they come from the base model as it "
            "is loaded, so its adapters differ a little from the authors'."
        )
    return kind


def _scaling(lora: PlainConfig) -> float:
    alpha = lora.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < 1e6:
        raise WrongFile("has no number lora_alpha in lora_config, so the scaling is unknown.")
    return float(alpha)  # the authors multiply by it and do not divide by the rank


def _compare(
    config: PlainConfig, lora: PlainConfig, aggregator: PlainConfig, sizes: Mapping, widths: Mapping, num_layers: int
) -> None:
    """Refuses configs that say another size than the tensors have; what a config leaves out is not compared."""
    perceiver = sizes["aggregator"]
    said_and_found: list[tuple[str, Any, Any]] = [
        ("r", lora.get("r"), sizes["rank"]),
        ("latent_size", config.get("latent_size"), perceiver["latent_dim"]),
        ("num_pre_head_layers", config.get("num_pre_head_layers"), sizes["num_pre_head_blocks"]),
        ("num_layers", aggregator.get("num_layers"), num_layers),
        ("num_modules", aggregator.get("num_modules"), len(widths)),
        ("feature_size", aggregator.get("feature_size"), sizes["feature_dim"]),
        ("n_latent_queries", aggregator.get("n_latent_queries"), perceiver["num_latents"]),
        ("num_blocks", aggregator.get("num_blocks"), perceiver["num_blocks"]),
        (
            "num_self_attn_per_block",
            aggregator.get("num_self_attn_per_block"),
            perceiver["num_self_attention_blocks"],
        ),
    ]
    modules = lora.get("target_modules")
    if isinstance(modules, (set, list, tuple)) and all(isinstance(name, str) for name in modules):
        said_and_found.append(("target_modules", sorted(modules), sorted(widths)))
    match config.get("feature_sizes"):
        case (dict() as d_in, dict() as d_out):
            for name, pair in widths.items():
                said_and_found.append((f"feature_sizes of {name}", (d_in.get(name), d_out.get(name)), pair))
    layers = config.get("layer_indices")
    if isinstance(layers, (Tensor, list, tuple, range)):
        # Adapters for some layers only: the authors' code has the field, but its parts then disagree on their number.
        listed = (
            layers.tolist()
            if isinstance(layers, Tensor) and layers.numel() <= MAX_LAYERS
            else list(layers[:MAX_LAYERS])
        )
        said_and_found.append(("layer_indices", listed, list(range(num_layers))))
    for name, said, found in said_and_found:
        if said is not None and said != found:
            raise WrongFile(
                f"says {name} = {shortened(said)}, but its tensors have {shortened(found)}. Download it again."
            )


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many of 0, 1, ... follow the prefix in the keys."""
    found = {key.removeprefix(prefix).partition(".")[0] for key in tensors if key.startswith(prefix)}
    if found != {str(i) for i in range(len(found))}:
        raise WrongFile(f"has keys {prefix}0, 1, ... with gaps between the numbers. Download it again.")
    return len(found)


def _unshared_pre_head(tensors: dict[str, Tensor], num_blocks: int, num_layers: int) -> dict[str, Tensor]:
    """The same tensors; pre-head blocks that serve all layers (per_layer_processing=false) once for each layer."""
    result = dict(tensors)
    for block in range(num_blocks):
        # LayerNorm, dropout, Linear, SiLU, dropout, Linear, LayerNorm there; without the dropouts here.
        for theirs, ours in ((0, 0), (2, 1), (5, 3), (6, 4)):
            for part in ("weight", "bias"):
                tensor = result.pop(f"layers.{block}.mlp.{theirs}.{part}", None)
                if tensor is None:
                    continue
                if ours in (1, 3) and part == "weight":
                    tensor = tensor.T.expand(num_layers, *reversed(tensor.shape))
                elif ours in (1, 3):
                    tensor = tensor.view(1, 1, 1, 1, -1).expand(1, num_layers, 1, 1, -1)
                result[f"layers.{block}.layers.{ours}.{part}"] = tensor
    return result


def _renamed(tensors: Mapping[str, Tensor], network: HyperNetwork, *, limit: int) -> dict[str, Tensor]:
    """The network's state dict, float32, no two tensors share memory; `limit`: bytes they may have together."""
    # A shared block is in the file under each of its places.
    order = network.aggregator.encoder.order
    expected = {name: tensor.shape for name, tensor in network.state_dict().items()}
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = "aggregator." + key.removeprefix(_PERCEIVER) if key.startswith(_PERCEIVER) else "lora_head." + key
        if match := re.match(r"aggregator\.encoder\.layers\.(\d+)\.", name):
            name = f"aggregator.encoder.layers.{order[int(match[1])]}.{name[match.end() :]}"
        if name not in expected:
            raise WrongFile(f"also holds {shortened(key)}, which has no place in a network of its sizes.")
        if tensor.shape != expected[name] or not tensor.is_floating_point():
            raise WrongFile(
                f"has {shortened(key)} {list(tensor.shape)} of {tensor.dtype}, but floating-point "
                f"{list(expected[name])} fits its other tensors. Download it again."
            )
        if name in found and not torch.equal(found[name], tensor):
            raise WrongFile(f"should share its blocks (shared_weights), but {shortened(key)} differs from the first.")
        found.setdefault(name, tensor)
    if missing := sorted(expected.keys() - found.keys()):
        raise WrongFile(f"lacks the tensor of {missing[0]}. Download it again.")
    stored = [
        tensor.itemsize * math.prod(n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step)
        for tensor in found.values()
    ]
    if sum(stored) > limit:
        raise WrongFile("describes more numbers than it holds. Get the file from its authors.")
    weights = {}
    owners: set[int] = set()
    for name in expected:
        tensor = found[name].to(torch.float32)
        storage = tensor.untyped_storage()
        alone = storage.nbytes() == tensor.nbytes and tensor.is_contiguous() and storage.data_ptr() not in owners
        weights[name] = tensor if alone else tensor.clone(memory_format=torch.contiguous_format)
        owners.add(weights[name].untyped_storage().data_ptr())
    return weights


def _network(sizes: dict[str, Any], targets: list[LoRATarget], weights: dict[str, Tensor]) -> HyperNetwork:
    with torch.device("meta"):
        network = HyperNetwork(targets=targets, **sizes)
    network.load_state_dict(weights, assign=True)
    return network


def _listed(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in numbers.items())
