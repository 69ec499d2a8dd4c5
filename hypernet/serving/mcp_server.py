"""The verbs of one user's memory as tools of an MCP server, over stdio or HTTP.

run("outputs/memory", user="alice", model="assets/tiny", transport="stdio")

A memory of another user in the same folder is as unknown as one that never was. The model's tools wait for each other.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from threading import Lock
from typing import Any, Literal, ParamSpec

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import ValidationError

import hypernet
from hypernet.memory.memory import Memory
from hypernet.memory.store.reading import unknown
from hypernet.memory.store.records import Filters, plain

_P = ParamSpec("_P")
_INSTRUCTIONS = (
    "What the user said in earlier conversations, with dates. Search before answering about the user; add what is "
    "worth keeping; update what changed instead of adding it again; forget what the user wants forgotten. Ids come "
    "from memory_add, memory_search and memory_list."
)
_Json = dict[str, Any]


def run(
    directory: str | Path,
    *,
    user: str,
    model: str | None,
    transport: Literal["stdio", "http"],
    host: str = "127.0.0.1",
    port: int = 8001,
) -> None:
    """Serves until the agent closes the stream, SIGTERM or Ctrl-C.

    Raises:
        ValueError: the folder is no memory, or the address is not this machine's alone: over HTTP there are no keys.
    """
    if transport == "http" and host not in ("127.0.0.1", "::1", "localhost"):
        raise ValueError(f"The address {host} can be reached by others, and MCP has no keys here. Give 127.0.0.1.")
    Filters(user).checked()
    memory = Memory.open(directory, model=model)
    try:
        server = memory_server(memory, user=user)
        if transport == "stdio":
            server.run("stdio")
        else:
            server.run("streamable-http", host=host, port=port)
    finally:
        memory.close()


class _Server(MCPServer[Any]):
    """Wrong arguments are told in one line too."""

    async def call_tool(self, name: str, arguments: dict[str, Any], context: Any = None) -> Any:
        try:
            return await super().call_tool(name, arguments, context)
        except ToolError as error:
            if not isinstance(error.__cause__, ValidationError):
                raise
            first = error.__cause__.errors()[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            raise ToolError(f"Error executing tool {name}: {' '.join(reason.split())}.") from error


def memory_server(memory: Memory, *, user: str) -> MCPServer[Any]:
    """The tools of one user's memory."""
    server = _Server("hypernet-memory", instructions=_INSTRUCTIONS, version=hypernet.__version__, log_level="ERROR")
    lock = Lock()

    def tool(verb: Callable[_P, _Json]) -> Callable[_P, _Json]:
        """Registers a verb: one at a time, and what the caller got wrong is told to the agent in one line."""

        @wraps(verb)
        def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _Json:
            try:
                with lock:
                    return verb(*args, **kwargs)
            except ValueError as error:
                raise ToolError(" ".join(str(error).split())) from error

        return server.tool()(guarded)

    def own(key: str) -> str:
        if memory.store.owners(key) != {user}:
            raise unknown(key)
        return key

    def listed(found: Sequence[Any]) -> _Json:
        return {"memories": plain(found)}

    @tool
    def memory_add(
        content: str,
        subject: str | None = None,
        relation: str | None = None,
        valid_at: str | None = None,
        invalid_at: str | None = None,
        source: str | None = None,
        run_id: str | None = None,
    ) -> _Json:
        """Remember a text. With subject and relation it supersedes what had the same ones. Dates are ISO 8601."""
        found = memory.add(
            content,
            user_id=user,
            run_id=run_id,
            subject=subject,
            relation=relation,
            valid_at=valid_at,
            invalid_at=invalid_at,
            source=source,
        )
        return dict(plain(found))

    @tool
    def memory_search(
        question: str,
        limit: int = 5,
        as_of: str | None = None,
        known_at: str | None = None,
        run_id: str | None = None,
    ) -> _Json:
        """Find what answers a question best: text, id, validity, source. as_of asks about a date in the past."""
        return listed(memory.search(question, user_id=user, run_id=run_id, limit=limit, as_of=as_of, known_at=known_at))

    @tool
    def memory_ask(question: str, tier: Literal["auto", "token", "adapter", "none"] = "auto") -> _Json:
        """Let the local model answer from the memories: text in its prompt (token) or as weights (adapter)."""
        return dict(plain(memory.ask(question, user_id=user, tier=tier)))

    @tool
    def memory_get(id: str, as_of: str | None = None) -> _Json:
        """One memory by its id or id@version."""
        return dict(plain(memory.get(own(id), as_of=as_of)))

    @tool
    def memory_list(limit: int = 100, as_of: str | None = None, run_id: str | None = None) -> _Json:
        """What holds now, or on a date."""
        return listed(memory.list(user_id=user, run_id=run_id, limit=limit, as_of=as_of))

    @tool
    def memory_history(id: str) -> _Json:
        """Everything that happened to a memory."""
        return {"history": plain(memory.history(own(id)))}

    @tool
    def memory_profile(limit: int = 20, recent_days: float = 7) -> _Json:
        """What is known of the user at a glance: stable facts, then recent ones."""
        found = memory.profile(user_id=user, limit=limit, recent_days=recent_days)
        return {**plain(found), "text": str(found)}

    @tool
    def memory_update(id: str, content: str, valid_at: str | None = None, source: str | None = None) -> _Json:
        """State a memory anew from a date on; the versions before stay."""
        return dict(plain(memory.update(own(id), content, valid_at=valid_at, source=source)))

    @tool
    def memory_invalidate(id: str, at: str | None = None) -> _Json:
        """State that a memory no longer holds."""
        return dict(plain(memory.invalidate(own(id), at=at)))

    @tool
    def memory_delete(id: str, reason: str | None = None) -> _Json:
        """Take a memory out of everything; memory_restore brings it back until it is purged."""
        return dict(plain(memory.delete(own(id), reason=reason)))

    @tool
    def memory_delete_all(run_id: str, reason: str | None = None) -> _Json:
        """Delete all memories of one conversation."""
        return dict(plain(memory.delete_all(user_id=user, run_id=run_id, reason=reason)))

    @tool
    def memory_restore(id: str) -> _Json:
        """Bring a deleted memory back."""
        return dict(plain(memory.restore(own(id))))

    @tool
    def memory_forget(id: str, verify: bool = False, reason: str | None = None) -> _Json:
        """Delete a memory and its adapters, and erase the content for good; verify compares with a twin without it."""
        report = memory.forget(own(id), verify=verify, reason=reason)
        erased = memory.purge(id, user_id=user)
        return {"forgotten": plain(report.as_dict()), "erased": plain(erased)}

    @tool
    def memory_write_adapters() -> _Json:
        """Make the adapters that memory_ask with tier "adapter" answers from."""
        return dict(plain(memory.write_adapters(user_id=user)))

    @tool
    def memory_status() -> _Json:
        """Counts and bytes of each tier."""
        return dict(plain(memory.status(user_id=user)))

    return server
