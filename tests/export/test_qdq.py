"""Graphs in codes compute what the quantised torch modules compute, from one copy of the weights, on every backend."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from mixed_stage import GRAPH, SCHEMES, WEIGHTS, Mixed, make_inputs, write_mixed
from tintype.backends.onnxruntime import OnnxRuntimeBackend
from tintype.backends.updated_weights import UpdatedWeights
from tintype.bundle import Bundle, describe
from tintype.models.quantised import layer_codes
from tintype_export.quantisation import packed, read_layers, unpacked
from tintype_export.tensorrt import build_engines
from tolerances import LINEAR_7_BITS, LINEAR_INT8, QUANTISED_GRAPH, QUANTISED_GRAPH_FP8


@pytest.fixture(scope="module", params=SCHEMES.values(), ids=SCHEMES.keys())
def written(request, tmp_path_factory):
    """A folder with a quantised graph in it, the torch module that it is of, and the scheme."""
    root = tmp_path_factory.mktemp("qdq")
    return root, write_mixed(root, request.param), request.param


def as_bundle(root, scheme):
    names = (WEIGHTS, GRAPH)
    return Bundle(
        folder=root,
        name="mixed",
        family="latent_unet",
        precision=scheme.weights,
        stages={"denoise": {"6x5-b2": GRAPH}},
        scheduler={},
        tokenizers=[],
        defaults={},
        files={name: describe(root / name) for name in names},
    )


def distance(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_graph_computes_what_the_torch_modules_compute(written, backend):
    root, stage, scheme = written
    bundle, how = as_bundle(root, scheme), {"dtype": "float32"}
    if backend == "openvino":
        engine = pytest.importorskip("tintype.backends.openvino").OpenVinoBackend
        stage = copy.deepcopy(stage)
        stage.unet.conv.output_scale = None  # which it gains nothing by
    else:
        engine = OnnxRuntimeBackend
    adds = (scheme.weights, scheme.activations) == ("int8", "static")
    fewer = engine.largest_code("cpu") if adds else None
    with torch.inference_mode():
        expected = stage(*make_inputs().values()).numpy()
    arrays = {name: tensor.numpy() for name, tensor in make_inputs().items()}
    twice = scheme.weights == "fp8" and backend == "openvino"
    close = QUANTISED_GRAPH_FP8 if twice else QUANTISED_GRAPH
    if fewer is not None:
        how["updated"], close = UpdatedWeights(bundle, largest_code=fewer), LINEAR_7_BITS
    actual = engine(bundle, **how).run("denoise", "6x5-b2", arrays)
    assert distance(actual["model_output"], expected) < close


def test_the_graph_holds_no_weights_and_rounds_what_has_a_scale(written):
    root, _, scheme = written
    graph = onnx.load(root / GRAPH, load_external_data=False).graph
    inside = [t for t in graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    assert sum(len(t.SerializeToString()) for t in inside) < 600
    outside = {t.name for t in graph.initializer} - {t.name for t in inside}
    assert {f"unet.{name}.weight.codes" for name in ("conv", "to_q", "to_k", "row")} <= outside
    rounded = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    outputs = {"int8": 3, "fp8": 2}
    expected = 4 + outputs[scheme.weights] if scheme.activations == "static" else 0
    assert len(rounded) == expected


def test_onnxruntime_multiplies_and_convolves_codes_by_codes(tmp_path, monkeypatch):
    """A graph whose nodes it did not put together would be as right, and slower than one in float32."""
    write_mixed(tmp_path, SCHEMES["int8"])
    made = tmp_path / "optimised.onnx"
    make = ort.InferenceSession

    def session(graph, options, **how):
        options.optimized_model_filepath = str(made)
        return make(graph, options, **how)

    monkeypatch.setattr(ort, "InferenceSession", session)
    backend = OnnxRuntimeBackend(as_bundle(tmp_path, SCHEMES["int8"]))
    arrays = {name: tensor.numpy() for name, tensor in make_inputs().items()}
    backend.run("denoise", "6x5-b2", arrays)
    kinds = Counter(node.op_type for node in onnx.load(made, load_external_data=False).graph.node)
    # The convolution; queries, whose bias is added behind; keys; and one row, which alone is a Gemm.
    products = ("QLinearConv", "MatMulIntegerToFloat", "QLinearMatMul", "Gemm")
    assert [kinds[name] for name in products] == [1, 1, 1, 1]
    assert not kinds.keys() & {"Conv", "FusedConv", "MatMul", "FusedMatMul"}


def test_codes_are_read_back_as_they_were_written(written):
    root, stage, _ = written
    back = read_layers(root / WEIGHTS, Mixed())
    for name, kept in layer_codes(stage.unet).items():
        assert back[name].scheme == kept.scheme
        assert torch.equal(back[name].codes.float(), kept.codes.float())
        assert torch.equal(back[name].weight_scale, kept.weight_scale)
        assert (back[name].smoothing is None) == (kept.smoothing is None)
        assert (back[name].output_scale is None) == (kept.output_scale is None)
        if kept.output_scale is not None:
            assert torch.equal(back[name].output_scale, kept.output_scale)


def test_codes_of_four_bits_lie_as_onnx_says():
    codes = torch.randint(-8, 8, (6, 10), dtype=torch.int8)
    tensor = onnx.helper.make_tensor("c", onnx.TensorProto.INT4, [6, 10], codes.flatten().tolist())
    as_bytes = np.array(tensor.int32_data, np.uint8).tobytes()
    assert packed(codes).numpy().tobytes() == as_bytes
    assert torch.equal(unpacked(packed(codes)), codes)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_tensorrt_builds_it_for_gpus_that_multiply_in_codes(scheme, tmp_path):
    trt = pytest.importorskip("tensorrt_rtx")
    write_mixed(tmp_path, scheme, torch.float16)
    gpus = ("sm_89", "sm_120")
    entries = build_engines(tmp_path, {"denoise": {"6x5-b2": GRAPH}}, gpus, print)
    for gpu in gpus:
        engine = tmp_path / entries[gpu]["stages"]["denoise"]["6x5-b2"]
        assert engine.stat().st_size > (tmp_path / WEIGHTS).stat().st_size / 2
        assert entries[gpu]["version"] == trt.__version__


def test_in_float16_the_graph_is_near_what_it_is_in_float32(tmp_path):
    scheme = SCHEMES["int8"]
    stage = write_mixed(tmp_path, scheme, torch.float16)
    with torch.inference_mode():
        expected = stage(*make_inputs().values()).numpy()
    arrays = {name: tensor.numpy() for name, tensor in make_inputs().items()}
    actual = OnnxRuntimeBackend(as_bundle(tmp_path, scheme)).run("denoise", "6x5-b2", arrays)
    assert distance(actual["model_output"], expected) < LINEAR_INT8
