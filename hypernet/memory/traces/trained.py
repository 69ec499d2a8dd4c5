"""TrainedRetriever: the dual encoder that a memory's traces trained, kept in its folder, and trained anew when they go.

trained = TrainedRetriever(memory.store, BaseModelEmbedder(base_model, tokenizer))
memory.retriever.embedder = trained.embedder()        # trains where there is none that stands; None: too few traces
trained.delete_traces(Filters(user_id="alice"))       # afterwards it is what it would be without alice, to the bit

    retriever/encoder.safetensors      its weights
    retriever/manifest.json            what it was trained on, as hashes, and how

An encoder stands while every example that it saw is still there. Deleting a memory or a trace takes that away;
`embedder` then trains anew, and what it had written, vectors of memories among it, is erased.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from hypernet.io.files import replaced_folder
from hypernet.memory.embedding import BaseModelEmbedder
from hypernet.memory.store.records import Filters
from hypernet.memory.store.token_store import TokenStore
from hypernet.memory.traces.dual_encoder import DualEmbedder, DualEncoder, DualTraining
from hypernet.memory.traces.kept import MANIFEST_FILE, RETRIEVER_FOLDER, erase_retriever, hash_of
from hypernet.memory.traces.trace_store import Example, TraceStore

_ENCODER = "encoder.safetensors"


class TrainedRetriever:
    """Of one memory.

    Args:
        base: on whose embeddings the towers work.
        training: how; None: as `DualTraining` says.
        min_examples: usable ones, below which nothing is trained.
        growth: by how much the usable examples must have grown since, for more of them to be trained on.
    """

    def __init__(
        self,
        store: TokenStore,
        base: BaseModelEmbedder,
        *,
        training: DualTraining | None = None,
        min_examples: int = 16,
        growth: float = 1.5,
    ) -> None:
        if min_examples < 1 or growth < 1:
            raise ValueError(f"min_examples is {min_examples} and growth {growth}. Give at least 1 of both.")
        self.store, self.traces, self.base = store, TraceStore(store), base
        self.training, self.min_examples, self.growth = training or DualTraining(), min_examples, growth
        self._folder = store.folder / RETRIEVER_FOLDER

    def embedder(self) -> DualEmbedder | None:
        """The encoder that stands, trained now where none does or the traces have grown; None: too few traces."""
        examples = self.training.usable(self.traces.examples())
        manifest = self._manifest()
        if manifest is None or not self._stands(manifest, examples) or self._has_grown(manifest, examples):
            self._train(examples)
        if not (self._folder / _ENCODER).is_file():
            return None
        return DualEmbedder(self.base, DualEncoder.load(self._folder / _ENCODER))

    def delete_traces(self, filters: Filters) -> int:
        """Deletes the traces within the filters and all that was learned from them; returns how many.

        Raises:
            ValueError: no filter is given.
        """
        number = self.traces.delete(filters)
        self.embedder()
        return number

    def _train(self, examples: Sequence[Example]) -> None:
        """Files of the examples, or none where there are too few."""
        erase_retriever(self.store)
        if len(examples) < self.min_examples:
            return
        encoder = self.training.train(self.base, examples)
        manifest = {
            **{"base": self.base.name, "training": asdict(self.training), "encoder": encoder.sha256},
            "examples": sorted(map(hash_of, examples)),
        }
        with replaced_folder(self._folder) as folder:
            encoder.save(folder / _ENCODER)
            (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _manifest(self) -> dict[str, Any] | None:
        path = self._folder / MANIFEST_FILE
        return json.loads(path.read_bytes()) if path.is_file() else None

    def _stands(self, manifest: dict[str, Any], examples: Sequence[Example]) -> bool:
        same = manifest["base"] == self.base.name and manifest["training"] == asdict(self.training)
        return same and set(manifest["examples"]) <= set(map(hash_of, examples))

    def _has_grown(self, manifest: dict[str, Any], examples: Sequence[Example]) -> bool:
        return len(examples) >= self.growth * len(manifest["examples"]) and len(examples) > len(manifest["examples"])
