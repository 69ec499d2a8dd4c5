"""Doc-to-LoRA: a document becomes LoRA weights in one forward pass of a hypernetwork.

Axis letters, the same in every einops pattern, docstring and comment:
`C` chunks, `N` documents, `Q` questions, `T` chunk tokens, `S` prompt tokens, `L` layers, `M` target modules,
`R` rank, `K` latents, `D` feature, `H` latent size.

    from hypernet import DocToLoRA

    model = DocToLoRA.from_pretrained("assets/tiny")
    adapter = model.internalize(open("document.txt").read())
    print(model.generate(["Who founded the company?"], adapter))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hypernet.io.logs import silence_imports

if TYPE_CHECKING:
    from hypernet.adapters.adapter import LoRAAdapter
    from hypernet.adapters.library import AdapterLibrary
    from hypernet.doc_to_lora import DocToLoRA
    from hypernet.memory.memory import Memory

__version__ = "0.2.0"
__all__ = ["AdapterLibrary", "DocToLoRA", "LoRAAdapter", "Memory"]

silence_imports()

# Public name → its module, imported when the name is first used: torch and transformers take seconds.
_MODULES = {
    "AdapterLibrary": "hypernet.adapters.library",
    "DocToLoRA": "hypernet.doc_to_lora",
    "LoRAAdapter": "hypernet.adapters.adapter",
    "Memory": "hypernet.memory.memory",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value  # the next use finds it at once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
