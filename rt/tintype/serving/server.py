"""uvicorn around the application: a socket first, work ended before connections are."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from tintype.errors import RequestError, TintypeError
from tintype.pipeline import Pipeline
from tintype.serving.app import Service, make_app
from tintype.serving.metrics import Metrics
from tintype.serving.queue import Queue

_SOON = 0.01  # seconds
_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections; asked for before a model is loaded, which takes longer than being refused."""
    if not 0 <= port < 1 << 16:
        raise RequestError(f"--port {port} is outside 0..65535; 0 takes any that is free")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (socket.gaierror, UnicodeError) as error:
        raise RequestError(f"--host {host} is unknown; 127.0.0.1 is this machine alone") from error
    except OSError as error:
        if error.errno in _NOT_HERE:
            raise RequestError(f"--host {host} is no address of this machine") from error
        reason = os.strerror(error.errno or 0)  # without the address, which Python adds
        raise TintypeError(
            f"--port {port} on {host} cannot be had: {reason}; choose another, or 0 for any that is free"
        ) from error


def address_of(listener: socket.socket) -> str:
    """Where a browser finds it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_server(pipeline: Pipeline, places: int, on_start: Callable[[], None]) -> Server:
    """What answers for a pipeline, on the sockets with which it is `run`, until a signal says to stop."""
    queue = Queue(places)
    app = make_app(Service(pipeline, queue, Metrics(queue)))
    config = uvicorn.Config(
        app, lifespan="off", log_config=None, log_level="warning", access_log=False
    )
    return Server(config, queue, on_start)


class Server(uvicorn.Server):
    """uvicorn's, which says when it has begun, and ends the queue before it waits for answers to go out."""

    def __init__(self, config: uvicorn.Config, queue: Queue, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self.queue = queue
        self._on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop, and at a second signal without waiting for clients; uvicorn would raise the signal again at the end."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.queue.close()
        await super().shutdown(sockets)
        for connection in list(self.server_state.connections):  # which a second signal left
            connection.transport.abort()
        while self.server_state.tasks:  # that hear of it, and would be cut off in the middle
            await asyncio.sleep(_SOON)
        self.queue.join()  # a thread in a backend's code would not survive the interpreter's end
