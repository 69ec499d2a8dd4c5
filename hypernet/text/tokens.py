"""Token ids that a base model knows.

check_known(ids, tokenizer, num_embeddings=2048)
"""

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase


def check_known(
    rows: Iterable[Sequence[int]], tokenizer: PreTrainedTokenizerBase, *, num_embeddings: int | None
) -> None:
    """Every id has an embedding; a token that was added to the tokenizer alone has none.

    Args:
        rows: token ids of texts. num_embeddings: of the base model; None: not known, nothing is checked.

    Raises:
        ValueError: naming the token.
    """
    if num_embeddings is None:
        return
    highest = max((max(row) for row in rows if len(row)), default=0)
    if highest >= num_embeddings:
        raise ValueError(
            f"A text has the token {tokenizer.convert_ids_to_tokens(highest)!r} with id {highest}, but the base model "
            f"has embeddings for {num_embeddings} tokens. Take it out of the text, or resize the base model's "
            "embeddings: resize_token_embeddings."
        )
