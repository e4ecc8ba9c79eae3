"""What OpenVINO holds of a model: the files as they are mapped, and what it packs of them for its kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file

import memory_held
from tintype.backends import onnx_weights
from tintype.backends.graphs import MappedWeights
from tintype.bundle import open_bundle
from tiny_bundle import F32, WEIGHTS, external_tensors, save, write_decoder
from tolerances import TINY_GRAPH, relative_error

ov = pytest.importorskip("openvino")
from tintype.backends.openvino import OpenVinoBackend  # noqa: E402 - needs openvino
from tintype.backends.openvino_model import read_model  # noqa: E402 - needs openvino

WIDTH = 4096
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KINDS = {"fp32": F32, "bf16": TensorProto.BFLOAT16, "fp16": TensorProto.FLOAT16}
BYTES = {"float32": 4, "bfloat16": 2}
WIDENED = (("linear", "w"), ("convolution", "k"))
BACKEND = """
from tintype.backends.openvino import OpenVinoBackend
backend = OpenVinoBackend(bundle)
"""


def write_layers(folder: Path, precision: str) -> torch.Tensor:
    """Write a bundle whose decoder is a linear layer and a convolution, as exports write them; what it shall give."""
    torch.manual_seed(3)
    weights = {
        "linear": torch.randn(WIDTH, WIDTH) / WIDTH**0.5,
        "convolution": torch.randn(WIDTH // 4, WIDTH, 3, 3) / WIDTH,
    }
    stored = {name: weight.to(TYPES[precision]) for name, weight in weights.items()}
    (folder / "weights").mkdir(parents=True)
    save_file(stored, folder / WEIGHTS)
    computed = TensorProto.FLOAT16 if precision == "fp16" else F32
    widened = precision == "bf16"  # there is no convolution in bfloat16
    linear, convolution = ("w", "k") if widened else ("linear", "convolution")
    nodes = [
        *(helper.make_node("Cast", [name], [to], to=F32) for name, to in WIDENED if widened),
        helper.make_node("Cast", ["latents"], ["x"], to=computed),
        helper.make_node("MatMul", ["x", linear], ["mixed"]),
        helper.make_node("Reshape", ["mixed", "square"], ["picture"]),
        helper.make_node("Conv", ["picture", convolution], ["y"], pads=[1, 1, 1, 1]),
        helper.make_node("Cast", ["y"], ["image"], to=F32),
    ]
    square = onnx.numpy_helper.from_array(np.array([1, WIDTH, 2, 2]), "square")
    faces = ("latents", [4, WIDTH]), ("image", [1, WIDTH // 4, 2, 2])
    inputs, outputs = ([helper.make_tensor_value_info(name, F32, shape)] for name, shape in faces)
    external = external_tensors(folder / WEIGHTS, KINDS[precision])
    save(folder, "decode/b1.onnx", (nodes, inputs, outputs, [square]), external)
    write_decoder(folder, precision)
    x = latents().double()
    mixed = (x @ stored["linear"].double()).reshape(1, WIDTH, 2, 2)
    return torch.nn.functional.conv2d(mixed, stored["convolution"].double(), padding=1)


def latents() -> torch.Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("precision", TYPES)
def test_a_graph_is_computed_from_where_its_weights_are_mapped(tmp_path, precision):
    write_layers(tmp_path / "layers", precision)
    bundle = open_bundle(tmp_path / "layers")
    graph = bundle.path("decode/b1.onnx").read_bytes()
    weights = MappedWeights(bundle)
    model = read_model(ov.Core(), graph, weights)
    constants = {node.get_friendly_name(): node for node in model.get_ops()}
    for tensor in onnx_weights.external_tensors(graph):
        address, _ = weights.place(tensor.location, tensor.offset, tensor.length)
        assert constants[tensor.name].get_tensor_view().data.ctypes.data == address


@memory_held.told
@pytest.mark.parametrize("precision", TYPES)
def test_it_holds_weights_once_beside_the_mapped_files_and_computes_what_they_say(
    tmp_path, precision
):
    expected = write_layers(tmp_path / "layers", precision)
    dtype = OpenVinoBackend(open_bundle(tmp_path / "layers")).dtype
    held, actual = memory_held.by_a_run(BACKEND, tmp_path / "layers", latents().numpy())
    stored = (WIDTH * WIDTH + WIDTH // 4 * WIDTH * 9) * BYTES[dtype]
    assert held < 1.3 * stored
    allowed = TINY_GRAPH if dtype == "float32" else 2**-7
    assert relative_error(actual, expected.numpy()) < allowed
