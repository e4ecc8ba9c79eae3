"""Runs a bundle's ONNX graphs with onnxruntime; weights stay in the safetensors files that the graphs point into."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException

from tintype.backends import Arrays, OneType
from tintype.backends.codes import SIDE, largest_code_on_cpu
from tintype.backends.compiled import Compiled, cores, memory, one_line
from tintype.backends.graphs import MappedWeights, graph_file, read_graph
from tintype.backends.onnx_weights import INT8, ExternalTensor, weight_files
from tintype.backends.onnxruntime_model import straightened
from tintype.backends.remembering import InTwo, Memory, opened
from tintype.bundle import DTYPES, Bundle
from tintype.errors import BackendUnavailable, BundleError, RequestError, TintypeError
from tintype.protobuf import counted, sized

if TYPE_CHECKING:
    from tintype.backends.updated_weights import UpdatedWeights

# What a bundle's precision does without. int8: a product fused with its bias has no kernel that gives float32, and one
# whose input's codes others read as well, as they do where equal nodes became one, has none that takes codes; either
# would be computed in float32. fp8: what is fused for int8 is fused for e4m3, too, which no kernel takes. int4: the
# products' inputs would be rounded to int8, and the bundle says that weights alone are rounded.
_UNFUSED = {"int8": ["MatMulAddFusion", "CommonSubexpressionElimination"]}
_ENTRIES = {
    "fp8": {"session.disable_quant_qdq": "1"},
    "int4": {"session.qdq_matmulnbits_accuracy_level": "1"},
}
# How many times what is stored of these a CPU computes with, in float32.
_WIDENED = {"bf16": 2, "fp8": 4}
# A session that widens weights as it is made holds them twice in the end, once as its kernels pack them.
_LARGEST_SHARE = 1 / 4
# Longer than it takes from one node of a graph to the next.
_SPIN_US = "200"
# What ONNX's types are as numpy's: float32, int8, float16, and bfloat16's bits.
_ARRAYS = {1: np.float32, 3: np.int8, 10: np.float16, 16: np.uint16}
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxRuntimeBackend(OneType):
    """One session a (stage, profile), made once, at its first use, shared by all threads.

    With `batch_invariant` (None: on CPU) every picture goes through the same profile by itself.
    """

    name = "onnxruntime"

    @staticmethod
    def largest_code(device: str) -> int | None:
        """What codes of weights may be at most for this device to add their products up; None where all may."""
        on_cpu = _provider(device) == _PROVIDERS["cpu"]
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
        # Its graphs are written in what they are computed in, and none is written in bfloat16.
        self.dtype = "float16" if bundle.precision == "fp16" else "float32"
        if DTYPES.get(dtype, dtype) not in ("auto", self.dtype):
            raise RequestError(
                f"dtype={dtype!r}: this bundle was exported in {bundle.precision}, which onnxruntime computes in "
                f"{self.dtype}"
            )
        self.bundle = bundle
        self._updated = updated
        self._weights = MappedWeights(bundle, updated)
        self._provider = _provider(device)
        kind, _, number = device.partition(":")
        self._place = (kind, int(number or 0))  # as onnxruntime names where an array lies
        self._on_host = self._provider == _PROVIDERS["cpu"]
        self.batch_invariant = self._on_host if batch_invariant is None else batch_invariant
        self._sessions = Compiled(self._open)
        self._memory = Memory()
        # By where a file has them; sessions read them here and hold no reference.
        self._turned: dict[tuple[str, int], NDArray[np.int8]] = {}

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(self.bundle.stages)

    def profiles(self, stage: str) -> list[str]:
        return list(self.bundle.stages[stage])

    def compile(self, stage: str, profile: str) -> None:
        self._sessions.begin((stage, profile))

    def run(self, stage: str, profile: str, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        with _told(stage, profile):
            return self._memory.run(self._sessions.get((stage, profile)), inputs, _run)

    def place(self, array: NDArray[Any]) -> Any:
        if self._on_host:
            return array
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), *self._place)

    def run_placed(self, stage: str, profile: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        if self._on_host:
            return self.run(stage, profile, inputs)
        with _told(stage, profile):
            return self._memory.run(self._sessions.get((stage, profile)), inputs, self._run_bound)

    def _run_bound(
        self, session: ort.InferenceSession, inputs: Mapping[str, Any]
    ) -> dict[str, Any]:
        names = [output.name for output in session.get_outputs()]
        binding = session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name in names:
            binding.bind_output(name, *self._place)
        session.run_with_iobinding(binding)
        return dict(zip(names, binding.get_outputs(), strict=True))

    def fetch(self, placed: Any) -> NDArray[np.float32]:
        array: NDArray[np.float32] = placed if self._on_host else placed.numpy()
        return array

    def _open(self, key: tuple[str, str]) -> InTwo[ort.InferenceSession]:
        relative = graph_file(self.bundle.stages, *key)
        graph = read_graph(self.bundle, relative)
        fills = self._on_host and self._fills_memory(graph)
        try:
            return opened(graph, lambda part: self._session(part, fills_memory=fills))
        except Exception as error:  # onnxruntime's own classes share no public base
            raise BundleError(
                f"{self.bundle.folder}: {relative} does not load: {one_line(error)}"
            ) from error

    def _session(self, graph: bytes, *, fills_memory: bool) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = cores()
        # From the second run on it would hold a plan's memory beside what the first run took, and be no faster.
        options.enable_mem_pattern = False
        # A session's threads spin from its making on, by default for 2 ** 20 turns, and take the cores from the other
        # stages' sessions that are made meanwhile, and from other processes. Older versions heed the first entry alone.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry("session.intra_op.spin_duration_us", _SPIN_US)
        # Graphs name their weights relative to the bundle's root. onnxruntime refuses paths that leave the
        # graph's own folder, and its older versions heed this entry only for a graph given as bytes.
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self.bundle.folder)
        )
        for name, value in _ENTRIES.get(self.bundle.precision, {}).items():
            options.add_session_config_entry(name, value)
        unfused = [*_UNFUSED.get(self.bundle.precision, ())]
        if fills_memory:
            # Each run widens them then, each before it is used and not all at its beginning.
            unfused.append("ConstantFolding")
            options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        changed = {} if self._updated is None else dict(_changed(graph, self._updated))
        if self._on_host and self.bundle.precision == "int8":
            graph, codes = straightened(graph, self._turned_codes)
            changed |= {name: _value(turned, INT8) for name, turned in codes.items()}
        if changed:
            options.add_external_initializers([*changed], [*changed.values()])
        return ort.InferenceSession(
            graph, options, providers=[self._provider], disabled_optimizers=unfused
        )

    def _turned_codes(self, tensor: ExternalTensor) -> NDArray[np.int8]:
        """[in, out], of codes that files have as [out, in]: once, however many sessions read them."""
        place = tensor.location, tensor.offset
        if place not in self._turned:
            found = self._weights.find(*place, tensor.length).view(np.int8)
            turned = np.ascontiguousarray(found.reshape(tensor.shape).T)
            self._turned.setdefault(place, turned)  # sessions are made in several threads
        return self._turned[place]

    def _fills_memory(self, graph: bytes) -> bool:
        """Whether the graph's weights, widened, would take more of this machine's memory than is meant for them."""
        if self.bundle.precision not in _WIDENED:
            return False
        stored = sum(self.bundle.path(file).stat().st_size for file in weight_files(graph))
        return _WIDENED[self.bundle.precision] * stored > _LARGEST_SHARE * memory()


@contextmanager
def _told(stage: str, profile: str) -> Iterator[None]:
    """What onnxruntime says of a run that fails, such as one that lacks memory, in one line."""
    try:
        yield
    except (Fail, InvalidArgument, RuntimeException) as error:
        raise TintypeError(
            f"stage {stage} at {profile} failed in onnxruntime; where memory is short, ask for a smaller picture: "
            f"{one_line(error)}"
        ) from error


def _run(session: ort.InferenceSession, inputs: Mapping[str, Any]) -> dict[str, Any]:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def _changed(graph: bytes, updated: UpdatedWeights) -> Iterator[tuple[str, ort.OrtValue]]:
    """The graph's initialisers that were updated, by name."""
    for tensor, new in updated.in_graph(graph):
        values = new.view(_ARRAYS[tensor.data_type]).reshape(tensor.shape)
        yield tensor.name, _value(values, tensor.data_type)


def _value(values: NDArray[Any], kind: int) -> ort.OrtValue:
    """What onnxruntime reads where the array lies, as long as that lives."""
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(values, kind)


def _provider(device: str) -> str:
    name, _, number = "cpu".partition(":") if device == "auto" else device.partition(":")
    if name not in _PROVIDERS or not (number or "0").isdecimal():
        raise RequestError(
            f"device={device!r} is unknown to onnxruntime; choose one of auto, {', '.join(_PROVIDERS)}"
        )
    if _PROVIDERS[name] not in ort.get_available_providers():
        raise BackendUnavailable(
            f'device={device!r} needs onnxruntime-gpu; install it with: pip install "tintype[gpu]"'
        )
    return _PROVIDERS[name]


_INT32, _UINT8 = 6, 2  # as onnx.proto numbers types


@cache
def adds_codes(largest: int) -> bool:
    """Whether this CPU gets a product of codes right whose weights are so large: tried, as nothing tells."""
    session = ort.InferenceSession(_product_of_codes(), providers=[_PROVIDERS["cpu"]])
    inputs = np.full((SIDE, SIDE), 255, np.uint8)
    weights = np.full((SIDE, SIDE), largest, np.int8)
    (found,) = session.run(None, {"inputs": inputs, "weights": weights})
    return bool((found == SIDE * 255 * largest).all())


def _product_of_codes() -> bytes:
    """A model of one node; the numbers are those that onnx.proto gives the fields."""

    def value(name: str, kind: int) -> bytes:
        shape = sized(2, 2 * sized(1, counted(1, SIDE)))
        return sized(1, name.encode()) + sized(2, sized(1, counted(1, kind) + shape))

    names = sized(1, b"inputs") + sized(1, b"weights") + sized(2, b"sums")
    graph = (
        sized(1, names + sized(4, b"MatMulInteger"))
        + sized(2, b"product of codes")
        + sized(11, value("inputs", _UINT8))
        + sized(11, value("weights", INT8))
        + sized(12, value("sums", _INT32))
    )
    opset = counted(2, 13)
    return counted(1, 8) + sized(7, graph) + sized(8, opset)
