"""A conversation that is stored as it goes: each message at once, all of them one batch."""

from collections.abc import Mapping, Sequence
from typing import Any

from hypernet.memory.store.records import Draft, Filters, MemoryRef
from hypernet.memory.store.token_store import TokenStore

Message = Mapping[str, Any]


class Conversation:
    """What `Memory.capture` gives; whatever was said is stored, even if the block fails or the process is killed.

    Attributes:
        version: the batch that `rollback` takes back; None while nothing was said.
        refs: the memories, in order.
    """

    def __init__(self, store: TokenStore, filters: Filters) -> None:
        self._store, self._filters = store, filters
        self.version: str | None = None
        self.refs: list[MemoryRef] = []

    def add(self, role: str, content: str) -> MemoryRef:
        """Stores one message.

        Raises:
            ValueError: it has no text, or the conversation was rolled back.
        """
        (draft,) = drafts_of([{"role": role, "content": content}], self._filters)
        if self.version is None:
            self.version = self._store.start_batch("capture")
        (ref,) = self._store.add([draft], operation="capture", batch=self.version)
        self.refs.append(ref)
        return ref

    def user(self, content: str) -> MemoryRef:
        return self.add("user", content)

    def assistant(self, content: str) -> MemoryRef:
        return self.add("assistant", content)


def drafts_of(messages: Sequence[Message], filters: Filters, **common: Any) -> list[Draft]:
    """Chat messages as memories: {"role": ..., "content": text or OpenAI's list of parts}.

    Args:
        common: further fields of every Draft.

    Raises:
        ValueError: a message is none, or has no text.
    """
    drafts = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ValueError(f"Message {number} is {message!r}. Give role and content.")
        content = message["content"]
        if isinstance(content, list):
            parts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
            content = "\n".join(part for part in parts if isinstance(part, str))
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"Message {number} (role {message['role']!r}) has no text. Leave it out.")
        drafts.append(Draft(text=content, role=str(message["role"]), filters=filters, **common))
    return drafts
