"""Runs a bundle's TensorRT engines, by the package that built them: `tensorrt_rtx` or `tensorrt`."""

from __future__ import annotations

import importlib
import math
import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tintype.backends import Arrays, OneType
from tintype.backends.compiled import Compiled
from tintype.backends.cuda_driver import Device
from tintype.backends.graphs import graph_file, read_graph
from tintype.bundle import DTYPES, Bundle
from tintype.errors import BackendUnavailable, BundleError, RequestError, TintypeError
from tintype_kernels.cache import cache_folder, replace_bytes

if TYPE_CHECKING:
    from tintype.backends.updated_weights import UpdatedWeights

_EXTRAS = {"tensorrt_rtx": "tensorrt-rtx", "tensorrt": "tensorrt"}
_EXECUTIONS = ("eager", "graph")
_ONNX = "run the bundle's ONNX form with backend='onnxruntime'"


@dataclass(frozen=True)
class _Face:
    """What one of an engine's inputs or outputs takes."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True, eq=False)
class _Placed:
    """An array on the GPU, whose memory goes back to the pool with it."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    address: int


class _Pool:
    """Memory on the GPU that is used again. Work is in one stream's order, so nothing waits for what read it last."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._idle: dict[int, list[int]] = {}

    def take(self, face: _Face) -> _Placed:
        size = int(np.prod(face.shape)) * face.dtype.itemsize
        idle = self._idle.setdefault(size, [])
        placed = _Placed(
            face.shape, face.dtype, idle.pop() if idle else self._device.allocate(size)
        )
        weakref.finalize(placed, idle.append, placed.address)
        return placed


class _Kernels:
    """What TensorRT-RTX compiles for this GPU when an engine first runs, kept for the processes to come."""

    def __init__(self, runtime: Any, file: Path) -> None:
        self._cache = runtime.create_runtime_cache()
        self._file = file
        # Refused where another driver, GPU or version made it.
        self._kept = file.is_file() and self._cache.deserialize(file.read_bytes())
        runtime.set_runtime_cache(self._cache)

    def keep(self) -> None:
        """Write them, once. Where that cannot be, the next process compiles them again."""
        if not self._kept:
            self._kept = True
            with suppress(OSError):
                replace_bytes(self._file, bytes(self._cache.serialize()))


@dataclass(frozen=True)
class _Engine:
    """A loaded engine, which one request at a time uses; `tensorrt`'s holds its kernels itself."""

    context: Any
    inputs: dict[str, _Face]
    outputs: dict[str, _Face]
    kernels: _Kernels | None


class TensorRtBackend(OneType):
    """One engine a (stage, profile), shared by all threads, which take turns on the GPU.

    `device` is auto, cuda or cuda:N. With `batch_invariant` every picture goes through the same profile by itself.
    `execution` "graph" lets TensorRT-RTX capture an engine's launches as a CUDA graph and replay that.
    """

    name = "tensorrt"

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str = "auto",
        dtype: str = "auto",
        batch_invariant: bool | None = None,
        updated: UpdatedWeights | None = None,
        execution: str = "eager",
    ) -> None:
        if execution not in _EXECUTIONS:
            raise RequestError(
                f"execution={execution!r} is unknown to tensorrt; choose one of {', '.join(_EXECUTIONS)}"
            )
        self._execution = execution
        # Beside codes engines compute in float16.
        self.dtype = DTYPES.get(bundle.precision, "float16")
        if DTYPES.get(dtype, dtype) not in ("auto", self.dtype):
            raise RequestError(f"dtype={dtype!r}: this bundle's engines were built in {self.dtype}")
        packages = require_engines(bundle)
        self.bundle = bundle
        self.batch_invariant = bool(batch_invariant)
        self._trt = _imported(packages)
        self._device = Device(_index(device))
        self._pool = _Pool(self._device)
        self._lock = (
            threading.Lock()
        )  # one stream, and an engine's context holds one request's addresses
        self._stages = matching_engines(bundle, self._device.architecture, self._trt.__version__)
        self._graphs = bundle.engines[self._device.architecture].get("graphs", {})
        self._updated = updated
        if updated is not None and not self._graphs:
            raise RequestError(
                "lora: these engines keep the weights that they were built with; export with --weightless, or merge "
                f"the updates with tintype export --lora FILE, or {_ONNX}"
            )
        self._logger = self._trt.Logger(self._trt.Logger.ERROR)
        self._runtime = self._trt.Runtime(self._logger)
        self._engines = Compiled(self._open)

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(self._stages)

    def profiles(self, stage: str) -> list[str]:
        return list(self._stages[stage])

    def compile(self, stage: str, profile: str) -> None:
        self._engines.begin((stage, profile))

    def run(self, stage: str, profile: str, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        faces = self._engines.get((stage, profile)).inputs
        given = {name: np.asarray(inputs[name], face.dtype) for name, face in faces.items()}
        placed = {name: self.place(array) for name, array in given.items()}
        outputs = self.run_placed(stage, profile, placed)
        return {name: self.fetch(each) for name, each in outputs.items()}

    def place(self, array: NDArray[Any]) -> _Placed:
        array = np.ascontiguousarray(array)
        with self._lock:
            self._device.make_current()
            placed = self._pool.take(_Face(array.shape, array.dtype))
            self._device.copy_in(placed.address, array)
        return placed

    def run_placed(
        self, stage: str, profile: str, inputs: Mapping[str, _Placed]
    ) -> dict[str, _Placed]:
        engine = self._engines.get((stage, profile))
        with self._lock:
            self._device.make_current()
            outputs = {name: self._pool.take(face) for name, face in engine.outputs.items()}
            for name, placed in (*((n, inputs[n]) for n in engine.inputs), *outputs.items()):
                engine.context.set_tensor_address(name, placed.address)
            if not engine.context.execute_async_v3(self._device.stream):
                raise TintypeError("TensorRT did not run the engine; its log says why")
            if engine.kernels is not None:
                engine.kernels.keep()
        return outputs

    def fetch(self, placed: _Placed) -> NDArray[np.float32]:
        array = np.empty(placed.shape, placed.dtype)
        with self._lock:
            self._device.make_current()
            self._device.copy_out(array, placed.address)
            self._device.wait()
        return array

    def _open(self, key: tuple[str, str]) -> _Engine:
        relative = graph_file(self._stages, *key)
        self._device.make_current()
        engine = self._runtime.deserialize_cuda_engine(self.bundle.path(relative).read_bytes())
        if engine is None:
            raise BundleError(f"{self.bundle.folder}: TensorRT does not load {relative}; {_ONNX}")
        if self._graphs:
            self._fill(engine, graph_file(self._graphs, *key))
        context, kernels = self._context(engine, self.bundle.files[relative]["sha256"])
        inputs: dict[str, _Face] = {}
        outputs: dict[str, _Face] = {}
        for name in (engine.get_tensor_name(i) for i in range(engine.num_io_tensors)):
            given = engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT
            (inputs if given else outputs)[name] = self._face(engine, name)
        return _Engine(context, inputs, outputs, kernels)

    def _fill(self, engine: Any, graph: str) -> None:
        """Give an engine without weights those of the graph that it was built from."""
        refitter = self._trt.Refitter(engine, self._logger)
        filler = self._trt.OnnxParserRefitter(refitter, self._logger)
        # As when it was built: weights are named relative to the bundle's root.
        root = str(self.bundle.folder / "graph.onnx")
        content = read_graph(self.bundle, graph)
        filled = filler.refit_from_bytes(content, root) and self._update(refitter, content)
        if not (filled and refitter.refit_cuda_engine()):
            raise BundleError(
                f"{self.bundle.folder}: TensorRT does not take the weights of {graph} for its engine; {_ONNX}"
            )

    def _update(self, refitter: Any, graph: bytes) -> bool:
        """Give what was updated over what the files hold; whether the engine takes it."""
        if self._updated is None:
            return True
        return all(
            refitter.set_named_weights(
                tensor.name,
                self._trt.Weights(
                    refitter.get_weights_prototype(tensor.name).dtype,
                    new.ctypes.data,
                    math.prod(tensor.shape),
                ),
            )
            for tensor, new in self._updated.in_graph(graph)
        )

    def _context(self, engine: Any, fingerprint: str) -> tuple[Any, _Kernels | None]:
        """What runs the engine, and the kernels that are compiled for it on the way."""
        # Older versions of `tensorrt` have none.
        runtime = getattr(engine, "create_runtime_config", SimpleNamespace)()
        if self._execution == "graph":
            if not hasattr(runtime, "cuda_graph_strategy"):
                raise RequestError(
                    "execution='graph' needs engines by tensorrt-rtx, from version 1.2 on; leave it out"
                )
            runtime.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if not hasattr(runtime, "create_runtime_cache"):
            return engine.create_execution_context(), None
        kernels = _Kernels(runtime, cache_folder() / "tensorrt" / f"{fingerprint}.kernels")
        return engine.create_execution_context(runtime), kernels

    def _face(self, engine: Any, name: str) -> _Face:
        shape = tuple(int(side) for side in engine.get_tensor_shape(name))
        return _Face(shape, np.dtype(self._trt.nptype(engine.get_tensor_dtype(name))))


def require_engines(bundle: Bundle) -> set[str]:
    """The packages that built the bundle's engines; BundleError where it has none."""
    if not bundle.engines:
        raise BundleError(
            f"{bundle.folder} holds no engines; export it with --target tensorrt --gpu sm_NN, or {_ONNX}"
        )
    return {entry["package"] for entry in bundle.engines.values()}


def matching_engines(bundle: Bundle, gpu: str, version: str) -> dict[str, dict[str, str]]:
    """stage -> profile -> file of the engines for a GPU; one built for another GPU or version says which."""
    if gpu not in bundle.engines:
        raise BundleError(
            f"{bundle.folder} holds engines for {', '.join(bundle.engines)}, and this GPU is {gpu}; "
            f"export with --gpu {gpu}, or {_ONNX}"
        )
    entry = bundle.engines[gpu]
    if entry["version"] != version:
        raise BundleError(
            f"{bundle.folder}: its engines for {gpu} were built by {entry['package']} {entry['version']}, and "
            f"{version} is installed; install that version, export again, or {_ONNX}"
        )
    stages: dict[str, dict[str, str]] = entry["stages"]
    profiles = (*stages.values(), *entry.get("graphs", {}).values())
    for relative in (file for files in profiles for file in files.values()):
        if relative not in bundle.files:
            raise BundleError(f"{bundle.folder}: {relative} is not among the listed files")
    return stages


def _imported(packages: set[str]) -> Any:
    for package in sorted(packages):
        try:
            return importlib.import_module(package)
        except ImportError:
            continue
    package = min(packages)
    raise BackendUnavailable(
        f"this bundle's engines need the package {package}; install it with: "
        f'pip install "tintype[{_EXTRAS.get(package, package)}]"'
    )


def _index(device: str) -> int:
    kind, _, number = device.partition(":")
    if kind not in ("auto", "cuda") or not (number or "0").isdigit():
        raise RequestError(
            f"device={device!r} is unknown to tensorrt; choose one of auto, cuda, cuda:N"
        )
    return int(number or 0)
