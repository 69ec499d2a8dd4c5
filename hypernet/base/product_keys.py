"""ProductKeyMemory: a key-value memory with n² slots that a base model has beside the MLP of one block.

add_memory_layer(base_model, {"layer": 3, "num_keys": 32})    # answers as before: all values are 0
base_model.save_pretrained(folder)                             # config.json then says `memory_layer`
load_base_model(folder)                                        # comes back with it
"""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from hypernet.base.targets import find_blocks

_MEMORY = "memory"  # name of the module in the MLP that it stands beside


class ProductKeyMemory(nn.Module):
    """m(x) = g Σ_h Σ_{i in the top k of head h} w_h(i) v_i, w_h = softmax of the k highest scores.

    Slot i = a n + b of n² has in head h the score q₁·k₁(a) + q₂·k₂(b), with the halves q₁, q₂ of LayerNorm(W_h x). The
    k best of n² are among the k × k pairs of the best halves, so that only 2 n + k² scores are computed. Heads share
    the values v, which are 0 at first.

    Args:
        dim: of x and of the values.
        num_keys: n, of each half.
        num_heads, top_k: slots that a token reads are at most their product.
        key_dim: of a query, both halves.
        gain: g. AdamW moves all weights by steps of one size, and a token reads averages over slots that few steps have
            moved: after 60 steps of 1e-3 the root mean square of values is .006.

    Raises:
        ValueError: a size is below 1, top_k above num_keys, key_dim odd, or gain not above 0.

    Source: Lample et al. 2019, https://arxiv.org/abs/1907.05242, with LayerNorm instead of batch normalisation, so that
    a token's slots do not depend on its batch.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_keys: int = 32,
        num_heads: int = 4,
        top_k: int = 8,
        key_dim: int = 32,
        gain: float = 16.0,
    ) -> None:
        super().__init__()
        sizes = {"num_keys": num_keys, "num_heads": num_heads, "top_k": top_k, "key_dim": key_dim}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} of the memory layer is {size}. Give at least 1.")
        if top_k > num_keys or key_dim % 2:
            raise ValueError(
                f"The memory layer has top_k {top_k}, num_keys {num_keys}, key_dim {key_dim}. Give a top_k up to "
                "num_keys, and an even key_dim."
            )
        if not 0 < gain < math.inf:
            raise ValueError(f"gain of the memory layer is {gain}. Give a finite number above 0.")
        self.num_keys, self.num_heads, self.top_k, self.gain = num_keys, num_heads, top_k, gain
        half = key_dim // 2
        self.query = nn.Linear(dim, num_heads * key_dim, bias=False)
        self.norm = nn.LayerNorm(key_dim)
        self.keys = nn.Parameter(torch.empty(num_heads, 2, num_keys, half).uniform_(-1, 1) / math.sqrt(half))
        self.values = nn.Parameter(torch.zeros(num_keys**2, dim))

    def lookup(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The slots that x [..., dim] reads, [..., H, k], and their weights."""
        halves = self.norm(self.query(x).unflatten(-1, (self.num_heads, -1))).unflatten(-1, (2, -1))
        scores, places = torch.einsum("...htd,htnd->...htn", halves, self.keys).topk(self.top_k, -1)
        pairs = scores[..., 0, :, None] + scores[..., 1, None, :]
        slots = places[..., 0, :, None] * self.num_keys + places[..., 1, None, :]
        best, chosen = pairs.flatten(-2).topk(self.top_k, -1)
        return slots.flatten(-2).gather(-1, chosen), best.softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        slots, weights = (part.flatten(-2).flatten(0, -2) for part in self.lookup(x))
        # Without the values of all slots that are read in memory at once: 32 vectors a token.
        found = nn.functional.embedding_bag(
            slots, self.values, per_sample_weights=weights.to(self.values.dtype), mode="sum"
        )
        return (self.gain * found).view_as(x).to(x.dtype)


def add_memory_layer(base_model: PreTrainedModel, settings: dict[str, Any], *, seed: int = 0) -> ProductKeyMemory:
    """Puts a memory beside the MLP of one block, in place; its output is added to the MLP's.

    Args:
        settings: layer, the block's number, and sizes of `ProductKeyMemory`; noted in the model's config. With
            `replaces_mlp` its output stands for the MLP's, whose weights are there still and nothing reads.
        seed: of queries and keys.

    Raises:
        ValueError: there is no such block, or it has no `mlp`; or a size is wrong.
    """
    sizes = dict(settings)
    layer, replaces = sizes.pop("layer", None), sizes.pop("replaces_mlp", False)
    decoder, name = find_blocks(base_model)
    blocks = getattr(decoder, name)
    if type(layer) is not int or not 0 <= layer < len(blocks):
        raise ValueError(f"layer of the memory layer is {layer}. Give a block's number, 0 to {len(blocks) - 1}.")
    mlp = getattr(blocks[layer], "mlp", None)
    if mlp is None:
        raise ValueError(f"Block {layer} of {type(base_model).__name__} has no module `mlp` to put a memory beside.")
    weight = next(mlp.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        memory = ProductKeyMemory(base_model.config.get_text_config().hidden_size, **sizes)
    memory.train(mlp.training).to(weight).requires_grad_(weight.requires_grad)
    mlp.add_module(_MEMORY, memory)
    mlp.register_forward_hook(_memory_alone if replaces else _add_memory)
    base_model.config.memory_layer = dict(settings)
    return memory


def _add_memory(mlp: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + getattr(mlp, _MEMORY)(args[0])


def _memory_alone(mlp: nn.Module, args: tuple[Tensor, ...], _output: Tensor) -> Tensor:
    return getattr(mlp, _MEMORY)(args[0])


def memory_layers(base_model: nn.Module) -> dict[str, ProductKeyMemory]:
    """Module path → memory, of those that a base model has."""
    return {path: module for path, module in base_model.named_modules() if isinstance(module, ProductKeyMemory)}


def read_memory_layer(base_model: PreTrainedModel, folder: Path) -> None:
    """What `save_pretrained` wrote of a memory layer, which transformers leaves out; nothing, if config.json has none.

    Raises:
        ValueError: the tensors are not in the folder's model.safetensors.
    """
    settings = getattr(base_model.config, "memory_layer", None)
    if settings is None:
        return
    memory = add_memory_layer(base_model, settings)
    ((path, _),) = memory_layers(base_model).items()
    file = folder / "model.safetensors"
    try:
        with safe_open(file, "pt") as tensors, torch.no_grad():
            for name, parameter in memory.named_parameters():
                parameter.copy_(tensors.get_tensor(f"{path}.{name}"))
    except Exception as error:  # safetensors raises its own type, and torch others for a wrong shape
        raise ValueError(f"config.json says memory_layer {settings}, which {file} does not have: {error}.") from error
