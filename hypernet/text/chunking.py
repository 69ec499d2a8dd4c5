"""Text -> chunks: token ids and mask [C, T] for the context encoder, and the characters each chunk came from.

    chunks = chunk_document(text, tokenizer, max_chunk_tokens=512)
    chunks.ids, chunks.mask                      # [C, T], right-padded
    [text[start:end] for start, end in chunks.spans]

A document is tokenized once, as a whole, and cut between sentences. Every chunk stands inside the user turn of the base
model's own chat template (`chat_affixes`). `split_sentences` gives the same sentence borders without a tokenizer.
"""

import re
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

# How good a place is for a cut, best first. From _SOFT on (the end of a line that may be wrapped, a full stop before
# a small letter) they are used only inside a stretch that is longer than a chunk.
_PARAGRAPH, _SENTENCE, _SOFT, _WORD, _CHARACTER, _TOKEN = range(6)

# Each alternative matches as soon as its first character does and takes the whole run with it, so that scanning stays
# linear even on a megabyte of dots or blank lines.
_CLOSERS = r"\"'”’»›)\]}」』）】》〉*_"
_BORDER = re.compile(
    rf"(?P<ender>[.!?…‼⁇⁈⁉؟۔।॥։።]+[.!?…{_CLOSERS}]*(?:\[\d{{1,3}}\])*)(?P<blank>\s*)"
    rf"|[。！？｡]+[。！？｡…{_CLOSERS}]*\s*"
    r"|[\n\r\f\v\x85\u2028\u2029]\s*"
)
_LINE_BREAK = re.compile(r"\r\n|[\n\r\f\v\x85\u2028\u2029]")
_HEADING = re.compile(r"#{1,6}[ \t]")
_LIST_ITEM = re.compile(r"(?:[-*+•‣–|>]|\d{1,3}[.)]|[a-zA-Z][.)])[ \t]")
_WORD_BEFORE_DOT = re.compile(r"[^\W_]+(?:[.’'-][^\W_]+)*\Z")
_OPENERS = "\"'“‘«‹([{「『（【*_"

# A dot after these never ends a sentence, or only not before a number ("No. 5", "Fig. 3", "Jan. 7").
_ABBREVIATIONS = frozenset(
    "mr mrs ms mx dr prof st mt ft messrs mme mlle fr gen col maj capt cpt cmdr adm lt sgt cpl rev hon gov sen rep "
    "pres supt vs cf viz ca approx resp incl excl esp bzw hr fam sra srta".split()
)
_BEFORE_NUMBER = frozenset(
    "no nos nr fig figs eq eqs sec secs ch chap vol vols p pp art arts ed al tab ref refs app "
    "jan feb mar apr jun jul aug sep sept oct nov dec".split()
)

# Characters the words end at in scripts that write no spaces.
_CLAUSE_MARKS = "、，；："

# Ordinary texts that start and end differently: affixes that hold for all of them do not depend on the content.
_PROBES = (
    "The lighthouse guides ships home.",
    "In a storm it hums",
    "7 keepers (and one cat) wrote “Ahoy!”",
    "Ελλάδα: 灯台",
)


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


def chat_affixes(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids that stand before and after the content of a user turn: the chat template's opening (with the BOS token
    and a default system prompt, where it has them) and its closing with the start of the assistant's turn.

    They are read off `tokenizer.apply_chat_template`: prefix + content + suffix are exactly the ids it gives. Without a
    chat template they are the special tokens the tokenizer itself puts around a text (often just BOS, or nothing).

    Returns:
        (prefix_ids, suffix_ids).

    Raises:
        ValueError: if the template fails on a lone user message, or does not repeat its content word for word, once.

    Warns:
        UserWarning: if the tokenizer merges the content with the template around it, so that no fixed ids are exact for
            every content; the affixes are then tokenized by themselves. Also if the template writes today's date.
    """
    if not tokenizer.chat_template:
        framed = [tokenizer(probe)["input_ids"] for probe in _PROBES]
        prefix_text = suffix_text = ""
    else:
        rendered = _render(tokenizer, _PROBES[0])
        if rendered.count(_PROBES[0]) != 1:
            raise ValueError(
                f"The chat template of {type(tokenizer).__name__} should contain the user's text once, word for word, "
                f"but has it {rendered.count(_PROBES[0])} times. Set tokenizer.chat_template to one that does, or "
                "chunk with add_affixes=False."
            )
        prefix_text, suffix_text = rendered.split(_PROBES[0])
        framed = [_ids(tokenizer, _render(tokenizer, probe)) for probe in _PROBES]
        if "strftime_now" in tokenizer.get_chat_template():
            warnings.warn(
                "The chat template writes today's date around the document, so the same document gives another adapter "
                "tomorrow. Set tokenizer.chat_template to one with a fixed date to avoid that.",
                stacklevel=2,
            )
    affixes = [_around(ids, _ids(tokenizer, probe)) for ids, probe in zip(framed, _PROBES, strict=True)]
    if affixes[0] is not None and all(affix == affixes[0] for affix in affixes):
        return affixes[0]
    warnings.warn(
        f"{type(tokenizer).__name__} merges the user's text with the chat template around it, so chunks cannot be "
        "framed exactly as apply_chat_template would; prefix and suffix are tokenized by themselves instead.",
        stacklevel=2,
    )
    return _ids(tokenizer, prefix_text), _ids(tokenizer, suffix_text)


def chunk_document(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_chunk_tokens: int,
    context_tokens: int = 0,
    add_affixes: bool = True,
) -> Chunks:
    """Cuts a document into as few chunks as its sentence borders allow, of about equal length.

    Cuts fall between sentences, paragraphs, headings and list items. A sentence longer than a chunk is cut at line
    ends, else between words, else between characters. The text is tokenized once, and the chunks' document tokens
    joined are exactly `tokenizer(text, add_special_tokens=False)`: nothing is lost, changed or repeated. Same text,
    same chunks.

    Args:
        text: the document.
        tokenizer: a fast tokenizer (cuts need its character offsets).
        max_chunk_tokens: most document tokens in a chunk; the affixes come on top.
        context_tokens: tokens of the document before a chunk that stand in front of it again, outside the mask: the
            base model sees them, so that it knows whom "she" is about, and nothing else reads them.
        add_affixes: frame every chunk with `chat_affixes(tokenizer)`; if False, document tokens only, without BOS.

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

    # verbose=False: the warning that the text is longer than the model takes is what chunking is for.
    encoding = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, padding=False, truncation=False, verbose=False
    )
    document_ids = encoding["input_ids"]
    if not document_ids:
        raise ValueError(f"{type(tokenizer).__name__} makes no token of this document's {len(text)} characters.")

    characters, levels = _token_borders(text, np.asarray(encoding["offset_mapping"], dtype=np.int64))
    cuts = _choose_cuts(levels, max_chunk_tokens)

    prefix, suffix = chat_affixes(tokenizer) if add_affixes else ([], [])
    starts = [max(0, start - context_tokens) for start in cuts[:-1]]  # of what the base model sees
    rows = [prefix + document_ids[seen:end] + suffix for seen, end in zip(starts, cuts[1:], strict=True)]
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.full((len(rows), max(map(len, rows))), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for c, row in enumerate(rows):
        ids[c, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[c, : len(row)] = True
        mask[c, len(prefix) : len(prefix) + cuts[c] - starts[c]] = False
    return Chunks(ids, mask, tuple(pairwise(characters[cuts].tolist())), len(document_ids))


def split_sentences(text: str) -> list[tuple[int, int]]:
    """Character spans of the sentences and list items of a text. They cover it without gap: a sentence's span takes in
    the blanks that follow it, and the heading above it. Decimals, initials and common abbreviations do not end a
    sentence, nor does a line break inside a paragraph. Linear in the length of the text.

    Returns:
        [(start, end), ...], empty for an empty text.
    """
    borders = [high for _, high, level in _text_borders(text) if level <= _SENTENCE and high < len(text)]
    return list(pairwise([0, *borders, len(text)])) if text else []


def _text_borders(text: str) -> Iterator[tuple[int, int, int]]:
    """(low, high, level) of every place where a sentence or a line ends, in order. The cut may fall on any character in
    low..high, the blanks between the two sentences; high is the best one."""
    first = len(text) - len(text.lstrip())
    line_start = first
    for match in _BORDER.finditer(text, first):
        low, end = match.start() + len(match[0].rstrip()), match.end()
        breaks = list(_LINE_BREAK.finditer(text, low, end))
        level = _ender_level(text, match, line_start) if match["ender"] else _SENTENCE
        if not breaks:
            if level is not None:
                yield low, end, level
            continue
        if _HEADING.match(text, line_start):
            level = _SOFT  # a heading stays with what it heads
        elif len(breaks) > 1 or breaks[0][0] in "\f\u2029" or _HEADING.match(text, end):
            level = _PARAGRAPH
        elif _LIST_ITEM.match(text, end):
            level = _SENTENCE
        elif level is None or low == match.start():
            level = _SOFT  # a line that ends without a full stop may just be wrapped
        line_start = end
        # Indentation belongs to the line it indents.
        yield low, breaks[-1].end(), level


def _ender_level(text: str, match: re.Match[str], line_start: int) -> int | None:
    """What a run of enders like "." or "?!" is: the end of a sentence, a doubtful one, or none (part of a number, name,
    abbreviation or label)."""
    if not match["blank"]:
        return None
    following = next((c for c in text[match.end() : match.end() + 4] if c not in _OPENERS), "")
    if following in (".", "…"):
        return None  # inside ". . ."
    if match["ender"] == ".":
        # No abbreviation is longer than this, and a fixed look-back keeps the scan linear.
        word_start = max(line_start, match.start() - 24)
        word = _WORD_BEFORE_DOT.search(text, word_start, match.start())
        if word and _is_abbreviation(word[0].lower(), before_number=following.isdigit()):
            return None
        if word and word.start() == line_start and word[0].isdigit():
            return None  # "1." in front of a list item
    return _SOFT if following.islower() else _SENTENCE


def _is_abbreviation(word: str, *, before_number: bool) -> bool:
    if len(word) == 1 and word.isalpha():
        return True  # an initial
    parts = word.split(".")
    if len(parts) > 1 and all(len(part) <= 2 and part.isalpha() for part in parts):
        return True  # e.g., U.S., Ph.D.
    return parts[-1] in _ABBREVIATIONS or (before_number and parts[-1] in _BEFORE_NUMBER)


def _token_borders(text: str, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For a cut before token 0..n (n: after the last one): the character it falls on, and its level.

    offsets [n, 2] may leave out blanks, and repeat a character that is several tokens.
    """
    num_tokens = len(offsets)
    starts, ends = np.maximum.accumulate(offsets, axis=0).T
    characters = np.zeros(num_tokens + 1, dtype=np.int64)
    characters[1:-1] = ends[:-1]
    characters[-1] = len(text)

    levels = np.full(num_tokens + 1, _TOKEN, dtype=np.int64)
    levels[[0, -1]] = _PARAGRAPH
    levels[1:-1][ends[:-1] <= starts[1:]] = _CHARACTER

    letters = np.frombuffer(text.encode("utf-32-le"), dtype="<U1")
    blank = np.strings.isspace(letters)
    word_start = blank | np.concatenate([[False], (blank | np.isin(letters, list(_CLAUSE_MARKS)))[:-1]])
    inner = np.flatnonzero(levels == _CHARACTER)
    levels[inner[word_start[np.minimum(characters[inner], len(text) - 1)]]] = _WORD

    borders = np.array(list(_text_borders(text)), dtype=np.int64).reshape(-1, 3)
    low, high, level = borders.T
    token = np.searchsorted(ends, high, side="right")
    # A token that reaches over from one sentence into the next leaves no border there.
    clean = (token > 0) & (token < num_tokens)
    clean[clean] = starts[token[clean]] >= low[clean]
    np.minimum.at(levels, token[clean], level[clean])
    return characters, levels


def _choose_cuts(levels: np.ndarray, max_chunk_tokens: int) -> list[int]:
    """Tokens to cut before, from 0 to n: the fewest chunks, each cut near to an even share of what is left."""
    num_tokens = len(levels) - 1
    usable = levels <= _SENTENCE
    for level in (_SOFT, _WORD, _CHARACTER, _TOKEN):
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


def _render(tokenizer: PreTrainedTokenizerBase, content: str) -> str:
    try:
        turns = [{"role": "user", "content": content}]
        return cast(str, tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
    except Exception as error:  # a template is a program: it may raise anything
        raise ValueError(
            f"The chat template of {type(tokenizer).__name__} fails on a lone user message ({error}). Set "
            "tokenizer.chat_template to one that takes it, or chunk with add_affixes=False."
        ) from error


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _around(ids: list[int], content: list[int]) -> tuple[list[int], list[int]] | None:
    """What stands before and after content in ids; None if it is not in there."""
    for start in range(len(ids) - len(content) + 1):
        if ids[start : start + len(content)] == content:
            return ids[:start], ids[start + len(content) :]
    return None
