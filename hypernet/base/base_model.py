"""The frozen causal LM that answers, with its tokenizer: from the hub, a local folder, or a tiny random configuration.

base_model, tokenizer = load_base_model("assets/tiny/base_model")
fingerprint(base_model)      # names the weights; adapters carry it
"""

import codecs
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hypernet.base.catalog import KNOWN_BASE_MODELS, known_name, locate
from hypernet.base.product_keys import add_memory_layer, read_memory_layer
from hypernet.io.hub import hub_asked_once
from hypernet.io.logs import without_load_report, without_weight_bars
from hypernet.text.chat import closing_ids

BASE_MODEL_DTYPES = ("float32", "bfloat16", "float16", "float64")


def load_base_model(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    attention: str | None = None,
    quantization: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM, frozen and in evaluation mode, and its tokenizer.

    Args:
        source: hub name, local folder, or the name of a fetched base model (`hypernet base-model list`).
        dtype: the weights' type; None keeps the one they are stored in.
        attention: transformers' `attn_implementation`; None lets transformers choose.
        quantization: of the linear layers' weights while loading: "int8" (torchao, any device), "4bit" (bitsandbytes'
            nf4, GPU), None. What is stored quantised is loaded so in any case.

    A `memory_layer` in the folder's config.json comes with it, see `hypernet.base.product_keys`.

    Raises:
        ValueError: there is no model at `source`, it has not been fetched, or it cannot be read; an unknown
            quantization, dtype, attention or device; or the quantization's library is missing.
    """
    _check_kinds(dtype, attention, device)
    quantization_config = _quantization_config(quantization)
    source = locate(source)
    if str(source).startswith("~"):
        source = Path(source).expanduser()
    looks_local = Path(source).is_dir() or str(source).startswith((".", "/")) or str(source).count("/") > 1
    if looks_local and not (Path(source) / "config.json").is_file():
        raise ValueError(
            f"No base model in {source}: config.json is missing. Give a folder in transformers' format or a hub name."
        )
    _refuse_byte_order_marks(Path(source))
    try:
        with hub_asked_once(source), without_weight_bars(), without_load_report(_declares_memory_layer(source)):
            base_model = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype or "auto",
                attn_implementation=attention,
                quantization_config=quantization_config,
                # bitsandbytes quantises on the way to the GPU.
                device_map=device if quantization == "4bit" else None,
            )
            tokenizer = AutoTokenizer.from_pretrained(source)
        read_memory_layer(base_model, Path(source))
    except (
        Exception
    ) as error:  # transformers and safetensors raise a dozen types for a bad source; all of them mean this
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        hint = ""
        if name := known_name(source):
            here = str(source) != KNOWN_BASE_MODELS[name].original
            fetch = f"python -m hypernet base-model fetch {name}"
            hint = f" To check and repair it: {fetch}" if here else f" Without a hub: {fetch}, then base_model={name}."
        check = "Check the name, the files and the network"
        check += "" if attention is None else f", and whether this machine and model have attention={attention}"
        raise ValueError(f"Could not load the base model from {source}: {reason}. {check}.{hint}") from error
    _give_padding(tokenizer, num_embeddings(base_model))
    # A model that bitsandbytes has quantised is where it belongs, and refuses to be moved.
    if quantization != "4bit":
        base_model = base_model.to(device)  # type: ignore[arg-type]  # transformers wraps `to` without its signature
    return freeze(base_model), tokenizer


def _declares_memory_layer(source: str | Path) -> bool:
    """Its tensors are unexpected to transformers, which would say so."""
    file = Path(source) / "config.json"
    return file.is_file() and "memory_layer" in json.loads(file.read_bytes())


def _check_kinds(dtype: Any, attention: str | None, device: Any) -> None:
    """Names that transformers and torch refuse late, or in words of their own."""
    if dtype is not None and str(dtype).removeprefix("torch.") not in BASE_MODEL_DTYPES:
        raise ValueError(f"dtype should be one of {', '.join(BASE_MODEL_DTYPES)} or None, got {dtype!r}.")
    # Those that are installed; others, with a slash in their name, transformers would fetch from the hub and execute.
    known = ["eager", *(name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in name)]
    if attention is not None and attention not in known:
        raise ValueError(f"attention should be one of {', '.join(known)} or None, got {attention!r}.")
    try:
        torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device should be one of torch's, such as cpu or cuda:0, got {device!r}.") from error


def _refuse_byte_order_marks(folder: Path) -> None:
    """transformers cannot read them, and leaves a generation_config.json that has one out without a word."""
    for path in sorted(folder.glob("*.json")):
        with path.open("rb") as file:
            start = file.read(3)
        if start.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise ValueError(f"{path} begins with a byte order mark. Save it as UTF-8 without one.")


def num_embeddings(base_model: nn.Module) -> int:
    """Token ids that the base model knows: 0 and up to this, not included."""
    return int(base_model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]


def _give_padding(tokenizer: PreTrainedTokenizerBase, num_embeddings: int) -> None:
    """A padding token that the base model knows, where the tokenizer has none (as Llama 3's and Mistral's), or one that
    was added without an embedding. Padding is masked, so any token will do; one that is no text is taken if there is
    any."""
    found = [tokenizer.pad_token_id, tokenizer.eos_token_id, *closing_ids(tokenizer), *tokenizer.all_special_ids, 0]
    usable = next(token for token in found if token is not None and token < num_embeddings)
    if usable != tokenizer.pad_token_id:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(usable)


def _quantization_config(name: str | None) -> object | None:
    if name is None:
        return None
    libraries = {"int8": "torchao", "4bit": "bitsandbytes"}
    if name not in libraries:
        raise ValueError(f"Unknown quantization {name!r}: choose one of {', '.join(libraries)} or None.")
    if find_spec(libraries[name]) is None:
        raise ValueError(f"quantization={name} needs {libraries[name]}: pip install {libraries[name]}.")
    if name == "4bit":
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def freeze(base_model: PreTrainedModel) -> PreTrainedModel:
    """Evaluation mode, no gradients on the weights."""
    return base_model.eval().requires_grad_(False)


def build_base_model(config: dict[str, Any], *, seed: int = 0) -> PreTrainedModel:
    """A causal LM with random weights from a transformers configuration given as a dict with `model_type`.

    Args:
        config: may have `memory_layer`, see `hypernet.base.product_keys.add_memory_layer`.

    Raises:
        ValueError: no or unknown `model_type`, or a wrong `memory_layer`.
    """
    settings = dict(config)
    model_type, memory_layer = settings.pop("model_type", None), settings.pop("memory_layer", None)
    try:
        model_config = AutoConfig.for_model(model_type, **settings)
    except ValueError as error:
        raise ValueError(
            f"model_type is {model_type!r}; give one that transformers knows, e.g. llama or gemma2."
        ) from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base_model = AutoModelForCausalLM.from_config(model_config)
    if memory_layer is not None:
        add_memory_layer(base_model, memory_layer, seed=seed)
    return base_model


def fingerprint(tensors: nn.Module | dict[str, torch.Tensor], *, exact: bool = False) -> str:
    """SHA-256 over names, types, shapes and values of a module's tensors: the identity of the weights, on any device.

    Large tensors (over 2^20 elements) are represented by 2^16 evenly spaced elements, so that a model of billions of
    parameters takes well under a second; `exact` takes in every element, to tell whether a file is intact.
    """
    state = tensors.state_dict() if isinstance(tensors, nn.Module) else tensors
    digest = hashlib.sha256()
    for name, tensor in sorted(_plain_tensors(state), key=lambda pair: pair[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.reshape(-1)
        if flat.numel() > 2**20 and not exact:
            flat = flat[:: flat.numel() // 2**16]
        digest.update(flat.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain_tensors(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a state dict consists of: a quantised weight is integers and their scales."""
    for name, tensor in state.items():
        tensor = tensor.detach()
        if is_traceable_wrapper_subclass(tensor):
            inner, _ = tensor.__tensor_flatten__()
            yield from _plain_tensors({f"{name}.{part}": getattr(tensor, part) for part in inner})
        else:
            yield name, tensor


def logits_at(base_model: PreTrainedModel, where: Tensor, **inputs: Any) -> Tensor:
    """Logits of some positions alone: a quarter of a packed row's tokens predict an answer, the head costs most.

    Args:
        where: which positions, [N, S] bool.
        inputs: of the model's forward, [N, S] each.

    Returns:
        [number of True, V], row after row.
    """
    head = base_model.get_output_embeddings()
    # What follows the head (soft caps, scales) works on every logit alone, so the head may see chosen positions only.
    hook = head.register_forward_pre_hook(lambda module, args: (args[0][where],))
    try:
        return base_model(**inputs, use_cache=False).logits
    finally:
        hook.remove()


@contextmanager
def contiguous_states(base_model: nn.Module) -> Iterator[None]:
    """For passes that need logits of each row's last position alone.

    Its states, [B, 1, D], are a slice of all states, for which torch copies the output embeddings B times: .75 of 2.2 s
    of a processor that ten prompts of SmolLM2-135M in bfloat16 took.
    """
    head: nn.Module = base_model.get_output_embeddings()  # type: ignore[operator]
    hook = head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        hook.remove()
