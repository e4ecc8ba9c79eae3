"""The jobs that wait, and the thread that runs them one by one: a picture takes all cores, or the GPU, as it is."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

from tintype.errors import Cancelled, TintypeError
from tintype.pipeline import Output

_REMEMBERED = 8  # jobs, by which the next ones' seconds are guessed


class QueueFull(TintypeError):
    """No place is left to wait in; one may be found after `retry_after` seconds."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(
            f"{waiting} requests wait already, which is as many as may; try again in {retry_after} s"
        )
        self.retry_after = retry_after


@dataclass(eq=False)
class Job:
    """Work that looks at `stop` from time to time, and its result once there is one."""

    work: Callable[[], Output]
    stop: threading.Event
    result: Future[Output] = field(default_factory=Future)
    submitted: float = field(default_factory=time.perf_counter)
    waited: float = 0.0


class Queue:
    """Runs jobs in the order in which they came; besides the one that runs, up to `places` wait."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._closed = False
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="pictures", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many jobs wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many jobs run: 0 or 1."""
        return int(self._running is not None)

    def submit(self, work: Callable[[], Output], stop: threading.Event) -> Job:
        """Let the work wait for its turn; raises QueueFull where there is no place for it."""
        job = Job(work, stop)
        with self._changed:
            if self._closed:
                raise Cancelled("the server is stopping")
            if self.waiting + self.running > self._places:
                raise QueueFull(self.waiting, self._seconds_until_idle())
            self._waiting.append(job)
            self._changed.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Take a job out, or let it stop by itself where it runs."""
        with self._changed:
            job.stop.set()
            if job in self._waiting:
                self._waiting.remove(job)
                job.result.set_exception(Cancelled("the request was cancelled while it waited"))

    def close(self) -> None:
        """Cancel all jobs and take no more."""
        with self._changed:
            self._closed = True
            for job in [*self._waiting, *([self._running] if self._running else [])]:
                self.cancel(job)
            self._changed.notify()

    def join(self) -> None:
        """Wait for the last job of a closed queue to end."""
        self._thread.join()

    def _seconds_until_idle(self) -> int:
        mean = sum(self._seconds) / len(self._seconds) if self._seconds else 0.0
        return max(1, math.ceil(mean * (self.waiting + self.running)))

    def _run(self) -> None:
        while self._run_next():
            pass

    def _run_next(self) -> bool:
        """Run one job, once there is one; False when the queue is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return False
            job = self._running = self._waiting.popleft()
            job.result.set_running_or_notify_cancel()
        settle = self._settled(job)
        with self._changed:
            self._running = None
        settle()  # last, so that whoever hears of it finds a queue in which its place is free
        return True

    def _settled(self, job: Job) -> Callable[[], None]:
        """Do the work; what is returned tells how it went."""
        begin = time.perf_counter()
        job.waited = begin - job.submitted
        try:
            output = job.work()
        except Exception as error:  # a job that fails takes nobody else's with it
            return partial(job.result.set_exception, error)
        self._seconds.append(time.perf_counter() - begin)
        return partial(job.result.set_result, output)
