"""OpenVINO runs the bundles that onnxruntime runs: equal pictures, safe from threads, plain about what it cannot do."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

import tintype
from tintype import backends
from tintype.backends.onnx_weights import IN_MEMORY, read_from_memory, weight_files
from tintype.bundle import MANIFEST, open_bundle
from tintype.errors import BackendUnavailable, BundleError, ProfileError, RequestError
from tintype_export.quality import psnr
from tiny_bundle import WEIGHTS, denoise_inputs, random_weights, write_manifest
from tolerances import LEAST_DB_16_BITS, STAGE_FP32, TINY_GRAPH, relative_error

ov = pytest.importorskip("openvino")
from tintype.backends.openvino import (  # noqa: E402 - needs openvino
    CACHE_VARIABLE,
    OpenVinoBackend,
)
from tintype_kernels.cache import cache_folder  # noqa: E402 - needs openvino

PROMPT = "a red lighthouse on a rocky coast at dusk"
SETTINGS = {"num_inference_steps": 3, "output_type": "np"}
HAS_BF16 = "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.fixture
def backend(tiny_bundle):
    return OpenVinoBackend(open_bundle(tiny_bundle))


def save_again(folder, precision="fp32"):
    """Write the manifest anew, after a change to the folder's files."""
    manifest = json.loads((folder / MANIFEST).read_text())
    kept = ("name", "family", "stages", "scheduler", "defaults")
    write_manifest(folder, precision=precision, **{name: manifest[name] for name in kept})


def test_a_stage_is_what_its_graph_says(backend):
    weights, inputs = random_weights(), denoise_inputs()
    padded = np.pad(inputs["sample"], ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    local = np.einsum("nchwij,ocij->nohw", windows, weights["conv"])
    told = inputs["encoder_hidden_states"].mean(axis=1) @ weights["mix"]
    expected = np.tanh(local + told[:, :, None, None] + 0.5)
    actual = backend.run("denoise", "32x32-b1", inputs)["model_output"]
    assert relative_error(actual, expected) < TINY_GRAPH


def test_pictures_of_the_model_in_the_box_equal_torchs():
    settings = {"seed": 5, "guidance_scale": 4.0, "scheduler": "dpmpp_2m", **SETTINGS}
    expected = tintype.load("postcard", backend="torch", dtype="float32")(PROMPT, **settings)
    actual = tintype.load("postcard", backend="openvino")(PROMPT, **settings)
    assert relative_error(actual.images, expected.images) < STAGE_FP32


@pytest.mark.skipif(not HAS_BF16, reason="needs a processor with bfloat16 instructions")
def test_bfloat16_is_computed_in_where_asked_for_and_only_then():
    settings = {"seed": 5, **SETTINGS}
    expected = tintype.load("postcard", backend="onnxruntime")(PROMPT, **settings).images
    pipe = tintype.load("postcard", backend="openvino", dtype="bfloat16")
    actual = pipe(PROMPT, **settings).images
    assert LEAST_DB_16_BITS < psnr(actual, expected) < 90
    assert tintype.load("postcard", backend="openvino").family.backend.dtype == "float32"


def test_a_seed_is_the_same_bytes_alone_and_in_a_batch(tiny_bundle):
    pipe = tintype.load(tiny_bundle, backend="openvino")
    together = pipe(["a", "b", "c"], seed=[3, 1, 4], **SETTINGS).images
    alone = pipe("b", seed=1, **SETTINGS).images
    assert alone[0].tobytes() == together[1].tobytes()


def test_eight_threads_share_a_backend_without_disturbing_each_other(tiny_bundle, backend):
    lone = OpenVinoBackend(open_bundle(tiny_bundle))
    expected = [
        lone.run("denoise", "32x32-b1", denoise_inputs(n))["model_output"] for n in range(8)
    ]

    def one(n):
        return backend.run("denoise", "32x32-b1", denoise_inputs(n % 8))["model_output"]

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(one, range(64)))
    for n, result in enumerate(results):
        assert result.tobytes() == expected[n % 8].tobytes()


def test_outputs_stay_as_they_were_when_the_next_call_runs(backend):
    first = backend.run("denoise", "32x32-b1", denoise_inputs(0))["model_output"]
    before = first.copy()
    backend.run("denoise", "32x32-b1", denoise_inputs(1))
    np.testing.assert_array_equal(first, before)


def test_a_graph_pointed_to_memory_is_the_same_graph_as_onnx_reads_it(tiny_bundle):
    graph = (tiny_bundle / "denoise" / "32x32-b2.onnx").read_bytes()
    model = onnx.ModelProto.FromString(graph)
    for tensor in model.graph.initializer:
        fields = {entry.key: entry.value for entry in tensor.external_data}
        if fields:
            del tensor.external_data[:]
            told = {"location": IN_MEMORY, "offset": str(int(fields["offset"]) + 1000)}
            for key, value in (told | {"length": fields["length"]}).items():
                tensor.external_data.add(key=key, value=value)
    moved = read_from_memory(graph, lambda location, offset, length: (offset + 1000, length))
    assert onnx.ModelProto.FromString(moved) == model
    assert weight_files(moved) == {IN_MEMORY}


def test_weights_read_past_their_files_end_are_refused(tiny_copy):
    path = tiny_copy / "encode" / "b1.onnx"
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "offset":
            entry.value = str((tiny_copy / WEIGHTS).stat().st_size)
    path.write_bytes(model.SerializeToString())
    save_again(tiny_copy)
    with pytest.raises(BundleError, match="a graph reads bytes .* of weights/model.safetensors"):
        tintype.load(tiny_copy, backend="openvino")("x")


@pytest.mark.parametrize("bad", ["cut", "edited", "other operator"])
def test_a_graph_that_does_not_load_is_named_in_one_line(tiny_copy, bad):
    path = tiny_copy / "encode" / "b1.onnx"
    graph = path.read_bytes()
    if bad == "other operator":
        model = onnx.ModelProto.FromString(graph)
        model.graph.node[0].op_type = "Conjure"
        graph = model.SerializeToString()
    path.write_bytes({"cut": graph[:-7], "edited": b"\xff" + graph[1:]}.get(bad, graph))
    if bad != "edited":
        save_again(tiny_copy)  # as one who swaps a file and its hash would
    with pytest.raises(BundleError, match=r"encode/b1\.onnx") as raised:
        tintype.load(tiny_copy, backend="openvino")("x")
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("dtype", "met"),
    [("bfloat16", np.nan), ("bfloat16", np.inf), ("float16", np.nan), ("float16", 65504)],
    ids=str,
)
def test_a_stage_that_overflows_in_16_bits_runs_again_in_float32(backend, monkeypatch, dtype, met):
    expected = backend.run("denoise", "32x32-b1", denoise_inputs())["model_output"]
    run = backend._run

    def overflown(key, inputs):
        if key.dtype == "float32":
            return run(key, inputs)
        return {"model_output": np.full_like(expected, met)}

    backend.dtype = dtype
    monkeypatch.setattr(backend, "_run", overflown)
    with pytest.warns(RuntimeWarning, match=f"stage denoise met NaN or infinity in {dtype}"):
        actual = backend.run("denoise", "32x32-b1", denoise_inputs())["model_output"]
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4", "fp8"])
def test_what_holds_in_bfloat16_is_computed_in_it_where_the_processor_can(tiny_copy, precision):
    save_again(tiny_copy, precision=precision)
    dtype = OpenVinoBackend(open_bundle(tiny_copy)).dtype
    assert dtype == ("bfloat16" if HAS_BF16 else "float32")


def test_a_bundle_in_float16_is_computed_in_float32_on_every_cpu(tiny_copy):
    save_again(tiny_copy, precision="fp16")
    assert OpenVinoBackend(open_bundle(tiny_copy)).dtype == "float32"


def test_blobs_are_kept_where_asked_for_and_follow_the_weights(tiny_copy, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, "1")
    blobs = cache_folder() / "openvino"
    run = ("denoise", "32x32-b1", denoise_inputs())
    first = OpenVinoBackend(open_bundle(tiny_copy)).run(*run)["model_output"]
    kept = set(blobs.iterdir())
    again = OpenVinoBackend(open_bundle(tiny_copy)).run(*run)["model_output"]
    np.testing.assert_array_equal(again, first)
    assert set(blobs.iterdir()) == kept != set()
    tensors = load_file(tiny_copy / WEIGHTS)
    tensors["conv"].flat[-1] += 1
    save_file(tensors, tiny_copy / WEIGHTS)
    save_again(tiny_copy)
    changed = OpenVinoBackend(open_bundle(tiny_copy)).run(*run)["model_output"]
    monkeypatch.delenv(CACHE_VARIABLE)
    plain = OpenVinoBackend(open_bundle(tiny_copy)).run(*run)["model_output"]
    np.testing.assert_array_equal(changed, plain)
    assert (changed != first).any()


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"device": "warp"}, RequestError, "choose one of auto, cpu, gpu, npu"),
        ({"device": "gpu:7"}, BackendUnavailable, "'gpu:7' is not among .*: cpu"),
        ({"dtype": "float8"}, RequestError, "choose one of auto, float32"),
    ],
    ids=str,
)
def test_options_that_it_lacks_say_what_there_is(tiny_bundle, options, error, said):
    with pytest.raises(error, match=said):
        tintype.load(tiny_bundle, backend="openvino", **options)


def test_float16_is_refused_on_every_cpu_even_where_it_has_instructions_for_it(tiny_bundle):
    said = "'float16' is nothing that openvino computes in on this CPU; choose one of auto, float32"
    with pytest.raises(BackendUnavailable, match=said):
        tintype.load(tiny_bundle, backend="openvino", dtype="float16")


def test_a_profile_that_is_not_there_is_refused(backend):
    with pytest.raises(ProfileError, match="has no profile 9x9-b1; it has 32x32-b1"):
        backend.run("denoise", "9x9-b1", denoise_inputs())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"sample": np.zeros((1, 4, 5, 4), np.float32)},
            r"sample is float32 of shape \[1, 4, 5, 4\] where the graph has float32 of shape \[1, 4, 4, 4\]",
        ),
        ({"timestep": np.array([1j])}, "timestep is complex128 of shape .* has float32"),
        ({"timesteps": np.ones(1, np.float32)}, "timesteps is none of .*timestep"),
        ({"sample": None}, "missing is sample"),
    ],
    ids=["shape", "type", "name", "missing"],
)
def test_inputs_that_are_not_the_graphs_are_refused_in_one_line(backend, changed, said):
    inputs = {
        name: array for name, array in (denoise_inputs() | changed).items() if array is not None
    }
    with pytest.raises(
        RequestError, match=f"openvino does not take these inputs: {said}"
    ) as raised:
        backend.run("denoise", "32x32-b1", inputs)
    assert len(str(raised.value).splitlines()) == 1


def test_an_absent_package_names_the_extra(tiny_bundle, monkeypatch):
    monkeypatch.setattr(backends, "available", lambda name: name != "openvino")
    with pytest.raises(BackendUnavailable, match=r'pip install "tintype\[openvino\]"'):
        tintype.load(tiny_bundle, backend="openvino")


def test_auto_says_who_else_would_run_it(tiny_bundle):
    pipe = tintype.load(tiny_bundle)
    assert pipe.family.backend.name == "onnxruntime"
    assert "openvino would run it, too" in pipe.backend_reason
