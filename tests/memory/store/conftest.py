"""Stores of both databases, empty: `new_store("name")` makes one in a folder of the test, `store` is one."""

import pytest

from tests.postgres_server import PostgresServer, missing


@pytest.fixture(scope="session")
def postgres():
    """A PostgreSQL server, one per process of the tests."""
    if reason := missing():
        pytest.skip(reason)
    with PostgresServer() as server:
        yield server


@pytest.fixture
def schema(postgres):
    """schema(): the URL of an empty schema."""
    urls = []

    def make() -> str:
        urls.append(postgres.empty_schema())
        return urls[-1]

    yield make
    for url in urls:
        postgres.take_back(url)


@pytest.fixture(params=["sqlite", "postgresql"])
def new_store(request, tmp_path):
    from hypernet.memory.store.token_store import TokenStore

    schema = request.getfixturevalue("schema") if request.param == "postgresql" else None
    stores = []

    def make(name: str = "memory", **settings) -> TokenStore:
        """A second one of the same name shares the first one's database."""
        folder = tmp_path / name
        if schema and not folder.exists():
            settings["database"] = schema()
        stores.append(TokenStore(folder, **settings))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def store(new_store):
    return new_store()


@pytest.fixture
def sqlite_store(tmp_path):
    """For what Python alone does."""
    from hypernet.memory.store.token_store import TokenStore

    store = TokenStore(tmp_path / "memory")
    yield store
    store.close()


@pytest.fixture
def bytes_of(request):
    """bytes_of(store): of everything on the disk, but PostgreSQL's write-ahead log."""

    def read(store) -> bytes:
        found = b"".join(path.read_bytes() for path in store.folder.rglob("*") if path.is_file())
        if (store.folder / "memory.postgresql").exists():
            found += request.getfixturevalue("postgres").bytes_outside_the_log()
        return found

    return read


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request):
    """What a store is given as its database: None, or the URL of an empty schema."""
    return None if request.param == "sqlite" else request.getfixturevalue("schema")()
