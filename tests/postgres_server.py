"""A real PostgreSQL server for tests: its own data folder, a socket and no port; gone when the tests are.

with PostgresServer() as server:
    url = server.empty_schema()      # for one memory; server.take_back(url) when it is not needed any more
"""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

PASSWORD = "pa:ss/w@rd"  # of the role "guarded"; every other role needs none


def missing() -> str:
    """Why there can be no server here; empty if there can."""
    if _program("postgres") is None or _program("initdb") is None:
        return "PostgreSQL is not installed"
    try:
        import psycopg  # noqa: F401
    except ImportError:
        return "psycopg is not installed: the extra [postgres]"
    return "" if os.geteuid() or _server_user() else "PostgreSQL refuses root, and there is no user postgres or nobody"


class PostgresServer:
    """Durability is off, which only a crash of the machine would show; so is autovacuum, which takes processor time."""

    def __init__(self) -> None:
        # Not in pytest's folder: another user may not enter it, and a socket's path has 107 bytes at most.
        self.folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
        self.data = self.folder / "data"
        self._user = {}
        if os.geteuid() == 0 and (user := _server_user()):
            self._user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            os.chown(self.folder, user.pw_uid, user.pw_gid)
        self._free: list[str] = []
        self._number = 0

    def __enter__(self) -> "PostgresServer":
        self._run("initdb", "-D", str(self.data), "-U", "owner", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
        hba = self.data / "pg_hba.conf"
        hba.write_text("local all guarded scram-sha-256\nlocal all all trust\n")
        settings = {
            **{"fsync": "off", "full_page_writes": "off", "autovacuum": "off", "shared_buffers": "16MB"},
            **{"listen_addresses": "", "unix_socket_directories": str(self.folder), "max_wal_size": "64MB"},
            **{"max_connections": "100", "log_min_messages": "warning", "dynamic_shared_memory_type": "mmap"},
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        with (self.folder / "log").open("w") as log:
            self._server = subprocess.Popen(
                [str(_program("postgres")), "-D", str(self.data), *options], stderr=log, cwd=self.folder, **self._user
            )
        deadline = time.monotonic() + 60
        while True:
            try:
                self._admin = self.connect()
                break
            except Exception:
                if self._server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((self.folder / "log").read_text()) from None
                time.sleep(0.05)
        self.sql(f"CREATE ROLE guarded LOGIN PASSWORD '{PASSWORD}'")
        return self

    def __exit__(self, *_: object) -> None:
        self._admin.close()
        self._server.send_signal(signal.SIGQUIT)  # without a checkpoint
        try:
            self._server.wait(30)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def connect(self, user: str = "owner"):
        import psycopg

        return psycopg.connect(host=str(self.folder), user=user, dbname="postgres", autocommit=True)

    def sql(self, statement: str) -> list[tuple]:
        cursor = self._admin.execute(statement)
        return cursor.fetchall() if cursor.description else []

    def url(self, schema: str, *, user: str = "owner") -> str:
        return f"postgresql://{user}@/postgres?host={self.folder}&options=-csearch_path%3D{schema}"

    def empty_schema(self) -> str:
        """The URL of a schema without tables, or with a memory's tables that have no rows, which are quicker."""
        while self._free:
            schema = self._free.pop()
            if self._emptied(schema):
                return self.url(schema)
            self.sql(f"DROP SCHEMA {schema} CASCADE")
        return self.new_schema()

    def new_schema(self) -> str:
        self._number += 1
        self.sql(f"CREATE SCHEMA s{self._number}")
        return self.url(f"s{self._number}")

    def take_back(self, url: str) -> None:
        self._free.append(url.rpartition("%3D")[2])

    def _emptied(self, schema: str) -> bool:
        """False where a test has changed more than rows."""
        self._columns = getattr(self, "_columns", None) or self._columns_of(schema)
        if self._columns_of(schema) != self._columns:
            return False
        tables = ("batches", "events", "memories", "contains", "vectors", "words", "words_counted", "slots", "costs")
        tables += ("utilities", "traces")
        names = ", ".join(f"{schema}.{name}" for name in tables)
        # As a replica the trigger that keeps events does not fire.
        self.sql(f"SET session_replication_role = replica; TRUNCATE {names} RESTART IDENTITY")
        return True

    def _columns_of(self, schema: str) -> list[tuple]:
        return self.sql(
            "SELECT relname, attname FROM pg_attribute JOIN pg_class c ON c.oid = attrelid WHERE attnum > 0 AND "
            f"NOT attisdropped AND relkind = 'r' AND relnamespace = '{schema}'::regnamespace ORDER BY 1, 2"
        ) + self.sql(f"SELECT version_num FROM {schema}.alembic_version WHERE version_num < '9' AND version_num > '0'")

    def bytes_outside_the_log(self) -> bytes:
        """Of all files, after a checkpoint, but of the write-ahead log, which nobody can take anything out of."""
        self.sql("CHECKPOINT")
        paths = [path for path in self.data.rglob("*") if path.is_file() and "pg_wal" not in path.parts]
        return b"".join(path.read_bytes() for path in [*paths, self.folder / "log"])

    def _run(self, name: str, *arguments: str) -> None:
        done = subprocess.run([str(_program(name)), *arguments], capture_output=True, cwd=self.folder, **self._user)
        assert done.returncode == 0, done.stderr.decode()


def _program(name: str) -> str | None:
    installed = sorted(map(str, Path("/usr/lib/postgresql").glob(f"*/bin/{name}")))
    return shutil.which(name) or (installed[-1] if installed else None)


def _server_user() -> pwd.struct_passwd | None:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    return None
