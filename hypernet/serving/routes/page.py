"""The page at /: give a document, ask, and see four answers side by side with their tokens, milliseconds and bytes.

It asks as any client would, in the batch of all, and needs nothing from another host. Without a script the form and its
answers are there; page.js adds files, progress, the memory and the break-even plot.
"""

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import cache
from html import escape
from pathlib import Path
from string import Template
from typing import Annotated, Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import HTMLResponse, StreamingResponse

from hypernet.memory.store.records import Draft, Filters
from hypernet.serving.engine import Sampling
from hypernet.serving.errors import ApiError, explained
from hypernet.serving.routes.adapters import stored_adapter
from hypernet.serving.routes.completions import MEMORY, finished, start
from hypernet.serving.state import CurrentUser, ServerState, State
from hypernet.text.cleaning import visible, whole
from hypernet.text.documents import document_of
from hypernet.text.sentences import split_sentences

router = APIRouter(include_in_schema=False)
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; connect-src 'self'; "
    "style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'",
    "Cache-Control": "no-store",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
}


class Column(NamedTuple):
    """One way to answer. kept: bytes that lie on the server between questions."""

    name: str
    text: str
    prompt_tokens: int
    milliseconds: float
    kept: int


class PageQuestion(NamedTuple):
    """The form's fields; name: of the file that the document came from."""

    document: str = ""
    question: str = ""
    key: str = ""
    name: str = ""


@router.get("/")
async def page(state: State) -> HTMLResponse:
    return _rendered(state, PageQuestion(), result="")


@router.get("/page.js")
async def script() -> Response:
    text = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
    return Response(text, media_type="text/javascript", headers={"Cache-Control": "no-cache"})


@router.post("/")
async def ask(request: Request, state: State) -> HTMLResponse:
    """The form's answer; what is wrong stands on the page in one line."""
    asked = PageQuestion()
    try:
        asked = await _asked(request)
        result, status = await _answered(request, state, asked, progress=None), 200
    except Exception as error:
        status, result = _alert(state, error)
    return _rendered(state, asked, result=result, status=status)


@router.post("/answers")
async def stream_answers(request: Request, state: State) -> StreamingResponse:
    """The same for page.js, as server-sent events: {"done", "chunks"} while the document is read, at last {"html"}."""
    await request.body()  # now: the response listens for the client's leaving, and would take what comes
    loop, told = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any]]()

    def progress(done: int, num_chunks: int) -> None:
        loop.call_soon_threadsafe(told.put_nowait, {"done": done, "chunks": num_chunks})

    async def work() -> dict[str, Any]:
        try:
            return {"html": await _answered(request, state, await _asked(request), progress=progress)}
        except Exception as error:
            return {"html": _alert(state, error)[1]}

    asked = asyncio.ensure_future(work())
    asked.add_done_callback(lambda found: told.put_nowait({} if found.cancelled() else found.result()))

    async def events() -> AsyncIterator[str]:
        try:
            event: dict[str, Any] = {"html": None}
            while True:
                event = await told.get()
                yield f"data: {json.dumps(event)}\n\n"
                if "done" not in event:
                    return
        finally:
            asked.cancel()

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


@router.post("/text")
async def text_of_file(
    request: Request, state: State, user: CurrentUser, name: Annotated[str, Query(min_length=1, max_length=255)]
) -> dict[str, str]:
    """The text of a file, which is the request's body: plain text, Markdown, HTML or PDF, by its name."""
    _check_origin(request)
    document = await asyncio.to_thread(document_of, Path(name).name, await request.body())
    return {"name": document.name, "text": document.text}


async def _asked(request: Request) -> PageQuestion:
    _check_origin(request)
    fields = parse_qs((await request.body()).decode("utf-8", "replace"), max_num_fields=8)
    return PageQuestion(*(fields.get(name, [""])[0].strip() for name in PageQuestion._fields))


async def _answered(
    request: Request, state: ServerState, asked: PageQuestion, *, progress: Callable[[int, int], None] | None
) -> str:
    """The table's HTML. ApiError: without a key that counts, or a field is empty."""
    user = state.user_of(f"Bearer {asked.key}" if asked.key else None, None)
    if not asked.document or not asked.question:
        raise ApiError(400, "Give a document and a question.")
    return _table(*await _answers(request, state, user, asked, progress=progress))


def _alert(state: ServerState, error: Exception) -> tuple[int, str]:
    status, body = explained(error, directory=str(state.stores.directory))
    return status, f'<p role="alert">{escape(body["error"]["message"])}</p>'


async def _answers(
    request: Request,
    state: ServerState,
    user: str,
    asked: PageQuestion,
    *,
    progress: Callable[[int, int], None] | None,
) -> tuple[Sequence[Column], float]:
    """The four ways, one after the other so that each has the model alone as far as others leave it; and how many
    milliseconds the adapter took to make."""
    document, question = visible(whole(asked.document, "document"), "document"), asked.question
    source = visible(whole(asked.name, "name"), "name")[:255].strip() or "pasted text"
    run = "page-" + hashlib.sha256(document.encode()).hexdigest()[:24]
    before = time.perf_counter()
    entry = await stored_adapter(state, user, document, name=f"{run}.txt", progress=progress)
    # Joined now, as it is kept for all questions about it.
    await state.on_model(lambda: state.model.joined(state.stores.adapter(user, entry.id)))
    prepared_ms = 1000 * (time.perf_counter() - before)
    num_bytes = len(document.encode())
    sentences = [one for a, b in split_sentences(document) if (one := document[a:b].strip())]

    def remember() -> None:
        with state.stores.memory(user) as memory:
            filters = Filters(user, None, run)
            if not memory.list(user_id=user, run_id=run, limit=1):
                memory.store.add([Draft(text=one, filters=filters, source=source) for one in sentences])

    await asyncio.to_thread(remember)
    sampling = Sampling(max_new_tokens=min(64, state.settings.max_new_tokens))
    ways = [
        ("No context", None, None, 0),
        ("Adapter", entry.id, None, entry.num_bytes),
        ("Memory text in the prompt", MEMORY, None, num_bytes),
        ("Whole document in the prompt", None, document, num_bytes),
    ]
    found = []
    for name, named, in_prompt, kept in ways:
        started_at = time.perf_counter()
        try:
            started = await start(
                state,
                user=user,
                named=named,
                turns=[("user", question)],
                sampling=sampling,
                tier="token",
                filters=Filters(user, None, run),
                document=in_prompt,
            )
            text, _ = await finished(state, request, started)
            tokens = started.usage["prompt_tokens"]
        except ValueError as error:  # a document that does not fit the window
            text, tokens = " ".join(str(error).split()), 0
        found.append(Column(name, text, tokens, 1000 * (time.perf_counter() - started_at), kept))
    return found, prepared_ms


def _table(columns: Sequence[Column], prepared_ms: float) -> str:
    def cell(unit: str, value: float) -> str:
        return f'<td data-unit="{unit}">{value:,.0f}</td>'  # narrow windows show the unit, not the head

    units = ("prompt tokens", "ms", "bytes kept")
    rows = "".join(
        f'<tr><th scope="row">{escape(one.name)}</th><td class="answer">{escape(one.text)}</td>'
        + "".join(map(cell, units, (one.prompt_tokens, one.milliseconds, one.kept)))
        + "</tr>"
        for one in columns
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("way", "answer", *units))
    note = f'<p data-prepared-ms="{prepared_ms:.1f}">The adapter was made in {prepared_ms:,.0f} ms.</p>'
    return f"{note}<table><caption>Four answers</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _rendered(state: ServerState, asked: PageQuestion, *, result: str, status: int = 200) -> HTMLResponse:
    key = "" if state.keys is None else _KEY_FIELD
    values = {"model": state.settings.model_name, "document": asked.document, "question": asked.question}
    shown = _template().substitute({name: escape(value) for name, value in values.items()}, result=result, key=key)
    return HTMLResponse(shown, status, _HEADERS)


_KEY_FIELD = '<label for="key">API key</label><input id="key" name="key" type="password" autocomplete="off" required>'


@cache
def _template() -> Template:
    return Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))


def _check_origin(request: Request) -> None:
    """ApiError where a form of another site was sent here."""
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise ApiError(403, "This form is not this server's.")
