"""What a reader does not see and a tokenizer would: halves of characters, odd blanks, invisible characters.

    whole("Who is K\\udce4the?", "ask")        # -> "Who is K\\ufffdthe?"
    visible("Ol\\u00adwin\\u00a0Corton", "a.txt")  # -> "Olwin Corton"
    without_hyphenation("Olwin Cor-\\nton")     # -> "Olwin Corton"
    wording("* Olwin Corton, 3.5 m!")          # -> "olwin corton 3 5 m", the same wherever and however it is set
    is_blank("\\ufeff\\u200b")                 # -> True
    escaped("\\x1b[2J")                        # -> "\\\\x1b[2J", which moves no cursor

The first two say in the log how much they changed. Texts of ordinary characters come back as they are.
"""

import logging
import re
import unicodedata

log = logging.getLogger(__name__)

_HALF = re.compile("[\ud800-\udfff]")
_LINE_END = re.compile("[\x85\u2028]")  # next line, line separator
# All of Unicode's space separators but the space itself, and Hangul's fillers.
_BLANK = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000\u3164\uffa0]")
_SOFT_LINE_BREAK = re.compile("\u00ad[ \t]*\n[ \t]*(?=\\w)")

# Scripts in which joiners choose between forms of a letter: from Arabic to Tibetan and Myanmar, Khmer, Mongolian ...
_JOINING = "\u0600-\u0605\u0610-\u061b\u061d-\u109f\u1780-\u17ff\u1810-\u18af\u1900-\u1cff\ua800-\uabff"
_JOINING += "\ufb50-\ufdff\ufe70-\ufefc\U00010a00-\U00011fff\U0001e900-\U0001e95f"
# Scripts without spaces, where a zero-width space is what ends a word: Thai, Lao, Tibetan, Myanmar, Khmer, Javanese ...
_SPACELESS = "\u0e00-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u1b00-\u1bff\ua980-\ua9df\uaa00-\uaa7f"
_EMOJI = "\u00a9\u00ae\u203c\u2049\u2100-\u2bff\u3030\u303d\u3297\u3299\ufe0f\U0001f000-\U0001faff"
_SELECTORS = "\ufe00-\ufe0f\U000e0100-\U000e01ef"  # variants of the character before them
_KEPT = "|".join(
    [
        f"(?<=[{_JOINING}])[\u200c\u200d]",
        f"[\u200c\u200d](?=[{_JOINING}])",
        f"(?<=[{_EMOJI}])\u200d(?=[{_EMOJI}])",
        f"(?<=[{_SPACELESS}])\u200b(?=[{_SPACELESS}])",
        "(?<=[\u1820-\u18aa])\u180e",  # Mongolian vowel separator
        "\U0001f3f4[\U000e0020-\U000e007e]+\U000e007f",  # flag of a region, spelled in tags
    ]
)
# Soft hyphen, joiners, zero-width spaces, direction marks, invisible operators, byte order marks, annotations, tags;
# and selectors where nothing before them has variants.
_DROPPED = (
    "[\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
    f'|(?:\\A|(?<=[\\s!-"$-)+-/:-~{_SELECTORS}]))[{_SELECTORS}]'
)
_INVISIBLE = re.compile(f"{_KEPT}|({_DROPPED})")

# Ligatures, and the forms of letters that fonts choose: Latin, Armenian, Hebrew, Arabic.
_FORMS = re.compile("[\ufb00-\ufdff\ufe70-\ufefc]+")
_LETTER = r"[^\W\d_]"
_WORD = re.compile(rf"{_LETTER}+(?:[-\u2010]{_LETTER}+)*")
_BROKEN = re.compile(
    rf"(?<!{_LETTER})(?P<last>{_LETTER}{{1,60}})[-\u2010][ \t]*\n[ \t]*(?P<after>{_LETTER}+)(?=(?P<more>[-\u2010]\S)?)"
)
_LONGEST_ADDRESS = 200  # characters that are looked at before a broken word
_HYPHENATED = frozenset("self twenty thirty forty fifty sixty seventy eighty ninety".split())  # with what follows
_WORDS_AND_SIGNS = re.compile(r"\w+|[^\w\s.,;:!?…'\"‘’“”„‚«»()\[\]*#]+")  # not the marks of sentences and Markdown
# What moves a terminal's cursor, colours or clears it, ends its line or turns its direction, and what it cannot encode.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_CONJUNCTIONS = frozenset("and or und oder bzw sowie bis et ou y".split())  # after "pre-", before "post-war"


def whole(text: str, what: str) -> str:
    """`text` without halves of characters, which no tokenizer takes; two that belong together become their character.

    They come from bytes that are no UTF-8 in a command, from faulty PDF fonts, and from HTML entities.

    Args:
        what: how the log calls the text.
    """
    if not _HALF.search(text):
        return text
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    text, num_halves = _HALF.subn("\ufffd", text)
    if num_halves:
        log.warning("%r: %d half characters replaced", what, num_halves)
    return text


def visible(text: str, what: str) -> str:
    """`text` with spaces for other blanks, "\\n" for other line ends, letters for ligatures, nothing for the invisible.

    Joiners and zero-width spaces stay in the scripts and emoji where they mean something.

    Args:
        what: how the log calls the text.
    """
    if text.isascii():
        return text
    text = _FORMS.sub(lambda forms: unicodedata.normalize("NFKC", forms[0]), text)
    text, num_line_ends = _LINE_END.subn("\n", text)
    text, num_paragraphs = re.subn("\u2029", "\n\n", text)
    text, num_blanks = _BLANK.subn(" ", text)
    text, num_broken = _SOFT_LINE_BREAK.subn("", text)
    num_dropped = 0

    def replacement(match: re.Match[str]) -> str:
        nonlocal num_dropped
        if match[1] is None:
            return match[0]
        num_dropped += 1
        return ""

    text = _INVISIBLE.sub(replacement, text)
    num_blanks += num_line_ends + num_paragraphs
    num_dropped += num_broken
    changed = [f"odd blanks read as spaces or line ends: {num_blanks}"] if num_blanks else []
    changed += [f"invisible characters dropped: {num_dropped}"] if num_dropped else []
    if changed:
        log.warning("%r: %s", what, ", ".join(changed))
    return text


def without_hyphenation(text: str) -> str:
    """`text` with the words that were broken at line ends put together: "Cor-\\nton" is Corton.

    The hyphen stays where it belongs to the word: the text has the word with it elsewhere, or the word has another
    hyphen, or a single letter next to it, or starts as self-control and twenty-one do. Words that the text does not
    have elsewhere are put together only before a small letter, and neither in addresses nor in "pre-\\nand post-war".
    """
    if not _BROKEN.search(text):
        return text
    words = {word.lower().replace("\u2010", "-") for word in _WORD.findall(text)}

    def joined(match: re.Match[str]) -> str:
        last, after = match["last"], match["after"]
        if f"{last}-{after}".lower() in words:
            return f"{last}-{after}"
        if (last + after).lower() in words:
            return last + after
        before = text[max(0, match.start() - _LONGEST_ADDRESS) : match.start()]
        before = "" if before[-1:].isspace() else before.split()[-1] if before else ""
        if not after[0].islower() or after in _CONJUNCTIONS or re.search(r"[/@:.\\_\d]|^-", before):
            return match[0]
        stays = before.endswith(("-", "\u2010")) or match["more"] or 1 in (len(last), len(after))
        stays = stays or last.lower() in _HYPHENATED
        return f"{last}-{after}" if stays else last + after

    # A word may be broken more than once, and one match ends where the next begins.
    while (longer := _BROKEN.sub(joined, text)) != text:
        text = longer
    return text


def is_blank(text: str) -> bool:
    """Whether a reader would see nothing: blanks, control and invisible characters alone."""
    return all(
        unicodedata.category(character) in ("Cc", "Cf") for character in _BLANK.sub("", text) if not character.isspace()
    )


def escaped(text: str, *, keep: str = "") -> str:
    """`text` with control characters and halves of characters as Python writes them: "\\x1b", "\\n", "\\u202e".

    A stored text printed raw could clear the screen, forge lines or change the terminal's title.

    Args:
        keep: control characters that stay, such as "\\n\\t".
    """
    return _CONTROLS.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


def wording(text: str) -> str:
    """What stays of a passage however it is set: words, numbers and signs such as minus, in small letters."""
    return " ".join(_WORDS_AND_SIGNS.findall(text.casefold()))
