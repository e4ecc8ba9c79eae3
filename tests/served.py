"""A server in a thread of the test's own, and pipelines that wait or fail at a step."""

from __future__ import annotations

import base64
import io
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import numpy as np
from openai import OpenAI
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from tintype.serving.queue import Queue
from tintype.serving.server import address_of, listen, make_server
from watched import Watched, with_backend

SECONDS = 60  # that nothing here takes


@dataclass(frozen=True)
class Served:
    """Where a server is, its queue, and OpenAI's client of it."""

    url: str
    queue: Queue
    client: OpenAI

    def figures(self):
        """The samples of `GET /metrics`: name with labels -> number."""
        text = httpx.get(f"{self.url}/metrics").text
        return {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }


@contextmanager
def served(pipeline, places=16):
    """Serve the pipeline until the block ends."""
    started = threading.Event()
    server = make_server(pipeline, places, started.set)
    with listen("127.0.0.1", 0) as listener:
        url = address_of(listener)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        assert started.wait(SECONDS)
        try:
            with OpenAI(
                base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=SECONDS
            ) as client:
                yield Served(url, server.queue, client)
        finally:
            server.should_exit = True
            thread.join(SECONDS)
    assert not thread.is_alive()


class Held(Watched):
    """A backend whose steps wait for `go`; `reached` says that one does."""

    def __init__(self, inner):
        super().__init__(inner, reached=threading.Event(), go=threading.Event())

    def run_placed(self, stage, profile, inputs):
        self.reached.set()
        assert self.go.wait(SECONDS)
        return super().run_placed(stage, profile, inputs)


class FailsOnce(Watched):
    """A backend whose first decoding does what `fail` says."""

    def __init__(self, inner, fail):
        super().__init__(inner, fails=[fail])

    def run(self, stage, profile, inputs):
        outputs = super().run(stage, profile, inputs)
        return self.fails.pop()(outputs) if stage == "decode" and self.fails else outputs


def held(pipeline):
    """The pipeline on a held backend, and that backend."""
    backend = Held(pipeline.family.backend)
    return with_backend(pipeline, backend), backend


def until(condition):
    """Wait for what no event tells."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def opened(sent):
    """The picture of one entry of a response's data."""
    return Image.open(io.BytesIO(base64.b64decode(sent.b64_json)))


def pixels(image):
    return np.asarray(image).tobytes()


def as_file(image, kind="PNG"):
    """A picture as the bytes of a file."""
    stream = io.BytesIO()
    image.save(stream, format=kind)
    return stream.getvalue()
