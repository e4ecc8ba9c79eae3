"""What exporting a generator at full size takes: `python -m tintype_bench.full_size sd15 sdxl --json F`.

Random weights in the published shapes. For each precision: the graphs, then every stage once on each backend, then the
engines, each in a process of its own; seconds, most memory, and bytes on disk. No picture is compared: the bundles are
thrown away, and what a model's own weights do is verified where one is exported.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tintype.steps import STEPS
from tintype_bench.cases import Case
from tintype_bench.conditions import conditions
from tintype_bench.sources import Sources, default_folder

PRECISIONS = ("fp16", "bf16", "int8", "fp8", "int4")
BACKENDS = ("onnxruntime", "openvino")
GPUS = ("sm_89", "sm_120")
_SIDES = {"sd15": 512, "sdxl": 1024, "sd3-medium": 1024, "karlo": 256}
_GRAPHS = "engine_graphs.json"


@dataclass(frozen=True)
class Figure:
    """One process: what it did, how long that took, the most that it had in memory, and what it left on disk."""

    model: str
    precision: str
    what: str
    seconds: float | None = None
    peak_megabytes: float | None = None
    bytes: int | None = None
    error: str = ""


def main() -> None:
    """Measure, print each figure as it comes, and write all of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="+", choices=sorted(_SIDES))
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--backend", nargs="*", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--gpu", nargs="*", default=GPUS, help="engines for these; none at all")
    parser.add_argument("--json", type=Path, required=True, metavar="F")
    parser.add_argument("--cache", type=Path, default=default_folder(), metavar="DIR")
    parser.add_argument("--task", help=argparse.SUPPRESS)  # of a process that this one started
    options = parser.parse_args()
    if options.task:
        print(json.dumps(_TASKS[options.task](json.loads(options.json.read_text()))))
        return
    known = json.loads(options.json.read_text())["figures"] if options.json.is_file() else []
    figures = {(f["model"], f["precision"], f["what"]): f for f in known}
    for figure in _figures(options):
        print(json.dumps(asdict(figure)), flush=True)
        figures[figure.model, figure.precision, figure.what] = asdict(figure)
        report = {"conditions": conditions(), "figures": list(figures.values())}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _figures(options: argparse.Namespace) -> Iterator[Figure]:
    for model in options.model:
        side = _SIDES[model]
        case = Case(model, side, side, 1, 1, 5.0, ())
        checkpoint = Sources(options.cache.absolute()).work(case).checkpoint
        for precision in options.precision:
            bundle = options.cache.absolute() / "full-size" / f"{model}-{precision}"
            yield from _of_bundle(model, precision, side, checkpoint, bundle, options)
            for folder in (bundle, bundle.with_suffix(".engines")):
                shutil.rmtree(folder, ignore_errors=True)


def _of_bundle(
    model: str,
    precision: str,
    side: int,
    checkpoint: str,
    bundle: Path,
    options: argparse.Namespace,
) -> Iterator[Figure]:
    told = {"checkpoint": checkpoint, "bundle": str(bundle), "precision": precision, "side": side}
    for folder in (bundle, bundle.with_suffix(".engines")):
        shutil.rmtree(folder, ignore_errors=True)
    exported = _apart("export", told, options.json)
    yield Figure(model, precision, "export", **exported)
    if "error" in exported:
        return
    for backend in options.backend:
        outcome = _apart("run", {**told, "backend": backend}, options.json)
        yield Figure(model, precision, f"one step on {backend}", **outcome)
    for gpu in options.gpu:
        outcome = _apart("engines", {**told, "gpu": gpu}, options.json)
        yield Figure(model, precision, f"engines for {gpu}", **outcome)


def _apart(task: str, told: Mapping[str, Any], report: Path) -> dict[str, Any]:
    """The outcome of a task in a process of its own."""
    order = report.with_suffix(".task.json")
    order.write_text(json.dumps(told), encoding="utf-8")
    command = [sys.executable, "-m", "tintype_bench.full_size", "sd15", "--task", task]
    done = subprocess.run(
        [*command, "--json", str(order)], capture_output=True, text=True, check=False
    )
    order.unlink()
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"ended with {done.returncode}"]
        return {"error": last[0][:400]}
    outcome: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return outcome


def _export(told: Mapping[str, Any]) -> dict[str, Any]:
    """The graphs of every stage over one set of weights; then, not timed, those that engines are built from."""
    from tintype.bundle import save_manifest
    from tintype.checkpoints import open_checkpoint
    from tintype_export.bundle import ExportConfig, engine_graphs, quantisation, write_bundle
    from tintype_export.calibration import PROMPTS, Calibration

    # One step of one prompt gives every layer its ranges, which is all that shapes and times depend on.
    few = Calibration(PROMPTS[:1], steps=1, rows=256, shown=1)
    config = ExportConfig(((told["side"],) * 2,), told["precision"], calibration=few)
    checkpoint, folder = open_checkpoint(Path(told["checkpoint"])), Path(told["bundle"])
    folder.mkdir(parents=True)
    begin = time.perf_counter()
    quantised = quantisation(checkpoint, config, _tell)
    _, bundle = write_bundle(checkpoint, folder, config, quantised, _tell)
    save_manifest(bundle)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    outcome = _outcome(begin, size)
    for_engines, folder = replace(config, target="tensorrt"), folder.with_suffix(".engines")
    folder.mkdir()
    store, bundle = write_bundle(checkpoint, folder, for_engines, quantised, _tell)
    graphs = engine_graphs(checkpoint, store, bundle, for_engines, _tell)
    (folder / _GRAPHS).write_text(json.dumps(graphs), encoding="utf-8")
    return outcome


def _run(told: Mapping[str, Any]) -> dict[str, Any]:
    """Every stage of one guided step of one picture: loaded, run once, and let go."""
    import numpy as np

    from tintype.bundle import open_bundle
    from tintype.checkpoints import open_checkpoint
    from tintype.loading import bundle_pipeline
    from tintype_export.profiles import example_inputs

    bundle = open_bundle(Path(told["bundle"]), check_hashes=False)
    checkpoint = open_checkpoint(Path(told["checkpoint"]))
    begin = time.perf_counter()
    for stage in _stages(bundle.stages):
        profile = next(iter(bundle.stages[stage]))
        backend = bundle_pipeline(bundle, told["backend"]).family.backend
        inputs = example_inputs(checkpoint, _inputs(checkpoint, stage), stage, profile)
        outputs = backend.run(stage, profile, inputs)
        if not all(np.isfinite(each).all() for each in outputs.values()):
            raise ValueError(f"{stage} gave NaN or infinity")
    return _outcome(begin)


def _engines(told: Mapping[str, Any]) -> dict[str, Any]:
    """An engine of every stage for one GPU, one after the other; none is kept."""
    from tintype_export.tensorrt import build_engines

    root = Path(told["bundle"]).with_suffix(".engines")
    graphs = json.loads((root / _GRAPHS).read_text(encoding="utf-8"))
    begin, size = time.perf_counter(), 0
    for stage in _stages(graphs):
        profile, graph = next(iter(graphs[stage].items()))
        entry = build_engines(root, {stage: {profile: graph}}, [told["gpu"]], _tell)
        engine = root / entry[told["gpu"]]["stages"][stage][profile]
        size += engine.stat().st_size
        engine.unlink()
    return _outcome(begin, size)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _stages(stages: Iterable[str]) -> list[str]:
    """Of what a model has the last, which guides where that is possible: the others read the same weights, in other
    shapes."""
    last = {STEPS[name].model if name in STEPS else name: name for name in stages}
    return list(last.values())


def _inputs(checkpoint: Any, stage: str) -> tuple[str, ...]:
    """The names of what a stage takes; the module is made of nothing."""
    import torch

    from tintype.models.stages import build_stage

    with torch.device("meta"):
        module = build_stage(
            stage, checkpoint.components, lambda part: checkpoint.skeleton(part, torch.float32)
        )
    return module.inputs


def _outcome(begin: float, size: int | None = None) -> dict[str, Any]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {"seconds": time.perf_counter() - begin, "peak_megabytes": peak, "bytes": size}


_TASKS = {"export": _export, "run": _run, "engines": _engines}


if __name__ == "__main__":
    main()
