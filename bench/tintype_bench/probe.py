"""The machine's own pace, read again and again while a suite runs: what everybody's times share.

A probe is one process for a whole suite, so its readings differ by what the machine does and by nothing else. Their
changes are told beside the figures, as noise and in comparisons; no figure is ever corrected by them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType

from tintype_bench.protocol import WorkerProcess
from tintype_bench.spread import Reading
from tintype_bench.work import Runner, Work

_BLOCK = 1.0  # seconds of readings, of which one median is kept
_AGREEING = 5  # blocks in a row
_TOLERANCE = 0.03
_LIMIT = 30.0  # seconds


@dataclass(frozen=True)
class Settling:
    """A machine's warm-up: the median of every block in seconds, how long it took, and whether the last ones agreed."""

    medians: list[float]
    seconds: float
    steady: bool


def settle(read: Callable[[], float], clock: Callable[[], float] = time.monotonic) -> Settling:
    """Keep the machine at work until block after block takes as long, or the limit comes."""
    begin, medians, steady = clock(), list[float](), False
    while not steady and clock() - begin < _LIMIT:
        medians.append(_block(read, clock))
        last = medians[-_AGREEING:]
        steady = len(last) == _AGREEING and max(last) <= (1 + _TOLERANCE) * min(last)
    return Settling(medians, clock() - begin, steady)


def _block(read: Callable[[], float], clock: Callable[[], float]) -> float:
    begin, readings = clock(), [read()]
    while clock() - begin < _BLOCK:
        readings.append(read())
    return statistics.median(readings)


class Probe:
    """Reads the machine's pace in a process that starts with the first reading."""

    def __init__(self, device: str) -> None:
        self._runner = Runner("machine", device=device)

    @cached_property
    def _worker(self) -> WorkerProcess:
        worker = WorkerProcess(self._runner)
        worker.load(Work("", 0, 0))
        return worker

    def read(self) -> Reading:
        """Seconds of each part of the work, done once."""
        reading: Reading = self._worker.ask("stages")["stages"]
        return reading

    def settle(self) -> Settling:
        """Warm the machine up."""
        return settle(lambda: sum(self.read().values()))

    def __enter__(self) -> Probe:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if "_worker" in vars(self):
            self._worker.close()
