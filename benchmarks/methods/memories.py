"""Methods that answer from a memory: one tier each, the others switched off, and their controls."""

import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from benchmarks.methods.base import Answer, Method
from benchmarks.tasks.base import Asked, Case
from hypernet.doc_to_lora import DocToLoRA
from hypernet.memory.ask import MemoryQuestion, as_document
from hypernet.memory.memory import Memory
from hypernet.memory.store.records import Draft, Filters


class MemoryMethod(Method):
    """A folder with the case's documents as one user's memories and the other case's as another's.

    Documents that were replaced are told, given adapters and forgotten again (`Memory.forget`).

    Args:
        settings: of `Memory.open`: limit, join, top_k, ... .
    """

    with_adapters = False

    def __init__(self, *, model: DocToLoRA, max_new_tokens: int = 32, **settings: object) -> None:
        super().__init__(model=model, max_new_tokens=max_new_tokens)
        self.settings = settings
        self.memory: Memory | None = None
        self.user = "another" if self.of_another_document else "asked"

    def build(self, case: Case) -> None:
        if self.memory is not None:
            self.memory.close()
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name) / "memory"
        self.memory = Memory.open(folder, model=self.model, max_new_tokens=self.max_new_tokens, **self.settings)
        replaced = () if self.of_another_document else case.replaced
        mine, another = Filters("asked"), Filters("another")
        refs = self.memory.store.add([Draft(text=text, filters=mine) for text in [*replaced, *case.documents]])
        self.memory.store.add([Draft(text=text, filters=another) for text in case.others])
        if self.with_adapters:
            self.memory.write_adapters(user_id=self.user)
        for ref in refs[: len(replaced)]:
            self.memory.forget(ref, verify=False)
        self.held()

    def held(self) -> None:
        """What is made by the first question is made before it."""
        self.memory.search("Who?", user_id=self.user)

    def stored_bytes(self) -> int:
        return self.memory.store.content_bytes(Filters(self.user))


class TokenMemory(MemoryMethod):
    """What a search finds, in the prompt."""

    def documents_for(self, question: Asked) -> Sequence[str]:
        hits = self.memory.search(question.text, user_id=self.user, limit=self.memory.asker.limit)
        return [as_document(hits)] if hits else ()


class AdapterMemory(MemoryMethod):
    """The memories' adapters, of which each question gets those that it scores highest; nothing in the prompt."""

    with_adapters = True

    def held(self) -> None:
        super().held()
        self.memory.bank.held(Filters(self.user))

    def answer(self, questions: Sequence[Asked]) -> list[Answer]:
        self._asked = [question.text for question in questions]
        return super().answer(questions)

    def timed_answer(self, question: Asked) -> tuple[float, float, int]:
        self._asked = [question.text]
        return super().timed_answer(question)

    def active(self, prompts: Sequence[Sequence[int]]) -> AbstractContextManager:
        choices = self.memory.asker.choose([MemoryQuestion(text, Filters(self.user)) for text in self._asked])
        gate_power = self.memory.bank.gate_power or 0.0
        return self.model.injector.using([choice.adapter for choice in choices], gate_power=gate_power)

    def stored_bytes(self) -> int:
        return self.memory.bank.counts(Filters(self.user)).bytes


class AnothersTokenMemory(TokenMemory):
    """Control: what a search finds in another user's memory of the same folder."""

    of_another_document = True


class AnothersAdapterMemory(AdapterMemory):
    """Control: the adapters of another user's memories of the same folder."""

    of_another_document = True


class OracleMemory(Method):
    """The one memory that answers the question, alone in the prompt: the ceiling."""

    def build(self, case: Case) -> None:
        self._told = case.documents

    def documents_for(self, question: Asked) -> Sequence[str]:
        return (question.evidence,) if question.evidence in self._told else ()
