"""Trainings put together from plain settings."""

from functools import partial

import pytest
import torch

import hypernet.training.build
from hypernet.base.base_model import fingerprint
from hypernet.data.encyclopedia import background_questions
from hypernet.data.needles import Needles
from hypernet.training.build import base_model_training, doc_to_lora_training, encyclopedia_texts
from hypernet.training.lit_base_model import save_base_model
from hypernet.training.losses import AnswerNLL, ContextDistillation, Locality
from tests.small_trainings import OPTIMIZER, objective

STAGES = [{"steps": 3, "batch_size": 2, "facts_per_entity": [1, 2]}]
HYPERNETWORK = {"rank": 2, "scaling": None, "aggregator": {"name": "mean_pool", "latent_dim": 8}}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 300,
}


@pytest.fixture
def make(tiny_base_model_folder, tmp_path):
    def make(**changes):
        settings = {
            "base_model": str(tiny_base_model_folder),
            "target_modules": ["down_proj"],
            "context_encoder": {"kind": "per_layer_activations", "layer_idx": None},
            "hypernetwork": HYPERNETWORK,
            "max_chunk_tokens": 30,
            "stages": STAGES,
            "validation_stages": STAGES,
            "objective": objective(kl=0.5, locality_kl=2.0, nll=0.25),
            "optimizer": OPTIMIZER,
            "output_dir": str(tmp_path / "output"),
        }
        return doc_to_lora_training(**{**settings, **changes})

    return make


# The hypernetwork


def test_build_passes_settings_to_their_parts(make):
    module, data = make()
    given = {name: (type(term), term.weight) for name, term in module.objective.items()}
    assert given == {"kl": (ContextDistillation, 0.5), "locality_kl": (Locality, 2.0), "nll": (AnswerNLL, 0.25)}
    assert module.model.hypernetwork.rank == 2 and module.model.max_chunk_tokens == 30
    assert module.model.hypernetwork.config["aggregator"]["name"] == "mean_pool"
    assert [target.name for target in module.model.hypernetwork.targets] == ["down_proj"]
    assert len(data.train) == len(data.validation) == 3
    assert not any(parameter.requires_grad for parameter in module.model.base_model.parameters())


def test_build_seed_decides_weights_and_articles(make):
    torch.manual_seed(4)
    expected = torch.rand(2)
    torch.manual_seed(4)
    (one, data), (again, _), (other, other_data) = (make(seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(2), expected)
    assert fingerprint(one) == fingerprint(again) != fingerprint(other)
    assert data.train.curriculum.records(0) != other_data.train.curriculum.records(0)


def test_validation_has_articles_and_background_of_its_own(make):
    _, data = make()
    assert [part.curriculum.encyclopedia.split for part in (data.train, data.validation)] == ["train", "validation"]
    texts = [{question.text for question in part.background} for part in (data.train, data.validation)]
    assert texts[0] | texts[1] == {question.text for question in background_questions()}
    assert not texts[0] & texts[1]


def test_stages_draw_from_sources_made_for_each_split(make, few_texts, tmp_path):
    stages = [{"steps": 2, "batch_size": 3, "source": {"needles": 1}, "num_background": 0}]
    sources = {"needles": partial(Needles, num_tokens=[40, 60])}
    chosen = {"sources": sources, "stages": stages, "validation_stages": stages}
    for _, data in (make(seed=3, **chosen), make_base_model(tmp_path, seed=3, **chosen)):
        for split, batches in (("train", data.train), ("validation", data.validation)):
            source = batches.curriculum.sources["needles"]
            assert (source.split, source.seed, source.tokenizer) == (split, 3, batches.tokenizer)
            assert batches.curriculum.records(1)[0] == source.record(3)
            assert len(batches[1]) > 0


def test_training_starts_from_a_checkpoint(make, tmp_path):
    first, _ = make(seed=1)
    for parameter in first.model.hypernetwork.parameters():
        parameter.data += 0.1
    first.model.save_pretrained(tmp_path / "first")
    encoder = {"kind": "per_layer_activations", "context_tokens": 5}
    second, data = make(seed=2, init_from=str(tmp_path / "first"), max_chunk_tokens=17, context_encoder=encoder)
    assert fingerprint(second.model.hypernetwork) == fingerprint(first.model.hypernetwork)
    assert second.model.max_chunk_tokens == data.train.max_chunk_tokens == 17
    assert second.model.context_encoder.context_tokens == data.train.context_tokens == 5
    assert all(parameter.requires_grad for parameter in second.model.hypernetwork.parameters())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hypernetwork": {**HYPERNETWORK, "scaling": 3.0}}, "scaling differ"),
        ({"hypernetwork": {**HYPERNETWORK, "aggregator": {"name": "mean_pool", "latent_dim": 4}}}, "aggregator differ"),
        ({"target_modules": ["up_proj"]}, "targets differ"),
        ({"context_encoder": {"kind": "early_exit", "layer_idx": 1}}, "context_encoder differ"),
    ],
    ids=["scaling", "aggregator", "targets", "encoder"],
)
def test_settings_that_init_from_cannot_honour_are_refused(make, tmp_path, changes, named):
    make()[0].model.save_pretrained(tmp_path / "first")
    with pytest.raises(ValueError, match=f"{named}. Set them as in its config.yaml"):
        make(init_from=str(tmp_path / "first"), **changes)


@pytest.mark.parametrize("rank", [1, 5])
def test_training_starts_from_checkpoint_of_another_rank(make, tmp_path, rank):
    first, _ = make(seed=1)
    first.model.save_pretrained(tmp_path / "first")
    torch.manual_seed(4)
    expected = torch.rand(2)
    torch.manual_seed(4)
    settings = {"init_from": str(tmp_path / "first"), "hypernetwork": {**HYPERNETWORK, "rank": rank}}
    (second, _), (again, _), (other, _) = (make(seed=seed, **settings) for seed in (2, 2, 3))
    assert torch.equal(torch.rand(2), expected)
    network = second.model.hypernetwork
    assert network.rank == rank and network.scaling == 2 * rank**1.5
    assert all(parameter.requires_grad for parameter in network.parameters() if parameter.ndim)
    same = fingerprint(network) == fingerprint(other.model.hypernetwork)
    assert fingerprint(network) == fingerprint(again.model.hypernetwork) and same == (rank < 2)


# The base model


@pytest.fixture
def few_texts(monkeypatch):
    monkeypatch.setattr(
        hypernet.training.build, "encyclopedia_texts", lambda seed: encyclopedia_texts(seed=seed, num_articles=60)
    )


def make_base_model(tmp_path, **changes):
    settings = {"base_model": LLAMA, "vocab_size": 500, "stages": STAGES, "validation_stages": STAGES}
    settings |= {"document_weight": 0.1, "optimizer": OPTIMIZER, "output_dir": str(tmp_path / "base_model")}
    return base_model_training(**{**settings, **changes})


def test_built_base_model_fits_its_tokenizer(few_texts, tmp_path):
    module, data = make_base_model(tmp_path)
    config, tokenizer = module.base_model.config, module.tokenizer
    assert config.vocab_size == len(tokenizer) == 500
    assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert tokenizer.model_max_length == 300
    rows = data.train[0]
    mask = rows.attention_mask(torch.float32)
    logits = module.base_model(input_ids=rows.ids, position_ids=rows.positions, attention_mask=mask).logits
    assert logits.shape == (*rows.ids.shape, 500)
    assert [part.curriculum.encyclopedia.split for part in (data.train, data.validation)] == ["train", "validation"]


def test_build_seed_decides_the_base_model(few_texts, tmp_path):
    one, again, other = (make_base_model(tmp_path, seed=seed)[0] for seed in (1, 1, 2))
    assert fingerprint(one) == fingerprint(again) != fingerprint(other)
    assert one.tokenizer.get_vocab() == again.tokenizer.get_vocab() != other.tokenizer.get_vocab()


def test_training_starts_from_a_base_model_and_tokenizer(few_texts, tmp_path):
    first, _ = make_base_model(tmp_path, seed=1)
    save_base_model(first.base_model, first.tokenizer, tmp_path / "first")
    second, _ = make_base_model(tmp_path, seed=2, init_from=str(tmp_path / "first"))
    assert fingerprint(second) == fingerprint(first)
    assert second.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    assert all(parameter.requires_grad for parameter in second.parameters())
    wider = {**LLAMA, "hidden_size": 2 * LLAMA["hidden_size"]}
    with pytest.raises(ValueError, match="has hidden_size 16, the settings 32. Set them alike."):
        make_base_model(tmp_path, init_from=str(tmp_path / "first"), base_model=wider)


def test_tokenizer_is_trained_on_all_kinds_of_text():
    texts = list(encyclopedia_texts(seed=0, num_articles=20))
    joined = "\n".join(texts)
    assert "What is the capital of France?" in texts and " Paris" in texts
    assert joined.count("?") > 100 and sum(len(text.split(". ")) > 5 for text in texts) >= 15
    assert texts != list(encyclopedia_texts(seed=1, num_articles=20))
