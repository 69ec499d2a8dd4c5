"""DocToLoRA: the whole path, from a document to an adapter to an answer.

model = DocToLoRA.from_pretrained("assets/tiny")
adapter = model.internalize("Norbach was founded by Ilda Renwick. ...")
model.generate(["Who founded Norbach?"], adapter)
model.generate(["...", "..."], [adapter, other])          # every question its own adapter, or None
both = adapter + other
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hypernet.adapter import LoRAAdapter, find_targets, new_provenance
from hypernet.base_model import fingerprint, generate_text, load_base_model
from hypernet.checkpoint import BASE_MODEL_FOLDER, load_checkpoint, save_checkpoint
from hypernet.chunking import chunk_document
from hypernet.context_encoder import ContextEncoder
from hypernet.data.collate import ChatLayout, PackedRows
from hypernet.documents import Document
from hypernet.hypernetwork import HyperNetwork
from hypernet.injection import LoRAInjector
from hypernet.packed_attention import packed_logits


class DocToLoRA(nn.Module):
    """A frozen base model, the hypernetwork that writes adapters for it, and the hooks that put them in.

    Args:
        base_model, tokenizer: the causal LM that reads and answers; it stays frozen.
        hypernetwork: made for this base model's targets and width.
        context_encoder: {"kind": ..., "layer_idx": ...}, see `ContextEncoder`.
        max_chunk_tokens: document tokens per chunk.
        base_model_source: where the base model came from; adapters carry it for PEFT.

    Raises:
        ValueError: the hypernetwork's targets are not in this base model.
    """

    def __init__(
        self,
        *,
        base_model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        hypernetwork: HyperNetwork,
        context_encoder: dict[str, Any] | None = None,
        max_chunk_tokens: int,
        base_model_source: str = "",
    ) -> None:
        super().__init__()
        self.base_model = base_model
        self.tokenizer = tokenizer
        self.hypernetwork = hypernetwork
        self.context_encoder_settings = dict(context_encoder or {"kind": "per_layer_activations"})
        self.context_encoder = ContextEncoder(base_model, **self.context_encoder_settings)
        self.max_chunk_tokens = max_chunk_tokens
        self.base_model_source = base_model_source
        self.base_model_fingerprint = fingerprint(base_model)
        self.injector = LoRAInjector(base_model, hypernetwork.targets)
        self.layout = ChatLayout.of(tokenizer)
        self._bias: tuple[Any, dict[str, Tensor], dict[str, Tensor]] = (None, {}, {})

    @classmethod
    def build(
        cls,
        *,
        base_model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        target_modules: Sequence[str],
        hypernetwork: dict[str, Any],
        context_encoder: dict[str, Any],
        max_chunk_tokens: int,
        base_model_source: str = "",
    ) -> Self:
        """An untrained hypernetwork for this base model; `hypernetwork` holds rank, scaling, aggregator ... ."""
        encoder = ContextEncoder(base_model, **context_encoder)
        return cls(
            base_model=base_model,
            tokenizer=tokenizer,
            hypernetwork=HyperNetwork(
                targets=find_targets(base_model, target_modules),
                feature_dim=encoder.feature_dim,
                num_maps=encoder.num_maps,
                **hypernetwork,
            ),
            context_encoder=context_encoder,
            max_chunk_tokens=max_chunk_tokens,
            base_model_source=base_model_source,
        )

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        base_model: str | Path | None = None,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype | None = None,
        attention: str | None = None,
    ) -> Self:
        """A trained checkpoint folder.

        Args:
            source: the folder, see `hypernet.checkpoint`.
            base_model: hub name or folder of the base model; None takes the one the checkpoint names.
            dtype: of the base model's weights; None keeps what they are stored in. The hypernetwork stays in float32.
            attention: transformers' `attn_implementation`.

        Raises:
            ValueError: the checkpoint is missing or damaged, or was made for another base model.
        """
        checkpoint = load_checkpoint(source)
        base_source = str(base_model or checkpoint.base_model)
        model, tokenizer = load_base_model(base_source, device=device, dtype=dtype, attention=attention)
        result = cls(
            base_model=model,
            tokenizer=tokenizer,
            hypernetwork=checkpoint.hypernetwork.to(device).eval(),
            context_encoder=checkpoint.context_encoder,
            max_chunk_tokens=checkpoint.max_chunk_tokens,
            base_model_source=base_source,
        )
        # Another dtype gives another fingerprint of the same weights; then only the targets' shapes can be checked.
        if dtype is None and result.base_model_fingerprint != checkpoint.base_model_fingerprint:
            raise ValueError(
                f"The checkpoint {source} was made for the base model {checkpoint.base_model} with fingerprint "
                f"{checkpoint.base_model_fingerprint[:12]}, but {base_source} has "
                f"{result.base_model_fingerprint[:12]}. Give the base model it was trained with."
            )
        result.base_model_fingerprint = checkpoint.base_model_fingerprint
        return result

    def save_pretrained(self, directory: str | Path, *, include_base_model: bool = False) -> None:
        """Writes a checkpoint folder; with the base model inside, it needs nothing else."""
        directory = Path(directory)
        if include_base_model:
            self.base_model.save_pretrained(directory / BASE_MODEL_FOLDER)
            self.tokenizer.save_pretrained(directory / BASE_MODEL_FOLDER)
        save_checkpoint(
            directory,
            hypernetwork=self.hypernetwork,
            base_model=BASE_MODEL_FOLDER if include_base_model else self.base_model_source,
            base_model_fingerprint=self.base_model_fingerprint,
            context_encoder=self.context_encoder_settings,
            max_chunk_tokens=self.max_chunk_tokens,
        )

    @property
    def device(self) -> torch.device:
        return next(self.base_model.parameters()).device

    def adapt(self, ids: Tensor, mask: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Chunk ids and mask [C, T] → target name → A [C, L, R, d_in], B [C, L, R, d_out], differentiable."""
        self.injector.clear()  # the encoder reads with the plain base model
        features = self.context_encoder(ids, mask)
        # The base model may be in half precision; the hypernetwork is not.
        return self.hypernetwork(features.to(next(self.hypernetwork.parameters()).dtype), mask)

    @torch.no_grad()
    def internalize(
        self,
        document: str | Document | Sequence[str | Document],
        *,
        chunks_per_batch: int = 32,
        progress: Callable[[Iterable], Iterable] | None = None,
    ) -> LoRAAdapter:
        """One adapter from a document of any length, or from several documents together.

        Args:
            document: a text, a `Document` (which also gives its name and hash), or a sequence of them.
            chunks_per_batch: chunks read at once; fewer need less memory.
            progress: wraps the iterable over batches, e.g. tqdm.

        Raises:
            ValueError: a document is empty, or chunks_per_batch below 1.
        """
        if chunks_per_batch < 1:
            raise ValueError(f"chunks_per_batch must be at least 1, got {chunks_per_batch}.")
        single = isinstance(document, (str, Document))
        documents = [_as_document(d) for d in ([document] if single else document)]
        if not documents:
            raise ValueError("There is no document to internalize; give at least one.")
        chunks = [chunk_document(d.text, self.tokenizer, max_chunk_tokens=self.max_chunk_tokens) for d in documents]
        rows = [(ids, mask) for chunk in chunks for ids, mask in zip(chunk.ids, chunk.mask, strict=True)]
        batches = range(0, len(rows), chunks_per_batch)
        parts = []
        for start in progress(batches) if progress else batches:
            batch = rows[start : start + chunks_per_batch]
            width = max(len(ids) for ids, _ in batch)
            ids = torch.stack([nn.functional.pad(ids, (0, width - len(ids))) for ids, _ in batch]).to(self.device)
            mask = torch.stack([nn.functional.pad(mask, (0, width - len(mask))) for _, mask in batch]).to(self.device)
            parts.append(self.adapt(ids, mask))
        A, B = ({name: torch.cat([part[i][name] for part in parts]) for name in parts[0][i]} for i in (0, 1))
        described = [
            {
                "name": d.name,
                "sha256": d.sha256,
                "characters": len(d.text),
                "chunks": [list(span) for span in chunk.spans],
            }
            for d, chunk in zip(documents, chunks, strict=True)
        ]
        generator = fingerprint(self.hypernetwork)
        bias_A, bias_B = self._bias_block(generator)
        return LoRAAdapter(
            targets=self.hypernetwork.targets,
            A=A,
            B=B,
            bias_A=bias_A,
            bias_B=bias_B,
            scaling=self.hypernetwork.scaling,
            provenance=new_provenance(
                described,
                generator=generator,
                base_model_name=self.base_model_source,
                base_model_fingerprint=self.base_model_fingerprint,
            ),
        )

    def generate(
        self,
        questions: Sequence[str],
        adapters: LoRAAdapter | None | Sequence[LoRAAdapter | None] = None,
        *,
        documents: Sequence[str | None] | None = None,
        max_new_tokens: int = 32,
    ) -> list[str]:
        """Greedy answers, one batch.

        Args:
            questions: one text each.
            adapters: one for all questions, one (or None) per question, or None for the plain base model.
            documents: a text per question to put into the prompt, or None.

        Raises:
            ValueError: the numbers of questions, adapters and documents differ, or an adapter is another base model's.
        """
        if isinstance(questions, str):
            raise ValueError("questions must be a list of texts, got one text; write generate([question], adapter).")
        if isinstance(documents, str):
            raise ValueError("documents must be a list with a text (or None) for each question, got one text.")
        given = [adapters] if isinstance(adapters, LoRAAdapter) else list(adapters or [])
        for adapter in given:
            self._check_ours(adapter)
        for name, items in (("adapters", adapters), ("documents", documents)):
            if isinstance(items, Sequence) and len(items) != len(questions):
                raise ValueError(f"Got {len(items)} {name} for {len(questions)} questions; give one (or None) each.")
        if not questions:
            return []
        prompts = [
            self.layout.prompt(q, d) for q, d in zip(questions, documents or [None] * len(questions), strict=True)
        ]
        with self.injector.using(adapters):
            return generate_text(self.base_model, self.tokenizer, prompts, max_new_tokens=max_new_tokens)

    def forward(self, rows: PackedRows) -> Tensor:
        """Logits of the answer tokens of packed rows, with whatever adapters the injector holds.

        Returns:
            [number of answer tokens, V], in the rows' order.
        """
        return packed_logits(self.base_model, rows, rows.target_kind >= 0)

    def set_chunks(
        self, A: dict[str, Tensor], B: dict[str, Tensor], num_chunks: Sequence[int], *, shift: int = 0
    ) -> None:
        """Puts the adapters of N documents in force, one per row; they stay until `injector.clear()`, after backward.

        Args:
            A, B: of all chunks together, document after document, as `adapt` gives them.
            num_chunks: chunks of each document.
            shift: row i gets the adapter of document (i + shift) mod N; 1 gives every row a wrong one.
        """
        num_slots = sum(num_chunks)
        first = [sum(num_chunks[:i]) for i in range(len(num_chunks))]
        # The bias block is one more slot, shared by all documents, once in each document's list.
        slots = [[*range(start, start + count), num_slots] for start, count in zip(first, num_chunks, strict=True)]
        self.injector.set(
            {name: torch.cat([A[name], bias[None]]) for name, bias in self.hypernetwork.bias_A.items()},
            {name: torch.cat([B[name], bias[None]]) for name, bias in self.hypernetwork.bias_B.items()},
            slots[shift:] + slots[:shift],
            scaling=self.hypernetwork.scaling,
        )

    def _bias_block(self, generator: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Copies of bias_A and bias_B, shared by all adapters of one state of the hypernetwork."""
        # Copies: training on must not change adapters made before. Shared: a batch of many adapters holds them once.
        biases = self.hypernetwork.bias_A, self.hypernetwork.bias_B
        state = generator, next(iter(biases[0].values())).device
        if self._bias[0] != state:
            self._bias = state, *({name: bias.detach().clone() for name, bias in block.items()} for block in biases)
        return self._bias[1:]

    def _check_ours(self, adapter: LoRAAdapter | None) -> None:
        if adapter is None:
            return
        made_for = adapter.provenance["base_model"]
        if made_for["fingerprint"] != self.base_model_fingerprint:
            raise ValueError(
                f"The adapter was made for the base model {made_for['name']} ({str(made_for['fingerprint'])[:12]}), "
                f"this is {self.base_model_source} ({self.base_model_fingerprint[:12]}). "
                "Generate it again with this one."
            )


def _as_document(document: str | Document) -> Document:
    if isinstance(document, Document):
        return document
    # surrogatepass: chunking refuses half characters, and says what to do.
    sha256 = hashlib.sha256(document.encode(errors="surrogatepass")).hexdigest()
    return Document(name="text", text=document, sha256=sha256)
