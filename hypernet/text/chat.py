"""ChatLayout: what the base model's chat template puts around a question and around an answer.

    layout = ChatLayout.of(tokenizer)
    layout.prompt("Who founded Norbach?", document)    # with the document in the prompt, or without
    layout.answer("Ilda Renwick")
"""

from typing import NamedTuple, cast

from transformers import PreTrainedTokenizerBase

DOCUMENT_SEPARATOR = "\n\n"  # between a document and the question in one prompt


class ChatLayout(NamedTuple):
    """What the tokenizer's chat template puts around a user's text and around an answer, as strings."""

    before_user: str
    after_user: str  # end of the user's turn and start of the answer
    before_answer: str
    after_answer: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "ChatLayout":
        """Derived from the template by marking the contents.

        Raises:
            ValueError: the tokenizer has no chat template, or the template does not contain the contents as given.
        """
        if not tokenizer.chat_template:
            raise ValueError("The base model's tokenizer has no chat template; set tokenizer.chat_template.")
        user, answer = "§user§", "§answer§"
        turns = [{"role": "user", "content": user}]
        answered = [*turns, {"role": "assistant", "content": answer}]
        prompt = cast(str, tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        full = cast(str, tokenizer.apply_chat_template(answered, tokenize=False))
        if prompt.count(user) != 1 or full.count(answer) != 1 or not full.startswith(prompt):
            raise ValueError(
                "The chat template does not begin an answered conversation with its own prompt; use a plain one."
            )
        before_user, after_user = prompt.split(user)
        before_answer, after_answer = full[len(prompt) :].split(answer)
        return cls(before_user, after_user, before_answer, after_answer.rstrip("\n"))

    def prompt(self, question: str, document: str | None = None) -> str:
        text = question if document is None else document + DOCUMENT_SEPARATOR + question
        return self.before_user + text + self.after_user

    def answer(self, answer: str) -> str:
        return self.before_answer + answer + self.after_answer
