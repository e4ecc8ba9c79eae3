"""What a call takes where a CUDA graph replays it: without Python, and with nothing in the second-level cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Beyond every GPU's second-level cache, and long enough to hide the next launch.
FLUSH_BYTES = 512 * 2**20


def replay_times(call: Callable[[], Any], runs: int) -> list[float]:
    """Microseconds of each of `runs` replays of the call, which has run before and so has nothing left to compile."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        call()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    make: Any = torch.cuda.Event
    events = [[make(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for begun, ended in events:
        flush.zero_()
        begun.record()
        graph.replay()
        ended.record()
    torch.cuda.synchronize()
    return [1000 * begun.elapsed_time(ended) for begun, ended in events]
