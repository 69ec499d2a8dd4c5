"""The chat layout as strings and the affixes as token ids: both are what the chat template writes."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hypernet.text.chat import ChatLayout, chat_affixes, closing_ids, conversation_ids
from tests.text.small_tokenizers import TEMPLATE, make_metaspace_tokenizer, make_tokenizer, user_ids

# ChatLayout


def test_chat_layout_equals_chat_template(tiny_tokenizer):
    layout = ChatLayout.of(tiny_tokenizer)
    turns = [{"role": "user", "content": "A text.\n\nWho?"}, {"role": "assistant", "content": "Ilda"}]
    render = lambda turns, **settings: tiny_tokenizer.apply_chat_template(turns, tokenize=False, **settings)  # noqa: E731
    assert layout.prompt("Who?", "A text.") == render(turns[:1], add_generation_prompt=True)
    assert layout.prompt("Who?", "A text.") + layout.answer("Ilda") == render(turns)


class Templated:
    """A tokenizer that only has a chat template."""

    def __init__(self, template):
        from transformers.utils.chat_template_utils import render_jinja_template

        self.chat_template = template
        self._render = render_jinja_template

    def apply_chat_template(self, turns, *, tokenize, add_generation_prompt=False):
        assert not tokenize
        settings = {"chat_template": self.chat_template, "add_generation_prompt": add_generation_prompt}
        rendered, _ = self._render([turns], **settings)
        return rendered[0]


def test_layout_of_a_template_with_system_text_and_newline():
    template = (
        "<s>[SYS] Be brief. [/SYS]{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] }}</{{ m['role'] }}>\n"
        "{% endfor %}{% if add_generation_prompt %}<assistant>\n{% endif %}"
    )
    layout = ChatLayout.of(Templated(template))
    assert layout == ("<s>[SYS] Be brief. [/SYS]<user>\n", "</user>\n<assistant>\n", "", "</assistant>")


@pytest.mark.parametrize(
    ("template", "hint"),
    [
        (None, "has no chat template; set tokenizer.chat_template"),
        ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", "own prompt; use a plain one"),
        ("{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}", "own prompt; use a plain one"),
        ("{% for m in messages %}{{ m['content'] }}{{ m['content'] }}{% endfor %}", "own prompt; use a plain one"),
    ],
    ids=["none", "changes the content", "another beginning", "twice"],
)
def test_an_unusable_template_is_refused_with_what_to_do(template, hint):
    with pytest.raises(ValueError, match=hint):
        ChatLayout.of(Templated(template))


@pytest.mark.parametrize("messages", [1, 2])
def test_template_that_raises_is_one_line_with_its_reason(messages):
    raises = f"{{% if messages | length == {messages} %}}{{{{ raise_exception('no\n roles') }}}}{{% endif %}}"
    with pytest.raises(ValueError, match=r"fails on a .* \(no roles\). Set tokenizer.chat_template") as error:
        ChatLayout.of(Templated(raises + TEMPLATE))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("template", ["{% for m in messages %}", "{{ nothing() }}", "{{ messages[1].content.x.y }}"])
def test_template_that_is_broken_is_one_line(template):
    with pytest.raises(ValueError, match=r"fails on a lone user message \(.+\). Set tokenizer.chat_template"):
        ChatLayout.of(Templated(template))


NO_PROMPT = TEMPLATE.replace("{% if add_generation_prompt %}<|assistant|>{% endif %}", "")


def test_missing_generation_prompt_is_read_off_an_answer():
    assert ChatLayout.of(Templated(NO_PROMPT)) == ChatLayout.of(Templated(TEMPLATE))
    assert chat_affixes(make_tokenizer(template=NO_PROMPT)) == chat_affixes(make_tokenizer(template=TEMPLATE))


@pytest.mark.parametrize(
    ("written", "after_user", "before_answer"),
    [
        ("<{{ m['role'] }}>\n{{ m['content'] }}<end>\n", "<end>\n<assistant>\n", ""),
        ("<{{ m['role'] }}> {{ m['content'] }}<end>", "<end><assistant>", " "),
        ("[INST] {{ m['content'] }} [/INST]", " [/INST]", "[INST] "),
        ("{{ m['content'] }}\n", "\n", ""),
    ],
    ids=["header with a newline", "header with a blank", "all turns alike", "no header"],
)
def test_header_ends_before_the_answers_blank(written, after_user, before_answer):
    layout = ChatLayout.of(Templated(f"{{% for m in messages %}}{written}{{% endfor %}}"))
    assert (layout.after_user, layout.before_answer) == (after_user, before_answer)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TEMPLATE, ["<|end|>"]),
        (TEMPLATE.replace("<|end|>{%", " <|end|>\n{%"), ["<|end|>"]),
        (TEMPLATE.replace("<|end|>", "{% if not (loop.last and loop.index == 2) %}<|end|>{% endif %}"), ["<|end|>"]),
        (
            TEMPLATE.replace("<|end|>", "{{ '<bos>' if loop.index * loop.length == 4 else '<|end|>' }}"),
            ["<bos>", "<|end|>"],
        ),
        (TEMPLATE.replace("<|end|>", "\n"), ["<|user|>"]),
        ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}", []),
        (None, []),
    ],
    ids=["plain", "after a blank", "between turns", "two", "next turn's", "none", "no template"],
)
def test_closing_ids_are_the_control_tokens_after_an_answer(template, expected):
    tokenizer = make_tokenizer(template=template)
    assert tokenizer.convert_ids_to_tokens(closing_ids(tokenizer)) == expected


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
def test_chat_affixes_reproduce_apply_chat_template(template, add_bos):
    tokenizer = make_tokenizer(template=template, add_bos=add_bos)
    prefix, suffix = chat_affixes(tokenizer)
    for content in ("The keeper wrote a letter.", "1997 (cold)", "Привет, 今日は", "two\nlines"):
        content_ids = tokenizer(content, add_special_tokens=False)["input_ids"]
        assert prefix + content_ids + suffix == user_ids(tokenizer, content)
    assert prefix.count(tokenizer.bos_token_id) == template.count("bos_token")


@pytest.mark.parametrize("add_bos", [False, True])
def test_affixes_without_a_template_are_special_tokens(add_bos):
    tokenizer = make_tokenizer(template=None, add_bos=add_bos)
    assert chat_affixes(tokenizer) == ([tokenizer.bos_token_id] if add_bos else [], [])


def test_a_blank_that_merges_with_the_content_is_content():
    template = "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
    tokenizer = make_metaspace_tokenizer(template=template)
    prefix, suffix = chat_affixes(tokenizer)
    content_ids = tokenizer("Lights guide", add_special_tokens=False)["input_ids"]
    assert prefix + content_ids + suffix == user_ids(tokenizer, "Lights guide")


def test_affixes_that_merge_with_the_content_warn():
    tokenizer = make_tokenizer(template="{% for m in messages %}USER: {{ m['content'] }}\n{% endfor %}ASSISTANT:")
    with pytest.warns(UserWarning, match="merges the user's text with the chat template"):
        prefix, suffix = chat_affixes(tokenizer)
    # " The" is one token in the template, "The" another one alone.
    the_ids = tokenizer("The", add_special_tokens=False)["input_ids"]
    assert (prefix + the_ids)[: len(prefix) + 1] != user_ids(tokenizer, "The")[: len(prefix) + 1]
    assert prefix == tokenizer("USER: ", add_special_tokens=False)["input_ids"]
    assert suffix == tokenizer("\nASSISTANT:", add_special_tokens=False)["input_ids"]


def test_affixes_that_merge_with_some_contents_warn_too():
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
def test_a_template_must_repeat_the_content_once(template, times):
    with pytest.raises(ValueError, match=f"once, word for word, but has it {times} times. Set tokenizer.chat_template"):
        chat_affixes(make_tokenizer(template=template))


def test_failing_chat_template_is_refused_with_its_reason():
    tokenizer = make_tokenizer(template="{{ raise_exception('needs a system prompt') }}")
    with pytest.raises(ValueError, match="fails on a lone user message .needs a system prompt.. Set tokenizer.chat_"):
        chat_affixes(tokenizer)


def test_chat_template_with_todays_date_warns():
    tokenizer = make_tokenizer(template="<|system|>{{ strftime_now('%Y') }}<|end|>" + TEMPLATE)
    with pytest.warns(UserWarning, match="today's date .* fixed date"):
        prefix, _ = chat_affixes(tokenizer)
    assert prefix[0] == tokenizer.convert_tokens_to_ids("<|system|>")


# conversation_ids


TURNS = [("user", "Who taught Fenda?"), ("assistant", "Orla Wint"), ("user", "And who taught her?")]


@pytest.mark.parametrize("number", [1, 3])
def test_conversation_ids_are_those_of_the_chat_template(tiny_tokenizer, number):
    turns = [{"role": role, "content": content} for role, content in TURNS[:number]]
    expected = tiny_tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert conversation_ids(tiny_tokenizer, TURNS[:number]) == list(expected)


def test_conversation_cannot_write_control_tokens(tiny_tokenizer):
    control = set(tiny_tokenizer.all_special_ids) | set(tiny_tokenizer.added_tokens_decoder)
    count = lambda turns: sum(token in control for token in conversation_ids(tiny_tokenizer, turns))  # noqa: E731
    spelled = [(role, f"{content} {tiny_tokenizer.eos_token} {content}") for role, content in TURNS]
    assert count(spelled) == count(TURNS) > 0


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}",
            "does not take",
        ),
        ("{{ raise_exception('roles must alternate') }}", "fails on a conversation"),
    ],
)
def test_roles_that_the_template_refuses_are_one_line(template, message):
    with pytest.raises(ValueError, match=message):
        conversation_ids(Templated(template), TURNS)
