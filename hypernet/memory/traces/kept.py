"""What a trained retriever leaves in a memory's folder and tables, and when it must go. Reads no weights, so no torch.

is_stale(store)               # whether it saw an example that is gone
erase_stale(store)            # then it goes, and the vectors that it gave
"""

import hashlib
import json
import shutil

from sqlalchemy import delete, select

from hypernet.memory.store.schema import vectors
from hypernet.memory.store.token_store import TokenStore
from hypernet.memory.traces.trace_store import Example, TraceStore

RETRIEVER_FOLDER, MANIFEST_FILE = "retriever", "manifest.json"
DUAL = ":dual:"  # in the names of embedders that were trained


def erase_retriever(store: TokenStore) -> None:
    """Removes a memory's trained retriever and the vectors that any gave."""
    shutil.rmtree(store.folder / RETRIEVER_FOLDER, ignore_errors=True)
    trained = vectors.c.embedder.contains(DUAL, autoescape=True)
    with store.database.read() as connection:
        if connection.execute(select(vectors.c.seq).where(trained).limit(1)).first() is None:
            return
    with store.database.write() as connection:
        connection.execute(delete(vectors).where(trained))


def is_stale(store: TokenStore) -> bool:
    """Whether a trained retriever saw an example that is gone."""
    path = store.folder / RETRIEVER_FOLDER / MANIFEST_FILE
    if not path.is_file():
        return False
    there = set(map(hash_of, TraceStore(store).examples()))
    return not set(json.loads(path.read_bytes())["examples"]) <= there


def erase_stale(store: TokenStore) -> bool:
    """Removes a trained retriever that saw an example which is gone; whether there was one."""
    if found := is_stale(store):
        erase_retriever(store)
    return found


def hash_of(example: Example) -> str:
    """Of all that an example teaches. Its user is in it: a question of another user is another example."""
    return hashlib.sha256(json.dumps(example, ensure_ascii=False).encode()).hexdigest()
