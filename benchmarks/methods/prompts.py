"""Methods that put text into the prompt: none of it, all of it, all of it read in advance, the best chunks of it."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.measuring.decoding import Prefix
from benchmarks.methods.base import Method
from benchmarks.tasks.base import Asked, Case
from hypernet.doc_to_lora import DocToLoRA
from hypernet.io.logs import without_weight_bars
from hypernet.text.chunking import chunk_document


class NoContext(Method):
    """The question alone: the floor."""


class FullContext(Method):
    """All documents in the prompt, read again for every question: the ceiling, as long as they fit."""

    def documents_for(self, question: Asked) -> Sequence[str]:
        return self.documents

    def stored_bytes(self) -> int:
        return sum(len(document.encode()) for document in self.documents)


class PrefixCache(FullContext):
    """All documents in the prompt, their keys and values kept. The same answers as `FullContext`."""

    def __init__(self, *, model: DocToLoRA, max_new_tokens: int = 32) -> None:
        super().__init__(model=model, max_new_tokens=max_new_tokens)
        self._prefix: Prefix | None = None
        self._fits = True

    def build(self, case: Case) -> None:
        head, self._fits = self.head(self.documents)
        self._prefix = Prefix.of(self.model.base_model, head) if head else None

    def prompt(self, question: Asked) -> tuple[list[int], bool]:
        return self.tail(question), self._fits

    def prefix(self) -> Prefix | None:
        return self._prefix

    def stored_bytes(self) -> int:
        return self._prefix.num_bytes if self._prefix else 0


class Retrieval(Method):
    """The chunks that fit a question best, in the documents' order, in the prompt; none where none has a word of it.

    Args:
        num_chunks: put into the prompt.
        max_chunk_tokens: of each; cut between sentences.
        encoder: None ranks by BM25 (bm25s); a sentence-transformers model ranks by the cosine of embeddings.

    Raises:
        ValueError: the library that ranks is not installed.
    """

    def __init__(
        self,
        *,
        model: DocToLoRA,
        num_chunks: int,
        max_chunk_tokens: int,
        encoder: str | None = None,
        max_new_tokens: int = 32,
    ) -> None:
        super().__init__(model=model, max_new_tokens=max_new_tokens)
        self.num_chunks = num_chunks
        self.max_chunk_tokens = max_chunk_tokens
        self.chunks: list[str] = []
        self._ranking = _Bm25() if encoder is None else _Dense(encoder)

    def build(self, case: Case) -> None:
        self.chunks = [
            document[start:end].strip()
            for document in self.documents
            for start, end in chunk_document(
                document, self.model.tokenizer, max_chunk_tokens=self.max_chunk_tokens, add_affixes=False
            ).spans
        ]
        if self.chunks:
            self._ranking.index(self.chunks)

    def documents_for(self, question: Asked) -> Sequence[str]:
        if not self.chunks:
            return ()
        scores = self._ranking.scores(question.text)
        if not scores.any():  # no chunk has a word of the question
            return ()
        # Stable: chunks of one score come in the documents' order.
        best = np.argsort(-scores, kind="stable")[: self.num_chunks]
        return [" ".join(self.chunks[i] for i in sorted(best))]

    def stored_bytes(self) -> int:
        return sum(len(chunk.encode()) for chunk in self.chunks) + (self._ranking.num_bytes() if self.chunks else 0)


class _Bm25:
    def __init__(self) -> None:
        try:
            import bm25s
        except ImportError as error:
            raise ValueError("method=retrieval ranks with bm25s, which is not installed: pip install bm25s.") from error
        logging.getLogger("bm25s").setLevel(logging.WARNING)  # importing it makes it report every index
        self._bm25s = bm25s

    def index(self, texts: Sequence[str]) -> None:
        self._num_texts = len(texts)
        self._index = None
        tokens = self._tokens(list(texts))
        if any(tokens.ids):  # bm25s refuses texts without any word, and so questions: "?", "A"
            self._index = self._bm25s.BM25()
            self._index.index(tokens, show_progress=False)

    def scores(self, question: str) -> np.ndarray:
        (words,) = self._tokens([question], return_ids=False)
        return self._index.get_scores(words) if self._index and words else np.zeros(self._num_texts)

    def num_bytes(self) -> int:
        arrays = self._index.scores.values() if self._index else ()
        return sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))

    def _tokens(self, texts: list[str], *, return_ids: bool = True) -> Any:
        # No stop words: with them a short chunk can be left without any word.
        return self._bm25s.tokenize(texts, stopwords=None, return_ids=return_ids, show_progress=False)


class _Dense:
    def __init__(self, encoder: str) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ValueError(
                f"method.encoder={encoder} needs sentence-transformers: pip install sentence-transformers."
            ) from error
        with without_weight_bars():
            self._encoder = SentenceTransformer(encoder)

    def index(self, texts: Sequence[str]) -> None:
        self._embeddings = self._encode(list(texts))

    def scores(self, question: str) -> np.ndarray:
        (embedding,) = self._encode([question])
        return self._embeddings @ embedding

    def num_bytes(self) -> int:
        return self._embeddings.nbytes

    def _encode(self, texts: list[str]) -> np.ndarray:
        return self._encoder.encode(texts, normalize_embeddings=True, show_progress_bar=False)
