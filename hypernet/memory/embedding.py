"""Embedders: texts to unit vectors, by the base model itself or by sentence-transformers.

embedder = open_embedder("assets/tiny")            # or "sentence-transformers:<name>"
embedder.embed(["Who taught Fenda Elfax?"])        # [N, D] float32, rows of length 1
embedder.name                                      # names the weights and the way; vectors are stored under it
LazyModel("assets/tiny")                           # a checkpoint or base model, loaded by whoever first needs it
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hypernet.doc_to_lora import DocToLoRA

Vectors = npt.NDArray[np.float32]
SENTENCE_TRANSFORMERS = "sentence-transformers:"
_BATCH = 64  # texts read at once
_SMOOTHING, _RANK_OFFSET = 1e-4, 30


class Embedder(Protocol):
    """Anything with these two; a memory takes it as `embedder`."""

    @property
    def name(self) -> str:
        """Changes whenever its vectors do."""
        ...

    def embed(self, texts: Sequence[str]) -> Vectors:
        """[N, D] float32, rows of length 1, or 0 for a text without tokens."""
        ...


class BaseModelEmbedder:
    """The weighted mean of a text's input embeddings: no forward pass, and better than hidden states.

    A token of probability p weighs a / (a + p) with a = 1e-4: names count, articles hardly (Arora, Liang, Ma 2017,
    "A simple but tough-to-beat baseline for sentence embeddings", ICLR). p is Zipf's 1 / (rank + 30) over the
    vocabulary, which tokenizers number by frequency. Recall@5 of the tiny model on 8 users of 200 memories: 0.86
    weighted, 0.66 as a plain mean. Hidden states of its blocks, plain mean on harder memories: 0.28 to 0.04 for 0.50.

    Args:
        base_model, tokenizer: the frozen causal LM.
    """

    def __init__(self, base_model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
        import torch

        from hypernet.base.base_model import fingerprint, num_embeddings

        self._embeddings, self._tokenizer = base_model.get_input_embeddings(), tokenizer
        self._max_tokens = int(base_model.config.get_text_config().max_position_embeddings)
        zipf = 1 / (torch.arange(num_embeddings(base_model), device=base_model.device) + _RANK_OFFSET)
        self._weights = _SMOOTHING / (_SMOOTHING + zipf / zipf.sum())  # [V]
        self.name = f"{fingerprint(base_model)[:16]}:weighted"

    @property
    def dim(self) -> int:
        """D, of an embedding."""
        return int(self._embeddings.get_parameter("weight").shape[1])

    def tokens(self, texts: Sequence[str]) -> "tuple[Tensor, Tensor]":
        """Embeddings of the texts' tokens [N, T, D] and how much each weighs [N, T], 0 for padding."""
        import torch

        tokens = self._tokenizer(
            list(texts),
            **{"add_special_tokens": False, "truncation": True, "max_length": self._max_tokens},
            **{"padding": True, "padding_side": "right", "return_tensors": "pt"},
        ).to(self._weights.device)
        ids = tokens["input_ids"].long()  # a text without tokens gives floats
        with torch.no_grad():
            return self._embeddings(ids).float(), self._weights[ids] * tokens["attention_mask"]

    def embed(self, texts: Sequence[str]) -> Vectors:
        from einops import einsum

        parts = (self.tokens(texts[start : start + _BATCH]) for start in range(0, len(texts), _BATCH))
        sums = [einsum(*both, "n t d, n t -> n d").cpu().numpy() for both in parts]
        return _unit(np.concatenate(sums)) if sums else np.zeros((0, 0), np.float32)


class SentenceTransformersEmbedder:
    """A model of the library sentence-transformers, by its name on the hub or its folder.

    Raises:
        ValueError: the library is not installed, or there is no such model.
    """

    def __init__(self, model: str) -> None:
        if find_spec("sentence_transformers") is None:
            raise ValueError(
                f"The embedder {SENTENCE_TRANSFORMERS}{model} needs a library: pip install sentence-transformers."
            )
        from sentence_transformers import SentenceTransformer

        try:
            self._model = SentenceTransformer(model)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"sentence-transformers cannot load {model}: {reason}. Check name and network.") from error
        self.name = f"{SENTENCE_TRANSFORMERS}{model}"

    def embed(self, texts: Sequence[str]) -> Vectors:
        return _unit(np.asarray(self._model.encode(list(texts), show_progress_bar=False), np.float32))


class LazyModel:
    """A checkpoint or base model, loaded when it is first needed; as an embedder, the base model's.

    Args:
        source: hub name or folder of either, or a DocToLoRA that is there already.

    Raises:
        ValueError: it is a path that is not there.
    """

    def __init__(self, source: "str | Path | DocToLoRA") -> None:
        self.source: str | Path | None = source if isinstance(source, (str, Path)) else None
        self._given: DocToLoRA | None = None if isinstance(source, (str, Path)) else source
        if self.source is not None and str(self.source)[:1] in ("/", ".", "~"):
            if not Path(self.source).expanduser().exists():
                raise ValueError(f"No base model in {self.source}, and no checkpoint. Check the path.")

    def doc_to_lora(self) -> "DocToLoRA":
        """The checkpoint.

        Raises:
            ValueError: it is a base model without a hypernetwork, or cannot be read.
        """
        if (found := self._checkpoint) is None:
            if self.source is not None and not Path(self.source).expanduser().exists():
                where = Path(self.source).expanduser().absolute()
                raise ValueError(
                    f"No checkpoint {self.source}: there is no folder {where}. Give its whole path, or "
                    "hub:owner/repository/name."
                )
            raise ValueError(
                f"{self.source} is a base model without a hypernetwork, which searches but cannot answer. Give a "
                "checkpoint, such as assets/tiny."
            )
        return found

    @property
    def has_hypernetwork(self) -> bool:
        """Whether it is a checkpoint, so that it answers and writes adapters."""
        return self._checkpoint is not None

    @cached_property
    def _checkpoint(self) -> "DocToLoRA | None":
        if self._given is not None:
            return self._given
        from hypernet.interop.published import is_published
        from hypernet.model.checkpoint import is_checkpoint

        assert self.source is not None
        if not is_checkpoint(self.source) and not is_published(self.source):
            return None
        from hypernet.doc_to_lora import DocToLoRA

        return DocToLoRA.from_pretrained(self.source).eval().requires_grad_(False)

    @cached_property
    def _embedder(self) -> Embedder:
        if self._checkpoint is not None:
            return BaseModelEmbedder(self._checkpoint.base_model, self._checkpoint.tokenizer)
        assert self.source is not None
        return open_embedder(self.source)

    @property
    def name(self) -> str:
        return self._embedder.name

    def embed(self, texts: Sequence[str]) -> Vectors:
        return self._embedder.embed(texts)


def question_vectors(embedder: Embedder, questions: Sequence[str]) -> Vectors:
    """Of questions, by an embedder's `embed_questions` where it has one: a trained one reads them otherwise."""
    own: Callable[[Sequence[str]], Vectors] = getattr(embedder, "embed_questions", embedder.embed)
    return own(questions)


def open_embedder(source: str | Path) -> Embedder:
    """The embedder of a base model's folder or hub name, of a checkpoint's base model, or of sentence-transformers.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    if str(source).startswith(SENTENCE_TRANSFORMERS):
        return SentenceTransformersEmbedder(str(source).removeprefix(SENTENCE_TRANSFORMERS))
    from hypernet.base.base_model import load_base_model
    from hypernet.model.checkpoint import is_checkpoint, load_checkpoint

    return BaseModelEmbedder(*load_base_model(load_checkpoint(source).base_model if is_checkpoint(source) else source))


def _unit(vectors: Vectors) -> Vectors:
    lengths: Vectors = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)
