"""Embedders: the weighted mean against a loop over tokens."""

import numpy as np
import pytest

from hypernet.memory.embedding import BaseModelEmbedder, open_embedder


@pytest.fixture
def embedder(tiny_base_model, tiny_tokenizer):
    return BaseModelEmbedder(tiny_base_model, tiny_tokenizer)


def test_vector_is_the_weighted_mean_of_input_embeddings(embedder, tiny_base_model, tiny_tokenizer):
    table = tiny_base_model.get_input_embeddings().weight.numpy()
    zipf = np.array([1 / (rank + 30) for rank in range(len(table))])
    zipf /= zipf.sum()
    texts = ["Orla", "Fenda Elfax was taught by Orla Wint.", "a b c " * 30]
    found = embedder.embed(texts)
    for content, vector in zip(texts, found, strict=True):
        ids = tiny_tokenizer(content, add_special_tokens=False).input_ids
        expected = sum(1e-4 / (1e-4 + zipf[token]) * table[token] for token in ids)
        np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=1e-5)


def test_batches_and_padding_change_nothing(embedder):
    texts = [f"text number {n} " * (1 + n % 5) for n in range(100)]
    alone = np.stack([embedder.embed([content])[0] for content in texts])
    np.testing.assert_allclose(embedder.embed(texts), alone, atol=1e-5)


def test_text_without_tokens_is_a_zero_vector(embedder):
    assert not embedder.embed([""]).any() and embedder.embed([]).shape[0] == 0


def test_name_changes_with_the_weights(embedder, tiny_base_model, tiny_tokenizer):
    assert BaseModelEmbedder(tiny_base_model, tiny_tokenizer).name == embedder.name
    tiny_base_model.get_input_embeddings().weight[0, 0] += 1
    assert BaseModelEmbedder(tiny_base_model, tiny_tokenizer).name != embedder.name


def test_base_model_is_found_in_its_folder(tiny_base_model_folder, embedder):
    assert open_embedder(tiny_base_model_folder).name == embedder.name


def test_missing_model_or_library_is_one_line(monkeypatch):
    with pytest.raises(ValueError, match="No base model in"):
        open_embedder("./nowhere")
    monkeypatch.setattr("hypernet.memory.embedding.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install sentence-transformers"):
        open_embedder("sentence-transformers:all-MiniLM-L6-v2")
