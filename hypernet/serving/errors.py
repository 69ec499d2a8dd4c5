"""Errors in OpenAI's shape, one line each; never a traceback, never a path of the server."""

import errno
import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from hypernet.memory.store.reading import UnknownMemory
from hypernet.serving.scheduler import QueueFull, Stopping
from hypernet.serving.stores import UnknownAdapter
from hypernet.text.cleaning import escaped

log = logging.getLogger(__name__)

_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_MAX_CHARACTERS = 500  # of a message, which may quote what came


class ApiError(Exception):
    """A status with its message; code: a word for programs."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


def error_body(status: int, message: str, *, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error object, {"error": {"message", "type", "param", "code"}}; the message in one line."""
    line = escaped(" ".join(message.split()))
    line = line if len(line) <= _MAX_CHARACTERS else line[: _MAX_CHARACTERS - 3] + "..."
    kind = _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": line, "type": kind, "param": param, "code": code}}


def explained(error: BaseException, *, directory: str) -> tuple[int, dict[str, Any]]:
    """Status and body for whatever a request ended with.

    Args:
        directory: of the server's files, which no message names.
    """
    if isinstance(error, ApiError):
        return error.status, error_body(error.status, str(error), code=error.code, param=error.param)
    if isinstance(error, QueueFull):
        return 429, error_body(429, str(error), code="queue_full")
    if isinstance(error, Stopping):
        return 503, error_body(503, str(error), code="stopping")
    if isinstance(error, (UnknownMemory, UnknownAdapter)):
        return 404, error_body(404, str(error), code="not_found")
    if isinstance(error, RequestValidationError):
        place, reason = _invalid(error)
        return 400, error_body(400, f"{place}: {reason}" if place else reason, param=place or None)
    if isinstance(error, HTTPException):
        return error.status_code, error_body(error.status_code, str(error.detail))
    if isinstance(error, (ValueError, TypeError)):
        reason = str(error).replace(directory, "")
        return 400, error_body(400, reason, code="context_length_exceeded" if "does not fit" in reason else None)
    log.error("A request failed.", exc_info=error)
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
        return 503, error_body(503, "The server lacks disk space or memory for this now. Ask again later.")
    if isinstance(error, OSError):
        return 503, error_body(503, "The server cannot reach its data now; its log says more. Ask again later.")
    return 500, error_body(500, "The server made a mistake; its log says more.")


def install(app: FastAPI, *, directory: str) -> None:
    """Makes an application answer every error so."""

    async def answer(_: Request, error: Exception) -> JSONResponse:
        status, body = explained(error, directory=directory)
        headers = dict(getattr(error, "headers", None) or {})
        if status in (429, 503):
            headers["Retry-After"] = "1"
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(body, status, headers)

    for kind in (ApiError, QueueFull, Stopping, RequestValidationError, HTTPException, ValueError, TypeError, OSError):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(Exception, answer)


def _invalid(error: RequestValidationError) -> tuple[str, str]:
    """The first place that is wrong, and why."""
    first = error.errors()[0]
    names = [str(name) for name in first["loc"] if name not in ("body", "query", "path", "header")]
    if first["type"] == "json_invalid":
        return "", f"The body is no JSON: {first.get('ctx', {}).get('error', 'it cannot be read')}."
    if first["loc"] == ("body",):
        return "", "The body should be a JSON object, with Content-Type: application/json."
    if first["type"] == "extra_forbidden":
        return ".".join(names)[:100], "There is no such setting here; leave it out."
    return ".".join(names)[:100], str(first["msg"]).removeprefix("Value error, ")
