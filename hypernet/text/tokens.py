"""Texts → token ids: a control token that a text spells is ordinary text, and every id is one the base model knows.

framed_ids(tokenizer, [(layout.before_user, "Turns end in <|end|>.", layout.after_user)])
text_ids(tokenizer, ["Turns end in <|end|>."])
check_known(ids, tokenizer, num_embeddings=2048)
"""

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import chain, pairwise

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


def framed_ids(tokenizer: PreTrainedTokenizerBase, framed: Sequence[tuple[str, str, str]]) -> list[list[int]]:
    """Token ids of texts inside parts of the chat template, which alone have control tokens.

    A text that spells none is tokenized together with what is around it, as `apply_chat_template` does; one that does,
    apart from it.

    Args:
        framed: (part before, text, part after) each.
    """
    if not framed:
        return []
    parts = list(dict.fromkeys(part for before, _, after in framed for part in (before, after)))
    rows = tokenizer([*map("".join, framed), *parts], add_special_tokens=False, verbose=False)["input_ids"]
    rows, ids_of = rows[: len(framed)], dict(zip(parts, rows[len(framed) :], strict=True))
    for i, (before, text, after) in enumerate(framed):
        if _spells_control_token(tokenizer, text, rows[i], ids_of[before] + ids_of[after]):
            rows[i] = ids_of[before] + _split(tokenizer, text)[0] + ids_of[after]
    return rows


def text_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts, none of them a control token."""
    return framed_ids(tokenizer, [("", text, "") for text in texts])


def text_encoding(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """`text_ids` of one text with the characters, (start, end), of each token; needs a fast tokenizer."""
    # verbose=False: the warning that the text is longer than the model takes is what chunking is for.
    encoding = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, padding=False, truncation=False, verbose=False
    )
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    return _split(tokenizer, text) if _spells_control_token(tokenizer, text, ids) else (ids, offsets)


def _spells_control_token(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: Sequence[int], around: Sequence[int] = ()
) -> bool:
    """Whether the ids of a text have other control tokens than those of the template around it."""
    # Ids, not spellings, tell: a token may be put together by a normalizer, or by template and text. Only the unknown
    # token also stands for what is not spelled like it.
    control, unknown = _control_ids_of(tokenizer), tokenizer.unk_token
    count = sum(token in control for token in ids)
    return count != sum(token in control for token in around) or bool(unknown and unknown in text)


def _split(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """As `text_encoding`, control tokens that the text spells split like other text."""
    control, borders = _control_ids_of(tokenizer), [0, len(text)]
    while True:
        encoding = tokenizer(
            [text[start:end] for start, end in pairwise(borders)],
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        ids = list(chain.from_iterable(encoding["input_ids"]))
        offsets = [
            (border + start, border + end)
            for border, of_piece in zip(borders, encoding["offset_mapping"], strict=False)
            for start, end in of_piece
        ]
        # That leaves added tokens that are not special, and pieces of a Unigram vocabulary: the text is cut inside.
        cuts = {
            (start + end) // 2
            for token, (start, end) in zip(ids, offsets, strict=True)
            if token in control and end - start > 1
        }
        if not cuts:
            return ids, offsets
        borders = sorted({*borders, *cuts})


def _control_ids_of(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    special = (*tokenizer.all_special_ids, tokenizer.unk_token_id)
    return _control_ids(tokenizer, str(tokenizer.chat_template), len(tokenizer), special)


@lru_cache(maxsize=8)  # 33 ms for 6,400 added tokens; what may change is part of the key
def _control_ids(tokenizer: PreTrainedTokenizerBase, template: str, *_: object) -> frozenset[int]:
    """Special tokens but the unknown one, and added ones that the chat template writes, words and blanks excepted."""
    with suppress(Exception):  # a template is a program: it may put tokens together, and may raise anything
        turns = [{"role": role, "content": "?"} for role in ("user", "assistant")]
        template += str(tokenizer.apply_chat_template(turns, tokenize=False))
    return frozenset(
        number
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special or (token.content in template and re.search(r"[^\w\s]", token.content))
    ) - {tokenizer.unk_token_id}
