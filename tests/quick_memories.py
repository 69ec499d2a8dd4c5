"""A memory's empty database is made once in this process and copied afterwards: Alembic takes 21 ms of CPU for each.

What tests the making itself, and commands in processes of their own, does as a user's.
"""

import pytest

from hypernet.memory.store.dialects import NEW_FILE, SQLite

MAKING = ("test_database.py", "test_dialects.py", "test_full_disk.py")
_made: list[bytes] = []


def make_quickly(patch: pytest.MonkeyPatch) -> None:
    make = SQLite._make

    def copy(self: SQLite) -> None:
        if not _made:
            make(self)
            _made.append(self.path.read_bytes())
        else:
            new = self.path.with_name(NEW_FILE)
            new.write_bytes(_made[0])
            new.replace(self.path)

    patch.setattr(SQLite, "_make", copy)
