"""TensorRT engines from a bundle's ONNX graphs, with `tensorrt_rtx`, which needs no GPU for it, or with `tensorrt`."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tintype.errors import BackendUnavailable, BundleError, RequestError

from .writing import gigabytes

PACKAGES = ("tensorrt_rtx", "tensorrt")
_QUIET_SECONDS = 5.0
_SIGNS_OF_NO_MEMORY = ("memory", "could not find any implementation")

Stages = Mapping[str, Mapping[str, str]]
Say = Callable[[str], None]


def tensorrt() -> Any:
    """The package that builds engines; both have the same interface."""
    for name in PACKAGES:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise BackendUnavailable(
        "target tensorrt needs the package tensorrt_rtx or tensorrt; install one with: "
        'pip install "tintype[tensorrt-rtx]" or pip install "tintype[tensorrt]"'
    )


def check_gpus(gpus: Sequence[str]) -> None:
    """Refuse a build for no GPU, or for one that the package does not know."""
    known = _capabilities(tensorrt())
    if not gpus:
        raise RequestError(
            f"target tensorrt needs --gpu, one or several of {', '.join(known)}; "
            "`nvidia-smi --query-gpu=compute_cap --format=csv` prints 8.9 for sm_89"
        )
    if unknown := [gpu for gpu in gpus if gpu not in known]:
        raise RequestError(f"gpu={unknown[0]!r} is unknown; choose from {', '.join(known)}")


def build_engines(root: Path, stages: Stages, gpus: Sequence[str], say: Say) -> dict[str, Any]:
    """Write STAGE/PROFILE.GPU.engine beside every graph; what the manifest says of them, by GPU."""
    trt = tensorrt()
    entries: dict[str, Any] = {
        gpu: {"package": trt.__name__, "version": trt.__version__, "stages": {}} for gpu in gpus
    }
    for stage, profiles in stages.items():
        for profile, graph in profiles.items():
            log = _Log(trt)
            network = _parse(trt, log, root, graph)
            for gpu in gpus:
                began = time.perf_counter()
                relative = f"{stage}/{profile}.{gpu}.engine"
                engine = _build(trt, log, network, gpu, _Progress(trt, relative, say))
                (root / relative).write_bytes(engine)
                entries[gpu]["stages"].setdefault(stage, {})[profile] = relative
                say(f"{relative}: {time.perf_counter() - began:.1f} s")
    return entries


def _capabilities(trt: Any) -> dict[str, Any]:
    """sm_89 -> what the package calls it. Only tensorrt_rtx builds for GPUs that are not there."""
    if not hasattr(trt, "ComputeCapability"):
        raise BackendUnavailable(
            f"{trt.__name__} builds for the GPU that it runs on alone; install tensorrt_rtx, which builds for others, "
            'with: pip install "tintype[tensorrt-rtx]"'
        )
    members = trt.ComputeCapability.__members__
    return {f"sm_{name[2:]}": member for name, member in members.items() if name.startswith("SM")}


def _parse(trt: Any, log: _Log, root: Path, graph: str) -> Any:
    """The network of a graph; its layers have the types that the graph says, and no others."""
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = log.builder.create_network(flags)
    parser = trt.OnnxParser(network, log.logger)
    # Weights are named relative to the bundle's root, so the graph is said to lie there.
    if parser.parse((root / graph).read_bytes(), str(root / "graph.onnx")):
        return network
    error = parser.get_error(0)
    raise BundleError(
        f"{graph}: TensorRT cannot take node {error.node_name() or error.node()} "
        f"({error.node_operator() or 'unknown operator'}): {error.desc()}"
    )


def _build(trt: Any, log: _Log, network: Any, gpu: str, progress: _Progress) -> bytes:
    config = log.builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(_capabilities(trt)[gpu], 0)
    config.clear_flag(trt.BuilderFlag.TF32)  # what says float32 is computed in it
    config.progress_monitor = progress.monitor
    log.errors.clear()
    engine = log.builder.build_serialized_network(network, config)
    if engine is None:
        reason = log.errors[0] if log.errors else "TensorRT says no reason"
        raise BundleError(
            f"{progress.name} cannot be built: {' '.join(reason.split())[:400]}{_hint(reason)}"
        )
    return bytes(engine)


def _hint(reason: str) -> str:
    """What a builder's error may mean besides what it says: without memory it finds no kernel that fits."""
    if not any(sign in reason.lower() for sign in _SIGNS_OF_NO_MEMORY):
        return ""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return (
        f"; this often means that memory ran out, of which {gigabytes(free)} is free: "
        "ask for a smaller size or batch"
    )


class _Log:
    """A builder, and the errors that it and its parser report."""

    def __init__(self, trt: Any) -> None:
        errors: list[str] = []

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)  # pybind11 wants it called by name

            def log(self, severity: Any, message: str) -> None:
                if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                    errors.append(message)

        self.errors = errors
        self.logger = Logger()
        self.builder = trt.Builder(self.logger)


class _Progress:
    """Says now and then which phase an engine's build is in."""

    def __init__(self, trt: Any, name: str, say: Say) -> None:
        self.name = name
        self._last = time.monotonic()

        class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.IProgressMonitor.__init__(self)

            def phase_start(monitor, phase: str, parent: str | None, steps: int) -> None:  # noqa: N805
                if time.monotonic() - self._last > _QUIET_SECONDS:
                    self._last = time.monotonic()
                    say(f"{name}: {phase}")

            def step_complete(self, phase: str, step: int) -> bool:
                return True  # go on

            def phase_finish(self, phase: str) -> None: ...

        self.monitor = Monitor()
