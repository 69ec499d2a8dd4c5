"""What every method of the benchmark is: `prepare` a case's documents, then `answer` questions on them.

A method is a prompt, and an adapter or none. What it costs is measured from outside, alike for all
(benchmarks/measuring/measure.py); a method says only what it keeps.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

from benchmarks.measuring.cost import adapter_flops, flops_of
from benchmarks.measuring.decoding import Generated, Prefix, greedy, log_likelihoods
from benchmarks.measuring.peak import peak_bytes
from benchmarks.tasks.base import Asked, Case
from hypernet.adapters.adapter import LoRAAdapter
from hypernet.base.base_model import num_embeddings
from hypernet.base.generation import context_window
from hypernet.doc_to_lora import DocToLoRA
from hypernet.text.chat import DOCUMENT_SEPARATOR
from hypernet.text.tokens import check_known, framed_ids


class Answer(NamedTuple):
    """text: the greedy answer. log_likelihood: of the first right answer, summed over its tokens, in nats.

    fits: whether the prompt held everything the method wanted in it; if not, the middle of the documents was left out.
    """

    text: str
    log_likelihood: float
    fits: bool
    prompt_tokens: int


class Method:
    """No context: the question alone. The others change `prepare`, `documents_for` or `adapter`.

    Args:
        model: base model, tokenizer and, for methods that want one, the trained hypernetwork.
        max_new_tokens: of an answer.
    """

    of_another_document = False  # whether it is given another case's documents, as a control

    def __init__(self, *, model: DocToLoRA, max_new_tokens: int = 32) -> None:
        self.model = model
        self.max_new_tokens = max_new_tokens
        self.window = context_window(model.base_model)
        self.documents: tuple[str, ...] = ()
        self.adapter: LoRAAdapter | None = None
        self.tail_tokens = 0

    # What a method is

    def prepare(self, case: Case) -> None:
        """Everything that is done once for the case's documents, before a question is known."""
        self.documents = tuple(document for document in self._given(case) if document)
        # The documents get what the case's longest question leaves of the window, so that a kept prefix does for all.
        self.tail_tokens = max(len(self.tail(question)) for question in case.questions)
        self.build(case)

    def build(self, case: Case) -> None:
        """The part of `prepare` in which methods differ; self.documents is set."""

    def documents_for(self, question: Asked) -> Sequence[str]:
        """What stands in the prompt before the question."""
        return ()

    @property
    def steps(self) -> tuple[int | None, ...]:
        """Gradient steps after which quality is reported; one None for a method without any."""
        return (None,)

    def use(self, step: int | None) -> None:
        """Answers as after that step, one of `steps`."""

    def seconds_at(self, step: int | None) -> float | None:
        """Seconds of `prepare` up to that step; None: all of them."""
        return None

    def stored_bytes(self) -> int:
        """What is kept of the documents between questions."""
        return 0

    def prepare_flops(self, case: Case) -> int:
        return flops_of(lambda: self.prepare(case))

    def prepare_peak_bytes(self, case: Case) -> int:
        """Most bytes of tensors held at a time while preparing, beyond those of the model."""
        return peak_bytes(lambda: self.prepare(case), device=self.model.device.type)

    # What all methods share

    def answer(self, questions: Sequence[Asked]) -> list[Answer]:
        prompts = [self.prompt(question) for question in questions]
        references = [self.encode_answer(question.answers[0]) for question in questions]
        ids = [prompt for prompt, _ in prompts]
        with self.active(ids):
            generated = self._greedy(ids)
            scores = log_likelihoods(
                self.model.base_model, ids, references, pad_id=self.model.tokenizer.pad_token_id, prefix=self.prefix()
            )
        before = prefix.length if (prefix := self.prefix()) else 0
        return [
            Answer(text, score, fits, before + len(prompt))
            for text, score, (prompt, fits) in zip(generated.texts, scores, prompts, strict=True)
        ]

    def timed_answer(self, question: Asked) -> tuple[float, float, int]:
        """(seconds to the first token, seconds altogether, tokens) of one question asked alone."""
        started = time.perf_counter()
        ids = [self.prompt(question)[0]]
        with self.active(ids):
            before = time.perf_counter() - started
            generated: Generated = self._greedy(ids)
        return before + generated.first_token_s, before + generated.total_s, generated.num_tokens[0]

    def answer_cost(self, question: Asked) -> tuple[int, int]:
        """(FLOPs, most bytes of tensors held at a time beyond what is kept) of one question asked alone."""
        num_tokens = len(self.prompt(question)[0]) + self.timed_answer(question)[2] - 1  # the last one is not read
        added = adapter_flops(self.adapter.targets, self.active_rank, num_tokens) if self.adapter else 0
        run: Callable[[], object] = lambda: self.timed_answer(question)  # noqa: E731
        return flops_of(run) + added, peak_bytes(run, device=self.model.device.type)

    def prompt(self, question: Asked) -> tuple[list[int], bool]:
        """Token ids, and whether everything is in them. Documents that are too long lose their middle."""
        head, fits = self.head(self.documents_for(question))
        return head + self.tail(question), fits

    def head(self, documents: Sequence[str]) -> tuple[list[int], bool]:
        """The prompt up to the end of the documents, in what the longest question leaves of the window."""
        before = self.encode("", before=self.model.layout.before_user)
        text = self.encode("".join(document + DOCUMENT_SEPARATOR for document in documents))
        room = max(0, self.window - self.max_new_tokens - self.tail_tokens - len(before))
        if len(text) <= room:
            return before + text, True
        return before + text[: -(-room // 2)] + text[len(text) - room // 2 :], False

    def tail(self, question: Asked) -> list[int]:
        """The prompt after the method's documents: the question, and the document that the task puts before it."""
        context = "" if question.context is None else question.context + DOCUMENT_SEPARATOR
        return self.encode(context + question.text, after=self.model.layout.after_user)

    def encode(self, text: str, *, before: str = "", after: str = "") -> list[int]:
        """Token ids of a text between parts of the chat template, which alone have control tokens."""
        ids = framed_ids(self.model.tokenizer, [(before, text, after)])
        check_known(ids, self.model.tokenizer, num_embeddings=num_embeddings(self.model.base_model))
        return ids[0]

    def encode_answer(self, text: str) -> list[int]:
        return self.encode(text, before=self.model.layout.before_answer, after=self.model.layout.after_answer)

    def prefix(self) -> Prefix | None:
        return None

    def active(self, prompts: Sequence[Sequence[int]]) -> AbstractContextManager:
        """The base model as it answers these prompts, token ids each."""
        return self.model.injector.using(self.adapter)

    @property
    def active_rank(self) -> int:
        """Of the adapter that is applied to a question."""
        return self.adapter.rank

    def _greedy(self, ids: Sequence[Sequence[int]]) -> Generated:
        return greedy(
            self.model.base_model,
            self.model.tokenizer,
            ids,
            max_new_tokens=self.max_new_tokens,
            prefix=self.prefix(),
        )

    def _given(self, case: Case) -> tuple[str, ...]:
        return case.others if self.of_another_document else case.documents
