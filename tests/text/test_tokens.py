"""Token ids that a base model knows."""

import pytest

from hypernet.text.tokens import check_known


@pytest.mark.parametrize("rows", [[], [[]], [[0, 599], [5]]])
def test_ids_with_an_embedding_pass(tiny_tokenizer, rows):
    check_known(rows, tiny_tokenizer, num_embeddings=600)


def test_id_without_an_embedding_is_refused_by_its_token(tiny_tokenizer):
    ids = tiny_tokenizer("<|end|> <|user|>")["input_ids"]
    check_known([ids], tiny_tokenizer, num_embeddings=None)
    with pytest.raises(
        ValueError, match=r"the token '.+' with id \d+, .* embeddings for 3 tokens. Take it out"
    ) as error:
        check_known([[1], ids], tiny_tokenizer, num_embeddings=3)
    assert "\n" not in str(error.value)
