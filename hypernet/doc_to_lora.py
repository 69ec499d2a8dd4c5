"""DocToLoRA: the whole path, from a document to an adapter to an answer.

model = DocToLoRA.from_pretrained("assets/tiny")
adapter = model.internalize("Norbach was founded by Ilda Renwick. ...")
model.generate(["Who founded Norbach?"], adapter)
model.generate(["...", "..."], [adapter, other])          # every question its own adapter, or None
both = model.join([adapter, other])                       # adapter + other is their plain sum
many = model.internalize(documents, decorrelate=False)
model.generate(questions, many, gate=1.25)                # every token the chunks that it is about, module by module
model.generate(questions, model.route(questions, many))   # every question the two chunks that it is about
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from hypernet.adapters.adapter import LoRAAdapter, new_provenance
from hypernet.adapters.composition import concatenate, decorrelate
from hypernet.adapters.decorrelation import decorrelate_, decorrelated
from hypernet.adapters.injection import LoRAInjector
from hypernet.adapters.routing import chunk_energies, routed
from hypernet.base.base_model import fingerprint, generate_text, load_base_model
from hypernet.base.packed_attention import packed_logits
from hypernet.base.packed_rows import PackedRows
from hypernet.base.targets import adapted_layers, find_targets
from hypernet.interop.checkpoints import open_checkpoint
from hypernet.model.checkpoint import BASE_MODEL_FOLDER, save_checkpoint
from hypernet.model.context_encoder import drop_context, make_context_encoder
from hypernet.model.hypernetwork import HyperNetwork
from hypernet.model.lora_head import zero_beyond_width
from hypernet.model.streaming import DEFAULT_BATCH_TOKENS, read_chunks
from hypernet.text.chat import ChatLayout
from hypernet.text.chunking import Chunks, chunk_document
from hypernet.text.documents import Document


def reading(
    base_model: nn.Module, target_layers: Sequence[int] | float | None, context_encoder: dict[str, Any]
) -> dict[str, Any]:
    """The context encoder's settings with a map for each of these layers, if it has one per layer."""
    if target_layers is None or context_encoder.get("kind", "per_layer_activations") != "per_layer_activations":
        return context_encoder
    return {**context_encoder, "layer_idx": adapted_layers(base_model, target_layers)}


class DocToLoRA(nn.Module):
    """A frozen base model, the hypernetwork that writes adapters for it, and the hooks that put them in.

    Args:
        base_model, tokenizer: the causal LM that reads and answers; it stays frozen.
        hypernetwork: made for this base model's targets and width.
        context_encoder: {"kind": ..., "layer_idx": ..., "context_tokens": ...}, see `make_context_encoder`.
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
        self.context_encoder = make_context_encoder(base_model, context_encoder)
        self.max_chunk_tokens = max_chunk_tokens
        self.base_model_source = base_model_source
        self.base_model_fingerprint = fingerprint(base_model)
        self.injector = LoRAInjector(base_model, hypernetwork.targets)
        self.layout = ChatLayout.of(tokenizer)
        self._generated_by: tuple[Any, str, dict[str, Tensor], dict[str, Tensor]] = (None, "", {}, {})

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
        target_layers: Sequence[int] | float | None = None,
    ) -> Self:
        """An untrained hypernetwork for this base model; `hypernetwork` holds rank, scaling, aggregator ... .

        Args:
            target_layers: the blocks to adapt (see `adapted_layers`), and whose activations are read where each has a
                map; None: all.
        """
        context_encoder = reading(base_model, target_layers, context_encoder)
        encoder = make_context_encoder(base_model, context_encoder)
        return cls(
            base_model=base_model,
            tokenizer=tokenizer,
            hypernetwork=HyperNetwork(
                targets=find_targets(base_model, target_modules, layers=target_layers),
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
        quantization: str | None = None,
        attention: str | None = None,
    ) -> Self:
        """A trained checkpoint: ours, or one that the Doc-to-LoRA authors published.

        Args:
            source: a folder, see `hypernet.model.checkpoint`; or a published pytorch_model.bin, its folder, or
                hub:owner/repository/name such as hub:SakanaAI/doc-to-lora/gemma_demo.
            base_model: hub name or folder of the base model; None takes the one the checkpoint names.
            dtype: of the base model's weights; None keeps what they are stored in. The hypernetwork stays in float32.
            quantization: of the base model's weights, "int8" or "4bit", see `load_base_model`.
            attention: transformers' `attn_implementation`.

        Raises:
            ValueError: the checkpoint is missing or damaged, or was made for another base model.
        """
        checkpoint = open_checkpoint(source, base_model=base_model)
        base_source = str(base_model or checkpoint.base_model)
        model, tokenizer = load_base_model(
            base_source, device=device, dtype=dtype, quantization=quantization, attention=attention
        )
        result = cls(
            base_model=model,
            tokenizer=tokenizer,
            hypernetwork=checkpoint.hypernetwork.to(device).eval(),
            context_encoder=checkpoint.context_encoder,
            max_chunk_tokens=checkpoint.max_chunk_tokens,
            base_model_source=base_source,
        )
        if checkpoint.base_model_fingerprint is None:  # a published checkpoint records only its base model's name
            network, encoder = result.hypernetwork, result.context_encoder
            wanted, found = (network.num_maps, network.feature_dim), (encoder.num_maps, encoder.feature_dim)
            if wanted != found:
                raise ValueError(
                    f"The checkpoint {source} reads {wanted[0]} feature maps of width {wanted[1]} from "
                    f"{checkpoint.base_model}, but {base_source} gives {found[0]} of width {found[1]}. Give the base "
                    "model it was trained with."
                )
            return result
        # Rounded otherwise, the same weights have another fingerprint; then only the targets' shapes can be checked.
        as_stored = dtype is None and quantization is None
        if as_stored and result.base_model_fingerprint != checkpoint.base_model_fingerprint:
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
            context_encoder=self.context_encoder.settings,
            max_chunk_tokens=self.max_chunk_tokens,
        )

    @property
    def device(self) -> torch.device:
        return next(self.base_model.parameters()).device

    def adapt(self, ids: Tensor, mask: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Chunk ids and mask [C, T] → target name → A [C, L, R, d_in], B [C, L, R, d_out], differentiable."""
        self.injector.clear()  # the encoder reads with the plain base model
        features, mask = drop_context(self.context_encoder(ids, mask), mask)
        # The base model may be in half precision; the hypernetwork is not.
        return self.hypernetwork(features.to(next(self.hypernetwork.parameters()).dtype), mask)

    def chunk(self, text: str) -> Chunks:
        """The text cut as this model reads it; raises as `chunk_document` does."""
        return chunk_document(
            text,
            self.tokenizer,
            max_chunk_tokens=self.max_chunk_tokens,
            context_tokens=self.context_encoder.context_tokens,
        )

    @torch.no_grad()
    def internalize(
        self,
        document: str | Document | Sequence[str | Document],
        *,
        max_batch_tokens: int = DEFAULT_BATCH_TOKENS,
        decorrelate: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> LoRAAdapter:
        """One adapter from a document of any length, or the plain sum of several documents' (see `join`).

        Memory beyond the model's weights is that of one batch and the adapter (see `hypernet.model.streaming`).

        Args:
            document: a text, a `Document` (which also gives its name and hash), or a sequence of them.
            max_batch_tokens: tokens read at once; fewer need less memory. Halved where memory runs out.
            decorrelate: tell a document's chunks apart with the hypernetwork's `join_ridge`, if it has one, for all of
                them to be in force together; False leaves them as they were generated, for a gate or `route`.
            progress: called with (chunks done, chunks altogether).

        Raises:
            ValueError: a document is empty, or max_batch_tokens below 1.
            MemoryError: a single chunk does not fit into memory.
        """
        single = isinstance(document, (str, Document))
        documents = [_as_document(d) for d in ([document] if single else document)]
        if not documents:
            raise ValueError("There is no document to internalize; give at least one.")
        chunks = [self.chunk(document.text) for document in documents]
        rows = [(ids, mask) for chunk in chunks for ids, mask in zip(chunk.ids, chunk.mask, strict=True)]
        self.injector.clear()  # the encoder reads with the plain base model
        A, B = read_chunks(
            rows, self.context_encoder, self.hypernetwork, max_batch_tokens=max_batch_tokens, progress=progress
        )
        ridge = self.hypernetwork.join_ridge if decorrelate else None
        if ridge is not None:
            start = 0
            for number in map(len, (chunk.ids for chunk in chunks)):
                for rows in A.values() if number > 1 else ():
                    for layer in range(rows.shape[1]):  # one by one: little memory beside the adapter
                        decorrelate_(rows[start : start + number, layer], ridge=ridge)
                start += number
        described = [
            {
                "name": d.name,
                "sha256": d.sha256,
                "characters": len(d.text),
                "chunks": [list(span) for span in chunk.spans],
                **({} if ridge is None else {"ridge": ridge}),
            }
            for d, chunk in zip(documents, chunks, strict=True)
        ]
        generator, bias_A, bias_B = self._generator()
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

    def join(self, adapters: LoRAAdapter | Sequence[LoRAAdapter]) -> LoRAAdapter:
        """The documents of these adapters in one, as the hypernetwork was trained to have them joined.

        Args:
            adapters: whose documents can still be told apart; one of several documents will do.

        Returns:
            Their plain sum, or where the hypernetwork has a `join_ridge` that sum decorrelated with it; then documents
            cannot be dropped or added any more.

        Raises:
            ValueError: as `hypernet.adapters.composition.concatenate` and `decorrelate`.
        """
        joined = adapters if isinstance(adapters, LoRAAdapter) else concatenate(adapters)
        ridge = self.hypernetwork.join_ridge
        return joined if ridge is None else decorrelate(joined, ridge)

    def route(
        self,
        questions: Sequence[str],
        adapter: LoRAAdapter,
        *,
        num_chunks: int = 2,
        sharpness: float = 1.0,
        documents: Sequence[str | None] | None = None,
    ) -> list[LoRAAdapter]:
        """For each question an adapter of the few chunks that it is about, for `generate`.

        Costs one reading of the questions by the plain base model.

        Args:
            questions: one text each.
            adapter: of any number of documents, made with `internalize(..., decorrelate=False)`.
            num_chunks, sharpness: how many chunks each question has, and how much the loudest counts before the others
                (see `hypernet.adapters.routing.routed`).
            documents: a text per question that will stand in the prompt, or None.

        Raises:
            ValueError: num_chunks is below 1 or sharpness below 0; or the adapter is another base model's, or its
                chunks cannot be told from each other any more.
        """
        self._check_ours(adapter)
        prompts = self._prompts(questions, documents)
        if not prompts:
            return []
        ids = self.tokenizer(prompts, add_special_tokens=False)["input_ids"]
        return self.route_prompts(ids, adapter, num_chunks=num_chunks, sharpness=sharpness)

    def route_prompts(
        self, prompts: Sequence[Sequence[int]], adapter: LoRAAdapter, *, num_chunks: int, sharpness: float
    ) -> list[LoRAAdapter]:
        """`route` for whole prompts, token ids each."""
        with self.injector.using(None):
            energies = chunk_energies(self.base_model, adapter, prompts)
        return routed(adapter, energies, num_chunks=num_chunks, sharpness=sharpness)

    def generate(
        self,
        questions: Sequence[str],
        adapters: LoRAAdapter | None | Sequence[LoRAAdapter | None] = None,
        *,
        documents: Sequence[str | None] | None = None,
        gate: float = 0.0,
        max_new_tokens: int = 32,
    ) -> list[str]:
        """Greedy answers, one batch.

        Args:
            questions: one text each.
            adapters: one for all questions, one (or None) per question, or None for the plain base model.
            documents: a text per question to put into the prompt, or None.
            gate: how much an adapter's chunks are held back where they are not what a token is about (see
                `LoRAInjector.pool`), for adapters made with `internalize(..., decorrelate=False)`. 0: not at all.

        Raises:
            ValueError: the numbers of questions, adapters and documents differ, or an adapter is another base model's;
                gated, its chunks are not as they were generated.
        """
        prompts = self._prompts(questions, documents)
        given = [adapters] if isinstance(adapters, LoRAAdapter) else list(adapters or [])
        for adapter in given:
            self._check_ours(adapter)
        if isinstance(adapters, Sequence):
            _check_one_each("adapters", adapters, questions)
        if not prompts:
            return []
        with self.injector.using(adapters, gate=gate):
            return generate_text(self.base_model, self.tokenizer, prompts, max_new_tokens=max_new_tokens)

    def forward(self, rows: PackedRows) -> Tensor:
        """Logits of the answer tokens of packed rows, with whatever adapters the injector holds.

        Returns:
            [number of answer tokens, V], in the rows' order.
        """
        return packed_logits(self.base_model, rows, rows.target_kind >= 0)

    def activate(
        self,
        A: dict[str, Tensor],
        B: dict[str, Tensor],
        num_chunks: Sequence[int],
        *,
        members: Sequence[Sequence[int]] | None = None,
        shift: int = 0,
    ) -> None:
        """Puts an adapter in force for each of N rows; they stay until `injector.clear()`, which comes after backward.

        Args:
            A, B: of all chunks together, document after document, as `adapt` gives them.
            num_chunks: chunks of each document.
            members: the documents that each row's adapter joins, as by `join`; None: row i has document i alone.
            shift: row i gets the adapter of row (i + shift) mod N; 1 gives every row a wrong one.
        """
        num_slots = sum(num_chunks)
        first = [sum(num_chunks[:i]) for i in range(len(num_chunks))]
        members = [[i] for i in range(len(num_chunks))] if members is None else members
        # Chunks are joined by address. The bias block is one more slot, shared by all, once in each row's list.
        slots = [[first[i] + chunk for i in documents for chunk in range(num_chunks[i])] for documents in members]
        if self.hypernetwork.join_ridge is not None:
            A = self._chunks_decorrelated(A, num_chunks)
            A, B, slots = self._documents_decorrelated(A, B, slots, num_chunks, members)
            num_slots = len(next(iter(A.values())))
        if self.hypernetwork.bias_rank:
            slots = [[*row, num_slots] for row in slots]
            A = {name: torch.cat([A[name], bias[None]]) for name, bias in self.hypernetwork.bias_A.items()}
            B = {name: torch.cat([B[name], bias[None]]) for name, bias in self.hypernetwork.bias_B.items()}
        self.injector.set(
            A,
            B,
            slots[shift:] + slots[:shift],
            scaling=self.hypernetwork.scaling,
        )

    def _chunks_decorrelated(self, A: dict[str, Tensor], num_chunks: Sequence[int]) -> dict[str, Tensor]:
        """The chunks of every document told from one another, as `internalize` does it."""
        several = [document for document, number in enumerate(num_chunks) if number > 1]
        if not several:
            return A
        first = [sum(num_chunks[:i]) for i in range(len(num_chunks))]
        slots, used = _padded([list(range(first[i], first[i] + num_chunks[i])) for i in several])
        slots, used = slots.to(self.device), used.to(self.device)
        return {
            name: rows.index_copy(
                0,
                slots[used],
                decorrelated(_taken(rows, slots, used), ridge=self.hypernetwork.join_ridge).transpose(1, 2)[used],
            )
            for name, rows in A.items()
        }

    def _documents_decorrelated(
        self,
        A: dict[str, Tensor],
        B: dict[str, Tensor],
        slots: list[list[int]],
        num_chunks: Sequence[int],
        members: Sequence[Sequence[int]],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], list[list[int]]]:
        """Slots of their own for rows that join several documents: what they read depends on who is beside them."""
        joined = [row for row, documents in enumerate(members) if len(set(documents)) > 1]
        if not joined:
            return A, B, slots
        chosen, used = _padded([slots[row] for row in joined])
        of, _ = _padded([[i for i in members[row] for _ in range(num_chunks[i])] for row in joined])
        chosen, used, of = chosen.to(self.device), used.to(self.device), of[:, None].to(self.device)
        end = len(next(iter(A.values())))
        joined_A, joined_B = {}, {}
        for name, rows in A.items():
            mixed = decorrelated(_taken(rows, chosen, used), of, ridge=self.hypernetwork.join_ridge)
            joined_A[name] = torch.cat([rows, mixed.transpose(1, 2)[used]])
            joined_B[name] = torch.cat([B[name], B[name][chosen[used]]])
        slots = list(slots)
        for row in joined:
            slots[row] = list(range(end, end + len(slots[row])))
            end += len(slots[row])
        return joined_A, joined_B, slots

    def _prompts(self, questions: Sequence[str], documents: Sequence[str | None] | None) -> list[str]:
        """Rendered, each with its document before it if it has one."""
        if isinstance(questions, str):
            raise ValueError("questions must be a list of texts, got one text; write [question].")
        if isinstance(documents, str):
            raise ValueError("documents must be a list with a text (or None) for each question, got one text.")
        documents = [None] * len(questions) if documents is None else documents
        _check_one_each("documents", documents, questions)
        return [self.layout.prompt(q, d) for q, d in zip(questions, documents, strict=True)]

    def _generator(self) -> tuple[str, dict[str, Tensor], dict[str, Tensor]]:
        """Fingerprint of the hypernetwork and copies of its bias_A and bias_B, made once per state of its weights."""
        # Hashing 309M parameters takes longer than reading a short document. torch counts in-place changes in _version;
        # another device or dtype gives another data_ptr.
        state = tuple((p.data_ptr(), p._version) for p in self.hypernetwork.parameters())
        if self._generated_by[0] != state:
            # Copies: training on must not change adapters made before. Shared: many adapters in a batch hold them once.
            rows = slice(self.hypernetwork.bias_rank)
            biases = (
                {
                    t.name: zero_beyond_width(t, width, block[t.name][:, rows].detach().clone())
                    for t in self.hypernetwork.targets
                }
                for width, block in (("d_in", self.hypernetwork.bias_A), ("d_out", self.hypernetwork.bias_B))
            )
            self._generated_by = state, fingerprint(self.hypernetwork), *biases
        return self._generated_by[1:]

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


def _check_one_each(name: str, items: Sequence[Any], questions: Sequence[str]) -> None:
    if len(items) != len(questions):
        raise ValueError(f"Got {len(items)} {name} for {len(questions)} questions; give one (or None) each.")


def _padded(lists: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Lists of numbers → [len(lists), longest] with zeros behind the shorter ones, and where they hold numbers."""
    rows = [torch.tensor(numbers) for numbers in lists]
    used = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)
    return pad_sequence(rows, batch_first=True), used


def _taken(rows: Tensor, slots: Tensor, used: Tensor) -> Tensor:
    """[slots, L, R, d] → [len(slots), L, longest, R, d], zeros where there is no slot."""
    return (rows[slots] * used[..., None, None, None]).transpose(1, 2)


def _as_document(document: str | Document) -> Document:
    if isinstance(document, Document):
        return document
    # surrogatepass: chunking refuses half characters, and says what to do.
    sha256 = hashlib.sha256(document.encode(errors="surrogatepass")).hexdigest()
    return Document(name="text", text=document, sha256=sha256)
