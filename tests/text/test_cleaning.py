"""Cleaning: what a reader does not see is dropped, what means something stays."""

import logging

import pytest

from hypernet.text.cleaning import escaped, is_blank, visible, whole, without_hyphenation, wording


@pytest.mark.parametrize(
    "given, right",
    [
        ("K\udce4the", "K\ufffdthe"),  # a byte of Latin-1 in a command
        ("\ud83e\udd84 and \ud83e", "\U0001f984 and \ufffd"),
        ("\udc00\ud800", "\ufffd\ufffd"),
        ("Kämme \U0001f984", "Kämme \U0001f984"),
    ],
)
def test_halves_of_characters_are_joined_or_replaced(given, right):
    assert whole(given, "a") == right


def test_replaced_half_characters_are_counted_in_the_log(caplog):
    whole("a\ud800b\udfff", "ask")
    assert [record.getMessage() for record in caplog.records] == ["'ask': 2 half characters replaced"]


@pytest.mark.parametrize("code", [0xA0, 0x1680, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000, 0x3164, 0xFFA0])
def test_blanks_other_than_the_space_become_spaces(code):
    assert visible(f"Olwin{chr(code)}Corton", "a") == "Olwin Corton"


def test_line_and_paragraph_separators_become_line_ends():
    assert visible("a\u2028b\x85c\u2029d", "a") == "a\nb\nc\n\nd"


@pytest.mark.parametrize(
    "code",
    [0xAD, 0x34F, 0x61C, 0x180E, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2070), 0xFEFF]
    + [0xFFF9, 0xE0041, 0xFE0F, 0xE0100],
)
@pytest.mark.parametrize("text", ["Ol{}win", "{}Olwin", "Olwin{}"])
def test_invisible_characters_are_dropped_from_words(code, text):
    assert visible(text.format(chr(code)), "a") == text.format("")


@pytest.mark.parametrize(
    "text",
    [
        "می\u200cخواهم",  # Persian
        "क\u094d\u200dष क\u094d\u200c",  # Devanagari
        "ශ\u0dca\u200dරී",  # Sinhala
        "ไทย\u200bไทย ភាសា\u200bខ្មែរ",  # Thai, Khmer
        "\u182a\u180e\u1820",  # Mongolian
        "\U0001f469\u200d\U0001f4bb \u2764\ufe0f\u200d\U0001f525 1\ufe0f\u20e3",  # emoji
        "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",  # flag of Scotland
        "\u845b\U000e0100\u57ce",  # a variant of a Chinese character
        "naïve – “Ahoy!” e\u0301 שלום 今日",
    ],
)
def test_characters_that_mean_something_stay(text, caplog):
    assert visible(text, "a") == text
    assert not caplog.records


def test_text_hidden_in_tags_or_selectors_is_dropped():
    assert visible("A" + "".join(chr(0xE0000 + ord(c)) for c in "obey"), "a") == "A"
    assert visible("☺\ufe0f\ufe01\ufe02\U000e0105", "a") == "☺\ufe0f"


def test_soft_hyphen_at_a_line_end_joins_the_word():
    assert visible("Nor\u00ad \n  bach", "a") == "Norbach"


def test_changes_are_counted_in_one_warning(caplog):
    with caplog.at_level(logging.INFO):
        visible("a\u00a0b\u2028c\u200bd\u00ade", "a.txt")
    assert [record.getMessage() for record in caplog.records] == [
        "'a.txt': odd blanks read as spaces or line ends: 2, invisible characters dropped: 2"
    ]
    caplog.clear()
    visible("a\u00a0b", "a.txt"), visible("c\u200bd", "b.txt")
    assert caplog.messages == [
        "'a.txt': odd blanks read as spaces or line ends: 1",
        "'b.txt': invisible characters dropped: 1",
    ]


@pytest.mark.parametrize(
    "given, right",
    [
        ("o\ufb03ce \ufb01nds \ufb02ow o\ufb00 ba\ufb04e", "office finds flow off baffle"),
        ("Wach\ufb05ube \ufb06", "Wachstube st"),
        ("\ufb13", "\u0574\u0576"),  # Armenian
        ("\ufefb", "\u0644\u0627"),  # Arabic
        ("Ĳssel æ ½ Ⅳ ﾊ", "Ĳssel æ ½ Ⅳ ﾊ"),
    ],
)
def test_ligatures_become_their_letters(given, right):
    assert visible(given, "a") == right


@pytest.mark.parametrize(
    "given, right",
    [
        ("Olwin Cor-\nton", "Olwin Corton"),
        ("Olwin Cor\u2010 \n  ton,", "Olwin Corton,"),
        ("(in-\nter-\nna-\ntional)", "(international)"),
        ("wäh-\nrend", "während"),
        ("a well-known man, a well-\nknown man", "a well-known man, a well-known man"),
        ("long-term, longterm, longterm, long-\nterm", "long-term, longterm, longterm, long-term"),
        ("twenty-\none acts of self-\ncontrol", "twenty-one acts of self-control"),
        ("Jean-Luc and Jean-\nLuc", "Jean-Luc and Jean-Luc"),
        ("INTRODUCTION INTRO-\nDUCTION", "INTRODUCTION INTRODUCTION"),
        ("mother-in-\nlaw", "mother-in-law"),
        ("state-\nof-the-art", "state-of-the-art"),
        ("an e-\nmail", "an e-mail"),
    ],
)
def test_words_broken_at_line_ends_are_put_together(given, right):
    assert without_hyphenation(given) == right


@pytest.mark.parametrize(
    "text",
    [
        "pre-\nand post-war",
        "Vor-\nund Nachteile",
        "1990-\n1995",
        "COVID-\n19",
        "Jean-\nLuc",
        "https://a.org/long-\nname",
        "--dry-\nrun",
        "a list:\n- one\n- two",
        "so -\nhe said",
        "a-\n\nb",
    ],
)
def test_other_hyphens_at_line_ends_stay(text):
    assert without_hyphenation(text) == text


# Wording


def test_wording_is_the_same_however_a_passage_is_set():
    expected = "olwin corton 3 5 m"
    for text in ("Olwin Corton, 3.5 m!", "* Olwin\n  CORTON (3.5 m)", "“Olwin Corton”; 3.5 m …", expected):
        assert wording(text) == expected


@pytest.mark.parametrize(
    "one, other", [("1.5 m", "15 m"), ("-5 C", "5 C"), ("5-3", "53"), ("a + b", "a b"), ("é", "e")]
)
def test_wording_keeps_numbers_and_signs_apart(one, other):
    assert wording(one) != wording(other)


def test_control_characters_are_written_as_python_writes_them():
    for code in [
        *range(0x20),
        *range(0x7F, 0xA0),
        0x2028,
        0x2029,
        *range(0x202A, 0x202F),
        *range(0x2066, 0x206A),
        0xD800,
    ]:
        assert escaped(f"a{chr(code)}b") == f"a{ascii(chr(code))[1:-1]}b"
    kept = "K\u00e4the \U0001f468\u200d\U0001f469 \u6f22 \\x1b"
    assert escaped(kept) == kept and escaped("a\n\tb\r", keep="\n\t") == "a\n\tb\\r"


@pytest.mark.parametrize("blank", ["", " \n\x1c", "\ufeff", "\u200b\u00ad", "\u3164\u00a0", "\x00\x1b", "\u202e"])
def test_text_of_nothing_visible_is_blank(blank):
    assert is_blank(blank) and not is_blank(f"{blank}.") and not is_blank(f"{blank}\u0301")
