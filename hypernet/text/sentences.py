"""Sentence borders of a text, without a tokenizer.

[text[start:end] for start, end in split_sentences(text)]
"""

import re
from collections.abc import Iterator
from itertools import pairwise

# How good a place is for a cut, best first; those after SOFT lie inside a sentence and are found by
# `hypernet.text.chunking`. From SOFT on (the end of a line that may be wrapped, a full stop before a small letter) they
# are used only inside a stretch that is longer than a chunk.
PARAGRAPH, SENTENCE, SOFT, WORD, CHARACTER, TOKEN = range(6)

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


def split_sentences(text: str) -> list[tuple[int, int]]:
    """Character spans of the sentences and list items of a text. They cover it without gap: a sentence's span takes in
    the blanks that follow it, and the heading above it. Decimals, initials and common abbreviations do not end a
    sentence, nor does a line break inside a paragraph. Linear in the length of the text.

    Returns:
        [(start, end), ...], empty for an empty text.
    """
    borders = [high for _, high, level in text_borders(text) if level <= SENTENCE and high < len(text)]
    return list(pairwise([0, *borders, len(text)])) if text else []


def text_borders(text: str) -> Iterator[tuple[int, int, int]]:
    """(low, high, level) of every place where a sentence or a line ends, in order. The cut may fall on any character in
    low..high, the blanks between the two sentences; high is the best one."""
    first = len(text) - len(text.lstrip())
    line_start = first
    for match in _BORDER.finditer(text, first):
        low, end = match.start() + len(match[0].rstrip()), match.end()
        breaks = list(_LINE_BREAK.finditer(text, low, end))
        level = _ender_level(text, match, line_start) if match["ender"] else SENTENCE
        if not breaks:
            if level is not None:
                yield low, end, level
            continue
        if _HEADING.match(text, line_start):
            level = SOFT  # a heading stays with what it heads
        elif len(breaks) > 1 or breaks[0][0] in "\f\u2029" or _HEADING.match(text, end):
            level = PARAGRAPH
        elif _LIST_ITEM.match(text, end):
            level = SENTENCE
        elif level is None or low == match.start():
            level = SOFT  # a line that ends without a full stop may just be wrapped
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
    return SOFT if following.islower() else SENTENCE


def _is_abbreviation(word: str, *, before_number: bool) -> bool:
    if len(word) == 1 and word.isalpha():
        return True  # an initial
    parts = word.split(".")
    if len(parts) > 1 and all(len(part) <= 2 and part.isalpha() for part in parts):
        return True  # e.g., U.S., Ph.D.
    return parts[-1] in _ABBREVIATIONS or (before_number and parts[-1] in _BEFORE_NUMBER)
