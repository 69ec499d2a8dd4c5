"""ObjectStoreLibrary: adapters in an object store, under the same ids and in the same files as in an `AdapterLibrary`.

    library = ObjectStoreLibrary("s3://bucket/library")   # any URL of fsspec; s3:// needs s3fs, gs:// gcsfs
    identity = library.add(adapter)

An adapter's files are uploaded first and entry.json last, so an entry is there completely or counts as missing, whoever
is killed; any number of machines may add at once, as what two write under one id is the same. There are no locks here,
and so no `remove`, `replace` or `clean`: copy the folder to a disk (`aws s3 cp --recursive`), where it is an ordinary
AdapterLibrary.
"""

import json
import tempfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import fsspec

from hypernet.adapters.adapter import ADAPTER_FILES, PROVENANCE_FILE, LoRAAdapter, check_is_adapter
from hypernet.adapters.library import ENTRY_FILE, AdapterLibrary, entry_record

_READ_AT_ONCE = 500  # entries; file systems over HTTP fetch them side by side


class ObjectStoreLibrary:
    """Adapters in an object store, by content.

    Args:
        url: of the library's folder, as fsspec has it; `storage_options` come from the environment (AWS_PROFILE, ...).

    Raises:
        ValueError: no such kind of URL, or what it needs is not installed.
    """

    def __init__(self, url: str) -> None:
        try:
            self.files, self.root = fsspec.url_to_fs(url.rstrip("/"))
        except (ImportError, ValueError, OSError) as error:
            raise ValueError(f"Cannot open {url}: {' '.join(str(error).split())}. Check the URL.") from error
        self.url = url

    def add(self, adapter: LoRAAdapter) -> str:
        """Stores an adapter and returns its id; one that is here already stays as it is.

        Raises:
            TypeError: it is no adapter.
            Exception: whatever the file system raises where it cannot be written.
        """
        check_is_adapter(adapter)
        identity = adapter.content_id()
        directory = f"{self.root}/{identity}"
        if self._record(self._read([f"{directory}/{ENTRY_FILE}"]), directory) is not None:
            return identity
        with tempfile.TemporaryDirectory(prefix="hypernet-") as folder:
            AdapterLibrary(folder).add(adapter)
            self.files.makedirs(directory, exist_ok=True)
            for name in (*ADAPTER_FILES, ENTRY_FILE):
                self.files.put_file(str(Path(folder, identity, name)), f"{directory}/{name}")
        return identity

    def provenances(self) -> Iterator[dict[str, Any]]:
        """What each entry that is there completely says of itself; none before the first `add`.

        Raises:
            ValueError: the place cannot be read.
        """
        try:
            self.files.invalidate_cache()  # others may have written since
            there = self.files.glob(f"{self.root}/*/{ENTRY_FILE}") if self.files.exists(self.root) else []
        except Exception as error:  # each file system has errors of its own
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"Cannot list {self.url}: {reason}. Check the URL and your credentials.") from error
        for start in range(0, len(there), _READ_AT_ONCE):
            paths = there[start : start + _READ_AT_ONCE]
            directories = [path.rpartition("/")[0] for path in paths]
            found = self._read([*paths, *(f"{directory}/{PROVENANCE_FILE}" for directory in directories)])
            for directory in directories:
                record, data = self._record(found, directory), found.get(f"{directory}/{PROVENANCE_FILE}")
                if record and data and sha256(data).hexdigest() == record["files"][PROVENANCE_FILE]["sha256"]:
                    yield json.loads(data)

    def _read(self, paths: list[str]) -> dict[str, bytes]:
        """The files that are there."""
        found = self.files.cat(paths, on_error="omit")
        return found if isinstance(found, dict) else {paths[0]: found}

    def _record(self, found: dict[str, bytes], directory: str) -> dict[str, Any] | None:
        """What entry.json says; None where it is missing, or cut off by a killed writer."""
        try:
            record = entry_record(found[f"{directory}/{ENTRY_FILE}"])
        except (KeyError, ValueError):
            return None
        return record if record["id"] == directory.rpartition("/")[2] else None
