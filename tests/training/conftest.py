"""Both trainings at a size that takes seconds."""

import pytest
import torch

from tests.small_trainings import OPTIMIZER, STAGES, Few, objective


@pytest.fixture
def make_module(make_doc_to_lora, tiny_base_model_folder):
    """make_module("doc_to_lora" or "base_model", **changes) → the Lightning module."""
    from hypernet.base.base_model import load_base_model
    from hypernet.training.lit_base_model import LitBaseModel
    from hypernet.training.lit_doc_to_lora import LitDocToLoRA

    def make(task, **changes):
        changes = {"optimizer": OPTIMIZER, **changes}
        if task == "doc_to_lora":
            model = changes.pop("model", None) or make_doc_to_lora()
            return LitDocToLoRA(model=model, **{"objective": objective(nll=0.3), **changes})
        torch.manual_seed(0)
        base_model, tokenizer = load_base_model(tiny_base_model_folder)
        return LitBaseModel(base_model=base_model.requires_grad_(True), tokenizer=tokenizer, **changes)

    return make


@pytest.fixture
def make_data(tiny_tokenizer):
    """make_data("doc_to_lora" or "base_model") → six steps of two documents, and one batch to validate on."""
    from hypernet.data.batches import BaseModelBatches, DistillationBatches
    from hypernet.data.curriculum import Curriculum
    from hypernet.data.datamodule import BatchDataModule
    from hypernet.data.encyclopedia import Encyclopedia

    def make(task):
        curricula = [Curriculum(Encyclopedia(split), STAGES) for split in ("train", "validation")]
        if task == "base_model":
            train, validation = (BaseModelBatches(curriculum, tiny_tokenizer) for curriculum in curricula)
        else:
            train, validation = (DistillationBatches(c, tiny_tokenizer, max_chunk_tokens=20) for c in curricula)
        return BatchDataModule(train=train, validation=Few(validation, 1))

    return make
