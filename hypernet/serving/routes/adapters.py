"""/v1/adapters: a document in, an adapter's id out; listing and deleting the user's own."""

import hashlib
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field

from hypernet.adapters.library import LibraryEntry
from hypernet.serving.errors import ApiError
from hypernet.serving.routes.completions import ApiModel
from hypernet.serving.state import CurrentUser, ServerState, State
from hypernet.text.cleaning import visible, whole
from hypernet.text.documents import Document

router = APIRouter(prefix="/v1/adapters")
# Of a document, read at once: running answers wait for so many at most.
_PIECE_TOKENS = 512


class AdapterRequest(ApiModel):
    """document: the text. name: by which requests may name the adapter, besides its id."""

    document: Annotated[str, Field(min_length=1)]
    name: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^:/\\\s\x00-\x1f][^:/\\\x00-\x1f]*$")] = "text"


@router.post("", status_code=201)
async def create(body: AdapterRequest, state: State, user: CurrentUser) -> dict[str, Any]:
    """Reads a document into an adapter; one that is there already, with the same content, stays as it is."""
    return _described(state, await stored_adapter(state, user, body.document, name=body.name))


@router.get("")
def list_(state: State, user: CurrentUser) -> dict[str, Any]:
    return {"object": "list", "data": [_described(state, entry) for entry in state.stores.entries(user)]}


@router.get("/{key}")
def get(key: str, state: State, user: CurrentUser) -> dict[str, Any]:
    return _described(state, state.stores.entry(user, key))


@router.delete("/{key}")
def delete(key: str, state: State, user: CurrentUser) -> dict[str, Any]:
    return {"id": state.stores.remove(user, key), "object": "adapter", "deleted": True}


async def stored_adapter(
    state: ServerState, user: str, text: str, *, name: str, progress: Callable[[int, int], None] | None = None
) -> LibraryEntry:
    """A document's adapter in the user's library, made by the model's thread.

    Args:
        progress: called by that thread with (chunks done, chunks altogether).

    Raises:
        ApiError: 413 if it is too long.
    """
    most = state.settings.max_document_characters
    if len(text) > most:
        raise ApiError(413, f"A document has at most {most:,} characters here, not {len(text):,}.")
    text = visible(whole(text, "document"), "document")
    document = Document(name=name, text=text, sha256=hashlib.sha256(text.encode()).hexdigest())

    def work() -> LibraryEntry:
        library = state.stores.library(user)
        made = state.model.internalize(document, max_batch_tokens=_PIECE_TOKENS, progress=progress)
        return library.find(library.add(made))

    return await state.on_model(work)


def _described(state: ServerState, entry: LibraryEntry) -> dict[str, Any]:
    return {
        "id": entry.id,
        "object": "adapter",
        "model": f"{state.settings.model_name}:{entry.id}",
        "documents": [{"name": name, "sha256": sha256} for name, sha256 in entry.documents],
        "chunks": entry.num_chunks,
        "rank": entry.rank,
        "bytes": entry.num_bytes,
        "created": entry.created,
    }
