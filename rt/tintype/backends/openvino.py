"""Runs a bundle's ONNX graphs with OpenVINO, which reads the weights where the files are mapped."""

from __future__ import annotations

import os
import queue
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from tintype.backends import Arrays, OnHost
from tintype.backends.codes import SIDE, largest_code_on_cpu
from tintype.backends.compiled import Compiled, cores, one_line
from tintype.backends.graphs import MappedWeights, graph_file, read_graph
from tintype.backends.onnx_weights import output_names
from tintype.backends.openvino_model import chooses, read_model, widen_late
from tintype.backends.remembering import InTwo, Memory, opened
from tintype.bundle import DTYPES, Bundle
from tintype.errors import BackendUnavailable, BundleError, RequestError
from tintype_kernels.cache import cache_folder

if TYPE_CHECKING:
    from tintype.backends.updated_weights import UpdatedWeights

# A blob holds the weights once more, packed, and larger than they were: kept only where somebody asks for it.
CACHE_VARIABLE = "TINTYPE_OPENVINO_CACHE"
_HINTS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
_CAPABILITY = {"bfloat16": "BF16", "float16": "FP16"}
_DEVICES = ("CPU", "GPU", "NPU")


class _Key(NamedTuple):
    stage: str
    profile: str
    dtype: str


class _Request:
    """A request with views of what it reads, which are filled in less time than OpenVINO's own way takes."""

    def __init__(self, model: ov.CompiledModel, outputs: Sequence[str]) -> None:
        self._request = model.create_infer_request()
        self._inputs = model.inputs
        self._ports = {name: port for port in self._inputs for name in port.names}
        self._views = {
            name: self._request.get_tensor(self._ports[name]).data for name in self._ports
        }
        self._held: dict[str, ov.Tensor] = {}
        # A port may have the names of several values that became one; the order is the graph's.
        self._outputs = dict(zip(outputs, model.outputs, strict=True))

    def run(self, inputs: Mapping[str, Any]) -> dict[str, NDArray[np.float32]]:
        """The outputs of arrays, which are copied, and of tensors, which are read where they lie."""
        if len(inputs) < len(self._inputs):
            raise _untaken(f"missing is {', '.join(self._views.keys() - inputs.keys())}")
        for name, value in inputs.items():
            if isinstance(value, ov.Tensor):
                self._hold(name, value)
            else:
                self._fill(name, value)
        self._request.infer()
        return {
            name: self._request.get_tensor(port).data.copy() for name, port in self._outputs.items()
        }

    def _hold(self, name: str, tensor: ov.Tensor) -> None:
        if self._held.get(name) is not tensor:
            self._request.set_tensor(self._ports[name], tensor)
            self._held[name] = tensor
            self._views.pop(name, None)  # of what it had in the tensor's place, which goes with it

    def _fill(self, name: str, array: NDArray[Any]) -> None:
        view = self._views.get(name)
        if view is None:
            raise _untaken(f"{name} is none of {', '.join(self._views)}")
        if view.shape != array.shape or not np.can_cast(array.dtype, view.dtype, "same_kind"):
            asked, given = (f"{each.dtype} of shape {[*each.shape]}" for each in (view, array))
            raise _untaken(f"{name} is {given} where the graph has {asked}")
        view[...] = array


def _untaken(why: str) -> RequestError:
    return RequestError(f"openvino does not take these inputs: {why}")


@dataclass(frozen=True)
class _Graph:
    """A compiled graph and the requests that nobody uses just now."""

    model: ov.CompiledModel
    outputs: list[str]
    idle: queue.SimpleQueue[_Request] = field(default_factory=queue.SimpleQueue)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, NDArray[np.float32]]:
        try:
            request = self.idle.get_nowait()
        except queue.Empty:
            request = _Request(self.model, self.outputs)
        try:
            return request.run(inputs)
        except RuntimeError as error:
            raise _untaken(one_line(error)) from error
        finally:
            self.idle.put(request)


# What a bundle is computed in unless the caller says otherwise. Beside products of codes, bfloat16 loses little.
_AUTO = {**DTYPES, "int8": "bfloat16", "int4": "bfloat16", "fp8": "bfloat16"}


class OpenVinoBackend(OnHost):
    """One compiled graph a (stage, profile), shared by all threads, each of which has a request of its own.

    `dtype` is what is computed in. "auto" is what the bundle was exported in, where the device computes in that, and
    else float32: a float32 bundle's figures hold for float32 alone, so fewer bits are for the caller to ask for.
    With `batch_invariant` (None: on CPU) every picture goes through the same profile by itself.
    """

    name = "openvino"

    @staticmethod
    def largest_code(device: str) -> int | None:
        """What codes of weights may be at most for this device to add their products up; None where all may."""
        on_cpu = device.lower() in ("auto", "cpu")
        return largest_code_on_cpu(adds_codes) if on_cpu else None

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str = "auto",
        dtype: str = "auto",
        batch_invariant: bool | None = None,
        updated: UpdatedWeights | None = None,
    ) -> None:
        self.bundle = bundle
        self._core = ov.Core()
        self._device = _device(device, self._core.available_devices)
        self.dtype = self._dtype(dtype)
        on_cpu = self._device == "CPU"
        self.batch_invariant = on_cpu if batch_invariant is None else batch_invariant
        self._weights = MappedWeights(bundle, updated)
        # A kept blob shall serve no other updates than those that it was made with.
        self._keeps = updated is None and os.environ.get(CACHE_VARIABLE, "0") != "0"
        self._graphs = Compiled(self._open)
        self._memory = Memory()

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(self.bundle.stages)

    def profiles(self, stage: str) -> list[str]:
        return list(self.bundle.stages[stage])

    def compile(self, stage: str, profile: str) -> None:
        self._graphs.begin(_Key(stage, profile, self.dtype))

    def run(self, stage: str, profile: str, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        outputs = self._run(_Key(stage, profile, self.dtype), inputs)
        # In float16 OpenVINO makes the largest number of a constant NaN or infinity, which is how graphs mark overflow.
        limit = np.finfo(np.float16).max if self.dtype == "float16" else np.inf
        if self.dtype == "float32" or all((abs(each) < limit).all() for each in outputs.values()):
            return outputs
        warnings.warn(
            f"stage {stage} met NaN or infinity in {self.dtype} and was run again in float32",
            RuntimeWarning,
            stacklevel=2,
        )
        return self._run(_Key(stage, profile, "float32"), inputs)

    def _run(self, key: _Key, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        return self._memory.run(self._graphs.get(key), inputs, _Graph.run, _as_tensors)

    def _open(self, key: _Key) -> InTwo[_Graph]:
        relative = graph_file(self.bundle.stages, key.stage, key.profile)
        graph = read_graph(self.bundle, relative)
        try:
            return opened(graph, lambda part: self._compiled(part, key.dtype))
        except RuntimeError as error:
            raise BundleError(
                f"{self.bundle.folder}: {relative} does not load: {one_line(error)}"
            ) from error

    def _compiled(self, graph: bytes, dtype: str) -> _Graph:
        model = read_model(self._core, graph, self._weights)
        if self._device == "CPU":
            widen_late(model)
        # In fewer bits another entry of a codebook would seem to be as near, and this has no such setting of one node.
        options = self._options("float32" if chooses(model) else dtype)
        compiled = self._core.compile_model(model, self._device, options)
        return _Graph(compiled, output_names(graph))

    def _options(self, dtype: str) -> dict[str, Any]:
        options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": _HINTS[dtype],
            "PERFORMANCE_HINT": "LATENCY",
        }
        # It would round the inputs of products whose weights alone are kept in codes.
        options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
        if self._keeps:
            options["CACHE_DIR"] = str(cache_folder() / "openvino")
        if self._device != "CPU":
            return options
        # Pinned threads would sit on cores that other processes, and other stages' graphs, are busy on.
        return options | {"INFERENCE_NUM_THREADS": cores(), "ENABLE_CPU_PINNING": False}

    def _dtype(self, wanted: str) -> str:
        capabilities = self._core.get_property(self._device, "OPTIMIZATION_CAPABILITIES")
        runs = ["float32", *(name for name, has in _CAPABILITY.items() if has in capabilities)]
        if self._device == "CPU" and "float16" in runs:
            # It rounds what graphs keep in float32, too, such as times, which no output shows. Nothing is lost: on the
            # CPU measured (with AMX, but for bfloat16 only) float32 was faster, and bfloat16 more than twice as fast.
            runs.remove("float16")
        name = DTYPES.get(wanted, wanted)
        if name == "auto":
            stored = _AUTO.get(self.bundle.precision, "float32")
            return stored if stored in runs else "float32"
        if name not in _HINTS:
            raise RequestError(
                f"dtype={wanted!r} is unknown; choose one of auto, {', '.join(runs)}"
            )
        if name not in runs:
            raise BackendUnavailable(
                f"dtype={wanted!r} is nothing that openvino computes in on this {self._device}; choose one of auto, "
                f"{', '.join(runs)}"
            )
        return name


def _as_tensors(values: dict[str, NDArray[np.float32]]) -> dict[str, ov.Tensor]:
    """Arrays as a request reads them where they lie, which it copies otherwise."""
    return {name: ov.Tensor(array) for name, array in values.items()}


@cache
def adds_codes(largest: int) -> bool:
    """Whether this CPU gets a product of int8 codes right whose weights are so large: tried, as nothing tells."""
    from openvino import opset13 as ops

    given = ops.parameter([SIDE, SIDE], np.float32)
    bounds = [np.float32(bound) for bound in (-128, 127, -128, 127)]
    codes = ops.fake_quantize(given, *bounds, 256)
    weight = ops.convert(ops.constant(np.full((SIDE, SIDE), largest, np.int8)), np.float32)
    scaled = ops.multiply(weight, ops.constant(np.ones((SIDE, 1), np.float32)))
    product = ov.Model([ops.matmul(codes, scaled, False, True)], [given])
    run = ov.Core().compile_model(product, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    (found,) = run([np.full((SIDE, SIDE), 127, np.float32)]).values()
    return bool((found == SIDE * 127 * largest).all())


def _device(wanted: str, present: list[str]) -> str:
    """OpenVINO's name, such as GPU.1 for gpu:1."""
    name = "CPU" if wanted == "auto" else wanted.upper().replace(":", ".")
    if name.split(".", maxsplit=1)[0] not in _DEVICES:
        choices = ", ".join(each.lower() for each in _DEVICES)
        raise RequestError(
            f"device={wanted!r} is unknown to openvino; choose one of auto, {choices}"
        )
    # One GPU is listed as GPU, several as GPU.0 and on, and GPU is then the first.
    if name not in present and f"{name}.0" not in present:
        listed = ", ".join(each.lower() for each in present) or "none"
        raise BackendUnavailable(
            f"device={wanted!r} is not among the devices that openvino finds here: {listed}; "
            "choose one of them, or install that device's driver"
        )
    return name
