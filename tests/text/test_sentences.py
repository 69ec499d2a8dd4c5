"""Sentence borders: what ends a sentence, what does not, and in which time they are found."""

import time

import pytest

from hypernet.text.sentences import split_sentences
from tests.text.small_tokenizers import CORPUS


def sentences(text: str) -> list[str]:
    return [text[start:end].rstrip() for start, end in split_sentences(text)]


@pytest.mark.parametrize(
    "text",
    [
        "Dr. Smith met Mrs. Jones and Prof. Lee.",
        "It cost 3.5 million, i.e. $3.50 each.",
        "J. K. Rowling and George R. R. Martin wrote.",
        "Use tools, e.g. Python, or similar.",
        "The U.S. Army left at 5 p.m. Eastern time.",
        "See Fig. 3 and No. 5 on p. 12 of Vol. 2.",
        "It happened on Jan. 7 in St. Petersburg vs. Moscow.",
        'Then "Why?" he asked, and "No!" she said.',
        "Visit example.com/a.b?c=d for more.",
        "I am here to . . . submit it.",
        "Yahoo! is a company; it waited ... and waited.",
        "A line that is\nwrapped by an editor\nat forty characters.",
    ],
)
def test_abbreviations_and_numbers_do_not_end_a_sentence(text):
    assert sentences(text) == [text]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ('He said "Stop." She went. (Really.) Yes.', ['He said "Stop."', "She went.", "(Really.)", "Yes."]),
        ("It was 1999. The year ended.", ["It was 1999.", "The year ended."]),
        ("It was 3.5. The rest is 4.", ["It was 3.5.", "The rest is 4."]),
        ("Known fact.[12] Next one.[3][4] End.", ["Known fact.[12]", "Next one.[3][4]", "End."]),
        ("Wait... What?! Yes… Ok.", ["Wait...", "What?!", "Yes…", "Ok."]),
        ("Go to example.com. Then read.", ["Go to example.com.", "Then read."]),
        ("Title\n\nText one\n\n\nText two", ["Title", "Text one", "Text two"]),
        ("# Top\n\nText. More.\n## Sub\nText", ["# Top\n\nText.", "More.", "## Sub\nText"]),
        ("List:\n- one\n- two\n1. three. Four\n2) five", ["List:", "- one", "- two", "1. three.", "Four", "2) five"]),
        ("今日は晴れ。「行こう！」次。Ok", ["今日は晴れ。", "「行こう！」", "次。", "Ok"]),
        ("नमस्ते दुनिया। यह ठीक है।", ["नमस्ते दुनिया।", "यह ठीक है।"]),
        ("هل انت هنا؟ نعم", ["هل انت هنا؟", "نعم"]),
        ("**Bold.** Next. _Done._ End.", ["**Bold.**", "Next.", "_Done._", "End."]),
        ("Page one.\fPage two", ["Page one.", "Page two"]),
        ("One.\r\nTwo\r\n\r\nThree", ["One.", "Two", "Three"]),
        ("\n\n  One. Two.  \n", ["\n\n  One.", "Two."]),
    ],
)
def test_sentence_ends_are_recognized(text, expected):
    assert sentences(text) == expected


def test_sentences_cover_the_text_without_gaps():
    text = "".join(CORPUS)
    spans = split_sentences(text)
    assert "".join(text[start:end] for start, end in spans) == text
    assert split_sentences("") == []


@pytest.mark.parametrize(
    "unit", ["Some words here. ", ".", "\n", " x", ". ", "a.", "1. ", "\n# ", '."', ".[", "。", "A.B."]
)
def test_border_search_is_linear_in_text_length(unit):
    started = time.process_time()
    spans = split_sentences("Start" + unit * (200_000 // len(unit)))
    assert time.process_time() - started < 5  # well below a second; a quadratic scan takes minutes
    assert spans[-1][1] >= 199_000
