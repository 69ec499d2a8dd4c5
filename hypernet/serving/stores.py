"""UserStores: each user's memory and adapters in a folder of their own, so that no request can reach another's.

stores = UserStores("outputs/serve", model)
with stores.memory("alice") as memory:
    memory.search("Who taught Fenda Elfax?", user_id="alice")
stores.library("alice").list()
stores.adapter("alice", "fenda_elfax.txt")         # loaded, and kept for the next request
"""

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from hypernet.adapters.adapter import LoRAAdapter
from hypernet.adapters.library import AdapterLibrary, LibraryEntry
from hypernet.doc_to_lora import DocToLoRA
from hypernet.memory.embedding import BaseModelEmbedder, Vectors
from hypernet.memory.memory import Memory
from hypernet.memory.store.database import schema_url


class UnknownAdapter(ValueError):
    """The user has none of this name; another user's is as unknown as one that never was."""


class _SharedEmbedder:
    """One embedder for all users; its tokenizer is its own, since tokenizers change while they pad."""

    def __init__(self, model: DocToLoRA) -> None:
        self._embedder = BaseModelEmbedder(model.base_model, copy.deepcopy(model.tokenizer))
        self.name, self._lock = self._embedder.name, Lock()

    def embed(self, texts: Sequence[str]) -> Vectors:
        with self._lock:
            return self._embedder.embed(texts)


class UserStores:
    """Opens what belongs to one user.

    Args:
        directory: below it each user has a folder, named by a hash of the user's name: no name leads out of it.
        database: URL of PostgreSQL: each user's memory then has a schema of its own there; its adapters stay in the
            folder. None: SQLite in the folder, or what the folder keeps.
        max_open: memories, and adapters, that stay open; the least recently used are closed.
    """

    def __init__(
        self, directory: str | Path, model: DocToLoRA, *, database: str | None = None, max_open: int = 64
    ) -> None:
        self.directory = Path(directory).expanduser().resolve()
        (self.directory / "users").mkdir(parents=True, exist_ok=True)  # a folder that nobody may write to is told now
        self.model, self.database, self.max_open = model, database, max_open
        self._embedder = _SharedEmbedder(model)
        self._memories: OrderedDict[str, tuple[Memory, int]] = OrderedDict()  # user → memory, requests that use it
        self._adapters: OrderedDict[tuple[str, str], LoRAAdapter] = OrderedDict()  # user, id
        self._lock = Lock()

    def folder(self, user: str) -> Path:
        return self.directory / "users" / hashlib.sha256(user.encode()).hexdigest()[:32]

    @contextmanager
    def memory(self, user: str) -> Iterator[Memory]:
        """The user's memory, made by the first request; open at least until the block ends."""
        with self._lock:
            memory, uses = self._memories.pop(user, (None, 0))
            if memory is None:
                memory = self._open(user)
            self._memories[user] = memory, uses + 1
            self._close_idle(self.max_open)
        try:
            yield memory
        finally:
            with self._lock:
                self._memories[user] = memory, self._memories[user][1] - 1

    def _open(self, user: str) -> Memory:
        folder, url = self.folder(user), None
        if self.database is not None:
            url = schema_url(self.database, f"hypernet_{folder.name}", folder=folder / "memory")
        return Memory.open(folder / "memory", database=url, model=self.model, embedder=self._embedder)

    def library(self, user: str) -> AdapterLibrary:
        return AdapterLibrary(self.folder(user) / "adapters")

    def entries(self, user: str) -> tuple[LibraryEntry, ...]:
        """The user's adapters, the oldest first."""
        library = self.library(user)
        return library.list() if library.directory.is_dir() else ()

    def entry(self, user: str, key: str) -> LibraryEntry:
        """The adapter with this id, unique beginning of one, or name of a document.

        Raises:
            UnknownAdapter: there is none, or several.
        """
        entries = self.entries(user)
        found = [entry for entry in entries if entry.id == key] or [
            entry for entry in entries if key and (entry.id.startswith(key) or key in dict(entry.documents))
        ]
        if len(found) != 1:
            reason = "You have no adapter" if not found else f"{len(found)} of your adapters could be"
            raise UnknownAdapter(f"{reason} {key!r}. GET /v1/adapters lists yours with their ids.")
        return found[0]

    def adapter(self, user: str, key: str) -> LoRAAdapter:
        """Raises as `entry`; or ValueError if it is damaged or another base model's."""
        entry = self.entry(user, key)
        with self._lock:
            if (kept := self._adapters.get((user, entry.id))) is not None:
                self._adapters.move_to_end((user, entry.id))
                return kept
        found = self.library(user).load(entry.id, base_model_fingerprint=self.model.base_model_fingerprint)
        with self._lock:
            self._adapters[user, entry.id] = found
            while len(self._adapters) > self.max_open:
                self._adapters.popitem(last=False)
        return found

    def remove(self, user: str, key: str) -> str:
        """Deletes an adapter; its id. Raises as `entry`."""
        identity = self.entry(user, key).id
        with self._lock:
            self._adapters.pop((user, identity), None)
        return self.library(user).remove(identity)

    def close(self) -> None:
        with self._lock:
            self._close_idle(0)

    def _close_idle(self, most: int) -> None:
        for user in [user for user, (_, uses) in self._memories.items() if not uses]:
            if len(self._memories) <= most:
                return
            self._memories.pop(user)[0].close()
