"""Many clients at once: those that go away, those that find no place, and those whose job fails."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import numpy as np
import openai
import pytest

from served import SECONDS, FailsOnce, held, opened, pixels, served, until
from watched import with_backend

PROMPT = "two white sailing boats"
STEPS = 4


@pytest.fixture
def elsewhere():
    """Where other clients run."""
    with ThreadPoolExecutor(4) as threads:
        yield threads


def drawn(server, seed):
    """The picture of a seed, asked of the server."""
    steps = {"seed": seed, "num_inference_steps": STEPS}
    return pixels(opened(server.client.images.generate(prompt=PROMPT, extra_body=steps).data[0]))


def expected(pipeline, seed):
    """The same, asked of the pipeline itself."""
    return pixels(pipeline(PROMPT, seed=seed, num_inference_steps=STEPS).images[0])


@contextmanager
def passing_client(server, seed):
    """A client that asks and does not stay for the answer: it goes away when the block ends."""
    body = f'{{"prompt": "{PROMPT}", "seed": {seed}, "num_inference_steps": {STEPS}}}'
    host = httpx.URL(server.url)
    with socket.create_connection((host.host, host.port), SECONDS) as connection:
        head = f"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}"
        connection.sendall(f"{head}\r\n\r\n{body}".encode())
        yield


def test_a_client_that_goes_away_stops_its_own_work_at_the_next_step_and_nobody_elses(
    postcard, elsewhere
):
    pipeline, backend = held(postcard)
    with served(pipeline) as server:
        with passing_client(server, seed=1):
            assert backend.reached.wait(SECONDS)
            neighbour = elsewhere.submit(drawn, server, 7)
            until(lambda: server.queue.waiting == 1)
        until(lambda: server.figures()["tintype_jobs_cancelled_total",] == 1)
        backend.go.set()
        assert neighbour.result(SECONDS) == expected(postcard, 7)
        assert len(backend.ran) == 1 + STEPS
        assert server.figures()["tintype_requests_total", "/v1/images/generations", "499"] == 1


def test_a_client_that_goes_away_while_it_waits_leaves_its_place_to_another(postcard, elsewhere):
    pipeline, backend = held(postcard)
    with served(pipeline, places=1) as server:
        first = elsewhere.submit(drawn, server, 1)
        assert backend.reached.wait(SECONDS)
        with passing_client(server, seed=2):
            until(lambda: server.queue.waiting == 1)
        until(lambda: server.queue.waiting == 0)
        second = elsewhere.submit(drawn, server, 3)
        until(lambda: server.queue.waiting == 1)
        backend.go.set()
        assert first.result(SECONDS) == expected(postcard, 1)
        assert second.result(SECONDS) == expected(postcard, 3)
        assert len(backend.ran) == 2 * STEPS


def test_a_client_that_goes_away_in_the_middle_of_its_body_is_nobodys_error(server, postcard):
    before = server.figures()
    host = httpx.URL(server.url)
    with socket.create_connection((host.host, host.port), SECONDS) as connection:
        connection.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\n")
        connection.sendall(b"Content-Length: 100\r\n\r\n{")
    gone = ("tintype_requests_total", "/v1/images/generations", "499")
    until(lambda: server.figures().get(gone, 0) == before.get(gone, 0) + 1)
    assert drawn(server, 7) == expected(postcard, 7)


def test_a_full_queue_is_429_with_the_seconds_after_which_to_try_again(postcard, elsewhere):
    pipeline, backend = held(postcard)
    with served(pipeline, places=1) as server:
        first = elsewhere.submit(drawn, server, 1)
        assert backend.reached.wait(SECONDS)
        second = elsewhere.submit(drawn, server, 2)
        until(lambda: server.queue.waiting == 1)
        figures = server.figures()
        assert (figures["tintype_jobs_waiting",], figures["tintype_jobs_running",]) == (1, 1)
        with pytest.raises(openai.RateLimitError) as caught:
            drawn(server, 3)
        assert caught.value.response.headers["retry-after"] == "1"
        assert "1 requests wait already" in caught.value.message
        backend.go.set()
        assert first.result(SECONDS) == expected(postcard, 1)
        assert second.result(SECONDS) == expected(postcard, 2)
        assert drawn(server, 3) == expected(postcard, 3)


def not_finite(outputs):
    return {name: np.full_like(array, np.nan) for name, array in outputs.items()}


def broken(_):
    raise RuntimeError("a fault of the runtime's\n  at line 3 of its source")


@pytest.mark.parametrize(
    ("fail", "says"),
    [
        (not_finite, "stage decode gave NaN or infinity"),
        (broken, "a fault of the runtime's at line 3"),
    ],
)
def test_a_job_that_fails_is_500_in_one_line_and_the_next_one_runs(postcard, fail, says):
    pipeline = with_backend(postcard, FailsOnce(postcard.family.backend, fail))
    with served(pipeline) as server:
        with pytest.raises(openai.InternalServerError) as caught:
            drawn(server, 7)
        error = caught.value.response.json()["error"]
        assert error["type"] == "server_error"
        assert says in error["message"]
        assert "\n" not in error["message"]
        assert drawn(server, 7) == expected(postcard, 7)


def test_a_fault_of_the_servers_own_is_500_and_counted(postcard, monkeypatch):
    def fail(*_):
        raise KeyError("a fault")

    with served(postcard) as server:
        monkeypatch.setattr("tintype.serving.replies.pictures", fail)
        with pytest.raises(openai.InternalServerError, match="its log says why"):
            drawn(server, 7)
        assert server.figures()["tintype_requests_total", "/v1/images/generations", "500"] == 1


def test_a_server_that_stops_cancels_what_runs_and_what_waits(postcard, elsewhere):
    pipeline, backend = held(postcard)
    with served(pipeline) as server:
        unfinished = [elsewhere.submit(drawn, server, 1)]
        assert backend.reached.wait(SECONDS)
        unfinished += [elsewhere.submit(drawn, server, 2)]
        until(lambda: server.queue.waiting == 1)
        server.queue.close()
        backend.go.set()
        unfinished += [elsewhere.submit(drawn, server, 3)]
        for each in unfinished:
            with pytest.raises(openai.InternalServerError) as caught:
                each.result(SECONDS)
            assert caught.value.status_code == 503
            assert "stopping" in caught.value.message
        assert len(backend.ran) == 1
