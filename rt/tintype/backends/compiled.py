"""Things that are slow to make, such as sessions: each made once, and shared by all threads."""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Generic, TypeVar

# What a container may fill, where it is told.
_CONTAINERS = Path("/sys/fs/cgroup/memory.max")
K = TypeVar("K")
V = TypeVar("V")


class Compiled(Generic[K, V]):
    """`make(key)` runs once a key, whoever asks first; what it raised is raised to all who waited, then tried again.

    `make` is a method of the object that holds this one, which does not hold it back: what was made, gigabytes mostly,
    goes with the object at once, and not when the garbage collector next comes by.
    """

    def __init__(self, make: Callable[[K], V]) -> None:
        self._make = weakref.WeakMethod(make)
        self._futures: dict[K, Future[V]] = {}
        self._lock = threading.Lock()

    def begin(self, key: K) -> None:
        """Make it in a thread of its own: optimising a graph is serial and holds no GIL.

        An interpreter that ends waits for the thread: a daemon would be ended inside the runtime's C++, which aborts
        the process.
        """
        self._future(key, _in_a_thread)

    def get(self, key: K) -> V:
        """The thing, made here where nobody has begun to."""
        return self._future(key, lambda work: work()).result()

    def _future(self, key: K, begin: Callable[[Callable[[], None]], None]) -> Future[V]:
        with self._lock:
            future = self._futures.get(key)
            if future is not None and not (future.done() and future.exception()):
                return future
            future = self._futures[key] = Future()
        begin(lambda: self._fulfil(future, key))
        return future

    def _fulfil(self, future: Future[V], key: K) -> None:
        try:
            if (make := self._make()) is not None:  # else nobody is left to ask for it
                future.set_result(make(key))
        except BaseException as error:  # whoever waits for it gets it, an interruption, too
            future.set_exception(error)


def _in_a_thread(work: Callable[[], None]) -> None:
    try:
        threading.Thread(target=work).start()
    except RuntimeError:
        # No more threads, or an interpreter that is ending: who asks for it shall not wait forever.
        work()


def cores() -> int:
    """The processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory() -> float:
    """The bytes of memory that this process may fill; endless where nothing tells."""
    limits = [math.inf]
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if _CONTAINERS.is_file() and (told := _CONTAINERS.read_text().strip()).isdecimal():
        limits.append(int(told))
    return min(limits)


def one_line(error: Exception) -> str:
    """What a runtime's many-lined error says, without where in its own sources it was raised."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if line and not line.startswith("Exception from"))[:400]
