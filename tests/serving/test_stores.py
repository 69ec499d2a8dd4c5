"""serving/stores.py: each user's memory in a schema of its own on a real PostgreSQL server, asked over HTTP."""

from contextlib import ExitStack
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient

from hypernet.serving.app import create_app
from hypernet.serving.keys import ApiKeys
from hypernet.serving.state import ServerSettings
from tests.postgres_server import PASSWORD, PostgresServer, missing


@pytest.fixture(scope="module")
def postgres():
    if reason := missing():
        pytest.skip(reason)
    with PostgresServer() as server:
        server.sql("GRANT CREATE ON DATABASE postgres TO guarded")
        yield server


@pytest.fixture
def url(postgres):
    """Of a database without schemas of users, whose role needs a password."""
    yield f"postgresql://guarded:{quote(PASSWORD, safe='')}@/postgres?host={postgres.folder}"
    for schema in schemas(postgres):
        postgres.sql(f"DROP SCHEMA {schema} CASCADE")


def schemas(postgres) -> list[str]:
    return [name for (name,) in postgres.sql("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'hypernet_%'")]


def clients(model, folder, url, *users, stack):
    """A client for each user of a new application on this database."""
    keys = ApiKeys(folder / "keys.json", create=True)
    headers = {user: {"Authorization": f"Bearer {keys.add(user)}"} for user in users}
    settings = ServerSettings(directory=str(folder / "data"), database=url, keys=str(folder / "keys.json"))
    app = create_app(model, settings)
    stack.enter_context(TestClient(app))
    return [TestClient(app, headers=headers[user], raise_server_exceptions=False) for user in users]


@pytest.fixture
def stack():
    with ExitStack() as found:
        yield found


def test_postgres_memories_are_added_found_asked_deleted(random_model, postgres, url, tmp_path, stack):
    alice, bob = clients(random_model, tmp_path, url, "alice", "bob", stack=stack)
    made = alice.post("/v1/memories", json={"content": "Alice keeps her spare key under the blue pot."})
    assert made.status_code == 201, made.text
    bob.post("/v1/memories", json={"content": "Bob keeps a cat."})
    assert len(schemas(postgres)) == 2 and not list((tmp_path / "data").rglob("*.sqlite"))
    rows = [postgres.sql(f"SELECT text FROM {schema}.memories") for schema in schemas(postgres)]
    assert sorted(rows) == [[("Alice keeps her spare key under the blue pot.",)], [("Bob keeps a cat.",)]]

    def found(client) -> list[str]:
        rows = client.post("/v1/memories/search", json={"question": "Where is the key under the pot?"}).json()["data"]
        return [row["id"] for row in rows]

    key = made.json()["id"]
    assert found(alice) == [key] and key not in found(bob)
    assert bob.get(f"/v1/memories/{key}").status_code == 404
    assert alice.post("/v1/memories/write_adapters").json()["written"] == 1
    for tier in ("token", "adapter"):
        answer = alice.post("/v1/memories/ask", json={"question": "Where is the key?", "tier": tier}).json()
        assert answer["memories"] == [f"{key}@1"] and answer["tier"] == tier
    assert alice.delete(f"/v1/memories/{key}").status_code == 200
    assert alice.get(f"/v1/memories/{key}").status_code == 404 and found(alice) == []
    alice.post("/v1/memories/purge", json={})
    assert "blue pot" not in str([postgres.sql(f"SELECT * FROM {schema}.memories") for schema in schemas(postgres)])
    assert "Bob keeps a cat." in bob.get("/v1/memories/export").text


def test_postgres_memories_are_there_after_a_restart(random_model, url, tmp_path, stack):
    (alice,) = clients(random_model, tmp_path, url, "alice", stack=stack)
    key = alice.post("/v1/memories", json={"content": "Alice plays chess."}).json()["id"]
    stack.close()
    (again,) = clients(random_model, tmp_path, url, "alice", stack=stack)
    assert again.get(f"/v1/memories/{key}").json()["text"] == "Alice plays chess."


def test_many_users_leave_postgres_connections_free(random_model, postgres, url, tmp_path, stack):
    """Each memory that stays open keeps one of the 100 connections that PostgreSQL has."""
    users = [f"user{number}" for number in range(6)]
    for client in clients(random_model, tmp_path, url, *users, stack=stack):
        for _ in range(3):
            assert client.get("/v1/memories/status").status_code == 200
    ((number,),) = postgres.sql("SELECT count(*) FROM pg_stat_activity WHERE usename = 'guarded'")
    assert number == len(users)


@pytest.mark.parametrize(
    ("database", "said"),
    [
        ("sqlite:///memory.sqlite", "is no URL of PostgreSQL. Give postgresql"),
        ("postgresql://nobody:secret@/none?host=/no/such/folder", "cannot be reached"),
    ],
)
def test_database_that_is_none_is_told_at_the_start(tmp_path, database, said):
    with pytest.raises((ValueError, OSError), match=said) as told:
        ServerSettings(directory=str(tmp_path), database=database).checked()
    assert "secret" not in str(told.value) and "\n" not in str(told.value)
    assert "secret" not in repr(ServerSettings(database=database))


def test_role_that_may_make_no_schema_is_told_at_the_start(postgres, tmp_path):
    postgres.sql("CREATE ROLE reader LOGIN")
    with pytest.raises(
        ValueError, match=r"role reader may make no schema .* GRANT CREATE ON DATABASE postgres TO reader"
    ):
        ServerSettings(directory=str(tmp_path), database=postgres.url("s0", user="reader")).checked()
