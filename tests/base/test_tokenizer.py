"""The tiny model's tokenizer: any text comes back, single digits, one chat template, the same from the same texts."""

import pytest
from transformers import AutoTokenizer

from hypernet.base.tokenizer import train_tokenizer

TEXTS = [
    "Norbach lies on the river Vel.\n\nIt has 3107 inhabitants.",
    "naïve Grüße, Ελλάδα 灯台 🦊‍🔥 e\u0301",
    "  two  spaces\tand a tab\r\n\n\n trailing ",
    "x=1;y==2 // <<ok>> don't 'quote' \\n",
    "\x00\x07\ufeff\u2028",
    "",
]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_trained_tokenizer_roundtrips_any_text(tiny_tokenizer, text):
    assert tiny_tokenizer.decode(tiny_tokenizer(text)["input_ids"]) == text


def test_saved_tokenizer_gives_same_tokens(tmp_path, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert [again(text)["input_ids"] for text in TEXTS] == [tiny_tokenizer(text)["input_ids"] for text in TEXTS]
    assert again.chat_template == tiny_tokenizer.chat_template and again.model_max_length == 512
    assert (again.pad_token, again.eos_token) == ("<|pad|>", "<|end|>")


def test_every_digit_is_one_token_even_in_frequent_numbers():
    tokenizer = train_tokenizer(["in 1984 and 19 or 7"] * 50, vocab_size=290, model_max_length=9)
    tokens = tokenizer.tokenize("in 1984 and 19 or 7")
    digits = [token for token in tokens if any(character.isdigit() for character in token)]
    assert [token.removeprefix("Ġ") for token in digits] == list("1984197")


@pytest.mark.parametrize("document", ["Norbach is a town.", "Norbach, 1984", "It ends with a line\n", "and a blank "])
def test_document_and_question_tokenize_the_same_joined(tiny_tokenizer, document):
    together = tiny_tokenizer(document + "\n\n" + "Who leads Norbach?")["input_ids"]
    apart = [tiny_tokenizer(text)["input_ids"] for text in (document, "\n\nWho leads Norbach?")]
    assert together == apart[0] + apart[1]


def test_vocabulary_has_the_size_and_special_tokens_are_single(tiny_tokenizer):
    assert len(tiny_tokenizer) == 600
    special = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
    assert [tiny_tokenizer(token)["input_ids"] for token in special] == [[i] for i in range(4)]


def test_trained_tokenizer_chat_template_writes_turns(tiny_tokenizer):
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ilda"}]
    render = lambda turns, **settings: tiny_tokenizer.apply_chat_template(turns, tokenize=False, **settings)  # noqa: E731
    assert render(turns) == "<|user|>Who?<|end|><|assistant|> Ilda<|end|>"
    assert render(turns[:1], add_generation_prompt=True) == "<|user|>Who?<|end|><|assistant|>"


def test_tokenizer_training_is_deterministic():
    def texts():
        yield from ["Norbach lies on the river Vel.", "The river Vel flows through Norbach."] * 3

    first, second = (train_tokenizer(texts(), vocab_size=290, model_max_length=9) for _ in range(2))
    assert first.get_vocab() == second.get_vocab() and len(first) == 290
    assert first("river Vel")["input_ids"] == second("river Vel")["input_ids"]
