"""What surrounds a TensorRT engine: which is taken, and how arrays get there and back; memory plays the GPU."""

from __future__ import annotations

import ctypes
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import tintype
from tintype.backends import cuda_driver
from tintype.backends import tensorrt as module
from tintype.backends.graphs import read_graph
from tintype.backends.onnx_weights import ExternalTensor
from tintype.backends.onnxruntime import OnnxRuntimeBackend
from tintype.backends.tensorrt import TensorRtBackend, matching_engines
from tintype.bundle import describe, open_bundle, save_manifest
from tintype.errors import BackendUnavailable, BundleError, RequestError

SETTINGS = {"num_inference_steps": 2, "output_type": "np", "seed": 3}


class MemoryDevice:
    """The interface of `Device` on the process's own memory."""

    architecture, stream = "sm_89", 7

    def __init__(self, index=0):
        self.buffers = {}

    def make_current(self): ...

    def wait(self): ...

    def allocate(self, size):
        buffer = np.zeros(size, np.uint8)
        self.buffers[buffer.ctypes.data] = buffer
        return buffer.ctypes.data

    def copy_in(self, address, array):
        assert array.nbytes == self.buffers[address].nbytes
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def copy_out(self, array, address):
        assert array.nbytes == self.buffers[address].nbytes
        ctypes.memmove(array.ctypes.data, address, array.nbytes)


class PlayedEngine:
    """TensorRT's engine and its context at once, whose file names the graph that onnxruntime runs for it."""

    def __init__(self, runner, stage, profile):
        graph = read_graph(runner.bundle, runner.bundle.stages[stage][profile])
        self.session = runner._session(graph, fills_memory=False)
        self.ports = [*self.session.get_inputs(), *self.session.get_outputs()]
        self.num_io_tensors, self.addresses = len(self.ports), {}

    def create_runtime_config(self):
        return SimpleNamespace()  # as of `tensorrt`, which compiles nothing at run time

    def create_execution_context(self, runtime=None):
        return self

    def get_tensor_name(self, index):
        return self.ports[index].name

    def _port(self, name):
        return next(port for port in self.ports if port.name == name)

    def get_tensor_shape(self, name):
        return self._port(name).shape

    def get_tensor_dtype(self, name):
        return self._port(name).type

    def get_tensor_mode(self, name):
        return "in" if name in [port.name for port in self.session.get_inputs()] else "out"

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def execute_async_v3(self, stream):
        assert stream == MemoryDevice.stream
        given = {port.name: self._array(port) for port in self.session.get_inputs()}
        for port, result in zip(
            self.session.get_outputs(), self.session.run(None, given), strict=True
        ):
            self._array(port)[...] = result
        return True

    def _array(self, port):
        dtype = np.dtype(nptype(port.type))
        count = int(np.prod(port.shape)) * dtype.itemsize
        memory = (ctypes.c_uint8 * count).from_address(self.addresses[port.name])
        return np.frombuffer(memory, dtype).reshape(port.shape)


def nptype(kind):
    return {"tensor(float)": np.float32, "tensor(int64)": np.int64}[kind]


def played_tensorrt(folder):
    runner = OnnxRuntimeBackend(open_bundle(folder, check_hashes=False))

    def deserialize(engine):
        return PlayedEngine(runner, *json.loads(engine))

    return SimpleNamespace(
        __version__="1.7",
        Logger=type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None}),
        Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=deserialize),
        TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out"),
        nptype=nptype,
    )


@pytest.fixture
def engines(tiny_copy, monkeypatch):
    """The tiny bundle with played engines for sm_89, on a machine that plays such a GPU."""
    bundle, stages, files = open_bundle(tiny_copy), {}, {}
    for stage, profiles in bundle.stages.items():
        for profile in profiles:
            relative = f"{stage}/{profile}.sm_89.engine"
            (tiny_copy / relative).write_text(json.dumps([stage, profile]))
            files[relative] = describe(tiny_copy / relative)
            stages.setdefault(stage, {})[profile] = relative
    entry = {"package": "tensorrt_rtx", "version": "1.7", "stages": stages}
    save_manifest(replace(bundle, engines={"sm_89": entry}, files=bundle.files | files))
    played = played_tensorrt(tiny_copy)
    monkeypatch.setattr(module, "_imported", lambda packages: played)
    monkeypatch.setattr(module, "Device", MemoryDevice)
    monkeypatch.setattr("tintype.backends.available", lambda name: True)
    return tiny_copy


def test_arrays_reach_the_engine_and_come_back(engines):
    expected = tintype.load(engines, backend="onnxruntime")("a", **SETTINGS).images
    actual = tintype.load(engines, backend="tensorrt")("a", **SETTINGS).images
    np.testing.assert_array_equal(actual, expected)


class PlayedCache:
    """A cache of kernels that takes back what it wrote."""

    serialized = 0

    def deserialize(self, blob):
        return blob == b"kernels"

    def serialize(self):
        PlayedCache.serialized += 1
        return b"kernels"


@pytest.mark.parametrize("found", [None, b"kernels", b"of another GPU"])
def test_kernels_that_are_compiled_at_the_first_run_are_kept(engines, tmp_path, monkeypatch, found):
    runtime = SimpleNamespace(
        create_runtime_cache=PlayedCache, set_runtime_cache=lambda cache: True
    )
    monkeypatch.setattr(PlayedEngine, "create_runtime_config", lambda engine: runtime)
    monkeypatch.setattr(PlayedCache, "serialized", 0)
    monkeypatch.setenv("TINTYPE_CACHE", str(tmp_path))
    bundle = open_bundle(engines)
    file = tmp_path / f"tensorrt/{bundle.files['decode/32x32-b1.sm_89.engine']['sha256']}.kernels"
    if found is not None:
        file.parent.mkdir()
        file.write_bytes(found)
    backend, latents = TensorRtBackend(bundle), np.zeros((1, 4, 4, 4), np.float32)
    for _ in range(2):
        backend.run("decode", "32x32-b1", {"latents": latents})
    assert file.read_bytes() == b"kernels"
    assert PlayedCache.serialized == (found != b"kernels")


def test_a_graph_is_captured_where_that_is_asked_for_and_there_is_such_a_thing(
    engines, monkeypatch
):
    latents = {"latents": np.zeros((1, 4, 4, 4), np.float32)}
    with pytest.raises(RequestError, match="needs engines by tensorrt-rtx"):
        TensorRtBackend(open_bundle(engines), execution="graph").run("decode", "32x32-b1", latents)
    runtime = SimpleNamespace(cuda_graph_strategy="none")
    monkeypatch.setattr(PlayedEngine, "create_runtime_config", lambda engine: runtime)
    module._imported(set()).CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole")
    TensorRtBackend(open_bundle(engines)).run("decode", "32x32-b1", latents)
    assert runtime.cuda_graph_strategy == "none"
    TensorRtBackend(open_bundle(engines), execution="graph").run("decode", "32x32-b1", latents)
    assert runtime.cuda_graph_strategy == "whole"


def test_tensorrt_rtx_has_the_names_that_a_graph_is_asked_for_by():
    trt = pytest.importorskip("tensorrt_rtx")
    assert hasattr(trt.IRuntimeConfig, "cuda_graph_strategy")
    assert hasattr(trt.CudaGraphStrategy, "WHOLE_GRAPH_CAPTURE")


def test_engines_without_weights_are_filled_from_the_graphs(engines):
    bundle = open_bundle(engines)
    entry = bundle.engines["sm_89"] | {"graphs": bundle.stages}
    filled = []

    def refit_from_bytes(graph, path):
        filled.append((graph, path))
        return True

    played = module._imported(set())
    played.Refitter = lambda engine, logger: SimpleNamespace(refit_cuda_engine=lambda: True)
    played.OnnxParserRefitter = lambda *_: SimpleNamespace(refit_from_bytes=refit_from_bytes)
    backend = TensorRtBackend(replace(bundle, engines={"sm_89": entry}))
    backend.run("decode", "32x32-b1", {"latents": np.zeros((1, 4, 4, 4), np.float32)})
    graph = (engines / "decode/32x32-b1.onnx").read_bytes()
    assert filled == [(graph, str(engines / "graph.onnx"))]


@pytest.mark.parametrize("taken", [True, False])
def test_updated_weights_go_into_engines_without_weights(engines, taken):
    bundle = open_bundle(engines)
    entry = bundle.engines["sm_89"] | {"graphs": bundle.stages}
    new = np.arange(4, dtype=np.float32).view(np.uint8)
    tensor = ExternalTensor("some.weight", 1, (2, 2), "weights/model.safetensors", 8, 16)
    updated = SimpleNamespace(in_graph=lambda graph: [(tensor, new)])
    given = []

    class Refitter:
        refit_cuda_engine = staticmethod(lambda: True)
        get_weights_prototype = staticmethod(lambda name: SimpleNamespace(dtype=f"type of {name}"))

        @staticmethod
        def set_named_weights(name, weights):
            given.append((name, weights))
            return taken

    played = module._imported(set())
    played.Refitter = lambda engine, logger: Refitter
    played.OnnxParserRefitter = lambda *_: SimpleNamespace(refit_from_bytes=lambda *_: True)
    played.Weights = lambda dtype, address, count: (dtype, address, count)
    backend = TensorRtBackend(replace(bundle, engines={"sm_89": entry}), updated=updated)
    latents = np.zeros((1, 4, 4, 4), np.float32)
    if taken:
        backend.run("decode", "32x32-b1", {"latents": latents})
    else:
        with pytest.raises(BundleError, match="does not take the weights"):
            backend.run("decode", "32x32-b1", {"latents": latents})
    assert given == [("some.weight", ("type of some.weight", new.ctypes.data, 4))]


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", "bfloat16"), ("int8", "float16"), ("int4", "float16")]
)
def test_what_engines_compute_in_is_told(engines, precision, dtype):
    backend = TensorRtBackend(replace(open_bundle(engines), precision=precision), dtype=dtype)
    assert backend.dtype == dtype


def test_engines_that_hold_their_weights_take_no_updates(engines):
    with pytest.raises(RequestError, match="--weightless"):
        TensorRtBackend(open_bundle(engines), updated=SimpleNamespace())


def test_weights_that_do_not_fit_their_engine_are_an_error_of_the_graph(engines):
    bundle = open_bundle(engines)
    entry = bundle.engines["sm_89"] | {"graphs": bundle.stages}
    played = module._imported(set())
    played.Refitter = lambda engine, logger: None
    played.OnnxParserRefitter = lambda *_: SimpleNamespace(refit_from_bytes=lambda *_: False)
    backend = TensorRtBackend(replace(bundle, engines={"sm_89": entry}))
    with pytest.raises(BundleError, match=r"does not take the weights of decode/32x32-b1\.onnx"):
        backend.run("decode", "32x32-b1", {"latents": np.zeros((1, 4, 4, 4), np.float32)})


def test_threads_take_turns(engines):
    backend = TensorRtBackend(open_bundle(engines))
    latents = np.random.default_rng(0).standard_normal((8, 1, 4, 4, 4), np.float32)

    def one(n):
        return backend.run("decode", "32x32-b1", {"latents": latents[n % 8]})["image"]

    expected = [one(n) for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for n, image in enumerate(pool.map(one, range(32))):
            assert image.tobytes() == expected[n % 8].tobytes()


def test_an_engine_for_another_gpu_says_which_and_offers_the_graphs(engines):
    with pytest.raises(
        BundleError, match="engines for sm_89, and this GPU is sm_75; .*onnxruntime"
    ):
        matching_engines(open_bundle(engines), "sm_75", "1.7")


def test_an_engine_of_another_version_says_which(engines):
    with pytest.raises(BundleError, match=r"built by tensorrt_rtx 1\.7, and 2\.0 is installed"):
        matching_engines(open_bundle(engines), "sm_89", "2.0")


def test_an_engine_that_the_manifest_does_not_list_is_refused(engines):
    bundle = open_bundle(engines)
    files = {name: entry for name, entry in bundle.files.items() if not name.startswith("decode")}
    with pytest.raises(BundleError, match="decode/32x32-b1.sm_89.engine is not among the listed"):
        matching_engines(replace(bundle, files=files), "sm_89", "1.7")


def test_a_bundle_without_engines_says_how_to_get_them(tiny_bundle, monkeypatch):
    monkeypatch.setattr("tintype.backends.available", lambda name: True)
    with pytest.raises(BundleError, match="holds no engines; export it with --target tensorrt"):
        tintype.load(tiny_bundle, backend="tensorrt")


@pytest.mark.parametrize(
    "options", [{"device": "cpu"}, {"dtype": "float16"}, {"execution": "compiled"}], ids=str
)
def test_options_that_engines_do_not_have_are_refused(engines, options):
    with pytest.raises(RequestError, match="float16|device='cpu'|choose one of eager, graph"):
        TensorRtBackend(open_bundle(engines), **options)


def test_a_machine_without_a_gpu_is_told_what_runs_instead(engines, monkeypatch):
    monkeypatch.setattr(module, "Device", cuda_driver.Device)
    monkeypatch.setattr(cuda_driver, "_LIBRARY", "no-such-library.so")
    with pytest.raises(BackendUnavailable, match="needs NVIDIA GPU 0 .*backend='onnxruntime'"):
        tintype.load(engines, backend="tensorrt")


def test_an_absent_package_names_its_extra(engines, monkeypatch):
    monkeypatch.undo()
    bundle = open_bundle(engines, check_hashes=False)
    entry = bundle.engines["sm_89"] | {"package": "tensorrt_of_tomorrow"}
    with pytest.raises(BackendUnavailable, match="need the package tensorrt_of_tomorrow"):
        TensorRtBackend(replace(bundle, engines={"sm_89": entry}))


def test_auto_does_not_guess_it(engines):
    assert tintype.load(engines).family.backend.name == "onnxruntime"
