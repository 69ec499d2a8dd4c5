"""DocToLoRA: the whole path, from a document to an adapter to an answer.

model = DocToLoRA.from_pretrained("assets/tiny")
adapter = model.internalize("Norbach was founded by Ilda Renwick. ...")
model.generate(["Who founded Norbach?"], adapter)
model.generate(["...", "..."], [adapter, other])                 # every question its own adapter, or None

many = model.internalize(documents)                              # or adapter + other
model.generate(questions, many)                                  # joined as the hypernetwork was trained
model.generate(questions, many, join="gate", gate_power=1.25)    # every token weights the chunks by their scores
model.generate(questions, many, join="route", top_k=2)           # every question its two best chunks
many.fused("ridge").save("outputs/both")                         # one plain LoRA for any other program
"""

import hashlib
import logging
import reprlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hypernet.adapters.adapter import LoRAAdapter, absolute_source, check_is_adapter, new_provenance, warn_of_same
from hypernet.adapters.composition import select_chunks
from hypernet.adapters.injection import LoRAInjector
from hypernet.adapters.joining import Joining, highest, prompt_inputs, routing_scores, separated_slots
from hypernet.adapters.merging import has_merged
from hypernet.base.base_model import fingerprint, load_base_model, num_embeddings
from hypernet.base.generation import check_fits, generate_text
from hypernet.base.packed_attention import packed_logits
from hypernet.base.packed_rows import PackedRows, Segment, pack_row, pad_rows
from hypernet.base.rounding import same_but_for_rounding
from hypernet.base.targets import adapted_layers, find_targets
from hypernet.interop.checkpoints import open_checkpoint
from hypernet.io.logs import without_weight_bars
from hypernet.model.checkpoint import BASE_MODEL_FOLDER, check_ours, save_checkpoint
from hypernet.model.context_encoder import drop_context, make_context_encoder
from hypernet.model.hypernetwork import HyperNetwork
from hypernet.model.lora_head import zero_beyond_width
from hypernet.model.streaming import DEFAULT_BATCH_TOKENS, read_and_write, read_chunks, read_in_passes
from hypernet.text.chat import ChatLayout
from hypernet.text.chunking import Chunks, chunk_document
from hypernet.text.cleaning import visible, whole, wording
from hypernet.text.documents import Document
from hypernet.text.tokens import check_known, framed_ids

log = logging.getLogger(__name__)


def reading(
    base_model: PreTrainedModel, target_layers: Sequence[int] | float | None, context_encoder: dict[str, Any]
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
        ridge: how the hypernetwork is trained to have chunks and documents joined: separated with this ridge (see
            `hypernet.adapters.joining`); None: their plain sum, as in the published checkpoints.
        base_model_source: where the base model came from; adapters carry it for PEFT.
        base_model_fingerprint: of the weights, where it is known; None computes it.

    Attributes:
        pause: called between two passes of whatever reads or answers here; it may use the model, with adapters as
            `using` has them, and what it raises ends the work. paused_s: seconds that it has taken so far.

    Raises:
        ValueError: the hypernetwork's targets are not in this base model, or the ridge is not above 0.
    """

    def __init__(
        self,
        *,
        base_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        hypernetwork: HyperNetwork,
        context_encoder: dict[str, Any] | None = None,
        max_chunk_tokens: int,
        ridge: float | None = None,
        base_model_source: str = "",
        base_model_fingerprint: str | None = None,
    ) -> None:
        super().__init__()
        self.base_model = base_model
        self.tokenizer = tokenizer
        self.hypernetwork = hypernetwork
        self.context_encoder = make_context_encoder(base_model, context_encoder, tokenizer)
        self.max_chunk_tokens = max_chunk_tokens
        self.trained_joining = Joining() if ridge is None else Joining("ridge", ridge=ridge)
        if hypernetwork.recitation is not None:
            self.trained_joining = Joining("route", top_k=1, weight_power=0.0)
        self.base_model_source = base_model_source
        self._base_model_name = absolute_source(base_model_source)  # now: the process may change its directory
        self.base_model_fingerprint = base_model_fingerprint or fingerprint(base_model)
        recites = hypernetwork.recitation is not None
        self.injector = LoRAInjector(base_model, hypernetwork.targets, answers_only=recites)
        self.layout = ChatLayout.of(tokenizer)
        self.pause: Callable[[], None] | None = None
        self.paused_s = 0.0
        self._joined: WeakKeyDictionary[LoRAAdapter, tuple[Any, LoRAAdapter | None]] = WeakKeyDictionary()
        self._generated_by: tuple[Any, str, dict[str, Tensor], dict[str, Tensor]] = (None, "", {}, {})

    @classmethod
    def build(
        cls,
        *,
        base_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        target_modules: Sequence[str],
        hypernetwork: dict[str, Any],
        context_encoder: dict[str, Any],
        max_chunk_tokens: int,
        ridge: float | None = None,
        base_model_source: str = "",
        target_layers: Sequence[int] | float | None = None,
    ) -> Self:
        """An untrained hypernetwork for this base model; `hypernetwork` holds rank, scaling, aggregator ... .

        Args:
            target_layers: the blocks to adapt (see `adapted_layers`), and whose activations are read where each has a
                map; None: all.
        """
        context_encoder = reading(base_model, target_layers, context_encoder)
        encoder = make_context_encoder(base_model, context_encoder, tokenizer)
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
            ridge=ridge,
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
            base_model: hub name, folder or fetched name of the base model; None takes the one the checkpoint names.
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
        recorded = checkpoint.base_model_fingerprint
        # Rounded otherwise, the same weights have another fingerprint; then only the targets' shapes can be checked.
        if recorded is not None and dtype is None and quantization is None:
            loaded = fingerprint(model)
            same, sentence = True, ""
            if loaded != recorded:
                same, sentence = same_but_for_rounding(model, base_source, checkpoint.base_model)
            if not same:
                raise ValueError(
                    f"The checkpoint {source} was made for the base model {checkpoint.base_model} with fingerprint "
                    f"{recorded[:12]}, but {base_source} has {loaded[:12]}. Give the base model it was trained with."
                    + f" {sentence}".rstrip()
                )
            if sentence:
                log.warning("%s", sentence)
        result = cls(
            base_model=model,
            tokenizer=tokenizer,
            hypernetwork=checkpoint.hypernetwork.to(device).eval(),
            context_encoder=checkpoint.context_encoder,
            max_chunk_tokens=checkpoint.max_chunk_tokens,
            ridge=checkpoint.ridge,
            base_model_source=base_source,
            base_model_fingerprint=recorded,
        )
        if recorded is None:  # a published checkpoint records only its base model's name
            network, encoder = result.hypernetwork, result.context_encoder
            wanted, found = (network.num_maps, network.feature_dim), (encoder.num_maps, encoder.feature_dim)
            if wanted != found:
                raise ValueError(
                    f"The checkpoint {source} reads {wanted[0]} feature maps of width {wanted[1]} from "
                    f"{checkpoint.base_model}, but {base_source} gives {found[0]} of width {found[1]}. Give the base "
                    "model it was trained with."
                )
            return result
        return result

    def save_pretrained(
        self,
        directory: str | Path,
        *,
        include_base_model: bool = False,
        dtype: torch.dtype | None = None,
        max_shard_mb: float | None = None,
    ) -> None:
        """Writes a checkpoint folder; with the base model inside, it needs nothing else.

        The hypernetwork is written in `dtype`, torch.bfloat16 for half the bytes, or as it is; it computes in float32
        again once it is loaded. Where it has more than `max_shard_mb` megabytes, in several files.

        As in transformers and PEFT, files of its own names that are there are replaced and others stay.

        Raises:
            ValueError: the folder's config.yaml, a name that others use too, is not a checkpoint's.
        """
        directory = Path(directory).expanduser()
        check_ours(directory)
        if include_base_model:
            with without_weight_bars():
                self.base_model.save_pretrained(directory / BASE_MODEL_FOLDER)
            self.tokenizer.save_pretrained(directory / BASE_MODEL_FOLDER)
        save_checkpoint(
            directory,
            hypernetwork=self.hypernetwork,
            base_model=BASE_MODEL_FOLDER if include_base_model else self.base_model_source,
            base_model_fingerprint=self.base_model_fingerprint,
            context_encoder=self.context_encoder.settings,
            max_chunk_tokens=self.max_chunk_tokens,
            ridge=self.trained_joining.ridge,
            dtype=dtype,
            max_shard_mb=max_shard_mb,
        )

    @property
    def device(self) -> torch.device:
        return next(self.base_model.parameters()).device

    @property
    def generator(self) -> str:
        """Fingerprint of the hypernetwork, which its adapters carry."""
        return self._generator()[0]

    def between_passes(self) -> None:
        """Lets `pause` in; for whoever calls the model several times in a row."""
        if self.pause is not None:
            started = time.perf_counter()
            self.pause()
            self.paused_s += time.perf_counter() - started

    def adapt(
        self, ids: Tensor, mask: Tensor, *, keys_only: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Chunk ids and mask [C, T] → target name → A [C, L, R, d_in], B [C, L, R, d_out], differentiable.

        Args:
            keys_only: of a hypernetwork that recites, make what a question finds its chunk by, and only those layers.
        """
        self.injector.clear()  # the encoder reads with the plain base model
        if self.hypernetwork.recitation is not None:
            return read_and_write(ids, mask, self.context_encoder, self.hypernetwork, keys_only=keys_only)
        features, mask = drop_context(self.context_encoder(ids, mask), mask)
        # The base model may be in half precision; the hypernetwork is not.
        return self.hypernetwork(features.to(next(self.hypernetwork.parameters()).dtype), mask)

    def chunk(self, text: str) -> Chunks:
        """The text cut as this model reads it.

        Raises:
            ValueError: as `chunk_document`, or it has a token that the base model lacks.
        """
        chunks = chunk_document(
            text,
            self.tokenizer,
            max_chunk_tokens=self.max_chunk_tokens,
            context_tokens=self.context_encoder.context_tokens,
            frame=self.context_encoder.frame(self.tokenizer),
            min_chunk_tokens=self.context_encoder.min_chunk_tokens,
        )
        check_known(chunks.ids.tolist(), self.tokenizer, num_embeddings=num_embeddings(self.base_model))
        return chunks

    @torch.no_grad()
    def internalize(
        self,
        document: str | Document | Sequence[str | Document],
        *,
        max_batch_tokens: int = DEFAULT_BATCH_TOKENS,
        pass_chunks: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> LoRAAdapter:
        """One adapter from a document of any length or from several; it holds their chunks as they are generated.

        Memory beyond the model's weights is that of one batch and the adapter (see `hypernet.model.streaming`).

        Args:
            document: a text, a `Document` (which also gives its name and hash), or a sequence of them. Spans and hash
                of a text count it as cleaned by `hypernet.text.cleaning.visible`.
            max_batch_tokens: tokens read at once; fewer need less memory. Halved where memory runs out.
            pass_chunks: instead, in passes of so many chunks and of one shape: a document's chunks are then the same to
                the bit whatever documents are read with it (`read_in_passes`).
            progress: called with (chunks done, chunks altogether) after each batch or pass. What it raises ends the
                reading.

        Raises:
            TypeError: it is neither a text nor a Document nor a sequence of them.
            ValueError: a document is empty, max_batch_tokens below 1, or an adapter is merged into the base model.
            MemoryError: a single chunk does not fit into memory.
        """
        if isinstance(document, (str, Document)) or not isinstance(document, Sequence):
            document = [document]  # a Document is a sequence too
        documents = [_as_document(text) for text in document]
        if not documents:
            raise ValueError("There is no document to internalize; give at least one.")
        if has_merged(self.base_model):
            raise ValueError("An adapter is merged into the base model, which would be read with it. Unmerge it first.")
        chunks = [self.chunk(document.text) for document in documents]
        described = [
            {
                "name": d.name,
                "sha256": d.sha256,
                "text_sha256": _sha256(d.text.strip()),
                "characters": len(d.text),
                "chunks": [list(span) for span in chunk.spans],
                "passages": [_sha256(wording(d.text[start:end]))[:16] for start, end in chunk.spans],
            }
            for d, chunk in zip(documents, chunks, strict=True)
        ]
        warn_of_same([[entry] for entry in described])
        rows = [(ids, mask) for chunk in chunks for ids, mask in zip(chunk.ids, chunk.mask, strict=True)]
        self.injector.clear()  # the encoder reads with the plain base model
        parts = self.context_encoder, self.hypernetwork

        def told(done: int, num_chunks: int) -> None:
            if progress is not None:
                progress(done, num_chunks)
            self.between_passes()

        if pass_chunks is None:
            A, B = read_chunks(rows, *parts, max_batch_tokens=max_batch_tokens, progress=told)
        else:
            A, B = read_in_passes(rows, *parts, pass_chunks=pass_chunks, progress=told)
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
                base_model_name=self._base_model_name,
                base_model_fingerprint=self.base_model_fingerprint,
                joining=self.trained_joining,
            ),
        )

    def generate(
        self,
        questions: Sequence[str],
        adapters: LoRAAdapter | None | Sequence[LoRAAdapter | None] = None,
        *,
        join: str | None = None,
        ridge: float | None = None,
        gate_power: float | None = None,
        top_k: int | None = None,
        documents: Sequence[str | None] | None = None,
        max_new_tokens: int = 32,
    ) -> list[str]:
        """Greedy answers, one batch.

        Args:
            questions: one text each.
            adapters: one for all questions, one (or None) per question, or None for the plain base model.
            join: how an adapter's chunks are joined: "sum", "ridge", "gate" or "route" (`hypernet.adapters.joining`);
                None: as the hypernetwork was trained. A fused adapter is used as it is.
            ridge, gate_power, top_k: the setting of that way; None: the trained ridge, a power of 1.25, 2 chunks.
            documents: a text per question to put into the prompt, or None.

        Raises:
            TypeError: a question or document is no text, or an adapter no `LoRAAdapter`.
            ValueError: the numbers of questions, adapters and documents differ; a prompt and its answer do not fit the
                base model's window, or it has a token that the base model lacks; an adapter is another base model's, or
                another one is merged into the base model; or the way is unknown, has another setting, or needs chunks
                as they were generated and they are not.
        """
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens should be a whole number, at least 1, got {max_new_tokens!r}.")
        joining = self.joining(join, ridge=ridge, gate_power=gate_power, top_k=top_k)
        prompts = self._prompts(questions, documents)
        if isinstance(adapters, Sequence) and not isinstance(adapters, str):
            _check_one_each("adapters", adapters, questions)
            for adapter in adapters:
                self._check_ours(adapter)
        else:
            self._check_ours(adapters)
        if not prompts:
            return []
        # Before routing reads them.
        check_known(prompts, self.tokenizer, num_embeddings=num_embeddings(self.base_model))
        check_fits(self.base_model, [len(row) for row in prompts], max_new_tokens=max_new_tokens)
        with self.using(adapters, joining, prompts=prompts):
            between = None if self.pause is None else self.between_passes
            return generate_text(
                self.base_model, self.tokenizer, prompts, max_new_tokens=max_new_tokens, between=between
            )

    def log_likelihoods(
        self,
        questions: Sequence[str],
        answers: Sequence[str],
        adapters: LoRAAdapter | None | Sequence[LoRAAdapter | None] = None,
        *,
        join: str | None = None,
        gate_power: float | None = None,
        documents: Sequence[str | None] | None = None,
    ) -> list[float]:
        """log p of each answer, with what the chat template ends it with, after its question: summed, in nats.

        Args:
            questions, adapters, join, gate_power, documents: as `generate`.
            answers: one text each.

        Raises:
            TypeError, ValueError: as `generate`.
        """
        joining = self.joining(join, gate_power=gate_power)
        prompts = self._prompts(questions, documents)
        _check_texts("answers", answers)
        _check_one_each("answers", answers, questions)
        if not prompts:
            return []
        frame = self.layout.before_answer, self.layout.after_answer
        framed = framed_ids(self.tokenizer, [(frame[0], whole(answer, "answer"), frame[1]) for answer in answers])
        check_known([*prompts, *framed], self.tokenizer, num_embeddings=num_embeddings(self.base_model))
        check_fits(self.base_model, [len(p) + len(a) for p, a in zip(prompts, framed, strict=True)], max_new_tokens=0)
        pairs = zip(prompts, framed, strict=True)
        rows = pad_rows(
            [pack_row((), [Segment(prompt + answer, len(prompt), False, 0)]) for prompt, answer in pairs],
            pad_id=self.tokenizer.pad_token_id or 0,
        ).to(self.device)
        wanted = rows.target_kind >= 0
        with torch.inference_mode(), self.using(adapters, joining, prompts=prompts):
            log_probs = self(rows).float().log_softmax(-1)
        found = log_probs.gather(1, rows.targets()[wanted][:, None])[:, 0]
        return [part.sum().item() for part in found.split([len(answer) for answer in framed])]

    @torch.no_grad()
    def routing_scores(self, questions: Sequence[str], adapter: LoRAAdapter) -> Tensor:
        """How strongly each chunk of an adapter answers each question, [Q, C]; see `hypernet.adapters.joining`.

        Raises:
            ValueError: as `generate` with join="route".
        """
        self._check_ours(adapter)
        adapter.check_keys("routed")
        prompts = self._prompts(questions, None)
        check_fits(self.base_model, [len(row) for row in prompts], max_new_tokens=0)
        return self._scores(prompts, adapter)

    def _scores(self, prompts: Sequence[Sequence[int]], adapter: LoRAAdapter) -> Tensor:
        """[Q, C]; of a recitation 0 for all chunks where none is close enough."""
        recitation = self.hypernetwork.recitation
        with torch.no_grad(), self.injector.using(None):
            if recitation is None:
                return routing_scores(self.base_model, adapter.targets, adapter.A, prompts)
            inputs, asked = self.read_questions(prompts)
            (A,) = adapter.A.values()
            scores, closeness = recitation.match(inputs, asked, A)
        return scores * (closeness >= recitation.min_match)[:, None]

    def read_questions(self, prompts: Sequence[Sequence[int]]) -> tuple[dict[int, Tensor], Tensor]:
        """What a hypernetwork that recites compares with its keys: by key layer what enters the adapted module at each
        token, [Q, S, d_in], and which tokens are the question's own, [Q, S] bool. No adapter may be active."""
        recitation = self.hypernetwork.recitation
        assert recitation is not None
        targets = self.hypernetwork.targets
        inputs = prompt_inputs(self.base_model, targets, prompts, layers=recitation.num_key_layers)
        before, after = self.around_question
        lengths = torch.tensor([len(ids) for ids in prompts], device=self.device)[:, None]
        places = torch.arange(int(lengths.max()), device=self.device)
        return inputs, (places >= before) & (places < lengths - after)

    @cached_property
    def around_question(self) -> tuple[int, int]:
        """Tokens of a prompt before the question and behind it."""
        around = framed_ids(self.tokenizer, [(self.layout.before_user, "", ""), ("", "", self.layout.after_user)])
        before, after = (len(ids) for ids in around)
        return before, after

    def joining(
        self,
        way: str | None = None,
        *,
        ridge: float | None = None,
        gate_power: float | None = None,
        top_k: int | None = None,
        weight_power: float | None = None,
    ) -> Joining:
        """The way to join with its setting; None: as the hypernetwork was trained.

        Raises:
            ValueError: a setting without its way; or as `Joining`.
        """
        if way is None:
            settings = {"ridge": ridge, "gate_power": gate_power, "top_k": top_k, "weight_power": weight_power}
            if given := [name for name, value in settings.items() if value is not None]:
                raise ValueError(f"{given[0]} is the setting of a way to join. Give join as well.")
            return self.trained_joining
        if way == "ridge" and ridge is None:
            ridge = self.trained_joining.ridge
        return Joining(way, ridge=ridge, gate_power=gate_power, top_k=top_k, weight_power=weight_power)

    @contextmanager
    def using(
        self,
        adapters: LoRAAdapter | None | Sequence[LoRAAdapter | None],
        joining: Joining | None = None,
        *,
        prompts: Sequence[Sequence[int]] = (),
    ) -> Iterator[None]:
        """The base model with these adapters inside the `with` block, their chunks joined in this way.

        Args:
            adapters: one for all, or one (or None) for each sequence of the batch.
            joining: None: as the hypernetwork was trained.
            prompts: token ids of each question; routing reads them, the other ways do not.

        Raises:
            ValueError: an adapter's chunks are not as they were generated, and the way needs them so; or an adapter is
                merged into the base model, and the sum of both would be used.
        """
        joining = joining or self.trained_joining
        adapters = self.joined(adapters, joining, prompts=prompts)
        with self.injector.using(adapters, gate_power=joining.gate_power or 0.0):
            yield

    def joined(
        self,
        adapters: LoRAAdapter | None | Sequence[LoRAAdapter | None],
        joining: Joining | None = None,
        *,
        prompts: Sequence[Sequence[int]] = (),
    ) -> LoRAAdapter | None | list[LoRAAdapter | None]:
        """What the injector is given for them, with the way's gate power; arguments and errors as `using`."""
        given = [adapters] if isinstance(adapters, LoRAAdapter) else adapters or []
        if any(adapter is not None for adapter in given) and has_merged(self.base_model):
            raise ValueError(
                "An adapter is merged into the base model, to which another would be added. Unmerge it first, or ask "
                "without adapters."
            )
        joining = joining or self.trained_joining
        adapters = self._each(adapters, lambda adapter: self._as_joined(adapter, joining))
        if joining.way != "route" or adapters is None:
            return adapters
        each = [adapters] * len(prompts) if isinstance(adapters, LoRAAdapter) else adapters
        return self._routed(each, prompts, joining)

    @staticmethod
    def _each(
        adapters: LoRAAdapter | None | Sequence[LoRAAdapter | None], change: Callable[[LoRAAdapter], LoRAAdapter]
    ) -> LoRAAdapter | None | list[LoRAAdapter | None]:
        if adapters is None or isinstance(adapters, LoRAAdapter):
            return adapters and change(adapters)
        return [adapter and change(adapter) for adapter in adapters]

    def _as_joined(self, adapter: LoRAAdapter, joining: Joining) -> LoRAAdapter:
        """Without copies, and fused if the way is ridge; made once for each adapter and state of its weights."""
        if adapter.is_fused and (joining.way != "ridge" or joining == self.trained_joining):
            return adapter
        weights = *adapter.A.values(), *adapter.B.values()
        state = joining, tuple((rows.data_ptr(), rows._version) for rows in weights)
        kept = self._joined.get(adapter)
        if kept is None or kept[0] != state:
            is_ridge = joining.way == "ridge"
            result = (
                adapter.fused("ridge", ridge=joining.ridge)
                if is_ridge
                else adapter.without_copies(within=not joining.is_plain_lora)
            )
            kept = state, None if result is adapter else result  # it would keep itself alive
            self._joined[adapter] = kept
        return kept[1] or adapter

    def _routed(
        self, adapters: Sequence[LoRAAdapter | None], prompts: Sequence[Sequence[int]], joining: Joining
    ) -> list[LoRAAdapter | None]:
        """For each prompt its adapter's highest-scoring chunks, which costs one reading by the plain base model."""
        assert joining.top_k is not None and joining.weight_power is not None
        chosen: list[LoRAAdapter | None] = [None] * len(adapters)
        for adapter in {id(adapter): adapter for adapter in adapters if adapter is not None}.values():
            adapter.check_keys("routed")
            places = [place for place, other in enumerate(adapters) if other is adapter]
            if not adapter.num_chunks:
                found = [adapter] * len(places)
            else:
                asked = [prompts[place] for place in places]
                scores = self._scores(asked, adapter)
                best = highest(scores, top_k=joining.top_k, weight_power=joining.weight_power)
                found = [select_chunks(adapter, *pair) for pair in zip(*best, strict=True)]
                # A question that no chunk is close to is asked of the plain base model.
                places = [place for place, row in zip(places, scores, strict=True) if row.any()]
                found = [part for part, row in zip(found, scores, strict=True) if row.any()]
            for place, part in zip(places, found, strict=True):
                chosen[place] = part
        return chosen

    def forward(self, rows: PackedRows) -> Tensor:
        """Logits of the answer tokens of packed rows, with whatever adapters the injector holds.

        Returns:
            [number of answer tokens, V], in the rows' order.
        """
        with self.injector.answering(rows.target_kind >= 0):
            return packed_logits(self.base_model, rows, rows.target_kind >= 0)

    def activate(
        self,
        A: dict[str, Tensor],
        B: dict[str, Tensor],
        chunk_counts: Sequence[int],
        *,
        members: Sequence[Sequence[int]] | None = None,
        shift: int = 0,
    ) -> None:
        """Activates an adapter for each of N rows, differentiably, joined as trained, until `injector.clear()`.

        Args:
            A, B: of all chunks together, document after document, as `adapt` gives them.
            chunk_counts: chunks of each document.
            members: the documents that each row's adapter joins; None: row i has document i alone.
            shift: row i gets the adapter of row (i + shift) mod N; 1 gives every row a wrong one.
        """
        members = [[i] for i in range(len(chunk_counts))] if members is None else members
        A, B, slots = separated_slots(A, B, chunk_counts, members, ridge=self.trained_joining.ridge)
        if self.hypernetwork.bias_rank:
            # The bias block is one more slot, shared by all, once in each row's list.
            num_slots = len(next(iter(A.values())))
            slots = [[*row, num_slots] for row in slots]
            A = {name: torch.cat([A[name], bias[None]]) for name, bias in self.hypernetwork.bias_A.items()}
            B = {name: torch.cat([B[name], bias[None]]) for name, bias in self.hypernetwork.bias_B.items()}
        self.injector.set(A, B, slots[shift:] + slots[:shift], scaling=self.hypernetwork.scaling)

    def _prompts(self, questions: Sequence[str], documents: Sequence[str | None] | None) -> list[list[int]]:
        """Token ids, each with its document before it if it has one."""
        if isinstance(questions, str):
            raise ValueError("questions must be a list of texts, got one text; write [question].")
        if isinstance(documents, str):
            raise ValueError("documents must be a list with a text (or None) for each question, got one text.")
        _check_texts("questions", questions)
        _check_texts("documents", [] if documents is None else documents, or_none=True)
        documents = [None] * len(questions) if documents is None else documents
        _check_one_each("documents", documents, questions)
        questions = [visible(whole(question, "question"), "question") for question in questions]
        documents = [
            None if document is None else visible(whole(document, "document"), "document") for document in documents
        ]
        return self.layout.prompt_ids(self.tokenizer, questions, documents)

    def _generator(self) -> tuple[str, dict[str, Tensor], dict[str, Tensor]]:
        """Fingerprint of the hypernetwork and copies of its bias_A and bias_B, made once per state of its weights."""
        # Hashing 309M parameters takes longer than reading a short document. torch counts in-place changes in _version;
        # another device or dtype gives another data_ptr.
        state = tuple((p.data_ptr(), p._version) for p in self.hypernetwork.parameters())
        if self._generated_by[0] != state:
            # Copies: training on must not change adapters made before. Shared: many adapters in a batch hold them once.
            rows = slice(self.hypernetwork.bias_rank)
            bias_A, bias_B = (
                {
                    t.name: zero_beyond_width(t, width, block[t.name][:, rows].detach().clone())
                    for t in self.hypernetwork.targets
                }
                for width, block in (("d_in", self.hypernetwork.bias_A), ("d_out", self.hypernetwork.bias_B))
            )
            self._generated_by = state, fingerprint(self.hypernetwork), bias_A, bias_B
        return self._generated_by[1:]

    def _check_ours(self, adapter: LoRAAdapter | None) -> None:
        if adapter is None:
            return
        check_is_adapter(adapter)
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


def _check_texts(name: str, texts: Any, *, or_none: bool = False) -> None:
    """Raises TypeError unless it is a sequence of texts."""
    if not isinstance(texts, Sequence) or isinstance(texts, bytes):
        raise TypeError(f"{name} must be a list of texts, got {reprlib.repr(texts)}.")
    for text in texts:
        if not isinstance(text, str) and not (or_none and text is None):
            raise TypeError(
                f"{name} must be texts{' or None' if or_none else ''}, got {reprlib.repr(text)} among them."
            )


def _as_document(document: str | Document) -> Document:
    if isinstance(document, Document):
        return document
    if not isinstance(document, str):
        raise TypeError(
            f"Expected a text, a Document or a list of them, got {reprlib.repr(document)}. Files become Documents by "
            "hypernet.text.documents.read_documents."
        )
    document = visible(document, "text")
    return Document(name="text", text=document, sha256=_sha256(document))


def _sha256(text: str) -> str:
    # surrogatepass: chunking refuses half characters, and says what to do.
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
