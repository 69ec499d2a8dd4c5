"""Chunking: no token lost, spans that cover the text, cuts at sentence borders, affixes as in the chat template."""

import json
import random
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hypernet.text.chat import chat_affixes
from hypernet.text.chunking import Chunks, chunk_document
from hypernet.text.sentences import split_sentences
from tests.text.small_tokenizers import (
    CORPUS,
    TEMPLATE,
    make_character_tokenizer,
    make_metaspace_tokenizer,
    make_tokenizer,
    plain_ids,
    user_ids,
)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def characters():
    return make_character_tokenizer()


@pytest.fixture(scope="module")
def real_texts() -> list[str]:
    path = Path(__file__).parents[3] / "shared" / "data" / "xquad" / "xquad.en.json"
    if not path.is_file():
        pytest.skip("the XQuAD file is not part of the repository; put it at ../shared/data/xquad/xquad.en.json")
    articles = json.loads(path.read_text(encoding="utf-8"))["data"][::3]
    return ["\n\n".join(paragraph["context"] for paragraph in article["paragraphs"]) for article in articles]


def pieces(text: str, chunks: Chunks) -> list[str]:
    return [text[start:end] for start, end in chunks.spans]


def check(text: str, tokenizer, max_chunk_tokens: int) -> Chunks:
    """What holds for every chunked text."""
    chunks = chunk_document(text, tokenizer, max_chunk_tokens=max_chunk_tokens)
    prefix, suffix = chat_affixes(tokenizer)
    expected = plain_ids(tokenizer, text)
    document_ids = []
    for row, mask in zip(chunks.ids.tolist(), chunks.mask.tolist(), strict=True):
        row = row[: sum(mask)]
        assert mask == sorted(mask, reverse=True)
        assert row[: len(prefix)] == prefix and row[len(row) - len(suffix) :] == suffix
        content = row[len(prefix) : len(row) - len(suffix)]
        assert 1 <= len(content) <= max_chunk_tokens
        document_ids += content
    assert document_ids == expected and chunks.num_tokens == len(expected)
    assert chunks.spans[0][0] == 0 and chunks.spans[-1][1] == len(text)
    assert all(start <= end for start, end in chunks.spans)
    assert all(left[1] == right[0] for left, right in pairwise(chunks.spans))
    assert "".join(pieces(text, chunks)) == text
    return chunks


# Chunks


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_chunking_keeps_every_token_and_character(seed, trim_offsets):
    tokenizer = make_tokenizer(trim_offsets=trim_offsets)
    rng = random.Random(seed)
    bits = [
        "a",
        "Z",
        "é",
        "ß",
        "今日",
        "。",
        "！」",
        "👩‍👩‍👧",
        "🇩🇪",
        "e\u0301",
        "\u200b",
        "\u3000",
        " ",
        "   ",
        "\t",
        "\n",
        "\r\n",
        "\n\n",
    ]
    bits += [
        ". ",
        "? ",
        "...",
        "Dr. ",
        "3.5",
        "e.g. ",
        "\n# ",
        "\n- ",
        "\n1. ",
        "word ",
        "longerword",
        "\x00",
        "\x0c",
        "\u2028",
        "नमस्ते। ",
    ]
    bits += ["<|end|>", "‘", "”", "(", ")", "�", "\U0010ffff"]
    for _ in range(12):
        text = "".join(rng.choices(bits, k=rng.randint(1, 80)))
        if not text.strip():
            continue
        for max_chunk_tokens in (1, 2, 3, 7, 37, 1000):
            chunks = check(text, tokenizer, max_chunk_tokens)
            if max_chunk_tokens >= 7:
                # Every chunk's own text has all its tokens' text: no cut went through a character.
                decoded = [tokenizer.decode(row[mask]) for row, mask in zip(chunks.ids, chunks.mask, strict=True)]
                for piece, part in zip(pieces(text, chunks), decoded, strict=True):
                    assert part == f"<|user|>{piece}<|end|><|assistant|>"


@pytest.mark.parametrize("kind", ["bert", "nfkc", "metaspace"])
def test_chunking_keeps_spans_with_rewriting_tokenizers(kind):
    """BERT drops blanks and control characters, NFKC joins and splits characters, Llama 2 adds a blank in front."""
    if kind == "metaspace":
        tokenizer = make_metaspace_tokenizer(template=None)
    else:
        backend = Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>"))
        if kind == "bert":
            backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        else:
            backend.normalizer, backend.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Split("", "isolated")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    text = "  Ｆｕｌｌ ﬁne e\u0301t\u00e9. \x00\x01 Zwölf Boxkämpfer\n\n㍿ 今日は。 İ ½ \u200bnext.  " * 3
    for max_chunk_tokens in (1, 3, 10, 1000):
        check(text, tokenizer, max_chunk_tokens)


def test_short_text_is_one_chunk_in_the_chat_template(tokenizer):
    text = "The keeper wrote. It was cold."
    chunks = chunk_document(text, tokenizer, max_chunk_tokens=100)
    assert chunks.ids.tolist() == [user_ids(tokenizer, text)]
    assert chunks.ids.dtype == torch.int64 and chunks.mask.dtype == torch.bool and chunks.mask.all()
    assert chunks.spans == ((0, len(text)),)


def test_chunks_are_cut_between_sentences(characters):
    text = "One two three. Four five. Six seven eight nine. Ten."
    chunks = check(text, characters, 26)
    assert pieces(text, chunks) == ["One two three. Four five. ", "Six seven eight nine. Ten."]


def test_chunks_are_as_few_as_possible_and_balanced(characters):
    text = "Nine word. " * 11  # 121 tokens, a border every 11; 50 hold 4 sentences
    chunks = check(text, characters, 50)
    assert sorted(chunks.mask.sum(dim=1).tolist()) == [33, 44, 44]


@pytest.mark.parametrize("seed", range(5))
def test_last_chunk_is_not_much_shorter(characters, seed):
    rng = random.Random(seed)
    for _ in range(40):
        text = " ".join("x" * rng.randint(3, 9) + "." for _ in range(rng.randint(20, 300))).replace("x.", "X.")
        text = text.replace(" x", " X")
        lengths = check(text, characters, 64).mask.sum(dim=1)
        if len(lengths) > 1:
            assert lengths.min() >= 0.4 * lengths.max()


def test_chunks_are_the_fewest_that_whole_sentences_allow(characters):
    rng = random.Random(0)
    for _ in range(50):
        lengths = [rng.randint(2, 30) for _ in range(rng.randint(1, 60))]
        text = "".join("A" + "b" * (n - 3) + ". " if n > 2 else "! " for n in lengths)
        borders = [end for _, end in split_sentences(text)]
        needed, start = 0, 0  # filling greedily from the front is optimal
        while start < len(text):
            start = max(border for border in borders if border <= start + 40)
            needed += 1
        assert len(check(text, characters, 40).spans) == needed


def test_a_paragraph_break_beats_a_more_central_sentence_end(characters):
    text = "Aaaa bbbb. Cccc dddd. Eeee ffff.\n\nGggg. " + "Hhhh iiii. Jjjj kkkk. Llll mmmm nnnnnn."
    assert len(text) == 79 and text.index("Gggg") == 34 and text.index("Hhhh") == 40
    assert pieces(text, check(text, characters, 70)) == [text[:34], text[34:]]
    flat = text.replace("\n\n", "  ")
    assert pieces(flat, check(flat, characters, 70)) == [flat[:40], flat[40:]]


def test_a_token_across_a_sentence_end_leaves_no_border():
    backend = Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(".{5}"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    # Tokens begin at 0, 5, 10 ... The sentence that begins at 19 does so inside of one.
    text = "Aaaaaaaaaaaaaaaaa. Bbbb. Cccccccccccccc."
    assert split_sentences(text) == [(0, 19), (19, 25), (25, 40)]
    assert check(text, tokenizer, 6).spans == ((0, 25), (25, 40))


def test_heading_stays_with_the_text_below_it(characters):
    text = "Some text here. And more of it.\n\n## The heading\n\nThe text below it. It goes on.\n"
    assert pieces(text, check(text, characters, 60))[1].startswith("## The heading\n\nThe text")


def test_list_items_are_not_cut_in_two(characters):
    text = "Shopping list\n" + "".join(f"- item number {i}\n" for i in range(12))
    for piece in pieces(text, check(text, characters, 50))[1:]:
        assert piece.startswith("- item")


def test_indentation_stays_with_its_line(characters):
    text = "- item one\n    - item two\n    - item three\n"
    assert pieces(text, check(text, characters, 20)) == ["- item one\n", "    - item two\n", "    - item three\n"]


def test_long_sentence_is_cut_between_words(characters):
    text = "Short one. " + "alpha beta gamma delta " * 5 + "end. Short two."
    parts = pieces(text, check(text, characters, 30))
    for part in parts:
        assert set(part.replace(".", " ").split()) <= {"Short", "one", "two", "alpha", "beta", "gamma", "delta", "end"}


def test_words_stay_whole_even_at_the_cost_of_balance(characters):
    text = ("x" * 19 + " ") * 5
    parts = pieces(text, check(text, characters, 45))
    assert len(parts) == 3
    assert all(set(map(len, part.split())) == {19} for part in parts)


def test_long_chinese_sentence_is_cut_at_commas(tokenizer):
    text = "今日天气很好我们出去走走吧，" * 5
    for piece in pieces(text, check(text, tokenizer, 100)):
        assert piece.endswith("，")


def test_unpunctuated_text_is_cut_at_line_ends_first(characters):
    text = "\n".join(f"row {i} of the table" for i in range(20))
    for piece in pieces(text, check(text, characters, 70))[1:]:
        assert piece.startswith("row")


def test_long_word_is_cut_between_characters(tokenizer, characters):
    assert [len(part) for part in pieces("x" * 100, check("x" * 100, characters, 30))] == [25, 25, 25, 25]
    # Each of these is four byte tokens: a chunk of 10 holds two whole ones.
    assert pieces("🦄" * 6, check("🦄" * 6, tokenizer, 10)) == ["🦄🦄"] * 3
    assert pieces("🦄" * 6, check("🦄" * 6, tokenizer, 7)) == ["🦄"] * 6


def test_chunk_smaller_than_a_character_loses_nothing(tokenizer):
    chunks = check("🦄🦄", tokenizer, 3)
    assert max(chunks.mask.sum(dim=1).tolist()) <= 3 + 3


def test_chinese_is_cut_at_full_stops(tokenizer):
    text = "今日は晴れ。明日は雨。" * 6
    for piece in pieces(text, check(text, tokenizer, 60)):
        assert piece.endswith("。")


def test_chunking_is_deterministic(tokenizer):
    text = "".join(CORPUS) * 5
    first, second = (chunk_document(text, tokenizer, max_chunk_tokens=41) for _ in range(2))
    assert torch.equal(first.ids, second.ids) and first.spans == second.spans


def test_without_affixes_ids_are_document_tokens_only():
    tokenizer = make_tokenizer(add_bos=True)
    chunks = chunk_document("One. Two.", tokenizer, max_chunk_tokens=100, add_affixes=False)
    assert chunks.ids[0].tolist() == tokenizer("One. Two.", add_special_tokens=False)["input_ids"]


def test_padding_uses_the_pad_token_or_zero(tokenizer, characters):
    characters_without_pad = make_character_tokenizer()
    characters_without_pad.pad_token = None
    for maker, pad in ((characters, characters.pad_token_id), (characters_without_pad, 0)):
        chunks = chunk_document("Aaaa bbbb. Cc dd.", maker, max_chunk_tokens=11)
        assert (~chunks.mask).any() and (chunks.ids[~chunks.mask] == pad).all()


def test_real_articles_are_cut_at_sentences_only(real_texts, tokenizer):
    num_cuts = 0
    for text in real_texts:
        borders = {end for _, end in split_sentences(text)}
        for _, end in check(text, tokenizer, 1500).spans[:-1]:
            # The blank before a sentence is part of its first token.
            assert end in borders or end + 1 in borders
            num_cuts += 1
    assert num_cuts > 20


@pytest.mark.parametrize("unit", ["The keeper wrote. It was cold.\n", "x", "word "])
def test_chunking_is_linear_in_text_length(characters, unit):
    text = unit * (50_000 // len(unit))
    started = time.process_time()
    chunks = chunk_document(text, characters, max_chunk_tokens=512)
    assert time.process_time() - started < 10
    assert len(chunks.spans) <= 2 * 50_000 / 512 + 1


@pytest.mark.parametrize("text", ["", " ", "\n\n\t", "\u3000\u2028"])
def test_chunking_refuses_blank_document(tokenizer, text):
    with pytest.raises(ValueError, match=f"{len(text)} characters, all blank. Give one that has text"):
        chunk_document(text, tokenizer, max_chunk_tokens=10)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None, "8"])
def test_chunk_size_must_be_a_positive_whole_number(tokenizer, value):
    with pytest.raises(ValueError, match="max_chunk_tokens should be a whole number, at least 1, but is"):
        chunk_document("text", tokenizer, max_chunk_tokens=value)


def test_lone_surrogate_is_refused_with_its_offset(tokenizer):
    with pytest.raises(ValueError, match="lone surrogate '.ud83e'. at character 3; .* Replace it"):
        chunk_document("abc\ud83e def", tokenizer, max_chunk_tokens=10)


def test_slow_tokenizer_is_refused():
    class SlowTokenizer:
        is_fast = False

    with pytest.raises(ValueError, match="character offsets of a fast tokenizer, but SlowTokenizer has none. Load it"):
        chunk_document("text", SlowTokenizer(), max_chunk_tokens=10)


def test_text_dropped_by_the_tokenizer_is_refused():
    backend = Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("x", "removed")
    with pytest.raises(ValueError, match="makes no token of this document's 2 characters"):
        chunk_document("xx", PreTrainedTokenizerFast(tokenizer_object=backend), max_chunk_tokens=10)


# Affixes


def test_bos_stands_once_in_every_chunk():
    tokenizer = make_tokenizer(template="{{ bos_token }}" + TEMPLATE, add_bos=True)
    chunks = check("Nine words. " * 30, tokenizer, 40)
    assert len(chunks.ids) > 1
    assert (chunks.ids == tokenizer.bos_token_id).sum(dim=1).tolist() == [1] * len(chunks.ids)
    assert (chunks.ids[:, 0] == tokenizer.bos_token_id).all()


@pytest.mark.parametrize("add_bos", [False, True])
def test_chunks_without_a_template_lose_nothing(add_bos):
    check("Nine words. " * 30, make_tokenizer(template=None, add_bos=add_bos), 40)


# Context


@pytest.mark.parametrize("context_tokens", [1, 7, 10_000])
def test_context_tokens_precede_chunk_outside_its_mask(context_tokens):
    tokenizer = make_tokenizer(add_bos=True)
    text = CORPUS[0] * 2
    plain = chunk_document(text, tokenizer, max_chunk_tokens=20)
    chunks = chunk_document(text, tokenizer, max_chunk_tokens=20, context_tokens=context_tokens)
    assert len(plain.ids) > 3
    assert chunks.spans == plain.spans
    prefix, suffix = chat_affixes(tokenizer)
    document = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = 0
    for c in range(len(plain.ids)):
        own = plain.ids[c][plain.mask[c]]
        assert torch.equal(chunks.ids[c][chunks.mask[c]], own)  # what is read is what was read without
        length = int(chunks.mask[c].nonzero().max()) + 1
        end = start + len(own) - len(prefix) - len(suffix)
        seen = document[max(0, start - context_tokens) : end]
        assert chunks.ids[c][:length].tolist() == [*prefix, *seen, *suffix]
        assert (chunks.ids[c][length:] == tokenizer.pad_token_id).all()
        start = end
    assert start == len(document)


@pytest.mark.parametrize("context_tokens", [-1, 1.5, True, None])
def test_impossible_context_tokens_are_refused(context_tokens):
    with pytest.raises(ValueError, match="context_tokens should be a whole number, at least 0, but is"):
        chunk_document("A text.", make_tokenizer(), max_chunk_tokens=9, context_tokens=context_tokens)
