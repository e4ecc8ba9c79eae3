"""A fixed piece of work that uses nothing of ours: how long it takes tells how fast the machine is at the moment."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tintype_bench.runners import Pictures, Running
from tintype_bench.work import Runner, Work

# Side of the products, bytes of the copies: together some 50 ms on two cores.
_SIZES = {"cpu": (1024, 1 << 26), "cuda": (8192, 1 << 29)}
_PRODUCTS, _COPIES = 4, 2


def load(work: Work, runner: Runner) -> Running:
    """The work of a probe is its own, whatever the case."""
    return Machine(runner.device)


class Machine:
    """Square products in float32 (on a GPU bfloat16), and copies that no cache holds; each on all cores."""

    def __init__(self, device: str) -> None:
        side, count = _SIZES[device]
        self._device = device
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self._factor = torch.ones(side, side, dtype=dtype, device=device)
        self._source, self._target = (
            torch.ones(count, dtype=torch.int8, device=device) for _ in range(2)
        )

    def run(self) -> Pictures:
        self.stages()
        return np.empty(0, np.float32)

    def stages(self) -> dict[str, float]:
        return {
            "product": self._seconds(lambda: self._factor @ self._factor, _PRODUCTS),
            "copy": self._seconds(lambda: self._target.copy_(self._source), _COPIES),
        }

    def _seconds(self, call: Callable[[], Any], times: int) -> float:
        begin = time.perf_counter()
        for _ in range(times):
            call()
        if self._device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - begin
