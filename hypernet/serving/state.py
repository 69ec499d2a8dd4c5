"""What requests share: settings, the model's scheduler, users' stores, keys, metrics; and what they depend on."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Self, TypeVar

from fastapi import Depends, Header, Request
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from hypernet.base.generation import context_window
from hypernet.doc_to_lora import DocToLoRA
from hypernet.io.paths import output_folder
from hypernet.memory.store.database import check_schemas
from hypernet.memory.store.records import Filters
from hypernet.serving.engine import BatchEngine, DecodingEngine
from hypernet.serving.errors import ApiError
from hypernet.serving.keys import ApiKeys
from hypernet.serving.scheduler import Scheduler
from hypernet.serving.stores import UserStores

_T = TypeVar("_T")
LOCAL_USER = "local"  # whose requests they are where there are no keys and nobody is named


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Limits and places.

    Attributes:
        directory: of users' memories and adapters.
        database: URL of PostgreSQL that has the memories' texts; None: SQLite in the directory.
        model_name: as requests call the base model.
        keys: file of API keys; None: whoever reaches the address is every user.
        max_batch: sequences decoded at once. max_queue: requests that may wait.
        max_new_tokens: of an answer at most; default_new_tokens: where a request says nothing.
        max_body_bytes, max_document_characters: of a request and of a document in it.
        drain_s: seconds that running requests have when the server stops.
    """

    directory: str = "outputs/serve"
    database: str | None = field(default=None, repr=False)  # it may hold a password
    model_name: str = "tiny"
    keys: str | None = None
    max_batch: int = 32
    max_queue: int = 256
    max_new_tokens: int = 1024
    default_new_tokens: int = 128
    max_body_bytes: int = 2 << 20
    max_document_characters: int = 1_000_000
    drain_s: float = 30.0

    def checked(self) -> Self:
        """Itself. ValueError: a limit is below 1, the model's name has a colon, which separates an adapter, or the
        folder cannot be one, or the role may make no schema. OSError: the database cannot be reached."""
        for name, value in vars(self).items():
            if isinstance(value, (int, float)) and value < 1:
                raise ValueError(f"{name} is {value}. Give at least 1.")
        if ":" in self.model_name or not self.model_name.strip():
            raise ValueError(f"The model's name is {self.model_name!r}. Give one without a colon.")
        output_folder(self.directory)
        if self.database is not None:
            check_schemas(self.database)
        return self


@dataclass
class ServerMetrics:
    """What /metrics shows; no label names a user."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        common: dict[str, Any] = {"registry": self.registry, "namespace": "hypernet"}
        self.requests = Counter("requests", "Requests by route and status.", ["route", "status"], **common)
        self.seconds = Histogram("request_seconds", "Seconds to the end of a response.", ["route"], **common)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens read.", **common)
        self.completion_tokens = Counter("completion_tokens", "Tokens written.", **common)
        self.cancelled = Counter("cancelled", "Generations whose client went away.", **common)

    def watch(self, scheduler: Scheduler) -> None:
        common: dict[str, Any] = {"registry": self.registry, "namespace": "hypernet"}
        Gauge("running", "Sequences in the batch.", **common).set_function(lambda: scheduler.num_running)
        Gauge("waiting", "Requests that wait for the model.", **common).set_function(lambda: scheduler.num_waiting)
        steps = Gauge("decode_steps", "Decode steps so far.", **common)
        steps.set_function(lambda: scheduler.num_steps)


class ServerState:
    """Made once for an application; `close` ends it."""

    def __init__(
        self, model: DocToLoRA, settings: ServerSettings, *, engine: Callable[..., DecodingEngine] = BatchEngine
    ) -> None:
        self.settings, self.model = settings.checked(), model
        self.keys = None if settings.keys is None else ApiKeys(settings.keys)
        self.stores = UserStores(settings.directory, model, database=settings.database)
        self.scheduler = Scheduler(engine(model, max_batch=settings.max_batch), max_queue=settings.max_queue)
        model.pause = self.scheduler.between  # whatever reads or answers lets running answers go on
        self.metrics = ServerMetrics()
        self.metrics.watch(self.scheduler)
        self.window = context_window(model.base_model)

    async def on_model(self, work: Callable[[], _T], *, brief: bool = False) -> _T:
        """What needs the model, run by the thread that owns it; brief: see `Scheduler.call`."""
        return await asyncio.wrap_future(self.scheduler.call(work, brief=brief))

    def close(self) -> None:
        self.scheduler.stop(drain_s=self.settings.drain_s)
        self.model.pause = None
        self.stores.close()

    def user_of(self, authorization: str | None, named: str | None) -> str:
        """Whose request it is: the key's user; without a file of keys, whoever is named.

        Raises:
            ApiError: 401 without a key that counts; 403 where another user is named.
        """
        if self.keys is None:
            return _checked_name(named) if named is not None else LOCAL_USER
        scheme, _, key = (authorization or "").partition(" ")
        user = self.keys.user_of(key.strip()) if scheme.lower() == "bearer" else None
        if user is None:
            raise ApiError(401, "Give your API key: Authorization: Bearer hn-...", code="invalid_api_key")
        self.check_user(user, named)
        return user

    def check_user(self, user: str, named: str | None) -> None:
        """ApiError 403 if a request that is one user's names another."""
        if named is not None and named != user:
            raise ApiError(403, f"This key is {user}'s and no other user's.", code="other_user")


def _checked_name(name: str) -> str:
    name = Filters(name).checked().user_id or LOCAL_USER
    if len(name) > 128:
        raise ApiError(400, f"A user's name has at most 128 characters, not {len(name)}.", param="user")
    return name


def server_state(request: Request) -> ServerState:
    found: ServerState = request.app.state.server
    return found


State = Annotated[ServerState, Depends(server_state)]


def current_user(
    state: State,
    authorization: Annotated[str | None, Header()] = None,
    x_user: Annotated[str | None, Header()] = None,
) -> str:
    return state.user_of(authorization, x_user)


CurrentUser = Annotated[str, Depends(current_user)]
