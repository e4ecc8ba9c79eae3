"""TensorRT engines from a bundle's ONNX graphs, with `tensorrt_rtx`, which needs no GPU for it, or with `tensorrt`."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tintype.backends.cuda_driver import Device
from tintype.errors import BackendUnavailable, BundleError, RequestError
from tintype_kernels.cache import cache_folder, replace_bytes

from .plugins import Plugins, check_kernels, register
from .writing import gigabytes

PACKAGES = ("tensorrt_rtx", "tensorrt")
_QUIET_SECONDS = 5.0
_SIGN_OF_NO_GPU = "CUDA_SUCCESS"
_SIGNS_OF_NO_MEMORY = ("memory", "could not find any implementation")

Stages = Mapping[str, Mapping[str, str]]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Target:
    """A GPU that engines can be built for: the package, and what it calls the GPU, which is None for this machine's."""

    trt: Any
    capability: Any


def targets() -> dict[str, Target]:
    """By their names, such as sm_89: many GPUs by tensorrt_rtx, which needs none, and this machine's by tensorrt."""
    packages = [importlib.import_module(name) for name in PACKAGES if _installed(name)]
    if not packages:
        raise BackendUnavailable(
            "target tensorrt needs the package tensorrt_rtx or tensorrt; install one with: "
            'pip install "tintype[tensorrt-rtx]" or pip install "tintype[tensorrt]"'
        )
    found: dict[str, Target] = {}
    for trt in packages:
        for gpu, capability in _capabilities(trt).items():
            found.setdefault(gpu, Target(trt, capability))
    if not found:
        raise BackendUnavailable(
            "tensorrt builds for the GPU that it runs on, and finds none here; install tensorrt_rtx, which builds for "
            'others, with: pip install "tintype[tensorrt-rtx]"'
        )
    return found


def check_gpus(gpus: Sequence[str], ops: Sequence[str] = ()) -> None:
    """Refuse a build for no GPU, for one that no package builds for, or with ops of ours if that takes no plugins."""
    known = targets()
    if not gpus:
        raise RequestError(
            f"target tensorrt needs --gpu, one or several of {', '.join(known)}; "
            "`nvidia-smi --query-gpu=compute_cap --format=csv` prints 8.9 for sm_89"
        )
    if unknown := [gpu for gpu in gpus if gpu not in known]:
        raise RequestError(f"gpu={unknown[0]!r} is unknown; choose from {', '.join(known)}")
    check_kernels(ops, {gpu: known[gpu].trt.__name__ for gpu in gpus})


def build_engines(
    root: Path,
    stages: Stages,
    gpus: Sequence[str],
    say: Say,
    *,
    weightless: bool = False,
    plugins: Plugins | None = None,
) -> dict[str, Any]:
    """Write STAGE/PROFILE.GPU.engine beside every graph; what the manifest says of them, by GPU.

    ``weightless`` engines hold no weights: they are filled from the graphs' when they are loaded. Building them takes
    a GPU, of any kind. ``plugins`` are those that the graphs have nodes of.
    """
    register(plugins or {})
    known = targets()
    chosen = {gpu: known[gpu] for gpu in gpus}
    packages = {target.trt for target in chosen.values()}
    entries: dict[str, Any] = {
        gpu: {"package": target.trt.__name__, "version": target.trt.__version__, "stages": {}}
        | ({"graphs": stages} if weightless else {})
        for gpu, target in chosen.items()
    }
    for stage, profiles in stages.items():
        for profile, graph in profiles.items():
            parsed = {trt: _parse(trt, root, graph) for trt in packages}
            for gpu, target in chosen.items():
                began = time.perf_counter()
                relative = f"{stage}/{profile}.{gpu}.engine"
                order = _Order(target, gpu, relative, weightless)
                engine = _build(order, *parsed[target.trt], say)
                (root / relative).write_bytes(engine)
                entries[gpu]["stages"].setdefault(stage, {})[profile] = relative
                say(f"{relative}: {time.perf_counter() - began:.1f} s")
    return entries


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _capabilities(trt: Any) -> dict[str, Any]:
    """sm_89 -> what the package calls it."""
    if hasattr(trt, "ComputeCapability"):
        members = trt.ComputeCapability.__members__
        return {f"sm_{name[2:]}": each for name, each in members.items() if name.startswith("SM")}
    try:
        return {Device().architecture: None}
    except BackendUnavailable:
        return {}


@dataclass(frozen=True)
class _Order:
    """What is to be built of a network."""

    target: Target
    gpu: str
    name: str
    weightless: bool

    @property
    def timings(self) -> Path | None:
        """Where `tensorrt` remembers how fast its kernels were here; `tensorrt_rtx` times none when it builds."""
        if self.target.capability is not None:
            return None
        trt = self.target.trt
        return cache_folder() / "tensorrt" / f"{trt.__name__}-{trt.__version__}-{self.gpu}.timings"


def _parse(trt: Any, root: Path, graph: str) -> tuple[_Log, Any]:
    """The network of a graph; its layers have the types that the graph says, and no others."""
    log = _Log(trt)
    flag = trt.NetworkDefinitionCreationFlag
    flags = 1 << int(flag.STRONGLY_TYPED)
    if hasattr(flag, "PREFER_AOT_PYTHON_PLUGINS"):
        flags |= 1 << int(flag.PREFER_AOT_PYTHON_PLUGINS)
    network = log.builder.create_network(flags)
    parser = trt.OnnxParser(network, log.logger)
    # Weights are named relative to the bundle's root, so the graph is said to lie there.
    if parser.parse((root / graph).read_bytes(), str(root / "graph.onnx")):
        return log, network
    error = parser.get_error(0)
    raise BundleError(
        f"{graph}: TensorRT cannot take node {error.node_name() or error.node()} "
        f"({error.node_operator() or 'unknown operator'}): {error.desc()}"
    )


def _build(order: _Order, log: _Log, network: Any, say: Say) -> bytes:
    trt = order.target.trt
    config = log.builder.create_builder_config()
    if order.target.capability is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(order.target.capability, 0)
    config.clear_flag(trt.BuilderFlag.TF32)  # what says float32 is computed in it
    if order.weightless:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT)
    config.progress_monitor = _Progress(trt, order.name, say).monitor
    log.errors.clear()
    with _remembered_timings(config, order.timings):
        engine = log.builder.build_serialized_network(network, config)
    if engine is None:
        reason = log.errors[0] if log.errors else "TensorRT says no reason"
        raise BundleError(
            f"{order.name} cannot be built: {' '.join(reason.split())[:400]}{_hint(reason)}"
        )
    return bytes(engine)


@contextmanager
def _remembered_timings(config: Any, file: Path | None) -> Iterator[None]:
    """What a build measures is found by the next one, of this version for this GPU."""
    if file is None:
        yield
        return
    known = file.read_bytes() if file.is_file() else b""
    timings = config.create_timing_cache(known)  # which must live until the engine is built
    config.set_timing_cache(timings, ignore_mismatch=False)
    yield
    replace_bytes(file, bytes(config.get_timing_cache().serialize()))


def _hint(reason: str) -> str:
    """What a builder's error may mean besides what it says: without memory it finds no kernel that fits."""
    if _SIGN_OF_NO_GPU in reason:
        return "; engines without weights are built beside an NVIDIA GPU: go to one, or leave --weightless out"
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
