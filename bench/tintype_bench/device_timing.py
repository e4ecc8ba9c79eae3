"""One timer for kernels. On CUDA: events around a replayed graph, which leaves out what no engine pays either."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from tintype_bench.spread import Spread, spread
from tintype_kernels.replay_times import replay_times

COPY_BYTES = 2**30


def time_call(
    call: Callable[[], Any], device: str, runs: int, *, longest: float = math.inf
) -> Spread:
    """Microseconds of `runs` calls after two to warm up; on a CPU of fewer, once they took `longest` seconds."""
    for _ in range(2):
        call()
    return spread(replay_times(call, runs) if device == "cuda" else _cpu(call, runs, longest))


def _cpu(call: Callable[[], Any], runs: int, longest: float) -> list[float]:
    found = [_wall(call)]
    while len(found) < runs and sum(found) < 1e6 * longest:
        found.append(_wall(call))
    return found


def _wall(call: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - begun)


def copy_bandwidth(device: str, runs: int) -> float:
    """Bytes a second, read and written, from one large tensor to another: the limit that others are held to."""
    moved = 2 * (COPY_BYTES if device == "cuda" else COPY_BYTES // 32)
    return moved / (copy_microseconds(moved, device, runs) * 1e-6)


@cache
def copy_microseconds(moved: int, device: str, runs: int) -> float:
    """What reading and writing as many bytes takes together, so timed, launch and latencies included.

    Of the library's copy and of a kernel that reads and writes as much the faster one: a copy in a graph of an H200
    was seen at 2.8 TB/s, and kernels beyond it.
    """
    source, target = (torch.ones(max(1, moved // 8), device=device) for _ in range(2))
    ways = [lambda: target.copy_(source), lambda: torch.add(source, 1, out=target)]
    return min(time_call(way, device, runs).median for way in ways)
