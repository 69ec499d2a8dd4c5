"""The plain content of a file that torch.save wrote, read without executing anything.

    content = load_plain(path)      # dicts, lists, texts, numbers, tensors and PlainConfigs

A `pytorch_model.bin` is a zip of tensors and a pickle, and a pickle is a program. Here it is interpreted with three
closed lists: its instructions, the names it may ask for, and what may be called. Nothing is ever imported for it; the
authors' dataclasses become `PlainConfig`s, tensors are rebuilt within the bounds of their storages.
"""

import io
import math
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hypernet.interop.published.locate import PUBLISHED_FILE

# A published file's pickle has 0.1 MB. Interpreted, a byte becomes up to 64 bytes of objects.
MAX_PICKLE_BYTES = 4 * 2**20
READ_BYTES = 2**24  # storages are read in pieces of this size: no second copy of a large one


class Refused(ValueError):
    """The file asks for something that a checkpoint does not need."""


class WrongFile(ValueError):
    """Not a file of the format, or one that cannot be expressed; says what to do."""


class PlainConfig:
    """The fields of one of the authors' dataclasses."""

    def __init__(self, name: str):
        self.name = name
        self.fields: dict[str, Any] = {}

    def get(self, field: str) -> Any:
        """The field's value, None where the file has no such field."""
        return self.fields.get(field)


def load_plain(path: Path) -> Any:
    """The content of the file; nothing of it is executed.

    Raises:
        WrongFile: it is none that torch.save wrote, or not of this machine's byte order.
        Refused: it asks for anything but plain data and tensors.
        Exception: of a dozen types where it is damaged.
    """
    with path.open("rb") as file:
        start = file.read(64)
    if not start.startswith(b"PK"):
        raise WrongFile(_not_a_zip(start))
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise WrongFile(f"is a zip file but not one that torch.save wrote. A Doc-to-LoRA {PUBLISHED_FILE} is one.")
        root = pickles[0].removesuffix("data.pkl")

        left = path.stat().st_size

        def read(name: str, limit: int | None = None) -> Tensor:
            nonlocal left
            info = entries[root + name]
            # torch.save compresses nothing, so all entries together fit into the file: bombs are ruled out.
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise Refused(f"its entry {name} is compressed")
            if info.file_size > min(left, left if limit is None else limit):
                raise Refused(f"its entry {name} has {info.file_size} bytes")
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
                    raise Refused(f"its storage {key} has {content.numel()} bytes for {count} numbers of {dtype}")
                storages[key] = content.view(dtype)
            if storages[key].dtype != dtype:
                raise Refused(f"its storage {key} has two types")
            return storages[key]

        order = bytes(read("byteorder", 16).numpy()).decode() if root + "byteorder" in entries else sys.byteorder
        if order != sys.byteorder:
            raise WrongFile(f"has {order}-endian numbers, this machine reads {sys.byteorder}-endian. Convert it there.")
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


# The pickle


class _Call(NamedTuple):
    """A function of this file that the pickle may call under another name."""

    function: Callable


class _ConfigType(NamedTuple):
    name: str


class _OrderedDict(dict):
    """collections.OrderedDict of a state dict; what is set on it (its modules' versions) is dropped."""


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
    numbers = (offset, *size, *stride)
    if not isinstance(storage, Tensor) or storage.ndim != 1 or len(size) != len(stride) or len(size) > 8:
        raise Refused("it describes a tensor that none can be")
    # A stride of zero repeats numbers; saved parameters have none, and it would make much out of little.
    if not all(type(number) is int and 0 <= number < 2**48 for number in numbers) or any(
        n > 1 and step == 0 for n, step in zip(size, stride, strict=True)
    ):
        raise Refused("it describes a tensor that none can be")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) > len(storage) or (math.prod(size) and last >= len(storage)):
        raise Refused(f"it describes a tensor {list(size)} that reaches beyond its {len(storage)} stored numbers")
    return storage.as_strided(size, stride, offset)


def _set(items: list = ()) -> set[str]:
    if not all(isinstance(item, str) for item in items):
        raise Refused("it holds a set of something else than texts")
    return set(items)


def _member(value: str) -> str:
    if not isinstance(value, str):
        raise Refused("it holds an enumeration's member that is no text")
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
_CONFIGS = {
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
    **{name: _ConfigType(name[1]) for name in _CONFIGS},
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
        raise Refused(f"it uses the pickle instruction {bytes([code])!r}")


# The unpickler that is written in Python: only there can the instructions be chosen and their effects be checked.
class _Unpickler(pickle._Unpickler):
    """Plain data, PlainConfigs and tensors, and nothing else."""

    def __init__(self, file: io.BytesIO, storage: Callable[[str, torch.dtype, int], Tensor]):
        super().__init__(file)
        self.storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise Refused(f"it asks for {module}.{name}")
        return _NAMES[module, name]

    def persistent_load(self, key: Any) -> Tensor:
        match key:
            case ("storage", torch.dtype() as dtype, str() as name, str(), int() as count) if name.isascii():
                return self.storage(name, dtype, count)
        raise Refused("it refers to something else than a storage")

    def load_reduce(self) -> None:
        arguments, call = self.stack.pop(), self.stack[-1]
        if not isinstance(call, _Call) or not isinstance(arguments, tuple):
            raise Refused(f"it calls {_called(call)}")
        self.stack[-1] = call.function(*arguments)

    def load_newobj(self) -> None:
        arguments, kind = self.stack.pop(), self.stack[-1]
        if not isinstance(kind, _ConfigType) or arguments != ():
            raise Refused(f"it makes an object of {_called(kind)}")
        self.stack[-1] = PlainConfig(kind.name)

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, (PlainConfig, _OrderedDict)) or not isinstance(state, dict):
            raise Refused(f"it sets the state of {_called(target)}")
        if isinstance(target, PlainConfig):
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
            raise Refused("it has a dict with other keys than texts")
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
    return thing.name if isinstance(thing, (PlainConfig, _ConfigType)) else f"a {type(thing).__name__}"
