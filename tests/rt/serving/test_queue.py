"""The queue by itself: order, places, cancelling, and how long it says that it will take."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from served import SECONDS, until
from tintype.errors import Cancelled
from tintype.serving.queue import Queue, QueueFull


@pytest.fixture
def queue():
    made = Queue(places=2)
    yield made
    made.close()


class Work:
    """Work that begins, waits to be let go and ends."""

    def __init__(self):
        self.begun, self.end = threading.Event(), threading.Event()

    def __call__(self):
        self.begun.set()
        assert self.end.wait(SECONDS)
        return self


def submit(queue, work=None):
    return queue.submit(work or (lambda: None), threading.Event())


def test_jobs_run_one_at_a_time_in_the_order_in_which_they_came(queue):
    first, order = Work(), []
    jobs = [submit(queue, first)]
    assert first.begun.wait(SECONDS)
    jobs += [submit(queue, lambda each=each: order.append((each, queue.running))) for each in "ab"]
    assert (queue.running, queue.waiting) == (1, 2)
    first.end.set()
    assert jobs[0].result.result(SECONDS) is first
    jobs[2].result.result(SECONDS)
    assert order == [("a", 1), ("b", 1)]


def test_a_place_is_free_once_a_result_is_told():
    queue = Queue(places=0)
    for _ in range(200):
        submit(queue).result.result(SECONDS)
    queue.close()
    queue.join()


def test_no_more_wait_than_there_are_places(queue):
    work = Work()
    submit(queue, work)
    assert work.begun.wait(SECONDS)
    waiting = [submit(queue), submit(queue)]
    with pytest.raises(QueueFull, match="2 requests wait already"):
        submit(queue)
    queue.cancel(waiting[0])
    with pytest.raises(Cancelled):
        waiting[0].result.result(SECONDS)
    last = submit(queue)
    work.end.set()
    last.result.result(SECONDS)


def test_retry_after_is_how_long_recent_jobs_took_times_those_there_are(queue, monkeypatch):
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr("tintype.serving.queue.time", clock)

    def took(seconds):
        clock.now += seconds

    for seconds in (2.0, 3.1):
        submit(queue, lambda seconds=seconds: took(seconds)).result.result(SECONDS)
    work = Work()
    submit(queue, work)
    assert work.begun.wait(SECONDS)
    for _ in range(2):
        submit(queue)
    with pytest.raises(QueueFull, match="in 8 s") as caught:
        submit(queue)
    assert caught.value.retry_after == 8  # 3 jobs of 2.55 s
    work.end.set()


def test_a_job_is_told_to_stop_and_others_are_not(queue):
    work = Work()
    running, waiting = submit(queue, work), submit(queue)
    assert work.begun.wait(SECONDS)
    queue.cancel(running)
    assert running.stop.is_set()
    assert not waiting.stop.is_set()
    work.end.set()
    waiting.result.result(SECONDS)


def test_a_job_that_fails_tells_its_own_client_alone(queue):
    def fail():
        raise KeyError("a fault")

    failed, next_one = submit(queue, fail), submit(queue)
    with pytest.raises(KeyError, match="a fault"):
        failed.result.result(SECONDS)
    next_one.result.result(SECONDS)


def test_a_closed_queue_cancels_what_waits_and_takes_no_more(queue):
    work = Work()
    running, waiting = submit(queue, work), submit(queue)
    assert work.begun.wait(SECONDS)
    queue.close()
    assert running.stop.is_set()
    with pytest.raises(Cancelled):
        waiting.result.result(SECONDS)
    with pytest.raises(Cancelled):
        submit(queue)
    work.end.set()
    queue.join()
    until(lambda: queue.running == 0)
