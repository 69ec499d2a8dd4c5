"""Alembic runs the migrations on the connection that `Database` has opened; there is no alembic.ini."""

from alembic import context

from hypernet.memory.store.schema import metadata

# The caller's transaction holds all migrations together; both databases undo DDL with it.
connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, transactional_ddl=True)
context.run_migrations()
