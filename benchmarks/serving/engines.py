"""Other ways to serve documents, behind the same HTTP: an adapter merged for each request, and a kept prefix.

python -m benchmarks.serving.engines kept_prefix --model assets/tiny --directory outputs/prefix --port 8001

`ours` is the product's own engine. All of them end an answer at its last token alone, whatever the model would write:
every way then decodes as many tokens for a request.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from hypernet.adapters.adapter import LoRAAdapter
from hypernet.doc_to_lora import DocToLoRA
from hypernet.serving.app import serve
from hypernet.serving.engine import BatchEngine, Generation, cache_layers, cache_of, stacked
from hypernet.serving.state import ServerSettings


class MergingEngine(BatchEngine):
    """One sequence at a time: its adapter is added to the weights before its prompt is read, and taken out after it.

    The weights are put back from a copy that is made once, and the product BᵀA is all that is computed for a request.
    """

    def __init__(self, model: DocToLoRA, *, max_batch: int = 1) -> None:
        super().__init__(model, max_batch=1)
        targets = model.hypernetwork.targets
        places = [(target.name, place) for target in targets for place in target.modules()]
        self._layers = [(name, place, model.base_model.get_submodule(place.path)) for name, place in places]
        self._plain = {place.path: module.weight.clone() for _, place, module in self._layers}
        self._is_merged = False

    @torch.inference_mode()
    def admit(self, arrivals: Sequence[Generation]) -> None:
        for one in arrivals:
            if one.adapter is not None:
                self._merge(one.adapter)
                one.adapter = None  # the engine adds nothing to the layers' outputs
        super().admit(arrivals)
        self._restore()

    @torch.inference_mode()
    def step(self) -> None:
        super().step()
        self._restore()

    def clear(self) -> list[Generation]:
        dropped = super().clear()
        self._restore()
        return dropped

    def _merge(self, adapter: LoRAAdapter) -> None:
        for name, place, module in self._layers:
            blocks = [(adapter.A[name][:, place.layer].flatten(0, 1), adapter.B[name][:, place.layer].flatten(0, 1))]
            if adapter.bias_rank:
                blocks.append((adapter.bias_A[name][place.layer], adapter.bias_B[name][place.layer]))
            for A, B in blocks:
                A, B = (rows.to(module.weight.dtype) for rows in (A[:, : place.d_in], B[:, : place.d_out]))
                module.weight.data.addmm_(B.T, A, alpha=adapter.scaling)
        self._is_merged = True

    def _restore(self) -> None:
        if self._is_merged and not self.running:
            for _, place, module in self._layers:
                module.weight.data.copy_(self._plain[place.path])
            self._is_merged = False


class PrefixEngine(BatchEngine):
    """Keeps the keys and values of prompts, and reads of a new prompt only what follows its longest known beginning.

    Args:
        max_kept: prompts; the one used longest ago is dropped.
    """

    def __init__(self, model: DocToLoRA, *, max_batch: int = 32, max_kept: int = 64) -> None:
        super().__init__(model, max_batch=max_batch)
        self.max_kept = max_kept
        self._kept: dict[tuple[int, ...], tuple[np.ndarray, list[tuple[Tensor, Tensor]]]] = {}
        self.num_hits = 0

    @torch.inference_mode()
    def admit(self, arrivals: Sequence[Generation]) -> None:
        if not arrivals:
            return
        found = [self._known(one.prompt) for one in arrivals]
        sizes = [size for _, size in found]
        self.num_hits += sum(size > 0 for size in sizes)
        rests = [list(one.prompt[size:]) for one, size in zip(arrivals, sizes, strict=True)]
        before, width = max(sizes), max(map(len, rests))
        pad = self.model.tokenizer.pad_token_id or 0
        ids = torch.tensor([[pad] * (width - len(rest)) + rest for rest in rests])
        mask = torch.tensor(
            [[0] * (before - p) + [1] * p + [0] * (width - len(r)) + [1] * len(r) for p, r in zip(sizes, rests)]  # noqa: B905
        )
        cache = cache_of(self._beginnings(found, before)) if before else DynamicCache()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, before:]
        logits = self._forward(arrivals, ids, mask, positions, cache)
        layers, mask = _moved_right(cache_layers(cache), mask)
        for place, (one, size) in enumerate(zip(arrivals, sizes, strict=True)):
            if size < len(one.prompt) // 2:
                self._keep_prompt(one.prompt, [(k[place], v[place]) for k, v in layers])
        stay = self._take(arrivals, logits)
        if stay:
            width, index = int(mask[stay].sum(-1).max()), torch.tensor(stay)
            rows = [(keys[index, :, -width:], values[index, :, -width:]) for keys, values in layers]
            self._cache, self._mask = stacked(self._cache, self._mask, cache_of(rows), mask[index, -width:])
            self.running += [arrivals[place] for place in stay]

    def _known(self, prompt: Sequence[int]) -> tuple[tuple[int, ...] | None, int]:
        """Which kept prompt begins as this one, and for how many tokens; at least one is left to read."""
        ids, best, most = np.asarray(prompt[:-1]), None, 15
        for key, (kept, _) in self._kept.items():
            size = min(len(ids), len(kept))
            differs = ids[:size] != kept[:size]
            common = int(differs.argmax()) if differs.any() else size
            if common > most:
                best, most = key, common
        if best is None:
            return None, 0
        self._kept[best] = self._kept.pop(best)
        return best, most

    def _beginnings(
        self, found: Sequence[tuple[tuple[int, ...] | None, int]], width: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of all layers, left-padded: [B, heads, width, d]."""
        some = next(layers for key, _ in found if key is not None for _, layers in [self._kept[key]])
        result = []
        for number, pair in enumerate(some):
            parts = []
            for which, like in enumerate(pair):
                rows = like.new_zeros(len(found), like.shape[0], width, like.shape[2])
                for row, (key, size) in zip(rows, found, strict=True):
                    if key is not None:
                        row[:, width - size :] = self._kept[key][1][number][which][:, :size]
                parts.append(rows)
            result.append((parts[0], parts[1]))
        return result

    def _keep_prompt(self, prompt: Sequence[int], layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        size = len(prompt)
        self._kept[tuple(prompt)] = (
            np.asarray(prompt),
            [(keys[:, -size:].clone(), values[:, -size:].clone()) for keys, values in layers],
        )
        while len(self._kept) > self.max_kept:
            del self._kept[next(iter(self._kept))]


def _moved_right(layers: Sequence[tuple[Tensor, Tensor]], mask: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """The same rows with their padding on the left."""
    if bool((mask.diff(dim=-1) >= 0).all()):
        return list(layers), mask
    order = mask.argsort(stable=True, dim=-1)
    index = order[:, None, :, None]
    moved = [tuple(part.gather(2, index.expand_as(part)) for part in pair) for pair in layers]
    return moved, mask.gather(1, order)  # type: ignore[return-value]


ENGINES: dict[str, type[BatchEngine]] = {"ours": BatchEngine, "merging": MergingEngine, "kept_prefix": PrefixEngine}


def endless(name: str, model: DocToLoRA, *, max_batch: int) -> BatchEngine:
    """An engine whose answers are as long as they are asked to be."""
    engine = ENGINES[name](model, max_batch=max_batch)
    engine.ends = []
    return engine


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.serving.engines", description=__doc__)
    parser.add_argument("engine", choices=ENGINES)
    for option in ("--model", "--directory"):
        parser.add_argument(option, required=True)
    for option in ("--port", "--max-batch"):
        parser.add_argument(option, type=int, required=True)
    given: Any = parser.parse_args()
    settings = ServerSettings(directory=given.directory, model_name="model", max_batch=given.max_batch)
    serve(given.model, settings, port=given.port, report=print, engine=partial(endless, given.engine))


if __name__ == "__main__":
    main()
