"""The application: routes, limits and metrics put together, and the process that serves it.

app = create_app(model, ServerSettings(model_name="tiny"))     # any ASGI server takes it
serve("assets/tiny", ServerSettings(), host="127.0.0.1", port=8000)
"""

import ipaddress
import logging
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import hypernet
from hypernet.doc_to_lora import DocToLoRA
from hypernet.serving import errors
from hypernet.serving.engine import BatchEngine, DecodingEngine
from hypernet.serving.routes import adapters, completions, memories, page
from hypernet.serving.state import CurrentUser, ServerMetrics, ServerSettings, ServerState, State

log = logging.getLogger(__name__)

# Without keys a page of another site must not reach the server by a name of its own that leads here.
_LOCAL_HOSTS = ["localhost", "127.0.0.1", "[::1]", "::1"]


class BodyLimit:
    """Refuses a body that is larger, as soon as that many bytes are announced or have come."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stated = next((value for name, value in scope.get("headers", ()) if name == b"content-length"), b"0")
        announced, come = int(stated) if stated.isdigit() else 0, 0

        async def limited() -> Message:
            nonlocal come
            message = await receive() if announced <= self.max_bytes else {"type": "http.request"}
            come += len(message.get("body", b""))
            if max(announced, come) > self.max_bytes:
                raise HTTPException(413, f"A request has at most {self.max_bytes:,} bytes here.")
            return message

        await self.app(scope, limited if scope["type"] == "http" else receive, send)


class RequestMeter:
    """Counts requests by route and status, and their seconds."""

    def __init__(self, app: ASGIApp, *, metrics: ServerMetrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            # The pattern, not what was asked for: a label for each id would grow without end.
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - started)


async def health(state: State, response: Response) -> dict[str, Any]:
    """200 while the model's thread works; what runs and waits."""
    alive = state.scheduler.is_alive
    response.status_code = 200 if alive else 503
    return {
        "status": "ok" if alive else "stopping",
        "model": state.settings.model_name,
        "running": state.scheduler.num_running,
        "waiting": state.scheduler.num_waiting,
    }


async def metrics(state: State, _: CurrentUser) -> Response:
    """Prometheus' text format; needs a key where there are keys."""
    return Response(generate_latest(state.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def create_app(
    model: DocToLoRA, settings: ServerSettings, *, engine: Callable[..., DecodingEngine] = BatchEngine
) -> FastAPI:
    """Everything but the socket. Its model belongs to it from now on: nobody else may call it.

    Args:
        engine: what decodes, made of the model and `max_batch`.
    """
    server = ServerState(model, settings, engine=engine)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await run_in_threadpool(server.close)

    app = FastAPI(title="hypernet", version=hypernet.__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.server = server
    errors.install(app, directory=str(server.stores.directory))
    for part in (completions, adapters, memories, page):
        app.include_router(part.router)
    app.add_api_route("/healthz", health, methods=["GET"])
    app.add_api_route("/metrics", metrics, methods=["GET"])
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    if settings.keys is None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=_LOCAL_HOSTS)
    app.add_middleware(RequestMeter, metrics=server.metrics)
    return app


def serve(
    source: str,
    settings: ServerSettings,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    report: Callable[[str], None] = log.info,
    engine: Callable[..., DecodingEngine] = BatchEngine,
) -> None:
    """Loads a checkpoint and serves it until SIGTERM or Ctrl-C; running requests then have `drain_s` to end.

    Args:
        report: called with a line once the address listens.
        engine: as `create_app` takes it.

    Raises:
        ValueError: without keys the address is not this machine's alone; or the checkpoint cannot be read.
    """
    settings.checked()
    check_address(host, settings)
    with _listening(host, port) as found:  # before the model is loaded, which takes seconds
        model = DocToLoRA.from_pretrained(source).eval().requires_grad_(False)
        # The graceful shutdown waits for open streams, then for the lifespan to end, which drains the model's thread.
        config = uvicorn.Config(
            create_app(model, settings, engine=engine),
            host=host,
            port=port,
            log_level="warning",
            timeout_graceful_shutdown=int(settings.drain_s),
        )
        shown = f"[{host}]" if ":" in host else host
        report(f"{settings.model_name} at http://{shown}:{port}/v1, files in {settings.directory}")
        # uvicorn raises the signal again after its shutdown, which would end the process by it instead of with 0.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        uvicorn.Server(config).run(sockets=[found])


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A bound socket, so that an address in use is an error before anything is said to be served."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((host, port))
        except OSError as error:
            raise ValueError(f"Cannot listen at {host}:{port}: {error.strerror}. Give another --port.") from error
        yield found


def check_address(host: str, settings: ServerSettings) -> None:
    """ValueError if others could reach a server without keys."""
    if settings.keys is not None or host == "localhost":
        return
    try:
        is_local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = False
    if not is_local:
        raise ValueError(
            f"The address {host} can be reached by others. Make API keys (hypernet api-key USER) and give their file "
            "with --keys, or serve 127.0.0.1."
        )
