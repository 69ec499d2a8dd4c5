"""API keys: a JSON file with the SHA-256 of each key and whose it is. The keys themselves are printed once.

keys = ApiKeys("outputs/keys.json")
key = keys.add("alice")                 # hn-...; the file has its hash
keys.user_of(key)                       # "alice"; None: no such key
"""

import hashlib
import json
import os
import secrets
from pathlib import Path

from hypernet.io.files import replaced
from hypernet.memory.store.records import Filters


class ApiKeys:
    """The keys of one file, read when it is opened.

    Raises:
        ValueError: the file is no list of keys.
        OSError: it cannot be read.
    """

    def __init__(self, path: str | Path, *, create: bool = False) -> None:
        self.path = Path(path).expanduser()
        self._users: dict[str, str] = {}
        if create and not self.path.exists():
            return
        try:
            rows = json.loads(self.path.read_bytes())["keys"]
            self._users = {str(row["sha256"]): Filters(str(row["user"])).checked().user_id or "" for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is no file of API keys. Make one: hypernet api-key USER.") from error

    def __len__(self) -> int:
        return len(self._users)

    def user_of(self, key: str) -> str | None:
        # A key has 256 random bits: how long a look-up of its hash takes tells nothing about it.
        return self._users.get(_hashed(key))

    def add(self, user: str) -> str:
        """A new key of this user, which is not stored."""
        Filters(user).checked()
        key = f"hn-{secrets.token_urlsafe(32)}"
        self._users[_hashed(key)] = user
        rows = [{"user": user, "sha256": hashed} for hashed, user in self._users.items()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(self.path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"keys": rows}, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return key


def _hashed(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()
