"""MovedWeights: what a version changes in the base model, as an adapter or as whole tensors; put in and taken out.

with installed(base_model, weights.tensors):      # afterwards the base model's own tensors, the same bytes
    model.generate(["Who taught Fenda Elfax?"])
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from hypernet.adapters.adapter import LoRAAdapter
from hypernet.base.base_model import load_base_model
from hypernet.doc_to_lora import DocToLoRA
from hypernet.io.logs import without_weight_bars

_ADAPTER, _MERGED = "adapter", "base_model"


@dataclass(frozen=True)
class MovedWeights:
    """tensors: parameter name → its value, of those that change alone. adapter: that they come from, if they do."""

    tensors: Mapping[str, Tensor]
    adapter: LoRAAdapter | None = None

    @classmethod
    def of_adapter(cls, base_model: nn.Module, adapter: LoRAAdapter) -> Self:
        """W + scaling * BᵀA for every module of the adapter."""
        tensors = {}
        for name, (A, B) in adapter.concatenated().items():
            target = next(target for target in adapter.targets if target.name == name)
            for module in target.modules():
                weight = base_model.get_parameter(f"{module.path}.weight").detach()
                delta = B[module.layer, :, : module.d_out].T @ A[module.layer, :, : module.d_in]
                tensors[f"{module.path}.weight"] = weight + adapter.scaling * delta.to(weight)
        return cls(tensors, adapter)

    def save(self, folder: Path, model: DocToLoRA) -> None:
        """Writes adapter/ (PEFT's format) or base_model/ (transformers' format) into a folder that is there."""
        if self.adapter is not None:
            (folder / _ADAPTER).mkdir()
            self.adapter.write_files(folder / _ADAPTER)
            return
        with installed(model.base_model, self.tensors), without_weight_bars():
            model.base_model.save_pretrained(folder / _MERGED)
        model.tokenizer.save_pretrained(folder / _MERGED)

    @classmethod
    def load(cls, folder: Path, model: DocToLoRA) -> Self:
        """Reads what `save` wrote.

        Raises:
            ValueError: it is missing, damaged or of another base model.
        """
        if (folder / _ADAPTER).is_dir():
            adapter = LoRAAdapter.load(folder / _ADAPTER, base_model_fingerprint=model.base_model_fingerprint)
            return cls.of_adapter(model.base_model, adapter.to(model.device))
        merged, _ = load_base_model(folder / _MERGED, device=model.device, dtype=model.base_model.dtype)
        own = dict(model.base_model.named_parameters())
        return cls({name: p.data for name, p in merged.named_parameters() if not torch.equal(p, own[name])})

    @property
    def num_bytes(self) -> int:
        if self.adapter is not None:
            return self.adapter.num_bytes
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


@contextmanager
def installed(base_model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """The base model with these values inside the `with` block, then with its own again, which were not copied."""
    parameters = {name: base_model.get_parameter(name) for name in tensors}
    own = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = tensors[name].detach()
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]
