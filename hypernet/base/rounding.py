"""How far the weights of two base models lie apart, where one may be the other rounded.

same, sentence = same_but_for_rounding(base_model, "HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m")
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open

from hypernet.base.catalog import KNOWN_BASE_MODELS, folder_of, known_name

if TYPE_CHECKING:  # a base model that is there is checked without torch
    from torch import Tensor, nn

# Q4_1 of normally distributed weights gives .08: 32 of them span 4.1 standard deviations in 15 steps, and the error of
# a step d is d / sqrt(12).
MOST_ROUNDING = 0.15
_WEIGHTS = "model.safetensors"


def stored_weights(source: str) -> Path | None:
    """The file of a base model's weights if it is one file on this machine: of a folder, a fetched base model, or a hub
    name that transformers has loaded before."""
    folder = folder_of(source) if source in KNOWN_BASE_MODELS else Path(source).expanduser()
    if (folder / _WEIGHTS).is_file():
        return folder / _WEIGHTS
    try:
        found = try_to_load_from_cache(source, _WEIGHTS)
    except ValueError:  # no hub name
        return None
    return Path(found) if isinstance(found, str) else None


def relative_difference(weights: "Mapping[str, Tensor]", reference: Path) -> float:
    """sqrt(Σ (w − r)² / Σ r²) over all weights r of a safetensors file; infinite if names or shapes differ."""
    difference = norm = 0.0
    with safe_open(reference, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  # no mapping: it has keys and nothing to iterate over
            wanted = file.get_tensor(name).float()
            if name not in weights or weights[name].shape != wanted.shape:
                return float("inf")
            difference += float((weights[name].detach().cpu().float() - wanted).square().sum())
            norm += float(wanted.square().sum())
    return (difference / norm) ** 0.5 if norm else float("inf")


def same_but_for_rounding(base_model: "nn.Module", source: str, made_for: str) -> tuple[bool, str]:
    """Whether a base model has the weights of another but for rounding, and a sentence that gives the difference.

    Args:
        source: what was loaded. made_for: the other one, of which something was made; a name or folder of each.

    Returns:
        False and no sentence if neither has anything to do with a known base model; False and what would be needed if
        the other one is not on this machine.
    """
    name = known_name(made_for) or known_name(source)
    if name is None:
        return False, ""
    reference = stored_weights(made_for)
    if reference is None:
        how = (
            f"python -m hypernet base-model fetch {made_for}"
            if made_for in KNOWN_BASE_MODELS
            else f"hf download {made_for}"
        )
        return False, f"Whether they differ by rounding alone cannot be measured without {made_for}: {how}"
    difference = relative_difference(base_model.state_dict(), reference)
    rounding = KNOWN_BASE_MODELS[name].rounding
    if math.isinf(difference):
        return False, "Their weights have other names or shapes."
    if difference > MOST_ROUNDING:
        return False, f"Their weights differ by {difference:.1%} (relative root mean square), more than by rounding."
    return True, (
        f"{source} and {made_for} are one base model, whose weights {name} has rounded ({rounding}): they differ by "
        f"{difference:.1%} (relative root mean square), so answers may differ."
    )
