"""The stores of both databases, as for tests of the store itself."""

from tests.memory.store.conftest import new_store, postgres, schema, store

__all__ = ["new_store", "postgres", "schema", "store"]
