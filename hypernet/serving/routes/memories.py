"""/v1/memories: the verbs of `hypernet.Memory` for the user whose request it is.

A user's memories lie in a store of their own, so an id, a filter left out or a batch of another user's means nothing in
it. Reading and writing texts needs no model and runs beside it; asking joins the batch; what else needs the model waits
for its thread.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import PlainTextResponse
from pydantic import Field

from hypernet.memory.ask import Answer
from hypernet.memory.memory import Memory
from hypernet.memory.store.records import Filters, plain
from hypernet.serving.errors import ApiError
from hypernet.serving.routes.completions import MEMORY, AnswerTier, ApiModel, finished, sampling_of, start
from hypernet.serving.routes.completions import CompletionRequest as _Request
from hypernet.serving.state import CurrentUser, State

_T = TypeVar("_T")
router = APIRouter(prefix="/v1/memories")

_Id = Annotated[str, Field(min_length=1, max_length=128)] | None
_Instant = Annotated[str, Field(max_length=64)] | None
_Text = Annotated[str, Field(min_length=1, max_length=1_000_000)]
_Limit = Annotated[int, Field(ge=1, le=1000)]


class MessageRequest(ApiModel):
    role: Annotated[str, Field(min_length=1, max_length=32)]
    content: _Text


class MemoryRequest(ApiModel):
    """As `Memory.add`; whose it is says the key."""

    content: _Text | Annotated[list[MessageRequest], Field(min_length=1, max_length=512)]
    agent_id: _Id = None
    run_id: _Id = None
    subject: _Id = None
    relation: _Id = None
    valid_at: _Instant = None
    invalid_at: _Instant = None
    source: Annotated[str, Field(min_length=1, max_length=1000)] | None = None
    metadata: dict[str, Any] | None = None
    conflict: Literal["latest", "add_only", "keep_both", "source_priority"] | None = None
    derived_from: Annotated[list[str], Field(max_length=100)] = []


class _WithinRequest(ApiModel):
    agent_id: _Id = None
    run_id: _Id = None
    as_of: _Instant = None
    known_at: _Instant = None


class SearchRequest(_WithinRequest):
    question: Annotated[str, Field(max_length=100_000)]
    limit: _Limit = 5


class AskRequest(_WithinRequest):
    question: _Text
    tier: AnswerTier = "auto"
    max_tokens: Annotated[int, Field(ge=1)] = 32


class UpdateRequest(ApiModel):
    content: _Text
    valid_at: _Instant = None
    invalid_at: _Instant = None
    source: Annotated[str, Field(min_length=1, max_length=1000)] | None = None


class InvalidateRequest(ApiModel):
    at: _Instant = None


class ForgetRequest(ApiModel):
    verify: bool = True
    reason: Annotated[str, Field(min_length=1, max_length=500)] | None = None


class RollbackRequest(ApiModel):
    version: Annotated[str, Field(max_length=32)]


class PurgeRequest(ApiModel):
    key: Annotated[str, Field(min_length=1, max_length=200)] | None = None


class ImportRequest(ApiModel):
    format: Literal["plain", "mem0", "graphiti", "letta"] = "plain"
    rows: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=10_000)]


def within(
    user: CurrentUser,
    agent_id: Annotated[str | None, Query(min_length=1, max_length=128)] = None,
    run_id: Annotated[str | None, Query(min_length=1, max_length=128)] = None,
) -> Filters:
    return Filters(user, agent_id, run_id)


def opened(state: State, user: CurrentUser) -> Iterator[Memory]:
    with state.stores.memory(user) as memory:
        yield memory


Within = Annotated[Filters, Depends(within)]
Opened = Annotated[Memory, Depends(opened, scope="request")]
_Reason = Annotated[str | None, Query(min_length=1, max_length=500)]


# --- Texts: no model ------------------------------------------------------------------------------------------------


@router.post("", status_code=201)
def add(body: MemoryRequest, memory: Opened, user: CurrentUser) -> Any:
    content = body.content if isinstance(body.content, str) else [one.model_dump() for one in body.content]
    rest = body.model_dump(exclude={"content"})
    return plain(memory.add(content, user_id=user, **rest))


@router.get("")
def list_(
    memory: Opened,
    filters: Within,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    as_of: str | None = None,
    known_at: str | None = None,
) -> dict[str, Any]:
    """The user's memories, each with the tiers that hold it."""
    found = memory.list(**filters._asdict(), limit=limit, as_of=as_of, known_at=known_at)
    written = memory.bank.entries_of([one.ref for one in found])
    tiers = [["token", "adapter"] if one.ref in written else ["token"] for one in found]
    return {"object": "list", "data": [plain(one) | {"tiers": held} for one, held in zip(found, tiers, strict=True)]}


@router.delete("")
def delete_all(memory: Opened, filters: Within, everything: bool = False, reason: _Reason = None) -> Any:
    """Deletes what matches the filters; all of the user's only with everything=true."""
    if filters.agent_id is None and filters.run_id is None and not everything:
        raise ApiError(400, "Give agent_id or run_id; all of your memories are deleted by everything=true alone.")
    return plain(memory.delete_all(**filters._asdict(), reason=reason))


@router.post("/search")
def search(body: SearchRequest, memory: Opened, user: CurrentUser) -> dict[str, Any]:
    return {"object": "list", "data": plain(memory.search(user_id=user, **body.model_dump()))}


@router.get("/status")
def status(memory: Opened, filters: Within) -> Any:
    return plain(memory.status(**filters._asdict()))


@router.get("/profile")
def profile(memory: Opened, filters: Within, limit: Annotated[int, Query(ge=1, le=1000)] = 20) -> Any:
    found = memory.profile(**filters._asdict(), limit=limit)
    return {**plain(found), "text": str(found)}


@router.get("/versions")
def versions(memory: Opened) -> dict[str, Any]:
    return {"object": "list", "data": plain(memory.versions())}


@router.post("/rollback")
def rollback(body: RollbackRequest, memory: Opened) -> Any:
    return plain(memory.rollback(body.version))


@router.post("/purge")
def purge(body: PurgeRequest, memory: Opened, user: CurrentUser) -> Any:
    return plain(memory.purge(body.key, user_id=user))


@router.post("/verify")
def verify(memory: Opened) -> Any:
    return plain(memory.verify())


@router.get("/export", response_class=PlainTextResponse)
def export(memory: Opened, filters: Within, format: Literal["plain", "mem0", "graphiti", "letta"] = "plain") -> str:
    with _file() as path:
        memory.export_jsonl(path, format=format, **filters._asdict())
        return path.read_text(encoding="utf-8")


@router.post("/import", status_code=201)
def import_(body: ImportRequest, memory: Opened, user: CurrentUser) -> Any:
    """Rows of a file that `export` or another system wrote; all of them become this user's."""
    whose = {"graphiti": {"group_id": user}, "letta": {}}.get(body.format, {"user_id": user})
    with _file() as path:
        path.write_text("\n".join(json.dumps({**row, **whose}) for row in body.rows), encoding="utf-8")
        try:
            return plain(memory.import_jsonl(path, format=body.format, user_id=user))
        except ValueError as error:
            raise ApiError(400, str(error).replace(str(path), "rows"), param="rows") from error


# --- With the model -------------------------------------------------------------------------------------------------


@router.post("/ask")
async def ask(body: AskRequest, request: Request, state: State, user: CurrentUser) -> Any:
    """Answers from the user's memories, in the batch of all users."""
    sampled = _Request(model=state.settings.model_name, prompt=body.question)
    started = await start(
        state,
        user=user,
        named=MEMORY,
        turns=[("user", body.question)],
        sampling=sampling_of(state, sampled, asked=body.max_tokens, logprobs=None),
        tier=body.tier,
        filters=Filters(user, body.agent_id, body.run_id),
        as_of=body.as_of,
        known_at=body.known_at,
    )
    text, _ = await finished(state, request, started)
    assert started.prepared is not None
    return plain(started.prepared.answered(text)) | {"usage": started.usage}


class ExplainRequest(ApiModel):
    """What `ask` answered, without its usage."""

    question: _Text
    text: _Text
    tier: Literal["token", "adapter", "none"]
    reason: Annotated[str, Field(max_length=1000)] = ""
    memories: Annotated[list[Annotated[str, Field(max_length=200)]], Field(max_length=100)]
    user_id: _Id = None
    agent_id: _Id = None
    run_id: _Id = None
    as_of: Annotated[str, Field(max_length=64)]
    known_at: _Instant = None
    prompt_tokens: int = 0
    usage: dict[str, int] | None = None


@router.post("/explain")
async def explain(body: ExplainRequest, state: State, user: CurrentUser) -> dict[str, Any]:
    values = body.model_dump(exclude={"usage"}) | {"memories": tuple(body.memories), "user_id": user}
    found = await _with_memory(state, user, lambda memory: memory.explain(Answer(**values)))
    return {"object": "list", "data": [effect.as_dict() for effect in found]}


@router.post("/write_adapters")
async def write_adapters(state: State, user: CurrentUser, filters: Within) -> Any:
    return plain(await _with_memory(state, user, lambda memory: memory.write_adapters(**filters._asdict())))


@router.post("/measure")
async def measure(state: State, user: CurrentUser, filters: Within) -> dict[str, Any]:
    found = await _with_memory(state, user, lambda memory: memory.measure(**filters._asdict()))
    return {"object": "list", "data": plain(found)}


# --- One memory -----------------------------------------------------------------------------------------------------


@router.get("/{key}")
def get(key: str, memory: Opened, as_of: str | None = None, known_at: str | None = None) -> Any:
    return plain(memory.get(key, as_of=as_of, known_at=known_at))


@router.patch("/{key}")
def update(key: str, body: UpdateRequest, memory: Opened) -> Any:
    return plain(memory.update(key, **body.model_dump()))


@router.delete("/{key}")
def delete(key: str, memory: Opened, reason: _Reason = None) -> Any:
    return plain(memory.delete(key, reason=reason))


@router.get("/{key}/history")
def history(key: str, memory: Opened) -> dict[str, Any]:
    return {"object": "list", "data": plain(memory.history(key))}


@router.post("/{key}/invalidate")
def invalidate(key: str, body: InvalidateRequest, memory: Opened) -> Any:
    return plain(memory.invalidate(key, at=body.at))


@router.post("/{key}/restore")
def restore(key: str, memory: Opened) -> Any:
    return plain(memory.restore(key))


@router.post("/{key}/forget")
async def forget(key: str, body: ForgetRequest, state: State, user: CurrentUser) -> Any:
    def work(memory: Memory) -> Any:
        return memory.forget(key, verify=body.verify, reason=body.reason).as_dict()

    return plain(await _with_memory(state, user, work))


# --- Inside ---------------------------------------------------------------------------------------------------------


async def _with_memory(state: State, user: str, work: Callable[[Memory], _T]) -> _T:
    def run() -> _T:
        with state.stores.memory(user) as memory:
            return work(memory)

    return await state.on_model(run)


@contextmanager
def _file() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hypernet-") as folder:
        yield Path(folder) / "memories.jsonl"
