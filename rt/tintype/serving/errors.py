"""Which status an error has, and its answer in OpenAI's form."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from tintype.errors import Cancelled, ProfileError, RequestError, TintypeError
from tintype.serving import replies
from tintype.serving.fields import FieldError, field_of
from tintype.serving.queue import QueueFull

_GONE = 499  # as proxies log a client that went away; nobody reads it
_log = logging.getLogger(__name__)


class BodyTooLarge(RequestError):
    """A request of more bytes than are read."""


# The first that fits.
_STATUS: dict[type[TintypeError], int] = {
    BodyTooLarge: 413,
    RequestError: 400,
    ProfileError: 400,
    QueueFull: 429,
    Cancelled: 503,  # by the server, which stops; whoever cancelled its own request has gone
    TintypeError: 500,
}
_CODES = {413: "request_too_large", 429: "rate_limit_exceeded"}


def add_error_handlers(app: FastAPI) -> None:
    """Whatever a route raises becomes one line in OpenAI's form."""
    app.add_exception_handler(TintypeError, _refused)
    app.add_exception_handler(HTTPException, _unrouted)
    app.add_exception_handler(ClientDisconnect, _unread)
    app.add_exception_handler(Exception, _failed)


def json_response(
    body: bytes, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """An answer of JSON that is written already."""
    return Response(body, status, headers, media_type="application/json")


def _refused(_: Request, error: Exception) -> Response:
    status = next(status for kind, status in _STATUS.items() if isinstance(error, kind))
    if status == 500:
        _log.error("%s", error)
    headers = {"Retry-After": str(error.retry_after)} if isinstance(error, QueueFull) else None
    body = replies.error(
        status,
        "the server is stopping; ask again once it is back" if status == 503 else str(error),
        field_of(error) if status == 400 else None,
        error.code if isinstance(error, FieldError) else _CODES.get(status),
    )
    return json_response(body, status, headers)


def _unrouted(request: Request, error: Exception) -> Response:
    """What the framework refuses: a path or a method that no route has, a form that is none."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    body = replies.error(error.status_code, message)
    return json_response(body, error.status_code, error.headers)


def _unread(*_: object) -> Response:
    return Response(status_code=_GONE)


def _failed(*_: object) -> Response:
    """A fault of ours, whose traceback is in the server's log."""
    return json_response(replies.error(500, "the server failed; its log says why"), 500)
