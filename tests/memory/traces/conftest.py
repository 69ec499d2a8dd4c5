"""The databases of both kinds, as for tests of the store itself."""

from tests.memory.store.conftest import database, postgres, schema

__all__ = ["database", "postgres", "schema"]
