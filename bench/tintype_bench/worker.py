"""One runner in a process of its own, told over a pipe what to do: `python -m tintype_bench.worker`.

A request is a line of JSON on stdin, {"do": VERB, ...}; the answer is a line on stdout, {"error": ...} where it failed:

    load     work, runner      -> seconds, and what `run` says, of the first run: whatever is compiled is compiled here
    output   path              -> the first run's pictures are written there as .npy
    run                        -> seconds, and joules and the clock in mhz where the driver tells
    stages                     -> seconds of one more run, and of each stage in it
    peak                       -> most memory used so far, host and device, in megabytes
    quit

A command of `--peer-cmd` that speaks this is kept loaded between runs, as ours are; see `protocol`.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, TextIO

import numpy as np

from tintype_bench import nvml
from tintype_bench.runners import Pictures, Running, make

Answer = dict[str, Any]


class Worker:
    """The verbs, as methods."""

    def __init__(self) -> None:
        self._running: Running | None = None
        self._first: Pictures | None = None
        self._on_gpu = False

    def load(self, work: dict[str, Any], runner: dict[str, Any]) -> Answer:
        begin = time.perf_counter()
        self._on_gpu = runner["device"] != "cpu"
        self._running = make({"work": work, "runner": runner})
        loaded = time.perf_counter() - begin
        self._first, seconds, _ = self._timed()
        return {"seconds": loaded, "first_seconds": seconds}

    def output(self, path: str) -> Answer:
        if self._first is None:
            raise RuntimeError("output was asked for before load")
        np.save(path, self._first)
        self._first = None
        return {}

    def run(self) -> Answer:
        _, seconds, joules = self._timed()
        return {"seconds": seconds, "joules": joules, "mhz": nvml.clock() if self._on_gpu else None}

    def stages(self) -> Answer:
        running = self._loaded()
        begin = time.perf_counter()
        stages = running.stages()
        return {"stages": stages, "seconds": time.perf_counter() - begin}

    def peak(self) -> Answer:
        return {"host": _host_peak(), "device": _device_peak() if self._on_gpu else None}

    def _loaded(self) -> Running:
        if self._running is None:
            raise RuntimeError("load comes first")
        return self._running

    def _timed(self) -> tuple[Pictures, float, float | None]:
        """Every runner ends with its result in host memory, so that the device has finished when the clock is read."""
        running = self._loaded()
        spent = nvml.energy() if self._on_gpu else None
        begin = time.perf_counter()
        result = running.run()
        seconds = time.perf_counter() - begin
        after = nvml.energy() if spent is not None else None
        return result, seconds, after - spent if after is not None and spent is not None else None


def _host_peak() -> float:
    """Megabytes that the process had resident at most."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _device_peak() -> float | None:
    """Megabytes that torch held at most; engines outside torch are not seen."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return float(torch.cuda.max_memory_reserved() / 2**20)


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer every line until `quit` or the end."""
    worker = Worker()
    verbs: dict[str, Callable[..., Answer]] = {
        name: getattr(worker, name) for name in ("load", "output", "run", "stages", "peak")
    }
    for line in requests:
        request = json.loads(line)
        verb = request.pop("do")
        if verb == "quit":
            return
        try:
            answer = verbs[verb](**request)
        except Exception as error:  # the asker reports it, and the others go on
            traceback.print_exc()
            reason = str(error).strip().splitlines() or [""]
            answer = {"error": f"{type(error).__name__}: {reason[0]}"[:400]}
        print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    """Answers have a pipe of their own; whatever libraries print on stdout goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
