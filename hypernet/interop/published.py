"""Checkpoints in the format of the Doc-to-LoRA authors: found, read without executing anything, fitted to a base model.

    published = read_published(find_published("hub:SakanaAI/doc-to-lora/gemma_demo"))
    hypernetwork, context_encoder = published.fitted(base_model)

A `pytorch_model.bin` is a zip of tensors and a pickle, and a pickle is a program. Here it is interpreted with three
closed lists: its instructions, the names it may ask for, and what may be called. Nothing is ever imported for it; the
authors' dataclasses become `Record`s, tensors are rebuilt within the bounds of their storages.
`hypernet.interop.checkpoints` converts such a file to safetensors and YAML, once.
"""

import io
import logging
import math
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hypernet.base.targets import LoRATarget, find_targets
from hypernet.model.hypernetwork import HyperNetwork

log = logging.getLogger(__name__)

PUBLISHED_FILE = "pytorch_model.bin"
HUB_PREFIX = "hub:"
PUBLISHED_KINDS = ("per_layer_activations", "early_exit", "embed_only")  # of context encoders
HEAD_DIM = 128  # the format has no place for another
# A published file's pickle has 0.1 MB. Interpreted, a byte becomes up to 64 bytes of objects.
MAX_PICKLE_BYTES = 4 * 2**20
MAX_LAYERS = 1000
READ_BYTES = 2**24  # storages are read in pieces of this size: no second copy of a large one


class Record:
    """The fields of one of the authors' dataclasses."""

    def __init__(self, name: str):
        self.name = name
        self.fields: dict[str, Any] = {}

    def get(self, field: str) -> Any:
        """The field's value, None where the file has no such field."""
        return self.fields.get(field)


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


# Finding


def is_published(source: str | Path) -> bool:
    """Whether `source` names a published checkpoint: hub:..., a file, or a folder that has one in it or below."""
    if str(source).startswith(HUB_PREFIX):
        return True
    path = Path(source).expanduser()
    return path.is_file() or bool(_direct(path) or _below(path))


def find_published(source: str | Path) -> Path:
    """The file of a published checkpoint, on disk or fetched from the hub (or its cache, without network).

    Args:
        source: the file; a folder with it, or with checkpoint-N folders (the highest N is taken); or
            hub:owner/repository/name, the folder `name` of a repository.

    Raises:
        ValueError: there is none, there are several, or the hub cannot be reached and the cache lacks it.
    """
    text = str(source)
    if text.startswith(HUB_PREFIX):
        owner, repository, *names = text.removeprefix(HUB_PREFIX).split("/") + ["", ""]
        name = "/".join(names).strip("/")
        parts = [owner, repository, *filter(None, name.split("/"))]
        if not all(re.fullmatch(r"[\w.-]+", part) and part.strip(".") for part in parts):
            raise ValueError(
                f"{text!r} names nothing on the hub. Write hub:owner/repository/name, such as "
                "hub:SakanaAI/doc-to-lora/gemma_demo."
            )
        folder = _fetch(f"{owner}/{repository}", name) / name
    else:
        folder = Path(source).expanduser()
    if folder.is_file():
        return folder
    if path := _direct(folder):
        return path
    if below := _below(folder):
        raise ValueError(
            f"{text} holds checkpoints in its folders {', '.join(below)}. Name one: {text.rstrip('/')}/{below[0]}"
        )
    raise ValueError(
        f"There is no {PUBLISHED_FILE} in {text}. Name the file, a folder with it, or hub:owner/repository/name."
    )


def _direct(folder: Path) -> Path | None:
    """PUBLISHED_FILE in the folder, or in the checkpoint-N with the highest N."""
    if (folder / PUBLISHED_FILE).is_file():
        return folder / PUBLISHED_FILE
    numbered = {
        int(match[1]): path
        for path in folder.glob(f"checkpoint-*/{PUBLISHED_FILE}")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.parent.name))
    }
    return numbered[max(numbered)] if numbered else None


def _below(folder: Path) -> list[str]:
    """Names of the folders in this one that hold a checkpoint."""
    return sorted(path.name for path in folder.glob("*/") if _direct(path)) if folder.is_dir() else []


def _fetch(repository: str, name: str) -> Path:
    from huggingface_hub import snapshot_download  # only this needs it

    try:
        # * matches / too, so that the file may lie in the folder itself or in a checkpoint-N.
        pattern = name if name.endswith(PUBLISHED_FILE) else f"{name}/*{PUBLISHED_FILE}".lstrip("/")
        return Path(snapshot_download(repository, allow_patterns=[pattern]))
    except Exception as error:  # the hub and its network raise a dozen types; all of them mean this
        raise ValueError(
            f"Cannot get {repository} from the hub ({_one_line(error)}). Check the name and the network, or download "
            f"{PUBLISHED_FILE} elsewhere and name the file."
        ) from error


# Reading


class _Refused(ValueError):
    """The file asks for something that a checkpoint does not need."""


class _Call(NamedTuple):
    """A function of this file that the pickle may call under another name."""

    function: Callable


class _RecordType(NamedTuple):
    name: str


class _OrderedDict(dict):
    """collections.OrderedDict of a state dict; what is set on it (its modules' versions) is dropped."""


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
    numbers = (offset, *size, *stride)
    if not isinstance(storage, Tensor) or storage.ndim != 1 or len(size) != len(stride) or len(size) > 8:
        raise _Refused("it describes a tensor that none can be")
    # A stride of zero repeats numbers; saved parameters have none, and it would make much out of little.
    if not all(type(number) is int and 0 <= number < 2**48 for number in numbers) or any(
        n > 1 and step == 0 for n, step in zip(size, stride, strict=True)
    ):
        raise _Refused("it describes a tensor that none can be")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) > len(storage) or (math.prod(size) and last >= len(storage)):
        raise _Refused(f"it describes a tensor {list(size)} that reaches beyond its {len(storage)} stored numbers")
    return storage.as_strided(size, stride, offset)


def _set(items: list = ()) -> set[str]:
    if not all(isinstance(item, str) for item in items):
        raise _Refused("it holds a set of something else than texts")
    return set(items)


def _member(value: str) -> str:
    if not isinstance(value, str):
        raise _Refused("it holds an enumeration's member that is no text")
    return value


def _ordered_dict() -> _OrderedDict:
    return _OrderedDict()


def _range(*numbers: int) -> range:
    return range(*numbers)


# Every name that a checkpoint may ask for, and what it gets. Nothing is imported for them.
_STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
}
_RECORDS = {
    ("ctx_to_lora.configs", "CtxEncoderArguments"),
    ("ctx_to_lora.modeling.aggregator", "AggregatorConfig"),
    ("ctx_to_lora.modeling.hypernet", "HypernetConfig"),
    # The authors' older name of the same module; their own demo gives it to files of that time.
    ("ctx_to_lora.modeling_utils", "HypernetConfig"),
    ("peft.tuners.lora.config", "LoraConfig"),
    ("peft.tuners.lora.config", "LoraRuntimeConfig"),
}
_ENUMERATIONS = {
    ("ctx_to_lora.modeling.aggregator", "AGGREGATOR_TYPE"),
    ("ctx_to_lora.modeling.ctx_encoder", "CTX_ENCODER_TYPE"),
    ("ctx_to_lora.pooling", "POOL_FN"),
    ("peft.utils.peft_types", "PeftType"),
    ("peft.utils.peft_types", "TaskType"),
}
_NAMES: dict[tuple[str, str], Any] = {
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
    **{name: _RecordType(name[1]) for name in _RECORDS},
    **{name: _Call(_member) for name in _ENUMERATIONS},
    ("torch._utils", "_rebuild_tensor_v2"): _Call(_rebuild_tensor),
    ("collections", "OrderedDict"): _Call(_ordered_dict),
    # Pickles of protocol 2 have Python 2's names.
    ("__builtin__", "set"): _Call(_set),
    ("builtins", "set"): _Call(_set),
    ("__builtin__", "xrange"): _Call(_range),
    ("builtins", "range"): _Call(_range),
}

# What torch.save writes, and what pickle protocols up to 5 write for plain data.
_INSTRUCTIONS = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT),
    *(pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS, pickle.EMPTY_SET, pickle.ADDITEMS),
    *(pickle.BINGET, pickle.LONG_BINGET, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE),
    *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.BUILD, pickle.NEWOBJ, pickle.BINPERSID),
)


class _Instructions(dict):
    def __missing__(self, code: int) -> Any:
        raise _Refused(f"it uses the pickle instruction {bytes([code])!r}")


# The unpickler that is written in Python: only there can the instructions be chosen and their effects be checked.
class _Unpickler(pickle._Unpickler):
    """Plain data, Records and tensors, and nothing else."""

    def __init__(self, file: io.BytesIO, storage: Callable[[str, torch.dtype, int], Tensor]):
        super().__init__(file)
        self.storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise _Refused(f"it asks for {module}.{name}")
        return _NAMES[module, name]

    def persistent_load(self, key: Any) -> Tensor:
        match key:
            case ("storage", torch.dtype() as dtype, str() as name, str(), int() as count) if name.isascii():
                return self.storage(name, dtype, count)
        raise _Refused("it refers to something else than a storage")

    def load_reduce(self) -> None:
        arguments, call = self.stack.pop(), self.stack[-1]
        if not isinstance(call, _Call) or not isinstance(arguments, tuple):
            raise _Refused(f"it calls {_called(call)}")
        self.stack[-1] = call.function(*arguments)

    def load_newobj(self) -> None:
        arguments, kind = self.stack.pop(), self.stack[-1]
        if not isinstance(kind, _RecordType) or arguments != ():
            raise _Refused(f"it makes an object of {_called(kind)}")
        self.stack[-1] = Record(kind.name)

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, (Record, _OrderedDict)) or not isinstance(state, dict):
            raise _Refused(f"it sets the state of {_called(target)}")
        if isinstance(target, Record):
            target.fields.update(state)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def load_additems(self) -> None:
        items = self.pop_mark()
        self.stack[-1].update(_set(items))

    def _set_items(self, items: list) -> None:
        keys, target = items[::2], self.stack[-1]
        # Texts only: a tuple nested a million times would be hashed as deep as the stack of the machine.
        if not isinstance(target, dict) or not all(isinstance(key, str) for key in keys):
            raise _Refused("it has a dict with other keys than texts")
        target.update(zip(keys, items[1::2], strict=True))

    dispatch = _Instructions({code[0]: pickle._Unpickler.dispatch[code[0]] for code in _INSTRUCTIONS})
    dispatch.update(
        {
            pickle.REDUCE[0]: load_reduce,
            pickle.NEWOBJ[0]: load_newobj,
            pickle.BUILD[0]: load_build,
            pickle.SETITEM[0]: load_setitem,
            pickle.SETITEMS[0]: load_setitems,
            pickle.ADDITEMS[0]: load_additems,
        }
    )


def _called(thing: Any) -> str:
    return thing.name if isinstance(thing, (Record, _RecordType)) else f"a {type(thing).__name__}"


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
        content = _load(path)
    except _Refused as error:
        raise ValueError(
            f"{path} is refused: {_short(error)}, which no Doc-to-LoRA checkpoint needs. Nothing of it was executed. "
            "Get the file from its authors."
        ) from error
    except _WrongFile as error:
        raise ValueError(f"{path} {_short(error)}") from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged zip or pickle fails in a dozen ways; all of them mean this
        raise ValueError(f"{path} is damaged or cut off ({_one_line(error)}). Copy or download it again.") from error
    try:
        return _interpreted(path, content)
    except _WrongFile as error:
        raise ValueError(f"{path} {_short(error)}") from error
    except MemoryError:
        raise
    except Exception as error:  # a record that holds something else than ever expected
        raise ValueError(f"{path} cannot be understood ({_one_line(error)}). Get the file from its authors.") from error


class _WrongFile(ValueError):
    """Not a file of the format, or one that cannot be expressed; says what to do."""


def _load(path: Path) -> Any:
    with path.open("rb") as file:
        start = file.read(64)
    if not start.startswith(b"PK"):
        raise _WrongFile(_not_a_zip(start))
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise _WrongFile(f"is a zip file but not one that torch.save wrote. A Doc-to-LoRA {PUBLISHED_FILE} is one.")
        root = pickles[0].removesuffix("data.pkl")

        left = path.stat().st_size

        def read(name: str, limit: int | None = None) -> Tensor:
            nonlocal left
            info = entries[root + name]
            # torch.save compresses nothing, so all entries together fit into the file: bombs are ruled out.
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise _Refused(f"its entry {name} is compressed")
            if info.file_size > min(left, left if limit is None else limit):
                raise _Refused(f"its entry {name} has {info.file_size} bytes")
            left -= info.file_size
            content = torch.empty(info.file_size, dtype=torch.uint8)
            view, position = memoryview(content.numpy()), 0
            with archive.open(info) as stream:
                while piece := stream.read(READ_BYTES):
                    view[position : position + len(piece)] = piece
                    position += len(piece)
            if position != info.file_size:
                raise EOFError(f"{name} ends early")
            return content

        storages: dict[str, Tensor] = {}

        def storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
            if key not in storages:
                content = read(f"data/{key}")
                if count != content.numel() // dtype.itemsize or content.numel() % dtype.itemsize:
                    raise _Refused(f"its storage {key} has {content.numel()} bytes for {count} numbers of {dtype}")
                storages[key] = content.view(dtype)
            if storages[key].dtype != dtype:
                raise _Refused(f"its storage {key} has two types")
            return storages[key]

        order = bytes(read("byteorder", 16).numpy()).decode() if root + "byteorder" in entries else sys.byteorder
        if order != sys.byteorder:
            raise _WrongFile(
                f"has {order}-endian numbers, this machine reads {sys.byteorder}-endian. Convert it there."
            )
        program = io.BytesIO(read("data.pkl", MAX_PICKLE_BYTES).numpy())
        return _Unpickler(program, storage).load()


def _not_a_zip(start: bytes) -> str:
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself. Run git lfs pull, or download the file."
    if b'{"' in start[8:11]:
        return "is a safetensors file. Name the folder that holds it with its config.yaml, or a pytorch_model.bin."
    if start.startswith(b"\x80"):
        return (
            "is a bare pickle or a file of torch before 1.6, which are not read. Save it again with torch.save of a "
            "newer version."
        )
    found = "not a zip file" if start else "empty"
    return f"is {found}, but a Doc-to-LoRA {PUBLISHED_FILE} is a zip file. Download it again."


# Understanding

_PERCEIVER = "aggregator.perceiver."
_ENCODER = _PERCEIVER + "encoder."
_COMPILED = "_orig_mod."


def _interpreted(path: Path, content: Any) -> Published:
    """The tensors under HyperNetwork's names, and its sizes, read off the tensors and compared with the records."""
    tensors, base_model, config, encoder = _parts(content)
    lora, aggregator = config.get("lora_config"), config.get("aggregator_config")
    if not isinstance(lora, Record) or not isinstance(aggregator, Record):
        raise _WrongFile("has no lora_config or aggregator_config in hypernet_config, as every published file has.")
    kind = _aggregator_and_encoder(config, aggregator, encoder, base_model)

    def shape(key: str, ndim: int) -> tuple[int, ...]:
        if key not in tensors or tensors[key].ndim != ndim or 0 in tensors[key].shape:
            got = list(tensors[key].shape) if key in tensors else "nothing"
            raise _WrongFile(f"should have {key} with {ndim} axes, got {got}. Is it a Doc-to-LoRA checkpoint?")
        return tuple(tensors[key].shape)

    names = sorted(key.removeprefix("bias_A.") for key in tensors if key.startswith("bias_A."))
    if not names:
        raise _WrongFile("has no bias_A.<target>, so its target modules are unknown. Is it a Doc-to-LoRA checkpoint?")
    widths = {name: (shape(f"bias_A.{name}", 3)[2], shape(f"bias_B.{name}", 3)[2]) for name in names}
    num_layers, rank, _ = shape(f"bias_A.{names[0]}", 3)
    if num_layers > MAX_LAYERS:
        raise _WrongFile(f"is for a base model with {num_layers} layers, which there is none of. Download it again.")
    projection, feature_dim = shape(_PERCEIVER + "modality_projection.gate_proj.weight", 2)
    num_latents, latent_dim = shape(_ENCODER + "latents_q", 2)
    num_outputs = shape(_PERCEIVER + "decoder.latents_q", 2)[0]
    layers = _count(tensors, _ENCODER + "layers.")
    is_cross = [f"{_ENCODER}layers.{i}.input_context_layernorm.weight" in tensors for i in range(layers)]
    num_blocks = sum(is_cross)
    per_block = layers // num_blocks if num_blocks else 0
    if not num_blocks or is_cross != [i % per_block == 0 for i in range(layers)]:
        raise _WrongFile(
            "has encoder layers in another order than a cross-attention and its self-attentions, repeated."
        )
    shared = bool(aggregator.get("shared_weights"))
    pre_head = _count(tensors, "layers.")
    tensors = _unshared_pre_head(tensors, pre_head, num_layers)
    hidden = shape("layers.0.layers.1.weight", 3)[2] if pre_head else 4 * latent_dim

    def multiple(size: int, unit: int, what: str) -> int:
        if size % unit:
            raise _WrongFile(f"has {what} {size}, which is no multiple of {unit}, so it cannot be expressed.")
        return size // unit

    first = f"{_ENCODER}layers.0."
    queries = {len(names) * rank: num_layers, num_layers * len(names) * rank: 1}
    if num_outputs not in queries:
        raise _WrongFile(
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
        raise _WrongFile(f"has output queries for {sizes['num_maps']} feature maps, which {kind} does not give.")
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
        raise _WrongFile(f"cannot be expressed: {_one_line(error)}") from error
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


def _parts(content: Any) -> tuple[dict[str, Tensor], str, Record, Record]:
    if not isinstance(content, dict):
        raise _WrongFile("does not hold a dict of tensors, as a Doc-to-LoRA checkpoint does. Name another file.")
    tensors: dict[str, Tensor] = {}
    other = dict(content)
    for key, value in content.items():
        if isinstance(value, Tensor):
            name = key.replace(_COMPILED, "")
            if name in tensors:
                raise _WrongFile(f"has {name} twice, with and without {_COMPILED}. Get the file from its authors.")
            tensors[name] = other.pop(key)
    base_model, config, encoder = (
        other.pop(key, None) for key in ("base_model_name_or_path", "hypernet_config", "ctx_encoder_args")
    )
    kinds = (
        ("base_model_name_or_path", base_model, str),
        ("hypernet_config", config, Record),
        ("ctx_encoder_args", encoder, Record),
    )
    for key, value, kind in kinds:
        if not isinstance(value, kind):
            raise _WrongFile(f"has no {key}, so it is not a Doc-to-LoRA checkpoint. Name another file.")
    if other:
        raise _WrongFile(f"also holds {_short(min(other))}, which is unknown here. Is it a Doc-to-LoRA checkpoint?")
    return tensors, base_model, config, encoder


def _aggregator_and_encoder(config: Record, aggregator: Record, encoder: Record, base_model: str) -> str:
    """The context encoder's kind; refuses what the records say and this package has not."""
    if (kind := aggregator.get("aggregator_type")) not in (None, "perceiver"):
        raise _WrongFile(f"has the aggregator {_short(kind)}; only perceiver is supported.")
    if config.get("extra_modules"):
        raise _WrongFile("also generates norms (extra_modules), which is not supported.")
    kind = encoder.get("ctx_encoder_type")
    if kind not in PUBLISHED_KINDS:
        raise _WrongFile(f"has the context encoder {_short(kind)}; there are {', '.join(PUBLISHED_KINDS)}.")
    reader = encoder.get("ctx_encoder_model_name_or_path")
    if reader not in (None, base_model):
        raise _WrongFile(f"reads documents with {_short(reader)} instead of its base model, which is not supported.")
    layer_idx, last = encoder.get("layer_idx"), encoder.get("ctx_encoder_last_layer")
    if kind == "early_exit" and layer_idx is not None and (type(layer_idx) is not int or abs(layer_idx) > 10_000):
        raise _WrongFile("has an early_exit whose layer_idx is no number of a layer.")
    if kind == "per_layer_activations" and last not in (None, aggregator.get("num_layers")):
        raise _WrongFile("reads fewer layers than its base model has (ctx_encoder_last_layer), which is not supported.")
    if encoder.get("quantize_ctx_encoder") is True:
        log.warning(
            "This checkpoint was trained on features of a 4-bit base model; here they come from the base model as it "
            "is loaded, so its adapters differ a little from the authors'."
        )
    return kind


def _scaling(lora: Record) -> float:
    alpha = lora.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < 1e6:
        raise _WrongFile("has no number lora_alpha in lora_config, so the scaling is unknown.")
    return float(alpha)  # the authors multiply by it and do not divide by the rank


def _compare(
    config: Record, lora: Record, aggregator: Record, sizes: Mapping, widths: Mapping, num_layers: int
) -> None:
    """Refuses records that say another size than the tensors have; what a record leaves out is not compared."""
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
            raise _WrongFile(f"says {name} = {_short(said)}, but its tensors have {_short(found)}. Download it again.")


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many of 0, 1, ... follow the prefix in the keys."""
    found = {key.removeprefix(prefix).partition(".")[0] for key in tensors if key.startswith(prefix)}
    if found != {str(i) for i in range(len(found))}:
        raise _WrongFile(f"has keys {prefix}0, 1, ... with gaps between the numbers. Download it again.")
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
    """The network's state dict, float32, each tensor with memory of its own; `limit`: bytes they may have together."""
    # A shared block is in the file under each of its places.
    order = network.aggregator.encoder.order
    expected = {name: tensor.shape for name, tensor in network.state_dict().items()}
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = "aggregator." + key.removeprefix(_PERCEIVER) if key.startswith(_PERCEIVER) else "lora_head." + key
        if match := re.match(r"aggregator\.encoder\.layers\.(\d+)\.", name):
            name = f"aggregator.encoder.layers.{order[int(match[1])]}.{name[match.end() :]}"
        if name not in expected:
            raise _WrongFile(f"also holds {_short(key)}, which has no place in a network of its sizes.")
        if tensor.shape != expected[name] or not tensor.is_floating_point():
            raise _WrongFile(
                f"has {_short(key)} {list(tensor.shape)} of {tensor.dtype}, but floating-point "
                f"{list(expected[name])} fits its other tensors. Download it again."
            )
        if name in found and not torch.equal(found[name], tensor):
            raise _WrongFile(f"should share its blocks (shared_weights), but {_short(key)} differs from the first.")
        found.setdefault(name, tensor)
    if missing := sorted(expected.keys() - found.keys()):
        raise _WrongFile(f"lacks the tensor of {missing[0]}. Download it again.")
    stored = [
        tensor.itemsize * math.prod(n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step)
        for tensor in found.values()
    ]
    if sum(stored) > limit:
        raise _WrongFile("describes more numbers than it holds. Get the file from its authors.")
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


def _short(thing: Any) -> str:
    """One line of at most 200 characters."""
    text = " ".join(str(thing).split())
    return text if len(text) <= 200 else text[:200] + "..."


def _one_line(error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return _short(reason).rstrip(".")
