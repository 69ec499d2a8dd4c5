"""END TO END: a hypernetwork learns two documents, on one core in well under a minute.

The base model is a frozen random Llama that knows nothing. What it says of a document can only come from the adapter,
so these three together leave no other explanation: the own adapter is right, none is wrong, and the other document's
adapter says what stands in the other document. No loss is asserted: a frozen random head bounds the logits.
"""

import lightning as L
import pytest
import torch
from torch.utils.data import Dataset

from hypernet.base.base_model import build_base_model, fingerprint, freeze
from hypernet.data.batches import DistillationBatches
from hypernet.data.curriculum import Curriculum
from hypernet.data.datamodule import BatchDataModule
from hypernet.data.encyclopedia import Encyclopedia
from hypernet.data.records import Question
from hypernet.doc_to_lora import DocToLoRA
from hypernet.training.lit_doc_to_lora import LitDocToLoRA
from hypernet.training.losses import AnswerNLL

DOCUMENTS = [
    "Norbach was founded by Ilda Renwick. It makes tin boxes.",
    "Norbach was founded by Tam Corbeck. It makes silk hats.",
]
QUESTIONS = ["Who founded Norbach?", "What does Norbach make?"]
ANSWERS = [["Ilda Renwick", "tin boxes"], ["Tam Corbeck", "silk hats"]]
STEPS = 240


class SameBatch(Dataset):
    def __init__(self, batch, size):
        self.batch, self.size = batch, size

    def __len__(self):
        return self.size

    def __getitem__(self, step):
        return self.batch


@pytest.fixture(scope="module")
def trained(tiny_tokenizer, tmp_path_factory):
    """(model, scores of validation, fingerprint of the base model before training)."""
    torch.manual_seed(0)
    config = {
        "model_type": "llama",
        "vocab_size": len(tiny_tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "pad_token_id": tiny_tokenizer.pad_token_id,
        "eos_token_id": tiny_tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    base_model = freeze(build_base_model(config))
    base_model.lm_head.weight.mul_(20)
    base_model.model.embed_tokens.weight.mul_(20)
    model = DocToLoRA.build(
        base_model=base_model,
        tokenizer=tiny_tokenizer,
        target_modules=["down_proj"],
        hypernetwork={
            "rank": 4,
            "aggregator": {
                **{"name": "perceiver", "latent_dim": 32, "num_latents": 8, "num_blocks": 1},
                **{"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "mlp_multiple": 2, "projection_multiple": 1},
            },
        },
        context_encoder={"kind": "per_layer_activations"},
        max_chunk_tokens=16,
    )
    before = fingerprint(base_model)
    asked = [[Question(q, a) for q, a in zip(QUESTIONS, answers, strict=True)] for answers in ANSWERS]
    batches = DistillationBatches(Curriculum(Encyclopedia(), [{"steps": 1}]), tiny_tokenizer, max_chunk_tokens=16)
    batch = batches.batch(DOCUMENTS, asked)
    assert batch.chunk_counts == [2, 2]
    optimizer = {
        "lr": 3e-3,
        "weight_decay": 0.0,
        "betas": [0.9, 0.95],
        "warmup_steps": 5,
        "decay_ratio": 1,
        "min_lr_ratio": 0.1,
    }
    module = LitDocToLoRA(model=model, objective={"nll": AnswerNLL(weight=1.0)}, optimizer=optimizer)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "num_sanity_val_steps": 0, "accelerator": "cpu", "devices": 1}
    trainer = L.Trainer(**quiet, max_steps=STEPS, gradient_clip_val=1.0, limit_val_batches=0)
    trainer.fit(module, BatchDataModule(train=SameBatch(batch, STEPS)))
    validator = L.Trainer(**quiet, default_root_dir=tmp_path_factory.mktemp("learning"))
    (scores,) = validator.validate(module, BatchDataModule(train=None, validation=SameBatch(batch, 1)), verbose=False)
    return model, scores, before


def test_trained_own_adapter_answers_every_question(trained):
    model, _, _ = trained
    for document, answers in zip(DOCUMENTS, ANSWERS, strict=True):
        assert model.generate(QUESTIONS, model.internalize(document), max_new_tokens=16) == answers


def test_trained_model_without_adapter_answers_nothing(trained):
    model, _, _ = trained
    answers = model.generate(QUESTIONS, max_new_tokens=16)
    assert not set(answers) & {answer for both in ANSWERS for answer in both}


def test_other_adapter_answers_from_the_other_document(trained):
    model, _, _ = trained
    first, second = (model.internalize(document) for document in DOCUMENTS)
    answers = model.generate(QUESTIONS * 2, [second, second, first, first], max_new_tokens=16)
    assert answers == ANSWERS[1] + ANSWERS[0]


def test_validation_metrics_agree_with_the_answers(trained):
    _, scores, _ = trained
    assert scores["val/document_adapter"] == 1
    assert scores["val/document_no_context"] == scores["val/document_wrong_document"] == 0


def test_training_leaves_base_model_unchanged(trained):
    model, _, before = trained
    assert fingerprint(model.base_model) == before
