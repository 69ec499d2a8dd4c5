"""hypernet serve, api-key and mcp: the model and memories for other programs."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

_KEYS = "outputs/api_keys.json"
_Model = Annotated[str, typer.Option(help="Checkpoint, as DocToLoRA.from_pretrained takes it.")]
_Host = Annotated[str, typer.Option(help="Address to listen at; others than this machine's need --keys.")]
_Port = Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")]
_Keys = Annotated[str | None, typer.Option(help="File of API keys; without it no key is needed.", show_default=False)]


def _allowed_rank(value: int) -> int:
    from hypernet.interop.vllm import MAX_LORA_RANKS

    if value not in MAX_LORA_RANKS:
        raise typer.BadParameter(f"{value} is not one of {', '.join(map(str, MAX_LORA_RANKS))}.")
    return value


def serve(
    model: _Model = "assets/tiny",
    name: Annotated[
        str | None, typer.Option(help="What requests call the model; default its folder's name.", show_default=False)
    ] = None,
    directory: Annotated[str, typer.Option(help="Folder of users' memories and adapters.")] = "outputs/serve",
    database: Annotated[
        str | None,
        typer.Option(help="URL of PostgreSQL for the memories' texts; default SQLite.", show_default=False),
    ] = None,
    keys: _Keys = None,
    host: _Host = "127.0.0.1",
    port: _Port = 8000,
    max_batch: Annotated[int, typer.Option(min=1, help="Sequences decoded at once.")] = 32,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; others get 429.")] = 256,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 1024,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Bytes of a request at most.")] = 2 << 20,
    drain_seconds: Annotated[int, typer.Option(min=1, help="That running requests have when it stops.")] = 30,
    engine: Annotated[Literal["hypernet", "vllm"], typer.Option(help="What decodes; vllm needs that package.")] = (
        "hypernet"
    ),
    max_lora_rank: Annotated[
        int, typer.Option(help="With vllm: rank of an adapter at most, as vLLM allows them.", callback=_allowed_rank)
    ] = 256,
    max_loras: Annotated[int, typer.Option(min=1, help="With vllm: adapters in one step.")] = 8,
) -> None:
    """Serve a checkpoint over HTTP, with adapters and memories of many users.

    The API is OpenAI's: any of its clients works with the base URL that is
    printed. A request names an adapter (model="tiny:ADAPTER") or its user's
    memory (model="tiny:memory").

    \b
    hypernet serve --model assets/tiny --port 8000
    hypernet serve --host 0.0.0.0 --keys outputs/api_keys.json
    """
    _needs("fastapi", "serve")
    from hypernet.serving.app import serve as serve_app
    from hypernet.serving.engine import BatchEngine, DecodingEngine
    from hypernet.serving.state import ServerSettings

    make_engine: Callable[..., DecodingEngine] = BatchEngine
    if engine == "vllm":
        from hypernet.serving.vllm_engine import vllm_engine

        make_engine = vllm_engine(max_lora_rank=max_lora_rank, max_loras=max_loras)

    settings = ServerSettings(
        directory=directory,
        database=database,
        model_name=name or Path(model).name.rpartition(":")[2],
        keys=keys,
        max_batch=max_batch,
        max_queue=max_queue,
        max_new_tokens=max_new_tokens,
        max_body_bytes=max_body_bytes,
        drain_s=drain_seconds,
    )
    report = lambda line: typer.echo(line, err=True)  # noqa: E731
    serve_app(model, settings, host=host, port=port, report=report, engine=make_engine)


def api_key(
    user: Annotated[str, typer.Argument(help="Whose requests the key makes.", show_default=False)],
    keys: Annotated[str, typer.Option(help="File to add it to; made where it is missing.")] = _KEYS,
    revoke: Annotated[bool, typer.Option("--revoke", help="Take all keys of the user out instead.")] = False,
) -> None:
    """Print a new API key of a user, once; the file has only its hash.

    A server that runs takes it from its next request on, and no longer what was
    revoked.

    \b
    hypernet api-key alice
    hypernet serve --keys outputs/api_keys.json
    hypernet api-key alice --revoke
    """
    from hypernet.serving.keys import ApiKeys

    if not revoke:
        typer.echo(ApiKeys(keys, create=True).add(user))
    elif number := ApiKeys(keys).remove(user):
        typer.echo(f"{number} keys of {user} revoked")
    else:
        raise ValueError(f"{keys} has no key of {user!r}. Check the name, or name another file with --keys.")


def mcp(
    directory: Annotated[str, typer.Option(help="The memory's folder.")] = "outputs/memory",
    user: Annotated[str, typer.Option(help="Whose memories agents see and write.")] = "local",
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint that answers and finds by meaning; default words alone.", show_default=False),
    ] = None,
    transport: Annotated[Literal["stdio", "http"], typer.Option(help="How the agent reaches it.")] = "stdio",
    host: Annotated[str, typer.Option(help="Address of this machine to listen at.")] = "127.0.0.1",
    port: _Port = 8001,
) -> None:
    """Offer a memory to agents as an MCP server.

    Over stdio an agent starts this command itself; over HTTP it connects to
    http://HOST:PORT/mcp, from this machine alone.

    \b
    hypernet mcp --user alice --model assets/tiny
    hypernet mcp --user alice --transport http --port 8001
    """
    _needs("mcp", "mcp")
    from hypernet.serving.mcp_server import run

    run(directory, user=user, model=model, transport=transport, host=host, port=port)


def _needs(package: str, extra: str) -> None:
    from importlib.util import find_spec

    if find_spec(package) is None:
        python = Path(sys.executable).name
        raise ValueError(f"This needs the extra [{extra}]: {python} -m pip install 'doc-to-lora[{extra}]'.")
