"""Text -> chunks: token ids and mask [C, T] for the context encoder, and the characters each chunk came from.

    chunks = chunk_document(text, tokenizer, max_chunk_tokens=512)
    chunks.ids, chunks.mask                      # [C, T], right-padded
    [text[start:end] for start, end in chunks.spans]

A document is tokenized once, as a whole, and cut between sentences (`hypernet.text.sentences`). Every chunk stands
inside the user turn of the base model's own chat template (`hypernet.text.chat.chat_affixes`).
"""

from bisect import bisect_left, bisect_right
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hypernet.text.chat import chat_affixes
from hypernet.text.sentences import CHARACTER, PARAGRAPH, SENTENCE, SOFT, TOKEN, WORD, text_borders
from hypernet.text.tokens import text_encoding

# Characters the words end at in scripts that write no spaces.
_CLAUSE_MARKS = "、，；："


class Frame(NamedTuple):
    """What stands around every chunk.

    before, after: token ids. unread_before, unread_after: how many of them, from the outside, only the base model sees.
    """

    before: list[int]
    after: list[int]
    unread_before: int = 0
    unread_after: int = 0


class Chunks(NamedTuple):
    """A document cut into C chunks of at most T tokens, affixes included."""

    ids: Tensor
    """Token ids [C, T] int64: prefix, document tokens, suffix, then padding on the right."""
    mask: Tensor
    """[C, T] bool, False on the padding."""
    spans: tuple[tuple[int, int], ...]
    """(start, end) characters of the text per chunk; they cover it without gap. Empty only where a chunk is so short
    that it holds no more than part of one character."""
    num_tokens: int
    """Document tokens of all chunks together, affixes not counted."""


def chunk_document(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_chunk_tokens: int,
    context_tokens: int = 0,
    add_affixes: bool = True,
    frame: Frame | None = None,
    min_chunk_tokens: int | None = None,
) -> Chunks:
    """Cuts a document into as few chunks as its sentence borders allow, of about equal length.

    Cuts fall between sentences, paragraphs, headings and list items. A sentence longer than a chunk is cut at line
    ends, else between words, else between characters. The text is tokenized once, and the chunks' document tokens
    joined are exactly `text_ids(tokenizer, [text])`: nothing is lost, changed or repeated. Same text, same chunks.

    Args:
        text: the document.
        tokenizer: a fast tokenizer (cuts need its character offsets).
        max_chunk_tokens: most document tokens in a chunk; the affixes come on top.
        context_tokens: tokens of the document before a chunk that stand in front of it again, outside the mask: the
            base model sees them, so that it knows whom "she" is about, and nothing else reads them.
        add_affixes: frame every chunk with `chat_affixes(tokenizer)`; if False, document tokens only, without BOS.
        frame: instead of these affixes.
        min_chunk_tokens: about one chunk for each sentence instead: as many as possible, each of so many tokens at
            least, but for the last one. None: as few chunks as possible.

    Returns:
        Chunks: ids [C, T], mask [C, T], character spans, number of document tokens.

    Raises:
        ValueError: if the text is blank or not encodable, the tokenizer not a fast one, max_chunk_tokens below 1 or
            context_tokens below 0.
    """
    for name, value, least in (("max_chunk_tokens", max_chunk_tokens, 1), ("context_tokens", context_tokens, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} should be a whole number, at least {least}, but is {value!r}.")
    if not tokenizer.is_fast:
        raise ValueError(
            f"Chunking needs the character offsets of a fast tokenizer, but {type(tokenizer).__name__} has none. "
            "Load it with AutoTokenizer.from_pretrained(..., use_fast=True)."
        )
    if not text.strip():
        raise ValueError(f"The document is empty: {len(text)} characters, all blank. Give one that has text.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"The document has half a character (lone surrogate {text[error.start]!r}) at character {error.start}; no "
            r"tokenizer takes it. Replace it, e.g. re.sub('[\ud800-\udfff]', '\ufffd', text)."
        ) from error

    document_ids, offsets = text_encoding(tokenizer, text)
    if not document_ids:
        raise ValueError(f"{type(tokenizer).__name__} makes no token of this document's {len(text)} characters.")

    characters, levels = _token_borders(text, np.asarray(offsets, dtype=np.int64))
    if min_chunk_tokens is None:
        cuts = _choose_cuts(levels, max_chunk_tokens)
    else:
        cuts = _cuts_by_sentence(levels, min_chunk_tokens, max_chunk_tokens)

    if frame is None:
        frame = Frame(*chat_affixes(tokenizer)) if add_affixes else Frame([], [])
    starts = [max(0, start - context_tokens) for start in cuts[:-1]]  # of what the base model sees
    rows = [frame.before + document_ids[seen:end] + frame.after for seen, end in zip(starts, cuts[1:], strict=True)]
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.full((len(rows), max(map(len, rows))), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for c, row in enumerate(rows):
        ids[c, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[c, frame.unread_before : len(row) - frame.unread_after] = True
        mask[c, len(frame.before) : len(frame.before) + cuts[c] - starts[c]] = False
    return Chunks(ids, mask, tuple(pairwise(characters[cuts].tolist())), len(document_ids))


def _token_borders(text: str, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For a cut before token 0..n (n: after the last one): the character it falls on, and its level.

    offsets [n, 2] may leave out blanks, and repeat a character that is several tokens.
    """
    num_tokens = len(offsets)
    starts, ends = np.maximum.accumulate(offsets, axis=0).T
    characters = np.zeros(num_tokens + 1, dtype=np.int64)
    characters[1:-1] = ends[:-1]
    characters[-1] = len(text)

    levels = np.full(num_tokens + 1, TOKEN, dtype=np.int64)
    levels[[0, -1]] = PARAGRAPH
    levels[1:-1][ends[:-1] <= starts[1:]] = CHARACTER

    letters = np.frombuffer(text.encode("utf-32-le"), dtype="<U1")
    blank = np.strings.isspace(letters)
    word_start = blank | np.concatenate([[False], (blank | np.isin(letters, list(_CLAUSE_MARKS)))[:-1]])
    inner = np.flatnonzero(levels == CHARACTER)
    levels[inner[word_start[np.minimum(characters[inner], len(text) - 1)]]] = WORD

    borders = np.array(list(text_borders(text)), dtype=np.int64).reshape(-1, 3)
    low, high, level = borders.T
    token = np.searchsorted(ends, high, side="right")
    # A token that reaches over from one sentence into the next leaves no border there.
    clean = (token > 0) & (token < num_tokens)
    clean[clean] = starts[token[clean]] >= low[clean]
    np.minimum.at(levels, token[clean], level[clean])
    return characters, levels


def _cuts_by_sentence(levels: np.ndarray, least: int, most: int) -> list[int]:
    """Tokens to cut before, from 0 to n: at every sentence's end behind at least so many; longer ones are cut again."""
    ends = np.flatnonzero(levels <= SENTENCE)[1:].tolist()
    cuts = [0]
    for end in ends:
        if end - cuts[-1] >= least or end == ends[-1]:
            cuts.append(end)
    if len(cuts) > 2 and cuts[-1] - cuts[-2] < least and cuts[-1] - cuts[-3] <= most:
        del cuts[-2]
    inner = [[start + cut for cut in _choose_cuts(levels[start : end + 1], most)] for start, end in pairwise(cuts)]
    return [0, *(cut for part in inner for cut in part[1:])]


def _choose_cuts(levels: np.ndarray, max_chunk_tokens: int) -> list[int]:
    """Tokens to cut before, from 0 to n: the fewest chunks, each cut near to an even share of what is left."""
    num_tokens = len(levels) - 1
    usable = levels <= SENTENCE
    for level in (SOFT, WORD, CHARACTER, TOKEN):
        stretches = np.diff(np.flatnonzero(usable))
        too_long = stretches > max_chunk_tokens
        if not too_long.any():
            break
        usable[:-1] |= np.repeat(too_long, stretches) & (levels[:-1] <= level)
    borders, penalty = np.flatnonzero(usable).tolist(), (levels * max_chunk_tokens / 10).tolist()

    # Filling the chunks from the end gives the earliest each of the cuts may lie, and how many are needed.
    earliest = [num_tokens]
    while earliest[-1] > 0:
        earliest.append(borders[bisect_left(borders, earliest[-1] - max_chunk_tokens)])
    num_chunks = len(earliest) - 1

    cuts = [0]
    for remaining, low in zip(range(num_chunks, 1, -1), earliest[-2:0:-1], strict=True):
        share = cuts[-1] + (num_tokens - cuts[-1]) / remaining
        window = borders[bisect_left(borders, low) : bisect_right(borders, cuts[-1] + max_chunk_tokens)]
        # A better place is worth a tenth of a chunk of imbalance per level.
        cuts.append(min(window, key=lambda k: abs(k - share) + penalty[k]))  # noqa: B023
    return [*cuts, num_tokens]
