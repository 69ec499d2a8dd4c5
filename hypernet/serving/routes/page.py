"""The page at /: paste a document, ask, and see four answers side by side with their tokens, milliseconds and bytes.

Rendered here, without scripts and without anything from another host; it asks as any client would, in the batch of all.
"""

import asyncio
import hashlib
import time
from collections.abc import Sequence
from functools import cache
from html import escape
from pathlib import Path
from string import Template
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from hypernet.memory.store.records import Draft, Filters
from hypernet.serving.engine import Sampling
from hypernet.serving.errors import ApiError, explained
from hypernet.serving.routes.adapters import stored_adapter
from hypernet.serving.routes.completions import MEMORY, finished, start
from hypernet.serving.state import ServerState, State
from hypernet.text.cleaning import visible, whole
from hypernet.text.sentences import split_sentences

router = APIRouter(include_in_schema=False)
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'",
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


@router.get("/")
async def page(state: State) -> HTMLResponse:
    return _rendered(state, document="", question="", result="")


@router.post("/")
async def ask(request: Request, state: State) -> HTMLResponse:
    """The form's answer; what is wrong stands on the page in one line."""
    document = question = ""
    try:
        _check_origin(request)
        fields = parse_qs((await request.body()).decode("utf-8", "replace"), max_num_fields=8)
        document, question, key = (fields.get(name, [""])[0].strip() for name in ("document", "question", "key"))
        user = state.user_of(f"Bearer {key}" if key else None, None)
        if not document or not question:
            raise ApiError(400, "Give a document and a question.")
        result, status = _table(await _answers(request, state, user, document, question)), 200
    except Exception as error:
        status, body = explained(error, directory=str(state.stores.directory))
        result = f'<p role="alert">{escape(body["error"]["message"])}</p>'
    return _rendered(state, document=document, question=question, result=result, status=status)


async def _answers(request: Request, state: ServerState, user: str, document: str, question: str) -> Sequence[Column]:
    """The four ways, one after the other so that each has the model alone as far as others leave it."""
    document = visible(whole(document, "document"), "document")
    run = "page-" + hashlib.sha256(document.encode()).hexdigest()[:24]
    entry = await stored_adapter(state, user, document, name=f"{run}.txt")
    num_bytes = len(document.encode())
    sentences = [one for a, b in split_sentences(document) if (one := document[a:b].strip())]

    def remember() -> None:
        with state.stores.memory(user) as memory:
            filters = Filters(user, None, run)
            if not memory.list(user_id=user, run_id=run, limit=1):
                memory.store.add([Draft(text=one, filters=filters, source=run) for one in sentences])

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
    return found


def _table(columns: Sequence[Column]) -> str:
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
    return f"<table><caption>Four answers</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _rendered(state: ServerState, *, document: str, question: str, result: str, status: int = 200) -> HTMLResponse:
    key = "" if state.keys is None else _KEY_FIELD
    values = {"model": state.settings.model_name, "document": document, "question": question}
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
