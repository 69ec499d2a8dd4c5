"""Puts a training together from plain settings: the Lightning module and the batches it is trained on.

module, data = base_model_training(base_model={...}, stages=[...], ...)     # conf/task/base_model.yaml
module, data = doc_to_lora_training(base_model="assets/tiny/base_model", ...) # conf/task/doc_to_lora.yaml
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hypernet.base.base_model import build_base_model, load_base_model, num_embeddings
from hypernet.base.product_keys import add_memory_layer
from hypernet.base.targets import find_targets
from hypernet.base.tokenizer import train_tokenizer
from hypernet.data.batches import BaseModelBatches, DistillationBatches
from hypernet.data.curriculum import Curriculum
from hypernet.data.datamodule import BatchDataModule
from hypernet.data.encyclopedia import Encyclopedia, background_questions
from hypernet.data.records import UNKNOWN
from hypernet.data.sources import Source
from hypernet.doc_to_lora import DocToLoRA, reading
from hypernet.interop.checkpoints import open_checkpoint
from hypernet.model.context_encoder import make_context_encoder
from hypernet.model.hypernetwork import HyperNetwork
from hypernet.training.lit_base_model import LitBaseModel
from hypernet.training.lit_doc_to_lora import LitDocToLoRA
from hypernet.training.losses import LossTerm, trained_terms

log = logging.getLogger(__name__)


def encyclopedia_texts(*, seed: int, num_articles: int = 6000) -> Iterator[str]:
    """What the tiny tokenizer is trained on: articles that no training step sees, questions, answers."""
    encyclopedia = Encyclopedia("train", seed=seed)
    for index in range(num_articles):
        record = encyclopedia.record(10**9 + index, num_entities=1 + index % 3, num_facts=6, num_distractors=2)
        yield record.document
        for question in record.questions:
            yield question.text
            yield f" {question.answer}"
        yield f" {UNKNOWN}"
    for question in background_questions():
        yield question.text
        yield f" {question.answer}"


def make_curriculum(
    split: str,
    stages: list[dict[str, Any]],
    *,
    seed: int,
    sources: Mapping[str, Callable[..., Source]] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Curriculum:
    """Stages over the encyclopedia and other sources of one split.

    Args:
        sources: name → what makes the source, called with split, seed and tokenizer (conf/data/).
    """
    made = {name: make(split=split, seed=seed, tokenizer=tokenizer) for name, make in (sources or {}).items()}
    return Curriculum(Encyclopedia(split, seed=seed), stages, sources=made)


def base_model_training(
    *,
    base_model: dict[str, Any],
    vocab_size: int,
    stages: list[dict[str, Any]],
    validation_stages: list[dict[str, Any]],
    document_weight: float,
    optimizer: dict[str, Any],
    output_dir: str,
    init_from: str | None = None,
    sources: Mapping[str, Callable[..., Source]] | None = None,
    seed: int = 0,
) -> tuple[LitBaseModel, BatchDataModule]:
    """The tiny base model from random weights, with a tokenizer trained on the encyclopedia; or one that learns more.

    Args:
        base_model: a transformers configuration; with `memory_layer`, one that `init_from` lacks is added to it.
        init_from: a base model, folder or hub name, whose weights and tokenizer training starts from; None starts anew.
        sources: what stages draw from in addition to the encyclopedia, see `make_curriculum`.

    Raises:
        ValueError: there is no model at `init_from`, or it is of another shape than `base_model` and `vocab_size` say.
    """
    if init_from is None:
        tokenizer = train_tokenizer(
            encyclopedia_texts(seed=seed), vocab_size=vocab_size, model_max_length=base_model["max_position_embeddings"]
        )
        token_ids = {
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
        }
        lm = build_base_model({**base_model, **token_ids}, seed=seed)
    else:
        lm, tokenizer = load_base_model(init_from, dtype=torch.float32)
        if "memory_layer" in base_model and not hasattr(lm.config, "memory_layer"):
            add_memory_layer(lm, base_model["memory_layer"], seed=seed)
        for key, wanted in {**base_model, "vocab_size": vocab_size}.items():
            if (found := getattr(lm.config, key, None)) != wanted:
                raise ValueError(f"init_from={init_from} has {key} {found}, the settings {wanted}. Set them alike.")
        lm.requires_grad_(True)
    module = LitBaseModel(
        base_model=lm,
        tokenizer=tokenizer,
        optimizer=optimizer,
        document_weight=document_weight,
        output_dir=output_dir,
    )
    shared = {"seed": seed, "sources": sources, "tokenizer": tokenizer}
    train = make_curriculum("train", stages, **shared)
    validation = make_curriculum("validation", validation_stages, **shared)
    train_batches, validation_batches = (
        BaseModelBatches(curriculum, tokenizer, num_embeddings=num_embeddings(lm)) for curriculum in (train, validation)
    )
    return module, BatchDataModule(train=train_batches, validation=validation_batches)


def doc_to_lora_training(
    *,
    base_model: str,
    target_modules: list[str],
    context_encoder: dict[str, Any],
    hypernetwork: dict[str, Any],
    max_chunk_tokens: int,
    stages: list[dict[str, Any]],
    validation_stages: list[dict[str, Any]],
    objective: Mapping[str, LossTerm],
    optimizer: dict[str, Any],
    output_dir: str,
    dtype: str | None = None,
    quantization: str | None = None,
    attention: str | None = None,
    init_from: str | None = None,
    include_base_model: bool = False,
    checkpoint_dtype: str | None = None,
    checkpoint_shard_mb: float | None = None,
    closeness_stages: list[dict[str, Any]] | None = None,
    sources: Mapping[str, Callable[..., Source]] | None = None,
    target_layers: list[int] | float | None = None,
    ridge: float | None = None,
    seed: int = 0,
) -> tuple[LitDocToLoRA, BatchDataModule]:
    """A hypernetwork for a frozen base model, distilled from documents in its prompt.

    Args:
        base_model: hub name or folder. dtype, quantization, attention: how it is loaded, see `load_base_model`.
        target_layers: the blocks to adapt, see `DocToLoRA.build`.
        objective: name → term of the loss (conf/objective/).
        ridge: how chunks and documents are joined, see `DocToLoRA`.
        init_from: a checkpoint whose hypernetwork training starts from, e.g. an earlier stage's, also of another base
            model of this shape, or of another rank (see `HyperNetwork.at_rank`); None starts anew.
        sources: what stages draw from in addition to the encyclopedia, see `make_curriculum`.
        closeness_stages: of what closeness is fitted to when training of keys ends; None: `stages`.
    """
    objective = trained_terms(objective)  # mistakes in it before anything is loaded
    if "join_ridge" in hypernetwork:
        raise ValueError("hypernetwork has no join_ridge any more; it is called task.ridge now.")
    if init_from is None:
        lm, tokenizer = load_base_model(base_model, dtype=dtype, quantization=quantization, attention=attention)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = DocToLoRA.build(
                base_model=lm,
                tokenizer=tokenizer,
                target_modules=target_modules,
                hypernetwork=hypernetwork,
                context_encoder=context_encoder,
                max_chunk_tokens=max_chunk_tokens,
                ridge=ridge,
                base_model_source=base_model,
                target_layers=target_layers,
            )
    else:
        checkpoint = open_checkpoint(init_from, base_model=base_model)
        lm, tokenizer = load_base_model(base_model, dtype=dtype, quantization=quantization, attention=attention)
        trained, rank = checkpoint.hypernetwork, hypernetwork.get("rank", 8)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            trained = trained if trained.rank == rank else trained.at_rank(rank)
        model = DocToLoRA(
            base_model=lm,
            tokenizer=tokenizer,
            hypernetwork=trained,
            # How much of the document is seen and made into one block may change from one training to the next.
            context_encoder={**checkpoint.context_encoder, "context_tokens": context_encoder.get("context_tokens", 0)},
            max_chunk_tokens=max_chunk_tokens,
            ridge=ridge,
            base_model_source=base_model,
        )
        _check_same_settings(
            model, init_from, target_modules, target_layers, hypernetwork, context_encoder, checkpoint.ridge
        )
        if model.base_model_fingerprint != checkpoint.base_model_fingerprint:
            # A start, not a result: after some hundred steps it reads the other base model as well
            # (docs/experiments/2026-11-24-base-model-reads-names.md).
            log.warning(
                "%s was trained with another base model than %s, or with its weights in another type.",
                init_from,
                base_model,
            )
    shared = {"seed": seed, "sources": sources, "tokenizer": model.tokenizer}
    train = make_curriculum("train", stages, **shared)
    validation = make_curriculum("validation", validation_stages, **shared)
    reading = {
        "max_chunk_tokens": max_chunk_tokens,
        "context_tokens": model.context_encoder.context_tokens,
        "frame": model.context_encoder.frame(model.tokenizer),
        "min_chunk_tokens": model.context_encoder.min_chunk_tokens,
        "num_embeddings": num_embeddings(lm),
    }
    closeness_steps = None
    if closeness_stages is not None:
        drawn = make_curriculum("train", closeness_stages, **shared)
        closeness_steps = DistillationBatches(drawn, model.tokenizer, skip_stored=True, **reading)
    module = LitDocToLoRA(
        model=model,
        objective=objective,
        optimizer=optimizer,
        output_dir=output_dir,
        include_base_model=include_base_model,
        checkpoint_dtype=checkpoint_dtype,
        checkpoint_shard_mb=checkpoint_shard_mb,
        closeness_steps=closeness_steps,
    )
    return module, BatchDataModule(
        train=DistillationBatches(train, model.tokenizer, skip_stored=True, **reading),
        validation=DistillationBatches(validation, model.tokenizer, held_out_background=True, **reading),
    )


def _check_same_settings(
    model: DocToLoRA,
    source: str,
    target_modules: list[str],
    target_layers: list[int] | float | None,
    hypernetwork: dict[str, Any],
    context_encoder: dict[str, Any],
    trained_ridge: float | None,
) -> None:
    own = model.hypernetwork
    targets = find_targets(model.base_model, target_modules, layers=target_layers)
    context_encoder = reading(model.base_model, target_layers, context_encoder)
    with torch.device("meta"):
        wanted = HyperNetwork(
            targets=targets, feature_dim=own.feature_dim, num_maps=own.num_maps, **hypernetwork
        ).config
    differing = [key for key, value in wanted.items() if own.config[key] != value]
    if (
        model.context_encoder.settings
        != make_context_encoder(model.base_model, context_encoder, model.tokenizer).settings
    ):
        differing.append("context_encoder")
    if model.trained_joining.ridge != trained_ridge:
        differing.append("ridge")
    if differing:
        raise ValueError(
            f"init_from={source} was made with other settings than these: {', '.join(differing)} differ. "
            "Set them as in its config.yaml."
        )
