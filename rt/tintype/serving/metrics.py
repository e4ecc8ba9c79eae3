"""What a server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tintype.pipeline import Output
from tintype.serving.queue import Job, Queue

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Metrics:
    """One server's figures, in a registry of their own."""

    def __init__(self, queue: Queue) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "tintype_requests",
            "Requests by route and status; 499 is a client that went away.",
            ["route", "status"],
            registry=self._registry,
        )
        self.cancelled = Counter(
            "tintype_jobs_cancelled",
            "Jobs whose client went away before they were done.",
            registry=self._registry,
        )
        self._pictures = Counter("tintype_pictures", "Pictures made.", registry=self._registry)
        self._seconds = Histogram(
            "tintype_stage_seconds",
            "Seconds of a job by stage, and in the queue before it.",
            ["stage"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        waiting = Gauge("tintype_jobs_waiting", "Jobs that wait.", registry=self._registry)
        waiting.set_function(lambda: queue.waiting)
        running = Gauge("tintype_jobs_running", "Jobs that run.", registry=self._registry)
        running.set_function(lambda: queue.running)

    def made(self, job: Job, output: Output) -> None:
        """Count a job that is done."""
        self._pictures.inc(len(output.images))
        for stage, seconds in {"queue": job.waited, **output.timings}.items():
            self._seconds.labels(stage).observe(seconds)

    def text(self) -> bytes:
        """All figures as `GET /metrics` sends them."""
        return generate_latest(self._registry)
