"""Chunking: no token lost, spans that cover the text, cuts at sentence borders, affixes as in the chat template."""

import json
import random
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hypernet.text.chunking import Chunks, chat_affixes, chunk_document, split_sentences

TEMPLATE = (
    "{% for m in messages %}<|{{m['role']}}|>{{m['content']}}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<pad>", "<bos>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
CORPUS = [
    "The keeper of the lighthouse wrote to the town. It was cold. The ships were late. The end.\n\n",
    "## Heading\n- item one\n- item two\n\nDr. Smith said so in 1997, 3.5 years later. Why? Nobody knows!\n",
    "Ein Satz mit Umlauten: äöü. Encore une phrase, déjà vue. Привет, мир. 今日は晴れ。明日は雨。",
]


def make_tokenizer(*, template: str | None = TEMPLATE, add_bos: bool = False, trim_offsets: bool = False):
    """A byte-level BPE tokenizer of about 400 tokens, as Llama 3's or Qwen's but tiny."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    steps = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if add_bos:
        steps.append(processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)]))
    backend.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", pad_token="<pad>", chat_template=template
    )


def make_character_tokenizer():
    """One token per character, so that token counts in the tests can be read off the text."""
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1} | {chr(i): i for i in range(32, 127)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")


def make_metaspace_tokenizer(*, template: str | None):
    """As Llama 2's or Mistral's: no pre-tokenization, a blank is written as "▁" and put before every text."""
    vocab = ["<unk>", "<s>", "▁", "[", "]", "I", "N", "S", "T", "/", "▁L", "▁7", *"Lighthousesguidme.7kp(aonct)wrAy:"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(vocab))}
    merges = [("▁", "L"), ("▁", "7")]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>", chat_template=template)


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


def sentences(text: str) -> list[str]:
    return [text[start:end].rstrip() for start, end in split_sentences(text)]


def user_ids(tokenizer, content: str) -> list[int]:
    message = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)


def check(text: str, tokenizer, max_chunk_tokens: int) -> Chunks:
    """What holds for every chunked text."""
    chunks = chunk_document(text, tokenizer, max_chunk_tokens=max_chunk_tokens)
    prefix, suffix = chat_affixes(tokenizer)
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
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
def test_any_text_keeps_every_token_and_every_character(seed, trim_offsets):
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
def test_tokenizers_that_rewrite_the_text_keep_tokens_and_spans(kind):
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


def test_short_text_is_one_chunk_framed_as_apply_chat_template_does(tokenizer):
    text = "The keeper wrote. It was cold."
    chunks = chunk_document(text, tokenizer, max_chunk_tokens=100)
    assert chunks.ids.tolist() == [user_ids(tokenizer, text)]
    assert chunks.ids.dtype == torch.int64 and chunks.mask.dtype == torch.bool and chunks.mask.all()
    assert chunks.spans == ((0, len(text)),)


def test_cuts_fall_between_sentences(characters):
    text = "One two three. Four five. Six seven eight nine. Ten."
    chunks = check(text, characters, 26)
    assert pieces(text, chunks) == ["One two three. Four five. ", "Six seven eight nine. Ten."]


def test_chunks_are_as_few_as_possible_and_balanced(characters):
    text = "Nine word. " * 11  # 121 tokens, a border every 11; 50 hold 4 sentences
    chunks = check(text, characters, 50)
    assert sorted(chunks.mask.sum(dim=1).tolist()) == [33, 44, 44]


@pytest.mark.parametrize("seed", range(5))
def test_last_chunk_is_not_a_leftover(characters, seed):
    rng = random.Random(seed)
    for _ in range(40):
        text = " ".join("x" * rng.randint(3, 9) + "." for _ in range(rng.randint(20, 300))).replace("x.", "X.")
        text = text.replace(" x", " X")
        lengths = check(text, characters, 64).mask.sum(dim=1)
        if len(lengths) > 1:
            assert lengths.min() >= 0.4 * lengths.max()


def test_the_number_of_chunks_is_the_least_that_whole_sentences_allow(characters):
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


def test_a_paragraph_break_beats_a_sentence_end_nearer_to_the_middle(characters):
    text = "Aaaa bbbb. Cccc dddd. Eeee ffff.\n\nGggg. " + "Hhhh iiii. Jjjj kkkk. Llll mmmm nnnnnn."
    assert len(text) == 79 and text.index("Gggg") == 34 and text.index("Hhhh") == 40
    assert pieces(text, check(text, characters, 70)) == [text[:34], text[34:]]
    flat = text.replace("\n\n", "  ")
    assert pieces(flat, check(flat, characters, 70)) == [flat[:40], flat[40:]]


def test_a_token_that_reaches_over_a_sentence_end_leaves_no_border_there():
    backend = Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(".{5}"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    # Tokens begin at 0, 5, 10 ... The sentence that begins at 19 does so inside of one.
    text = "Aaaaaaaaaaaaaaaaa. Bbbb. Cccccccccccccc."
    assert split_sentences(text) == [(0, 19), (19, 25), (25, 40)]
    assert check(text, tokenizer, 6).spans == ((0, 25), (25, 40))


def test_a_heading_goes_with_the_text_below_it(characters):
    text = "Some text here. And more of it.\n\n## The heading\n\nThe text below it. It goes on.\n"
    assert pieces(text, check(text, characters, 60))[1].startswith("## The heading\n\nThe text")


def test_list_items_are_not_cut_in_two(characters):
    text = "Shopping list\n" + "".join(f"- item number {i}\n" for i in range(12))
    for piece in pieces(text, check(text, characters, 50))[1:]:
        assert piece.startswith("- item")


def test_indentation_stays_with_its_line(characters):
    text = "- item one\n    - item two\n    - item three\n"
    assert pieces(text, check(text, characters, 20)) == ["- item one\n", "    - item two\n", "    - item three\n"]


def test_a_sentence_longer_than_a_chunk_is_cut_between_words(characters):
    text = "Short one. " + "alpha beta gamma delta " * 5 + "end. Short two."
    parts = pieces(text, check(text, characters, 30))
    for part in parts:
        assert set(part.replace(".", " ").split()) <= {"Short", "one", "two", "alpha", "beta", "gamma", "delta", "end"}


def test_words_stay_whole_even_where_a_cut_inside_one_would_balance_better(characters):
    text = ("x" * 19 + " ") * 5
    parts = pieces(text, check(text, characters, 45))
    assert len(parts) == 3
    assert all(set(map(len, part.split())) == {19} for part in parts)


def test_a_long_chinese_sentence_is_cut_at_its_commas(tokenizer):
    text = "今日天气很好我们出去走走吧，" * 5
    for piece in pieces(text, check(text, tokenizer, 100)):
        assert piece.endswith("，")


def test_a_long_unpunctuated_text_is_cut_at_line_ends_first(characters):
    text = "\n".join(f"row {i} of the table" for i in range(20))
    for piece in pieces(text, check(text, characters, 70))[1:]:
        assert piece.startswith("row")


def test_a_word_longer_than_a_chunk_is_cut_between_characters(tokenizer, characters):
    assert [len(part) for part in pieces("x" * 100, check("x" * 100, characters, 30))] == [25, 25, 25, 25]
    # Each of these is four byte tokens: a chunk of 10 holds two whole ones.
    assert pieces("🦄" * 6, check("🦄" * 6, tokenizer, 10)) == ["🦄🦄"] * 3
    assert pieces("🦄" * 6, check("🦄" * 6, tokenizer, 7)) == ["🦄"] * 6


def test_a_chunk_smaller_than_a_character_still_loses_nothing(tokenizer):
    chunks = check("🦄🦄", tokenizer, 3)
    assert max(chunks.mask.sum(dim=1).tolist()) <= 3 + 3


def test_chinese_is_cut_at_its_full_stops(tokenizer):
    text = "今日は晴れ。明日は雨。" * 6
    for piece in pieces(text, check(text, tokenizer, 60)):
        assert piece.endswith("。")


def test_the_same_text_gives_the_same_chunks(tokenizer):
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


@pytest.mark.parametrize(
    "unit", ["Some words here. ", ".", "\n", " x", ". ", "a.", "1. ", "\n# ", '."', ".[", "。", "A.B."]
)
def test_borders_are_found_in_time_linear_in_the_text(unit):
    started = time.process_time()
    spans = split_sentences("Start" + unit * (200_000 // len(unit)))
    assert time.process_time() - started < 5  # well below a second; a quadratic scan takes minutes
    assert spans[-1][1] >= 199_000


@pytest.mark.parametrize("unit", ["The keeper wrote. It was cold.\n", "x", "word "])
def test_chunking_is_linear_in_the_text(characters, unit):
    text = unit * (50_000 // len(unit))
    started = time.process_time()
    chunks = chunk_document(text, characters, max_chunk_tokens=512)
    assert time.process_time() - started < 10
    assert len(chunks.spans) <= 2 * 50_000 / 512 + 1


@pytest.mark.parametrize("text", ["", " ", "\n\n\t", "\u3000\u2028"])
def test_a_blank_document_is_refused(tokenizer, text):
    with pytest.raises(ValueError, match=f"{len(text)} characters, all blank. Give one that has text"):
        chunk_document(text, tokenizer, max_chunk_tokens=10)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None, "8"])
def test_a_chunk_size_that_is_no_positive_whole_number_is_refused(tokenizer, value):
    with pytest.raises(ValueError, match="max_chunk_tokens should be a whole number, at least 1, but is"):
        chunk_document("text", tokenizer, max_chunk_tokens=value)


def test_a_lone_surrogate_is_refused_with_its_place(tokenizer):
    with pytest.raises(ValueError, match="lone surrogate '.ud83e'. at character 3; .* Replace it"):
        chunk_document("abc\ud83e def", tokenizer, max_chunk_tokens=10)


def test_a_slow_tokenizer_is_refused():
    class SlowTokenizer:
        is_fast = False

    with pytest.raises(ValueError, match="character offsets of a fast tokenizer, but SlowTokenizer has none. Load it"):
        chunk_document("text", SlowTokenizer(), max_chunk_tokens=10)


def test_a_text_the_tokenizer_drops_is_refused():
    backend = Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("x", "removed")
    with pytest.raises(ValueError, match="makes no token of this document's 2 characters"):
        chunk_document("xx", PreTrainedTokenizerFast(tokenizer_object=backend), max_chunk_tokens=10)


# Affixes


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE,
        "{{ bos_token }}" + TEMPLATE,
        "{% if messages[0]['role'] != 'system' %}<|system|>You help.<|end|>\n{% endif %}" + TEMPLATE,
        TEMPLATE.replace("m['content']", "m['content'] | trim"),
        TEMPLATE.replace("<|assistant|>", "<|assistant|>\n\n<|think|>"),
        "{% for m in messages %}{{ m['role'] | upper }}:\n{{ m['content'] }}<|end|>{% endfor %}ASSISTANT:",
    ],
    ids=["plain", "bos", "default system prompt", "stripped content", "thinking", "no special token before"],
)
@pytest.mark.parametrize("add_bos", [False, True])
def test_prefix_content_suffix_is_what_apply_chat_template_gives(template, add_bos):
    tokenizer = make_tokenizer(template=template, add_bos=add_bos)
    prefix, suffix = chat_affixes(tokenizer)
    for content in ("The keeper wrote a letter.", "1997 (cold)", "Привет, 今日は", "two\nlines"):
        content_ids = tokenizer(content, add_special_tokens=False)["input_ids"]
        assert prefix + content_ids + suffix == user_ids(tokenizer, content)
    assert prefix.count(tokenizer.bos_token_id) == template.count("bos_token")


def test_bos_stands_once_in_every_chunk():
    tokenizer = make_tokenizer(template="{{ bos_token }}" + TEMPLATE, add_bos=True)
    chunks = check("Nine words. " * 30, tokenizer, 40)
    assert len(chunks.ids) > 1
    assert (chunks.ids == tokenizer.bos_token_id).sum(dim=1).tolist() == [1] * len(chunks.ids)
    assert (chunks.ids[:, 0] == tokenizer.bos_token_id).all()


@pytest.mark.parametrize("add_bos", [False, True])
def test_without_a_template_the_affixes_are_the_tokenizers_own_special_tokens(add_bos):
    tokenizer = make_tokenizer(template=None, add_bos=add_bos)
    assert chat_affixes(tokenizer) == ([tokenizer.bos_token_id] if add_bos else [], [])
    check("Nine words. " * 30, tokenizer, 40)


def test_a_blank_that_melts_into_the_content_belongs_to_the_content():
    template = "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
    tokenizer = make_metaspace_tokenizer(template=template)
    prefix, suffix = chat_affixes(tokenizer)
    content_ids = tokenizer("Lights guide", add_special_tokens=False)["input_ids"]
    assert prefix + content_ids + suffix == user_ids(tokenizer, "Lights guide")


def test_a_template_that_melts_into_the_content_warns_and_is_tokenized_by_itself():
    tokenizer = make_tokenizer(template="{% for m in messages %}USER: {{ m['content'] }}\n{% endfor %}ASSISTANT:")
    with pytest.warns(UserWarning, match="merges the user's text with the chat template"):
        prefix, suffix = chat_affixes(tokenizer)
    # " The" is one token in the template, "The" another one alone.
    the_ids = tokenizer("The", add_special_tokens=False)["input_ids"]
    assert (prefix + the_ids)[: len(prefix) + 1] != user_ids(tokenizer, "The")[: len(prefix) + 1]
    assert prefix == tokenizer("USER: ", add_special_tokens=False)["input_ids"]
    assert suffix == tokenizer("\nASSISTANT:", add_special_tokens=False)["input_ids"]


def test_a_template_that_melts_into_some_contents_only_warns_too():
    vocab = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġ7"]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocab)}, merges=[("Ġ", "7")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    template = "{% for m in messages %}USER: {{ m['content'] }}\n{% endfor %}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)
    # A word after "USER: " is as it is alone, but " 7" is one token.
    the_ids = tokenizer("USER: The\n", add_special_tokens=False)["input_ids"]
    assert user_ids(tokenizer, "The") == the_ids and len(user_ids(tokenizer, "7")) == len("USER: 7\n") - 1
    with pytest.warns(UserWarning, match="merges the user's text with the chat template"):
        chat_affixes(tokenizer)


@pytest.mark.parametrize(
    "template, times",
    [
        ("<|user|><|assistant|>", 0),
        (TEMPLATE + "{{ messages[0]['content'] }}", 2),
        (TEMPLATE.replace("']}}<", "'] | upper}}<"), 0),
    ],
    ids=["dropped", "twice", "changed"],
)
def test_a_template_that_does_not_repeat_the_content_once_is_refused(template, times):
    with pytest.raises(ValueError, match=f"once, word for word, but has it {times} times. Set tokenizer.chat_template"):
        chat_affixes(make_tokenizer(template=template))


def test_a_template_that_fails_is_refused_with_its_reason():
    tokenizer = make_tokenizer(template="{{ raise_exception('needs a system prompt') }}")
    with pytest.raises(ValueError, match="fails on a lone user message .needs a system prompt.. Set tokenizer.chat_"):
        chat_affixes(tokenizer)


def test_a_template_with_todays_date_warns():
    tokenizer = make_tokenizer(template="<|system|>{{ strftime_now('%Y') }}<|end|>" + TEMPLATE)
    with pytest.warns(UserWarning, match="today's date .* fixed date"):
        prefix, _ = chat_affixes(tokenizer)
    assert prefix[0] == tokenizer.convert_tokens_to_ids("<|system|>")


# Sentences


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
def test_what_does_not_end_a_sentence(text):
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
def test_what_ends_a_sentence(text, expected):
    assert sentences(text) == expected


def test_sentences_cover_the_text_without_gap():
    text = "".join(CORPUS)
    spans = split_sentences(text)
    assert "".join(text[start:end] for start, end in spans) == text
    assert split_sentences("") == []


# Context


@pytest.mark.parametrize("context_tokens", [1, 7, 10_000])
def test_context_stands_before_a_chunk_outside_its_mask(context_tokens):
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
def test_an_impossible_number_of_context_tokens_is_refused(context_tokens):
    with pytest.raises(ValueError, match="context_tokens should be a whole number, at least 0, but is"):
        chunk_document("A text.", make_tokenizer(), max_chunk_tokens=9, context_tokens=context_tokens)
