"""Messages that the base model writes in a user's place."""

from types import SimpleNamespace

from hypernet.data.self_study.engines import TransformersEngine
from hypernet.data.self_study.messages import written_messages
from hypernet.text.chat import ChatLayout


class Writer:
    """Writes the given texts in turn, and keeps what it was given."""

    def __init__(self, tokenizer, texts, layout=None):
        self.tokenizer, self.texts = tokenizer, texts
        self.layout = layout or ChatLayout.of(tokenizer)
        self.given = None

    def write(self, prompts, **settings):
        self.given = prompts, settings
        return [[place % len(self.texts)] for place in range(len(prompts))]

    def text(self, ids):
        return self.texts[ids[0]]


def test_every_second_message_is_cut_to_a_few_words(tiny_tokenizer):
    long = "Can you tell me, please, how far it is from the harbour to the old mill, and who lives there?"
    engine = Writer(tiny_tokenizer, [long])
    found = written_messages(engine, 40, seed=3)
    assert found[::2] == [long] * 20
    lengths = [len(text.split()) for text in found[1::2]]
    assert min(lengths) >= 1 and max(lengths) <= 9 and len(set(lengths)) > 4
    for text in found[1::2]:
        assert long.replace(",", "").startswith(text.rstrip("?.! ").replace(",", ""))
    assert {text[-1] for text in found[1::2]} >= {"?", ".", "!"}


def test_the_model_writes_where_a_users_message_begins(tiny_tokenizer):
    engine = Writer(tiny_tokenizer, ["Hello"])
    written_messages(engine, 3, seed=7)
    prompts, settings = engine.given
    asked = engine.layout.prompt_ids(tiny_tokenizer, ["Hello"])[0]
    assert prompts[0] == asked[: len(prompts[0])] and prompts == [prompts[0]] * 3
    assert tiny_tokenizer.decode(asked[len(prompts[0]) :]).startswith("Hello")
    assert settings["temperature"] == 1.0 and settings["seed"] == 7


def test_empty_messages_are_left_out(tiny_tokenizer):
    texts = ["", " \n", "How are you?"]
    assert written_messages(Writer(tiny_tokenizer, texts), 3) == ["How are you?"]


def test_no_messages_where_nothing_comes_before_a_users(tiny_tokenizer):
    layout = SimpleNamespace(before_user="")
    engine = Writer(tiny_tokenizer, ["Hello"], layout)
    assert written_messages(engine, 5) == [] and engine.given is None


def test_the_same_seed_writes_the_same(tiny_base_model, tiny_tokenizer):
    engine = TransformersEngine(tiny_base_model, tiny_tokenizer)
    first, again, other = (written_messages(engine, 4, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
