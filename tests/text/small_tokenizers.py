"""Small tokenizers of the kinds that large models have, and a chat template."""

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

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


def make_unigram_tokenizer():
    """As llm-jp's: its vocabulary has the control tokens as pieces, the most likely of all."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((letter, -3.0) for letter in "▁<>/:.dehilmoprstuw")]
    backend = Tokenizer(models.Unigram(pieces, 0, False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )


def with_added_tokens(tokenizer, **changes):
    """A copy whose added tokens have these settings, such as special=False; none of them names one."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["added_tokens"] = [{**token, **changes} for token in backend["added_tokens"]]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)), chat_template=tokenizer.chat_template
    )


def plain_ids(tokenizer, text: str) -> list[int]:
    """Independent reference: what a byte-level tokenizer makes of a text when it has no added tokens at all."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    return Tokenizer.from_str(json.dumps({**backend, "added_tokens": []})).encode(text, add_special_tokens=False).ids


def user_ids(tokenizer, content: str) -> list[int]:
    message = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
