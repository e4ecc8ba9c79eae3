"""The routes of `tintype serve`, and what each of them does with a request."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import AsyncGenerator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import python_multipart  # noqa: F401 - which forms are read with, imported so that its absence is told at the start
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tintype.backends.compiled import one_line
from tintype.errors import RequestError, TintypeError
from tintype.pipeline import Call, Output, Pipeline
from tintype.schedulers import fitting
from tintype.serving import replies
from tintype.serving.errors import BodyTooLarge, add_error_handlers, json_response
from tintype.serving.fields import EDIT, GENERATION, Asked, Check, asked, from_form
from tintype.serving.metrics import Metrics
from tintype.serving.queue import Job, Queue

# Bytes of a request's body.
_MOST_OF_JSON = 1_000_000
_MOST_OF_FORMS = 50_000_000
_MOST_FIELDS = 64
# The page brings all that it shows, and asks nobody but this server.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; connect-src 'self'"
_log = logging.getLogger(__name__)


def _one_thread() -> Executor:
    return ThreadPoolExecutor(1, thread_name_prefix="pixels")


@dataclass(frozen=True)
class Service:
    """One model, the queue before it, and the routes that lead there.

    `pixels` is where pictures are decoded, checked and encoded: beside the loop, and one at a time, so that many
    uploads do not fill the memory.
    """

    pipeline: Pipeline
    queue: Queue
    metrics: Metrics
    pixels: Executor = field(default_factory=_one_thread)
    created: int = field(default_factory=lambda: int(time.time()))

    async def generations(self, request: Request) -> Response:
        """POST /v1/images/generations: pictures of a prompt."""
        return await self._pictures(request, await _json(request), GENERATION)

    async def edits(self, request: Request) -> Response:
        """POST /v1/images/edits: pictures that begin with another."""
        return await self._pictures(request, await _form(request), EDIT)

    async def models(self) -> dict[str, Any]:
        """GET /v1/models."""
        return {"object": "list", "data": [self._model()]}

    async def model(self, name: str) -> Response:
        """GET /v1/models/NAME."""
        if name != self.pipeline.name:
            message = f"model {name!r} is not served here; {self.pipeline.name!r} is"
            return json_response(replies.error(404, message, "model", "model_not_found"), 404)
        return JSONResponse(self._model())

    async def health(self) -> dict[str, str]:
        """GET /healthz: there once the model is loaded."""
        return {"status": "ok"}

    async def figures(self) -> Response:
        """GET /metrics."""
        return Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def page(self) -> Response:
        """GET /: a page to try prompts."""
        page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
        return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY})

    async def _pictures(
        self, request: Request, given: Mapping[str, Any], known: Mapping[str, Check]
    ) -> Response:
        """Check, wait, run and encode; a client that goes away ends its own work."""
        stop, aside = threading.Event(), asyncio.get_running_loop().run_in_executor
        wanted, call = await aside(self.pixels, self._checked, given, known, stop)
        job = self.queue.submit(call.run, stop)
        output = await self._outcome(request, job)
        self.metrics.made(job, output)
        body = await aside(self.pixels, replies.pictures, self.pipeline, wanted, output)
        return json_response(body)

    def _checked(
        self, given: Mapping[str, Any], known: Mapping[str, Check], stop: threading.Event
    ) -> tuple[Asked, Call]:
        """The call that a request asks for; whatever is wrong with it is told before it waits."""
        wanted = asked(given, known, self.pipeline.name)
        call = self.pipeline.prepare(
            **wanted.arguments, callback_on_step_end=lambda *_: not stop.is_set()
        )
        return wanted, call

    async def _outcome(self, request: Request, job: Job) -> Output:
        result = asyncio.wrap_future(job.result)
        gone = asyncio.create_task(_gone(request))
        either: set[asyncio.Future[Any]] = {result, gone}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if result.done():
                return _told(result)
            self.metrics.cancelled.inc()
            raise ClientDisconnect
        finally:
            gone.cancel()
            if not result.done():
                self.queue.cancel(job)
                result.cancel()

    def _model(self) -> dict[str, Any]:
        """The model as OpenAI's API lists it, and what a request to it may leave open."""
        own = self.pipeline.settings()
        return {
            "id": self.pipeline.name,
            "object": "model",
            "created": self.created,
            "owned_by": "tintype",
            "backend": self.pipeline.family.backend.name,
            "sizes": self.pipeline.family.sizes(),
            "schedulers": fitting(self.pipeline.family.scheduler_config),
            "defaults": {
                "size": f"{own['width']}x{own['height']}",
                "num_inference_steps": own["steps"],
                "guidance_scale": own["guidance"],
                "scheduler": own["scheduler"],
            },
        }


def make_app(service: Service) -> FastAPI:
    """The application; FastAPI's own pages are left out, since they load scripts from elsewhere."""
    app = FastAPI(title="Tintype", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_api_route("/v1/images/generations", service.generations, methods=["POST"])
    app.add_api_route("/v1/images/edits", service.edits, methods=["POST"])
    app.add_api_route("/v1/models", service.models)
    app.add_api_route("/v1/models/{name:path}", service.model)
    app.add_api_route("/healthz", service.health)
    app.add_api_route("/metrics", service.figures)
    app.add_api_route("/", service.page)
    app.add_middleware(_Counted, metrics=service.metrics)
    add_error_handlers(app)
    return app


class _Counted:
    """Counts every request by the route that took it."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status = 500  # where the application fails before it answers

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.requests.labels(route, status).inc()


class _Bounded(Request):
    """A request whose body is read as far as `most` bytes."""

    def __init__(self, request: Request, most: int) -> None:
        super().__init__(request.scope, request.receive)
        self._most = most

    async def stream(self) -> AsyncGenerator[bytes, None]:
        read = 0
        async for chunk in super().stream():
            read += len(chunk)
            if read > self._most:
                raise BodyTooLarge(f"the request has more than {self._most} bytes; send less")
            yield chunk


async def _json(request: Request) -> Mapping[str, Any]:
    body = await _Bounded(request, _MOST_OF_JSON).body()
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError("the body is not JSON; send an object with a prompt") from error
    if not isinstance(given, dict):
        raise RequestError("the body is JSON, but no object; send one with a prompt")
    return given


async def _form(request: Request) -> Mapping[str, Any]:
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise RequestError("the body is no form; send multipart/form-data with image and prompt")
    bounded = _Bounded(request, _MOST_OF_FORMS)
    async with bounded.form(max_files=_MOST_FIELDS, max_fields=_MOST_FIELDS) as form:
        items = [
            (name, value if isinstance(value, str) else await value.read())
            for name, value in form.multi_items()
        ]
    return from_form(items)


async def _gone(request: Request) -> None:
    """Wait until the client of a request that has been read goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _told(result: asyncio.Future[Output]) -> Output:
    """The pictures of a job that is done, or a TintypeError."""
    try:
        return result.result()
    except TintypeError:
        raise
    except Exception as error:
        _log.exception("a picture could not be made")
        reason = one_line(error) or type(error).__name__
        raise TintypeError(f"the picture could not be made: {reason}") from error
