"""What a command's settings may be: a schema of plain types, and one line that says which setting is wrong.

class Trial(Settings):
    runs: Count
    device: Device = "auto"
    optimizer: Optimizer                       # settings below a setting

trial = checked(Trial, {"runs": 0})            # ValueError: runs should be a whole number, at least 1, got 0.
checked(arguments_of(make_optimizer), values)  # what a function or class takes, by its signature
"""

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    create_model,
)
from pydantic.fields import FieldInfo

from hypernet.io.paths import name_below, output_file, output_folder


class Settings(BaseModel):
    """Settings by name. An unknown one, a missing one, or one of another type is refused."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class Open(Settings):
    """Settings of which only some are named here; others are for whoever takes them to check."""

    model_config = ConfigDict(extra="allow")


def as_list(value: Any) -> Any:
    """One text, or one number that was meant as a text, is a list of one."""
    value = [] if value is None else value if isinstance(value, list) else [value]
    return [str(item) if type(item) in (int, float) else item for item in value]


Count = Annotated[int, Field(ge=1, description="a whole number, at least 1")]
Number = Annotated[int, Field(ge=0, description="a whole number, at least 0")]
Above0 = Annotated[float, Field(gt=0, description="a number above 0")]
AtLeast0 = Annotated[float, Field(ge=0, description="a number, at least 0")]
Share = Annotated[float, Field(ge=0, le=1, description="a number from 0 to 1")]
Text = Annotated[str, Field(min_length=1, description="a text")]
Name = Annotated[str, Field(min_length=1, description="a text"), AfterValidator(name_below)]
OutputFolder = Annotated[str, Field(min_length=1, description="a folder"), AfterValidator(output_folder)]
OutputFile = Annotated[str, Field(min_length=1, description="a file"), AfterValidator(output_file)]
Texts = Annotated[
    list[Annotated[str, StringConstraints(pattern=r"\S")]],
    BeforeValidator(as_list),
    Field(description="a text or a list of texts"),
]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="cpu, cuda or auto")]

_PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null", Any: ""}

S = TypeVar("S", bound=BaseModel)


def checked(schema: type[S], values: Mapping[str, Any], *, place: str = "") -> S:
    """The settings, if they are what the schema says.

    Args:
        place: the setting that these are below, for the messages.

    Raises:
        ValueError: of one line: what was wanted, what came, and where.
    """
    try:
        return schema.model_validate(dict(values))
    except ValidationError as invalid:
        error = invalid.errors()[0]
    if error["type"] == "value_error" and isinstance(error["ctx"]["error"], ValueError):
        raise ValueError(str(error["ctx"]["error"]))
    names, field, value, fields = _found(schema, error["loc"], values)
    name = ".".join([*([place] if place else []), *names])
    if error["type"] == "extra_forbidden" and field is None:
        raise ValueError(no_such_setting(name, fields))
    assert field is not None
    example = f" Write '{name}={field.examples[0]}'." if field.examples else ""
    raise ValueError(f"{name} should be {wanted(field)}, got {value!r}.{example}")


def no_such_setting(name: str, known: Sequence[str] = ()) -> str:
    """The message about a setting that there is not, with those that there are next to it."""
    parent = name.rpartition(".")[0]
    there = ", ".join(f"{parent}.{other}" if parent else other for other in known)
    return f"There is no setting {name!r}{f'. There are {there}' if there else ''}; see --help."


def wanted(field: FieldInfo) -> str:
    """What a setting may be, in words."""
    return field.description or _in_words(field.annotation)


def arguments_of(target: Callable[..., Any]) -> type[Settings]:
    """A schema of what a function or class takes: names, and types as far as they are plain ones.

    None of them is required: what is left out here may be given by call.
    """
    made = inspect.isclass(target) and not issubclass(target, tuple)  # a named tuple's types are the class's own
    try:
        hints = get_type_hints(target.__init__ if made else target)
    except NameError:  # a library's types that are imported for type checking alone, as of WandbLogger
        hints = {}
    parameters = inspect.signature(target).parameters.values()
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    kinds = {parameter.name: hints.get(parameter.name, Any) for parameter in parameters}
    fields: dict[str, Any] = {name: (_plain(kind), None) for name, kind in kinds.items()}
    return create_model(target.__name__, __base__=Open if takes_any else Settings, **fields)


def choose_device(name: str) -> str:
    """A device of this machine for cpu, cuda, cuda:1 ... or auto.

    Raises:
        ValueError: there is no such device here.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return name
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(name.partition(":")[2] or 0) >= count:
        raise ValueError(
            f"device is {name}, but torch {torch.__version__} finds {count} CUDA GPUs. Set device=cpu or device=auto."
        )
    return name


def _plain(kind: Any) -> Any:
    """A type as YAML can give it, with lists in the place of tuples; Any where it cannot."""
    if kind is Path:
        return str
    origin, parts = get_origin(kind), get_args(kind)
    if any(kind is plain for plain in _PLAIN) or origin is Literal:
        return kind
    inner = [_plain(part) for part in parts if part is not Ellipsis]
    if Any in inner or not inner:
        return Any
    if origin is tuple and Ellipsis not in parts:
        said = f"a list of {len(inner)}, each {_in_words(inner[0])}"
        return Annotated[list[inner[0]], Field(min_length=len(inner), max_length=len(inner), description=said)]  # type: ignore[valid-type]
    if origin in (list, tuple, Sequence):
        return list[inner[0]]  # type: ignore[valid-type]
    if origin in (dict, Mapping):
        return dict[inner[0], inner[1]]  # type: ignore[valid-type]
    return Union[tuple(inner)] if origin in (Union, types.UnionType) else Any  # noqa: UP007


def _found(
    schema: Any, place: Sequence[int | str], values: Any
) -> tuple[list[str], FieldInfo | None, Any, Sequence[str]]:
    """Of a place in the settings: names down to it, its field and value, and the names next to it."""
    names: list[str] = []
    field: FieldInfo | None = None
    fields: Sequence[str] = ()
    for part in place:
        if not (inspect.isclass(schema) and issubclass(schema, BaseModel)):
            break  # an element of a list, or one of several types
        names.append(str(part))
        fields, field = list(schema.model_fields), schema.model_fields.get(str(part))
        schema, values = field and field.annotation, values.get(part)
    return names, field, values, fields


def _in_words(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        said = [text for item in parts[1:] if (text := getattr(item, "description", None))]
        return said[0] if said else _in_words(parts[0])
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}" if len(parts) > 1 else str(parts[0])
    if origin in (Union, types.UnionType):
        return " or ".join(map(_in_words, parts))
    if origin is list:
        return f"a list, each {_in_words(parts[0])}" if parts else "a list"
    if origin is dict or (inspect.isclass(kind) and issubclass(kind, (dict, BaseModel))):
        return "settings of its own"
    return _PLAIN.get(kind, str(kind))
