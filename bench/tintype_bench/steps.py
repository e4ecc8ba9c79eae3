"""Where a step's time goes on a GPU: `python -m tintype_bench.steps sd15 sdxl --precision bf16 fp8 --json F`.

A shape's denoiser with the sampler's step around it, as pictures are made of: one picture, guided where the model
guides, random weights that are never written; `--stage decode` times what is behind the last step. Of unCLIP a step is
its decoder's, and decoding one step of what enlarges. A row has the time of a call, of a walk of
calls that nobody waits for between; what its kernels took by the GPU's own record; and the kernels that took most. What
texts and times tell is worked out once a picture and is in no step. `--execution` as for `tintype.load`.

`--stage picture` times whole pictures instead, text to pixels, at the shape's first published setting.

`--peer eager compiled` adds diffusers' denoiser alone, in bfloat16 on the same weights and inputs, whose rows have the
decibels by which the outputs agree. A row that is in F is left alone, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch

from tintype.backends import Arrays
from tintype.backends.torch import TorchBackend
from tintype.checkpoints import Checkpoint
from tintype.errors import TintypeError
from tintype.loading import checkpoint_pipeline
from tintype.profiles import Profile
from tintype.steps import STEPS
from tintype_bench.agreement import agreement_db
from tintype_bench.cases import GENERATORS, of_shape, tiny
from tintype_bench.conditions import conditions
from tintype_bench.random_weights import unwritten
from tintype_bench.runners.own import OwnPictures
from tintype_bench.shapes import SHAPES, find_shape
from tintype_bench.spread import spread
from tintype_bench.work import Work
from tintype_export.profiles import example_inputs
from tintype_kernels.cache import replace_text

Row = dict[str, Any]
_STAGES = ("step", "decode", "picture")
_PEER = {"stage": "denoise", "precision": "bf16"}
_PEERS = {"eager": "diffusers", "compiled": "diffusers-compiled"}  # their executions in rows
_KEPT = 40  # kernels of a row
_NAME = 110  # characters of a kernel's


def measure(
    checkpoint: Checkpoint, shape: str, precision: str, stage: str, options: argparse.Namespace
) -> Row:
    """One row; a precision that fails says why in its place."""
    row: Row = {"shape": shape, "stage": stage, "precision": precision}
    row["execution"] = options.execution
    try:
        if stage == "picture":
            return row | _drawn(checkpoint, shape, precision, options)
        return row | _timed(_call(checkpoint, shape, precision, stage, options), options)
    except (TintypeError, RuntimeError) as error:
        return row | _failure(error)


def measure_peer(checkpoint: Checkpoint, shape: str, peer: str, options: argparse.Namespace) -> Row:
    """The row of diffusers' denoiser, eager or compiled; the second says how long its first call took."""
    from tintype_bench.runners.diffusers_denoiser import denoiser

    row: Row = {"shape": shape, **_PEER, "execution": _PEERS[peer]}
    compiled = peer == "compiled"
    try:
        arrays, own = _own_output(checkpoint, shape, options.device)
        placed = {name: torch.from_numpy(a).to(options.device) for name, a in arrays.items()}
        with denoiser(checkpoint, options.device, torch.bfloat16, compiled=compiled) as theirs:
            begin = time.perf_counter()
            output = theirs(placed).float().cpu().numpy()
            if compiled:
                row["compile_seconds"] = time.perf_counter() - begin
            row["agreement_db"] = agreement_db(output, own, Work("", 0, 0, component="denoise"))
            return row | _timed(lambda: theirs(placed), options)
    except (TintypeError, RuntimeError) as error:
        return row | _failure(error)


def _own_output(checkpoint: Checkpoint, shape: str, device: str) -> tuple[Arrays, Any]:
    """Inputs of the denoiser, and what ours makes of them; ours is gone before theirs comes."""
    backend = TorchBackend(checkpoint, device=device, dtype="bf16")
    profile = _profile(checkpoint, 2 if _guides(checkpoint, shape) else 1)
    arrays = example_inputs(checkpoint, backend.inputs("denoise"), "denoise", profile)
    if "guidance" in arrays:  # times 1000 in bfloat16, in which diffusers counts it, 3.5 is 3504
        arrays["guidance"][:] = 4
    return arrays, backend.run("denoise", profile, arrays)["model_output"]


def _failure(error: Exception) -> Row:
    return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}


def _drawn(checkpoint: Checkpoint, shape: str, precision: str, options: argparse.Namespace) -> Row:
    """What pictures take, after one that loads and prepares what they need."""
    case = tiny(of_shape(shape)) if options.tiny else of_shape(shape)
    work = Work("", case.width, case.height, steps=case.steps, guidance=case.guidance)
    how = {"device": options.device, "dtype": precision, "execution": options.execution}
    pictures = OwnPictures(checkpoint_pipeline(checkpoint, "torch", **how), work)
    pictures.run()
    milliseconds, stages = [], []
    for _ in range(options.pictures):
        begin = time.perf_counter()
        stages.append(pictures.stages())  # draws one, too
        milliseconds.append(1e3 * (time.perf_counter() - begin))
    found = spread(milliseconds)
    return {
        "milliseconds": found.median,
        "quartiles": [found.lower, found.upper],
        "pictures": found.count,
        "stage_seconds": {
            name: statistics.median(each[name] for each in stages) for name in stages[0]
        },
        "width": work.width,
        "height": work.height,
        "steps": work.steps,
        "guidance": work.guidance,
        "prompt": work.prompt,
        "seed": work.seed,
    }


def _timed(step: Callable[[], Any], options: argparse.Namespace) -> Row:
    for _ in range(3):
        step()
    seconds = _seconds(step, options.steps, options.device)
    kernels = _kernels(step, options.device)
    busy = sum(spent for spent, _ in kernels.values())
    most = sorted(kernels.items(), key=lambda item: -item[1][0])[:_KEPT]
    return {
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
    if stage == "step" and _guides(checkpoint, shape):
        stage = "guided_step"
    stage = stage if stage in backend.stages else "enlarge_step"
    profile = _profile(checkpoint, 1)
    names = backend.inputs(stage)
    arrays = example_inputs(checkpoint, names, stage, profile)
    placed: Mapping[str, Any] = {name: backend.place(array) for name, array in arrays.items()}
    if stage in STEPS:  # as a picture of one step
        placed = backend.foretold(placed, arrays["row"][:1, 0])
    return lambda: backend.run_placed(stage, profile, placed)


def _guides(checkpoint: Checkpoint, shape: str) -> bool:
    """Whether a step runs a second row; FLUX is told its guidance."""
    setting = next(each for each in GENERATORS if each.shape == shape)
    return setting.guidance > 1 and checkpoint.family != "flux"


def _profile(checkpoint: Checkpoint, rows: int) -> str:
    return Profile(checkpoint.defaults["width"], checkpoint.defaults["height"], rows).name


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
    start = f"{row['shape']:14} {row['stage']:7} {row['precision']:5} {row['execution']:18}"
    if "failed" in row:
        return f"{start} {row['failed']}"
    told = _picture_told(row) if row["stage"] == "picture" else _call_told(row)
    return f"{start} {row['milliseconds']:9.3f} ms{told}"


def _picture_told(row: Row) -> str:
    lower, upper = row["quartiles"]
    stages = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in row["stage_seconds"].items())
    return f" ({lower:.1f} to {upper:.1f}), {row['steps']} steps, guidance {row['guidance']:g}: {stages}"


def _call_told(row: Row) -> str:
    whole, busy = row["milliseconds"], row["kernel_milliseconds"]
    agrees = f", {row['agreement_db']:.0f} dB" if "agreement_db" in row else ""
    after = f", compiled in {row['compile_seconds']:.0f} s" if "compile_seconds" in row else ""
    lines = [f", {busy:9.3f} in kernels ({busy / whole:.1%}){agrees}{after}"]
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
    parser.add_argument("--stage", nargs="+", default=["step"], choices=_STAGES)
    parser.add_argument("--execution", default="graph", choices=["eager", "compiled", "graph"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=20, help="calls in a row that are timed")
    parser.add_argument("--pictures", type=int, default=3, metavar="N", help="that are timed")
    parser.add_argument(
        "--peer", nargs="+", default=[], choices=_PEERS, help="time diffusers' denoiser, too"
    )
    parser.add_argument("--tiny", action="store_true", help="few narrow layers, to try this out")
    parser.add_argument("--json", type=Path, metavar="F")
    options = parser.parse_args()
    kept = options.json is not None and options.json.is_file()
    rows: list[Row] = json.loads(options.json.read_text(encoding="utf-8"))["rows"] if kept else []
    for shape in options.shape:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = unwritten(find_shape(shape, tiny=options.tiny), Path(folder, shape))
            for row in _rows(checkpoint, shape, options, {_key(row) for row in rows}):
                rows.append(row)
                print(line(row), flush=True)
                if options.json:
                    report = {"conditions": conditions(), "rows": rows}
                    replace_text(options.json, json.dumps(report, indent=1) + "\n")


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("shape", "stage", "precision", "execution"))


def _rows(
    checkpoint: Checkpoint, shape: str, options: argparse.Namespace, known: set[tuple[Any, ...]]
) -> Iterator[Row]:
    for precision, stage in product(options.precision, options.stage):
        if (shape, stage, precision, options.execution) not in known:
            yield measure(checkpoint, shape, precision, stage, options)
            _release(options.device)
    for peer in options.peer:
        if (shape, *_PEER.values(), _PEERS[peer]) not in known:
            yield measure_peer(checkpoint, shape, peer, options)
            _release(options.device)


def _release(device: str) -> None:
    """Give back what a row held, models in cycles of references too."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
