"""Runs a bundle's TensorRT engines, by the package that built them: `tensorrt_rtx` or `tensorrt`."""

from __future__ import annotations

import importlib
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tintype.backends import Arrays
from tintype.backends.compiled import Compiled
from tintype.backends.cuda_driver import Device
from tintype.backends.graphs import graph_file
from tintype.bundle import DTYPES, Bundle
from tintype.errors import BackendUnavailable, BundleError, RequestError, TintypeError

_EXTRAS = {"tensorrt_rtx": "tensorrt-rtx", "tensorrt": "tensorrt"}
_ONNX = "run the bundle's ONNX form with backend='onnxruntime'"


@dataclass(frozen=True)
class _Tensor:
    """One of an engine's inputs or outputs, and its place on the GPU."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    address: int


@dataclass(frozen=True)
class _Engine:
    """A loaded engine with buffers of its own, which one request at a time uses."""

    context: Any
    inputs: dict[str, _Tensor]
    outputs: dict[str, _Tensor]
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, device: Device, arrays: Arrays) -> dict[str, NDArray[np.float32]]:
        given = {
            name: np.ascontiguousarray(arrays[name], tensor.dtype)
            for name, tensor in self.inputs.items()
        }
        results = {name: np.empty(each.shape, each.dtype) for name, each in self.outputs.items()}
        with self.lock:
            device.make_current()
            for name, array in given.items():
                device.copy_in(self.inputs[name].address, array)
            if not self.context.execute_async_v3(device.stream):
                raise TintypeError("TensorRT did not run the engine; its log says why")
            for name, array in results.items():
                device.copy_out(array, self.outputs[name].address)
            device.wait()
        return results


class TensorRtBackend:
    """One engine a (stage, profile), shared by all threads, which take turns on the GPU.

    `device` is auto, cuda or cuda:N. With `batch_invariant` every picture goes through the same profile by itself.
    """

    name = "tensorrt"

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str = "auto",
        dtype: str = "auto",
        batch_invariant: bool | None = None,
    ) -> None:
        self.dtype = DTYPES[bundle.precision]
        if DTYPES.get(dtype, dtype) not in ("auto", self.dtype):
            raise RequestError(f"dtype={dtype!r}: this bundle's engines were built in {self.dtype}")
        packages = require_engines(bundle)
        self.bundle = bundle
        self.batch_invariant = bool(batch_invariant)
        self._trt = _imported(packages)
        self._device = Device(_index(device))
        self._stages = matching_engines(bundle, self._device.architecture, self._trt.__version__)
        self._runtime = self._trt.Runtime(self._trt.Logger(self._trt.Logger.ERROR))
        self._engines = Compiled(self._open)

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(self._stages)

    def profiles(self, stage: str) -> list[str]:
        return list(self._stages[stage])

    def compile(self, stage: str, profile: str) -> None:
        self._engines.begin((stage, profile))

    def run(self, stage: str, profile: str, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        return self._engines.get((stage, profile)).run(self._device, inputs)

    def _open(self, key: tuple[str, str]) -> _Engine:
        relative = graph_file(self._stages, *key)
        self._device.make_current()
        engine = self._runtime.deserialize_cuda_engine(self.bundle.path(relative).read_bytes())
        if engine is None:
            raise BundleError(f"{self.bundle.folder}: TensorRT does not load {relative}; {_ONNX}")
        context = engine.create_execution_context()
        inputs: dict[str, _Tensor] = {}
        outputs: dict[str, _Tensor] = {}
        for name in (engine.get_tensor_name(i) for i in range(engine.num_io_tensors)):
            tensor = self._tensor(engine, name)
            context.set_tensor_address(name, tensor.address)
            given = engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT
            (inputs if given else outputs)[name] = tensor
        return _Engine(context, inputs, outputs)

    def _tensor(self, engine: Any, name: str) -> _Tensor:
        shape = tuple(int(side) for side in engine.get_tensor_shape(name))
        dtype = np.dtype(self._trt.nptype(engine.get_tensor_dtype(name)))
        size = int(np.prod(shape)) * dtype.itemsize
        return _Tensor(shape, dtype, self._device.allocate(size))


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
    for relative in (file for profiles in stages.values() for file in profiles.values()):
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
