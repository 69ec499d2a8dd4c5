"""/v1/chat/completions, /v1/completions and /v1/models, as OpenAI's clients call them.

model="tiny"               the base model alone
model="tiny:<adapter>"     with an adapter of the user: its id, the beginning of one, or a document's name
model="tiny:memory"        from the user's memory: tier auto; X-Memory-Tier: token, adapter or none chooses
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from hypernet.memory.ask import MemoryQuestion, PreparedQuestion
from hypernet.memory.store.records import Filters
from hypernet.serving.engine import Delta, Generation, Sampling, TokenLogprob
from hypernet.serving.errors import ApiError, explained
from hypernet.serving.state import CurrentUser, ServerState, State
from hypernet.text.chat import conversation_ids, user_text
from hypernet.text.cleaning import visible, whole
from hypernet.text.tokens import text_ids

MEMORY = "memory"  # in the place of an adapter's id
AnswerTier = Literal["auto", "token", "adapter", "none"]
router = APIRouter()

_Text = Annotated[str, Field(max_length=1_000_000)]


class ApiModel(BaseModel):
    """A request's body: an unknown setting is refused, since it would not be honoured."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class TextPart(ApiModel):
    """The one kind of content part that there is."""

    type: Literal["text"]
    text: _Text


class ChatTurn(ApiModel):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: _Text | Annotated[list[TextPart], Field(min_length=1, max_length=64)]
    name: str | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(ApiModel):
    include_usage: bool = False


class _Sampled(ApiModel):
    """Settings of both kinds of completion; those that can only have one value are OpenAI's defaults."""

    model: str = Field(max_length=400)
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=500)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=500)]], Field(max_length=4)]
        | None
    ) = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    n: Literal[1] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(_Sampled):
    messages: Annotated[list[ChatTurn], Field(min_length=1, max_length=512)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class CompletionRequest(_Sampled):
    prompt: _Text
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None


@dataclass(eq=False)
class Started:
    """A sequence that runs, and what comes of it.

    prepared: where a memory answers.
    """

    generation: Generation
    deltas: "asyncio.Queue[Delta]"
    prepared: PreparedQuestion | None
    logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def usage(self) -> dict[str, int]:
        read, written = len(self.generation.prompt), len(self.generation.ids)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    @property
    def memory(self) -> dict[str, Any] | None:
        if self.prepared is None:
            return None
        return {"tier": self.prepared.tier, "reason": self.prepared.reason, "memories": list(self.prepared.memories)}


async def start(
    state: ServerState,
    *,
    user: str,
    named: str | None,
    turns: Sequence[tuple[str, str]] | None,
    sampling: Sampling,
    prompt: str = "",
    tier: str = "auto",
    filters: Filters | None = None,
    as_of: str | None = None,
    known_at: str | None = None,
    document: str | None = None,
) -> Started:
    """Builds the prompt by the model's thread, and lets the sequence into the batch.

    Args:
        named: what is behind the model's name: an adapter, `MEMORY`, or None.
        turns: (role, text) of a chat; None: the plain text `prompt`.
        document: text that stands in the prompt, before the question.
    """
    loop, deltas = asyncio.get_running_loop(), asyncio.Queue[Delta]()

    def emit(delta: Delta) -> None:
        loop.call_soon_threadsafe(deltas.put_nowait, delta)

    def build() -> Started:
        model, adapter, prepared, text = state.model, None, None, document
        if named == MEMORY:
            if turns is None:
                raise ApiError(400, "A memory answers questions: use /v1/chat/completions.", param="model")
            whose = filters or Filters(user)
            question = MemoryQuestion(turns[-1][1], whose, as_of, known_at)
            with state.stores.memory(user) as memory:
                (prepared,) = memory.asker.prepare([question], tier=tier)
            adapter, text = prepared.adapter, prepared.document
        elif named is not None:
            adapter = state.stores.adapter(user, named)
        ids = text_ids(model.tokenizer, [prompt])[0] if turns is None else _chat_ids(state, turns, text)
        if not ids:
            raise ApiError(400, "The prompt has no token. Give at least a word.", param="prompt")
        # A memory's adapter was joined and weighted where its chunks were chosen.
        joining = model.joining("sum") if prepared is not None else None
        joined = model.joined(adapter, joining, prompts=[ids])
        if isinstance(joined, list):
            (joined,) = joined
        generation = Generation(prompt=ids, sampling=sampling, adapter=joined, emit=emit, strips=turns is not None)
        state.scheduler.engine.check(generation)
        return Started(generation, deltas, prepared)

    # A memory is locked while its adapters are written: its questions wait for that, others do not.
    started = await state.on_model(build, brief=named != MEMORY)
    state.scheduler.submit(started.generation)
    state.metrics.prompt_tokens.inc(len(started.generation.prompt))
    return started


async def finished(state: ServerState, request: Request, started: Started) -> tuple[str, str]:
    """The whole text and why it ended; the sequence leaves the batch if the client goes away first."""
    text = ""
    watcher = asyncio.ensure_future(_disconnected(request))
    try:
        while True:
            getting = asyncio.ensure_future(started.deltas.get())
            await asyncio.wait({getting, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if not getting.done():
                getting.cancel()
                state.metrics.cancelled.inc()
                raise ApiError(499, "The client went away.")
            delta = getting.result()
            if delta.error is not None:
                raise delta.error
            text += delta.text
            started.logprobs += delta.logprobs
            if delta.finish:
                state.metrics.completion_tokens.inc(len(started.generation.ids))
                return text, delta.finish
    finally:
        watcher.cancel()
        started.generation.cancelled = True


def sampling_of(state: ServerState, body: _Sampled, *, asked: int | None, logprobs: int | None) -> Sampling:
    """ApiError if more tokens are asked for than an answer may have."""
    most = state.settings.max_new_tokens
    if asked is not None and asked > most:
        raise ApiError(400, f"max_tokens is {asked}; an answer has at most {most} tokens here.", param="max_tokens")
    return Sampling(
        max_new_tokens=asked or min(state.settings.default_new_tokens, most),
        temperature=body.temperature,
        top_p=body.top_p,
        seed=body.seed,
        stop=body.stops,
        logprobs=logprobs,
    )


def named_by(state: ServerState, model: str) -> str | None:
    """What is behind the model's name. ApiError 404 if it is another model's."""
    name, colon, named = model.partition(":")
    if name != state.settings.model_name or (colon and not named):
        base = state.settings.model_name
        raise ApiError(
            404,
            f"There is no model {model!r}: name {base}, {base}:{MEMORY} or {base}:ADAPTER.",
            code="model_not_found",
            param="model",
        )
    return named or None


# --- Routes ---------------------------------------------------------------------------------------------------------


@router.get("/v1/models")
def models(state: State, user: CurrentUser) -> dict[str, Any]:
    """The base model, the user's memory, and the user's adapters, each as requests name it."""
    base = state.settings.model_name
    names = [base, f"{base}:{MEMORY}", *(f"{base}:{entry.id}" for entry in state.stores.entries(user))]
    rows = [{"id": name, "object": "model", "created": 0, "owned_by": "hypernet"} for name in names]
    return {"object": "list", "data": rows}


@router.get("/v1/models/{name}")
def model(name: str, state: State, user: CurrentUser) -> dict[str, Any]:
    if (named := named_by(state, name)) not in (None, MEMORY):
        state.stores.entry(user, str(named))
    return {"id": name, "object": "model", "created": 0, "owned_by": "hypernet"}


@router.post("/v1/chat/completions", response_model=None)
async def chat_completions(
    body: ChatRequest,
    request: Request,
    state: State,
    user: CurrentUser,
    x_memory_tier: Annotated[AnswerTier, Header()] = "auto",
) -> Response | dict[str, Any]:
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs=true.", param="top_logprobs")
    if body.messages[-1].role != "user":
        raise ApiError(400, "The last message should be the user's.", param="messages")
    started = await start(
        state,
        user=_whose(state, user, body.user),
        named=named_by(state, body.model),
        turns=[("system" if one.role == "developer" else one.role, one.text) for one in body.messages],
        sampling=sampling_of(
            state,
            body,
            asked=body.max_completion_tokens or body.max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        ),
        tier=x_memory_tier,
    )
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
    if body.stream:
        return _event_stream(state, body, started, head | {"object": "chat.completion.chunk"}, _chat_chunk)
    text, finish = await finished(state, request, started)
    choice = {
        **{"index": 0, "message": {"role": "assistant", "content": text, "refusal": None}, "finish_reason": finish},
        "logprobs": {"content": _chat_logprobs(started.logprobs), "refusal": None} if body.logprobs else None,
    }
    found = head | {"object": "chat.completion", "choices": [choice], "usage": started.usage}
    return found if started.memory is None else found | {"memory": started.memory}


@router.post("/v1/completions", response_model=None)
async def completions(
    body: CompletionRequest, request: Request, state: State, user: CurrentUser
) -> Response | dict[str, Any]:
    started = await start(
        state,
        user=_whose(state, user, body.user),
        named=named_by(state, body.model),
        turns=None,
        prompt=visible(whole(body.prompt, "prompt"), "prompt"),
        sampling=sampling_of(state, body, asked=body.max_tokens, logprobs=body.logprobs),
    )
    head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion"}
    head |= {"created": int(time.time()), "model": body.model}  # type: ignore[dict-item]
    if body.stream:
        return _event_stream(state, body, started, head, _text_chunk)
    text, finish = await finished(state, request, started)
    logprobs = None if body.logprobs is None else _text_logprobs(started.logprobs)
    choice = {"index": 0, "text": text, "finish_reason": finish, "logprobs": logprobs}
    return {**head, "choices": [choice], "usage": started.usage}


# --- Inside ---------------------------------------------------------------------------------------------------------


def _whose(state: ServerState, user: str, named: str | None) -> str:
    """The user whose adapters and memory are meant; without keys the body's `user` does."""
    if state.keys is not None:
        state.check_user(user, named)
        return user
    return user if named is None else state.user_of(None, named)


def _chat_ids(state: ServerState, turns: Sequence[tuple[str, str]], document: str | None) -> list[int]:
    model = state.model
    cleaned = [(role, visible(whole(text, role), role)) for role, text in turns]
    document = None if document is None else visible(whole(document, "document"), "document")
    role, question = cleaned[-1]
    if len(cleaned) == 1:
        return model.layout.prompt_ids(model.tokenizer, [question], [document])[0]
    return conversation_ids(model.tokenizer, [*cleaned[:-1], (role, user_text(question, document))])


def _event_stream(
    state: ServerState, body: _Sampled, started: Started, head: dict[str, Any], chunk: Any
) -> StreamingResponse:
    """Server-sent events: a chunk for each delta, the usage if it is asked for, [DONE]."""
    wants_usage = body.stream_options is not None and body.stream_options.include_usage

    async def events() -> AsyncIterator[str]:
        done, is_first = False, True
        try:
            while not done:
                delta = await started.deltas.get()
                if delta.error is not None:
                    done = True
                    _, error = explained(delta.error, directory=str(state.stores.directory))
                    yield _event(error)
                    break
                done = delta.finish is not None
                found = head | {"choices": [chunk(delta, is_first, body)]}
                if is_first and started.memory is not None:
                    found["memory"] = started.memory
                yield _event(found | ({"usage": None} if wants_usage else {}))
                is_first = False
            if wants_usage and delta.error is None:
                yield _event(head | {"choices": [], "usage": started.usage})
            yield "data: [DONE]\n\n"
        finally:
            started.generation.cancelled = True
            state.metrics.completion_tokens.inc(len(started.generation.ids))
            if not done:
                state.metrics.cancelled.inc()

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _chat_chunk(delta: Delta, is_first: bool, body: ChatRequest) -> dict[str, Any]:
    message = ({"role": "assistant"} if is_first else {}) | ({"content": delta.text} if delta.text or is_first else {})
    logprobs = {"content": _chat_logprobs(delta.logprobs), "refusal": None} if body.logprobs else None
    return {"index": 0, "delta": message, "finish_reason": delta.finish, "logprobs": logprobs}


def _text_chunk(delta: Delta, is_first: bool, body: CompletionRequest) -> dict[str, Any]:
    logprobs = None if body.logprobs is None else _text_logprobs(delta.logprobs)
    return {"index": 0, "text": delta.text, "finish_reason": delta.finish, "logprobs": logprobs}


def _chat_logprobs(logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    def row(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return [
        row(one.text, one.logprob) | {"top_logprobs": [row(text, logprob) for text, logprob in one.top]}
        for one in logprobs
    ]


def _text_logprobs(logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    return {
        "tokens": [one.text for one in logprobs],
        "token_logprobs": [one.logprob for one in logprobs],
        "top_logprobs": [dict(one.top) for one in logprobs],
        "text_offset": None,
    }


async def _disconnected(request: Request) -> None:
    """Returns when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
