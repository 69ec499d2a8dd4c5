"""What the base model's chat template puts around a question, an answer and a chunk, as strings and as token ids.

layout = ChatLayout.of(tokenizer)
layout.prompt("Who founded Norbach?", document)    # with the document in the prompt, or without
layout.prompt_ids(tokenizer, ["Who founded Norbach?"], [document])
layout.answer("Ilda Renwick")
prefix, suffix = chat_affixes(tokenizer)           # token ids around the content of a user turn
"""

import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple, cast

from transformers import PreTrainedTokenizerBase

from hypernet.text.tokens import framed_ids

DOCUMENT_SEPARATOR = "\n\n"  # between a document and the question in one prompt

# Ordinary texts that start and end differently: affixes that hold for all of them do not depend on the content.
_PROBES = (
    "The lighthouse guides ships home.",
    "In a storm it hums",
    "7 keepers (and one cat) wrote “Ahoy!”",
    "Ελλάδα: 灯台",
)


class ChatLayout(NamedTuple):
    """What the tokenizer's chat template puts around a user's text and around an answer, as strings."""

    before_user: str
    after_user: str  # end of the user's turn and start of the answer
    before_answer: str
    after_answer: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "ChatLayout":
        """Derived from the template by marking the contents.

        A template that ignores `add_generation_prompt` still says how an answer begins: as one that has been given. Its
        header, up to the blanks before the answer, is then part of the prompt.

        Raises:
            ValueError: the tokenizer has no chat template, or the template fails, or does not contain the contents as
                given.
        """
        if not tokenizer.chat_template:
            raise ValueError("The base model's tokenizer has no chat template; set tokenizer.chat_template.")
        user, answer = "§user§", "§answer§"
        prompt = _render(tokenizer, [user], add_generation_prompt=True)
        full = _render(tokenizer, [user, answer])
        if prompt.count(user) != 1 or full.count(answer) != 1 or not full.startswith(prompt):
            raise ValueError(
                "The chat template does not begin an answered conversation with its own prompt; use a plain one."
            )
        before_user, after_user = prompt.split(user)
        before_answer, after_answer = full[len(prompt) :].split(answer)
        header = _missing_header(tokenizer)
        after_user, before_answer = after_user + header, before_answer[len(header) :]
        return cls(before_user, after_user, before_answer, after_answer.rstrip("\n"))

    def prompt(self, question: str, document: str | None = None) -> str:
        return self.before_user + user_text(question, document) + self.after_user

    def prompt_ids(
        self,
        tokenizer: PreTrainedTokenizerBase,
        questions: Sequence[str],
        documents: Sequence[str | None] | None = None,
    ) -> list[list[int]]:
        """Token ids of a prompt per question; a control token that a question or document spells is ordinary text."""
        documents = [None] * len(questions) if documents is None else documents
        texts = [user_text(question, document) for question, document in zip(questions, documents, strict=True)]
        return framed_ids(tokenizer, [(self.before_user, text, self.after_user) for text in texts])

    def answer(self, answer: str) -> str:
        return self.before_answer + answer + self.after_answer


def user_text(question: str, document: str | None) -> str:
    """A user's turn with its document, if it has one, before the question."""
    return question if document is None else document + DOCUMENT_SEPARATOR + question


def conversation_ids(tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]]) -> list[int]:
    """Token ids of a conversation up to the next answer; as in `prompt_ids`, no turn writes control tokens.

    Args:
        turns: (role, text) each; roles are those of the chat template, such as system, user and assistant.

    Raises:
        ValueError: the template fails on these roles, or does not repeat each text once, in order.
    """
    marks = [f"§{number}§" for number in range(len(turns))]
    rendered = _rendered(tokenizer, list(zip([role for role, _ in turns], marks, strict=True)))
    rest, parts = rendered + _missing_header(tokenizer), []
    for mark in marks:
        before, found, rest = rest.partition(mark)
        if not found or mark in rest:
            raise ValueError(
                f"The chat template of {type(tokenizer).__name__} does not take the roles "
                f"{', '.join(role for role, _ in turns)} in this order. Begin with a user's message and alternate."
            )
        parts.append(before)
    afters = [""] * (len(turns) - 1) + [rest]
    framed = zip(parts, [text for _, text in turns], afters, strict=True)
    return [token for row in framed_ids(tokenizer, list(framed)) for token in row]


def closing_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The control tokens that the chat template writes behind an assistant's message, first where the conversation
    ends, then where it goes on. Most templates write the same one there; those that write none, the next turn's."""
    if not tokenizer.chat_template:
        return []
    ends = [ChatLayout.of(tokenizer).after_answer]
    answer, more = "§answer§", "§more§"
    with suppress(ValueError, IndexError):  # one that takes a single question only
        ends.append(_render(tokenizer, ["§user§", answer, more]).split(answer)[1].split(more)[0])
    control = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    found = (next((token for token in _ids(tokenizer, end) if token in control), None) for end in ends)
    return list(dict.fromkeys(token for token in found if token is not None))


def chat_affixes(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids that stand before and after the content of a user turn: the chat template's opening (with the BOS token
    and a default system prompt, where it has them) and its closing with the start of the assistant's turn.

    They are read off `tokenizer.apply_chat_template`: prefix + content + suffix are exactly the ids it gives. Without a
    chat template they are the special tokens the tokenizer itself puts around a text (often just BOS, or nothing).

    Returns:
        (prefix_ids, suffix_ids).

    Raises:
        ValueError: if the template fails on a lone user message, or does not repeat its content word for word, once.

    Warns:
        UserWarning: if the tokenizer merges the content with the template around it, so that no fixed ids are exact for
            every content; the affixes are then tokenized by themselves. Also if the template writes today's date.
    """
    if not tokenizer.chat_template:
        framed = [tokenizer(probe)["input_ids"] for probe in _PROBES]
        prefix_text = suffix_text = ""
    else:
        rendered = _render(tokenizer, [_PROBES[0]], add_generation_prompt=True)
        if rendered.count(_PROBES[0]) != 1:
            raise ValueError(
                f"The chat template of {type(tokenizer).__name__} should contain the user's text once, word for word, "
                f"but has it {rendered.count(_PROBES[0])} times. Set tokenizer.chat_template to one that does, or "
                "chunk with add_affixes=False."
            )
        prefix_text, suffix_text = rendered.split(_PROBES[0])
        header = _missing_header(tokenizer)
        suffix_text += header
        framed = [
            _ids(tokenizer, _render(tokenizer, [probe], add_generation_prompt=True) + header) for probe in _PROBES
        ]
        if "strftime_now" in tokenizer.get_chat_template():
            warnings.warn(
                "The chat template writes today's date around the document, so the same document gives another adapter "
                "tomorrow. Set tokenizer.chat_template to one with a fixed date to avoid that.",
                stacklevel=2,
            )
    affixes = [_around(ids, _ids(tokenizer, probe)) for ids, probe in zip(framed, _PROBES, strict=True)]
    if affixes[0] is not None and all(affix == affixes[0] for affix in affixes):
        return affixes[0]
    warnings.warn(
        f"{type(tokenizer).__name__} merges the user's text with the chat template around it, so chunks cannot be "
        "framed exactly as apply_chat_template would; prefix and suffix are tokenized by themselves instead.",
        stacklevel=2,
    )
    return _ids(tokenizer, prefix_text), _ids(tokenizer, suffix_text)


def _render(tokenizer: PreTrainedTokenizerBase, contents: Sequence[str], *, add_generation_prompt: bool = False) -> str:
    """A conversation of these contents: the user's, the assistant's, the user's ... ."""
    return _rendered(
        tokenizer,
        [(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)],
        add_generation_prompt=add_generation_prompt,
    )


def _rendered(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]], *, add_generation_prompt: bool = True
) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
    except Exception as error:  # a template is a program: it may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        asked = {1: "a lone user message", 2: "a user message and its answer"}.get(len(turns), "a conversation")
        raise ValueError(
            f"The chat template of {type(tokenizer).__name__} fails on {asked} ({reason}). Set "
            "tokenizer.chat_template (chat_template.jinja in the model's folder) to one that takes it."
        ) from error
    return cast(str, rendered)


def _missing_header(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a template that ignores `add_generation_prompt` writes between a user's turn and an answer; else nothing."""
    user, answer = "§user§", "§answer§"
    prompt = _render(tokenizer, [user], add_generation_prompt=True)
    if prompt != _render(tokenizer, [user]):
        return ""
    full = _render(tokenizer, [user, answer])
    if not full.startswith(prompt):
        return ""
    # A blank before the answer is part of the answer's first token.
    header = full[len(prompt) :].split(answer)[0].rstrip(" ")
    # One that writes all turns alike has no header of the assistant's.
    of_all = prompt.split(user)[0].rstrip(" ").endswith(header)
    return header if header.strip() and not of_all else ""


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _around(ids: list[int], content: list[int]) -> tuple[list[int], list[int]] | None:
    """What stands before and after content in ids; None if it is not in there."""
    for start in range(len(ids) - len(content) + 1):
        if ids[start : start + len(content)] == content:
            return ids[:start], ids[start + len(content) :]
    return None
