"""API keys: a JSON file with the SHA-256 of each key and whose it is. The keys themselves are printed once.

keys = ApiKeys("outputs/keys.json")
key = keys.add("alice")                 # hn-...; the file has its hash
keys.user_of(key)                       # "alice"; None: no such key
keys.remove("alice")                    # all of hers; in another process too, from the next request on
"""

import hashlib
import json
import logging
import os
import secrets
from pathlib import Path

from hypernet.io.files import replaced
from hypernet.memory.store.records import Filters

log = logging.getLogger(__name__)


class ApiKeys:
    """The keys of one file, read again whenever it has changed.

    Raises:
        ValueError: the file is no list of keys.
        OSError: it cannot be read.
    """

    def __init__(self, path: str | Path, *, create: bool = False) -> None:
        self.path = Path(path).expanduser()
        self._read: tuple[object, dict[str, str]] = None, {}  # which state of the file, and hash → user
        if not create or self.path.exists():
            self._read = self._state(), self._users()

    def __len__(self) -> int:
        return len(self._current())

    def user_of(self, key: str) -> str | None:
        """Whose it is. While the file is missing or no list of keys, nobody's."""
        # A key has 256 random bits: how long a look-up of its hash takes tells nothing about it.
        return self._current().get(_hashed(key))

    def add(self, user: str) -> str:
        """A new key of this user, which is not stored."""
        Filters(user).checked()
        key = f"hn-{secrets.token_urlsafe(32)}"
        self._write({**self._current(), _hashed(key): user})
        return key

    def remove(self, user: str) -> int:
        """Takes all keys of a user out; how many they were."""
        users = self._current()
        left = {hashed: other for hashed, other in users.items() if other != user}
        if len(left) < len(users):
            self._write(left)
        return len(users) - len(left)

    def _current(self) -> dict[str, str]:
        state = self._state()
        if state != self._read[0]:
            try:
                users = self._users() if state else {}
            except (ValueError, OSError) as error:
                log.error("%s Until then no key counts.", error)
                users = {}
            self._read = state, users
        return self._read[1]

    def _state(self) -> object:
        """Another one after each change; None: there is no file."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def _users(self) -> dict[str, str]:
        try:
            rows = json.loads(self.path.read_bytes())["keys"]
            return {str(row["sha256"]): Filters(str(row["user"])).checked().user_id or "" for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is no file of API keys. Make one: hypernet api-key USER.") from error

    def _write(self, users: dict[str, str]) -> None:
        rows = [{"user": user, "sha256": hashed} for hashed, user in users.items()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(self.path, mode=0o600) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"keys": rows}, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._read = self._state(), users


def _hashed(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()
