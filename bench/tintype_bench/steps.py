"""Where a step's time goes on a GPU: `python -m tintype_bench.steps sd15 sdxl --precision bf16 fp8 --json F`.

A shape's denoiser with the sampler's step around it, as pictures are made of: one picture, guided where the model
guides, random weights that are never written; `--stage decode` times what is behind the last step. A row has the time
of a call, of a walk of calls that nobody waits for between; what its kernels took by the GPU's own record; and the
kernels that took most. What is left between is the host's doing. `--execution` as for `tintype.load`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch

from tintype.backends.torch import TorchBackend
from tintype.checkpoints import Checkpoint
from tintype.errors import TintypeError
from tintype.profiles import Profile
from tintype_bench.cases import GENERATORS
from tintype_bench.conditions import conditions
from tintype_bench.random_weights import unwritten
from tintype_bench.shapes import SHAPES, find_shape
from tintype_export.profiles import example_inputs
from tintype_kernels.cache import replace_text

Row = dict[str, Any]
_KEPT = 25  # kernels of a row
_NAME = 110  # characters of a kernel's


def measure(
    checkpoint: Checkpoint, shape: str, precision: str, stage: str, options: argparse.Namespace
) -> Row:
    """One row; a precision that fails says why in its place."""
    row: Row = {"shape": shape, "stage": stage, "precision": precision}
    row["execution"] = options.execution
    try:
        step = _call(checkpoint, shape, precision, stage, options)
        for _ in range(3):
            step()
        seconds = _seconds(step, options.steps, options.device)
        kernels = _kernels(step, options.device)
    except (TintypeError, RuntimeError) as error:
        return row | {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    busy = sum(spent for spent, _ in kernels.values())
    most = sorted(kernels.items(), key=lambda item: -item[1][0])[:_KEPT]
    return row | {
        "milliseconds": 1e3 * seconds,
        "kernel_milliseconds": busy,
        "kernels": [
            {"name": name[:_NAME], "milliseconds": spent, "calls": calls}
            for name, (spent, calls) in most
        ],
    }


def _call(
    checkpoint: Checkpoint, shape: str, precision: str, stage: str, options: argparse.Namespace
) -> Callable[[], Any]:
    """What takes the latents one step on, or decodes them."""
    backend = TorchBackend(
        checkpoint, device=options.device, dtype=precision, execution=options.execution
    )
    setting = next(each for each in GENERATORS if each.shape == shape)
    if stage == "step" and setting.guidance > 1 and checkpoint.family != "flux":
        stage = "guided_step"
    defaults = checkpoint.defaults
    size = (defaults["width"], defaults["height"])
    profile = Profile(*size, 1).name
    names = backend.inputs(stage)
    arrays = example_inputs(checkpoint, names, stage, profile)
    placed = {name: backend.place(array) for name, array in arrays.items()}
    return lambda: backend.run_placed(stage, profile, placed)


def _seconds(step: Callable[[], Any], count: int, device: str) -> float:
    """Of one step, of `count` in a row."""
    _finish(device)
    begin = time.perf_counter()
    for _ in range(count):
        step()
    _finish(device)
    return (time.perf_counter() - begin) / count


def _finish(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _kernels(step: Callable[[], Any], device: str) -> dict[str, tuple[float, int]]:
    """Milliseconds and calls of every kernel of one step, those of a replayed graph too; of a CPU, its operators'."""
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CPU if device == "cpu" else ProfilerActivity.CUDA
    with profile(activities=[activity]) as record:
        step()
        _finish(device)
    found: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for event in record.key_averages():
        spent = event.self_cpu_time_total if device == "cpu" else event.self_device_time_total
        before, calls = found[event.key]
        found[event.key] = (before + spent / 1e3, calls + event.count)
    return dict(found)


def line(row: Row) -> str:
    """The row, and below it the kernels that take most."""
    start = f"{row['shape']:14} {row['stage']:6} {row['precision']:5} {row['execution']:9}"
    if "failed" in row:
        return f"{start} {row['failed']}"
    whole, busy = row["milliseconds"], row["kernel_milliseconds"]
    lines = [f"{start} {whole:9.3f} ms, {busy:9.3f} in kernels ({busy / whole:.1%})"]
    lines += [
        f"    {each['milliseconds']:8.3f} ms {each['milliseconds'] / busy:6.1%} {each['calls']:5} {each['name']}"
        for each in row["kernels"]
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure each shape in each precision, and write each row as it comes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shape", nargs="+", choices=sorted(SHAPES))
    parser.add_argument("--precision", nargs="+", default=["bf16"], metavar="P")
    parser.add_argument("--stage", nargs="+", default=["step"], choices=["step", "decode"])
    parser.add_argument("--execution", default="graph", choices=["eager", "compiled", "graph"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=20, help="calls in a row that are timed")
    parser.add_argument("--tiny", action="store_true", help="few narrow layers, to try this out")
    parser.add_argument("--json", type=Path, metavar="F")
    options = parser.parse_args()
    rows: list[Row] = []
    for shape in options.shape:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = unwritten(find_shape(shape, tiny=options.tiny), Path(folder, shape))
            for precision, stage in product(options.precision, options.stage):
                rows.append(measure(checkpoint, shape, precision, stage, options))
                print(line(rows[-1]), flush=True)
                if options.json:
                    report = {"conditions": conditions(), "rows": rows}
                    replace_text(options.json, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
