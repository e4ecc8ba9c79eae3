"""Kills an export at random moments, as its own process because it forks: FOLDER KILLS. Prints what was left each time.

Odd kills have an older bundle in the target's place. Tracing, which touches no file, has been done before, into
FOLDER/traces, so that the kills fall on what surrounds it: copying, writing, verifying, renaming.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import onnxruntime  # noqa: F401 - imported before the forks rather than in each
import torch

from remembered_traces import load_traces, remembered_trace
from small_checkpoints import save_smallest
from tintype.bundle import is_bundle, open_bundle
from tintype_export import bundle as exporting

CONFIG = exporting.ExportConfig(sizes=((16, 16),), defaults={"width": 16, "height": 16})


def begin(source: Path, target: Path) -> int:
    """Export in a process of its own."""
    process = os.fork()
    if process == 0:
        try:
            exporting.export_bundle(source, target, CONFIG)
        finally:
            os._exit(0)
    return process


def main(folder: Path, kills: int) -> None:
    torch.set_num_threads(1)
    source, older, room = save_smallest(folder / "checkpoint"), folder / "older", folder / "room"
    exporting.trace = remembered_trace
    load_traces(folder / "traces")
    began = time.perf_counter()
    os.waitpid(begin(source, older), 0)
    whole = time.perf_counter() - began
    rng, target = random.Random(0), room / "bundle"
    for kill in range(kills):
        shutil.rmtree(target, ignore_errors=True)
        if kill % 2:
            shutil.copytree(older, target)
        process = begin(source, target)
        time.sleep(rng.uniform(0, 1.1 * whole))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        left = "none"
        if is_bundle(target):
            open_bundle(target, remember=False)  # raises where half of one is there
            left = "whole"
        hidden = room.is_dir() and any(path.name.startswith(".") for path in room.iterdir())
        print("left", left, "hidden" if hidden else "", flush=True)
    os.waitpid(begin(source, target), 0)
    open_bundle(target, remember=False)
    print("names", *sorted(path.name for path in room.iterdir()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
