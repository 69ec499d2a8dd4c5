"""KeyMoments: C = E[kkᵀ] of the keys of a feed-forward layer, over the tokens of given texts; kept on the disk.

moments = KeyMoments(texts, questions=questions, folder="outputs/moments")
moments.of(model, ["model.layers.2.mlp.down_proj"])      # path → C [d_in, d_in], float64
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hypernet.base.generation import context_window
from hypernet.doc_to_lora import DocToLoRA
from hypernet.io.files import replaced, save_tensors
from hypernet.text.tokens import text_ids

_BATCH = 32  # texts; the same batches give the same sums, to the bit
_KEY = "moments"


class KeyMoments:
    """C of what the base model reads; of texts as they are, and of questions inside its chat template.

    Args:
        texts, questions: unrelated to what is edited: W k stays for the keys that they have.
        folder: where each layer's C is kept, named by base model, texts and layer; None: nowhere.

    Raises:
        ValueError: there is neither a text nor a question.
    """

    def __init__(
        self, texts: Sequence[str] = (), *, questions: Sequence[str] = (), folder: str | Path | None = None
    ) -> None:
        if not texts and not questions:
            raise ValueError("C is a mean over the tokens of texts. Give texts or questions.")
        self.texts, self.questions = tuple(texts), tuple(questions)
        self.folder = None if folder is None else Path(folder)
        self._kept: dict[str, Tensor] = {}

    def of(self, model: DocToLoRA, paths: Sequence[str]) -> dict[str, Tensor]:
        """C of the inputs of these modules, by the base model's own weights.

        Raises:
            ValueError: a kept file is damaged.
        """
        wanted = {path: self._name(model, path) for path in paths}
        for name in wanted.values():
            file = None if self.folder is None else self.folder / name
            if name not in self._kept and file is not None and file.is_file():
                self._kept[name] = _read(file)
        missing = [path for path, name in wanted.items() if name not in self._kept]
        if missing:
            for path, moment in self._computed(model, missing).items():
                self._kept[wanted[path]] = moment
                if self.folder is not None:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    with replaced(self.folder / wanted[path]) as temporary:
                        save_tensors({_KEY: moment.cpu()}, temporary, metadata={"module": path})
        return {path: self._kept[name].to(model.device) for path, name in wanted.items()}

    def _name(self, model: DocToLoRA, path: str) -> str:
        dtype = str(model.base_model.get_parameter(f"{path}.weight").dtype)
        described = [model.base_model_fingerprint, dtype, path, self.texts, self.questions]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:32] + ".safetensors"

    @torch.no_grad()
    def _computed(self, model: DocToLoRA, paths: Sequence[str]) -> dict[str, Tensor]:
        rows = text_ids(model.tokenizer, self.texts)
        rows += model.layout.prompt_ids(model.tokenizer, self.questions)
        rows = [row[: context_window(model.base_model)] for row in rows if row]
        sums = {path: torch.zeros(0) for path in paths}
        model.injector.clear()
        for start in range(0, len(rows), _BATCH):
            part = rows[start : start + _BATCH]
            width = max(map(len, part))
            pad = model.tokenizer.pad_token_id or 0
            ids = torch.tensor([row + [pad] * (width - len(row)) for row in part], device=model.device)
            inside = torch.arange(width, device=ids.device) < torch.tensor([[len(row)] for row in part]).to(ids)
            with ExitStack() as undo:
                for path in paths:

                    def add(_module: object, args: Any, *, path: str = path, inside: Tensor = inside) -> None:
                        keys = args[0][inside].double()
                        sums[path] = sums[path].to(keys.device) + keys.T @ keys if len(sums[path]) else keys.T @ keys

                    undo.callback(model.base_model.get_submodule(path).register_forward_pre_hook(add).remove)
                # Rows are padded behind, where a causal model's earlier positions do not look.
                model.base_model(input_ids=ids, use_cache=False)
        return {path: total / sum(map(len, rows)) for path, total in sums.items()}


def _read(file: Path) -> Tensor:
    try:
        with safe_open(file, "pt") as opened:
            return opened.get_tensor(_KEY)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged ({error}). Delete it; it is computed anew.") from error
