"""What onnxruntime holds of a model whose weights it widens, and of one whose linear layers are in codes."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file

import memory_held
from tintype.backends import compiled, onnxruntime
from tintype.backends.onnxruntime_model import straightened
from tintype.bundle import open_bundle
from tintype.errors import TintypeError
from tiny_bundle import F32, WEIGHTS, constant, external_tensors, save, write_decoder
from tolerances import TINY_GRAPH, relative_error

WIDTH, LAYERS = 2048, 12
TYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
KINDS = {"bf16": TensorProto.BFLOAT16, "fp8": TensorProto.FLOAT8E4M3FN}
WIDE = 4 * WIDTH * WIDTH  # bytes of a layer's weight in float32


def write_layers(folder: Path, precision: str) -> np.ndarray:
    """Write a bundle whose decoder is linear layers, as exports write them; what it shall give for `latents()`."""
    torch.manual_seed(5)
    weights = {
        f"layer{i}": (torch.randn(WIDTH, WIDTH) / WIDTH**0.5).to(TYPES[precision])
        for i in range(LAYERS)
    }
    (folder / "weights").mkdir(parents=True)
    save_file(weights, folder / WEIGHTS)
    nodes, x = [], "latents"
    for name in weights:
        wide = f"{name} wide"
        if precision == "fp8":
            nodes.append(helper.make_node("DequantizeLinear", [name, "one"], [wide]))
        else:
            nodes.append(helper.make_node("Cast", [name], [wide], to=F32))
        out = "image" if name == f"layer{LAYERS - 1}" else f"{name} out"
        nodes.append(helper.make_node("MatMul", [x, wide], [out]))
        x = out
    faces = ("latents", [4, WIDTH]), ("image", [4, WIDTH])
    inputs, outputs = ([helper.make_tensor_value_info(name, F32, shape)] for name, shape in faces)
    external = external_tensors(folder / WEIGHTS, KINDS[precision])
    one = constant("one", 1, np.float32)
    save(folder, "decode/b1.onnx", (nodes, inputs, outputs, [one]), external, opset=19)
    write_decoder(folder, precision)
    x = torch.from_numpy(latents()).double()
    for weight in weights.values():
        x = x @ weight.double()
    return x.numpy()


def latents() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((4, WIDTH), np.float32)


BACKEND = """
from tintype.backends import onnxruntime
onnxruntime.memory = lambda: {memory}
backend = onnxruntime.OnnxRuntimeBackend(bundle)
"""


@memory_held.told
@pytest.mark.parametrize("precision", TYPES)
def test_weights_that_would_fill_memory_are_widened_one_after_the_other(tmp_path, precision):
    expected = write_layers(tmp_path / "layers", precision)

    def held(memory: float) -> float:
        """In weights of a layer."""
        backend = BACKEND.format(memory=float(memory))
        found, image = memory_held.by_a_run(backend, tmp_path / "layers", latents())
        assert relative_error(image, expected) < TINY_GRAPH
        return found / WIDE

    assert held(LAYERS * WIDE) < 3
    assert held(100 * LAYERS * WIDE) > LAYERS


@pytest.mark.parametrize(
    ("text", "expected"), [("max\n", None), ("1073741824\n", 2**30), (None, None)]
)
def test_a_container_may_fill_less_than_the_machine_has(text, expected, tmp_path, monkeypatch):
    path = tmp_path / "memory.max"
    monkeypatch.setattr(compiled, "_CONTAINERS", path)
    machine = compiled.memory()
    assert machine > 2**30
    if text is not None:
        path.write_text(text)
    assert compiled.memory() == (expected or machine)


def coded_layers(
    folder: Path, *, input_in_codes: bool = True
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Two linear layers in codes, as exports write them, and one whose codes are read untransposed; their codes,
    which lie in a file of the folder."""
    random = np.random.default_rng(2)
    shapes = {"wide": (48, 32), "narrow": (16, 48), "square": (16, 16)}
    codes = {n: random.integers(-127, 128, shape, np.int8) for n, shape in shapes.items()}
    constants = [constant("scale", 0.02, np.float32), constant("middle", 128, np.uint8)]
    nodes, described, x = [], [], "latents"
    for name, (rows, columns) in shapes.items():
        scales = random.random(rows, np.float32) / 100
        constants += [constant(f"{name} scales", scales, np.float32)]
        constants += [constant(f"{name} zeros", np.zeros(rows), np.int8)]
        if input_in_codes:
            nodes += [
                helper.make_node("QuantizeLinear", [x, "scale", "middle"], [f"{name} codes"]),
                helper.make_node(
                    "DequantizeLinear", [f"{name} codes", "scale", "middle"], [f"{name} in"]
                ),
            ]
            x = f"{name} in"
        given = [name, f"{name} scales", f"{name} zeros"]
        nodes.append(helper.make_node("DequantizeLinear", given, [f"{name} numbers"], axis=0))
        described.append(helper.make_tensor_value_info(f"{name} numbers", F32, [rows, columns]))
        weight = f"{name} numbers"
        if name != "square":
            nodes.append(helper.make_node("Transpose", [weight], [f"{name} turned"], perm=[1, 0]))
            weight = f"{name} turned"
        x, before = ("image" if name == "square" else f"{name} out"), x
        nodes.append(helper.make_node("MatMul", [before, weight], [x]))
    faces = ("latents", [4, 32]), ("image", [4, 16])
    inputs, outputs = ([helper.make_tensor_value_info(name, F32, shape)] for name, shape in faces)
    (folder / "weights").mkdir()
    save_file({n: torch.from_numpy(c) for n, c in codes.items()}, folder / WEIGHTS)
    external = external_tensors(folder / WEIGHTS, TensorProto.INT8).values()
    graph = helper.make_graph(
        nodes, "layers", inputs, outputs, [*constants, *external], value_info=described
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10
    ), codes


def computed(model: onnx.ModelProto, codes: dict[str, np.ndarray]) -> np.ndarray:
    """By onnxruntime, as it is without anything turned off, of the codes as initialisers of their own."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    for tensor in model.graph.initializer:
        if tensor.name in codes:
            tensor.CopyFrom(onnx.numpy_helper.from_array(codes[tensor.name], tensor.name))
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    inputs = np.random.default_rng(3).standard_normal((4, 32), np.float32)
    return session.run(None, {"latents": inputs})[0]


def test_codes_of_linear_layers_are_turned_and_the_graph_says_the_same(tmp_path) -> None:
    model, codes = coded_layers(tmp_path)
    graph, turned = straightened(model.SerializeToString(), lambda tensor: codes[tensor.name].T)
    assert {name: found.shape for name, found in turned.items()} == {
        "wide": (32, 48), "narrow": (48, 16)
    }  # fmt: skip
    found = onnx.ModelProto.FromString(graph)
    assert {n.op_type for n in found.graph.node} == {
        "QuantizeLinear", "DequantizeLinear", "Identity", "MatMul"
    }  # fmt: skip
    assert np.array_equal(computed(found, codes | turned), computed(model, codes))


def test_codes_of_layers_whose_input_is_in_numbers_stay_as_they_are(tmp_path) -> None:
    model, codes = coded_layers(tmp_path, input_in_codes=False)
    graph = model.SerializeToString()
    assert straightened(graph, lambda tensor: codes[tensor.name].T) == (graph, {})


@pytest.mark.parametrize("reader", ["DequantizeLinear", "Transpose"])
def test_codes_that_something_else_reads_stay_as_they_are(tmp_path, reader) -> None:
    model, codes = coded_layers(tmp_path)
    given = {
        "DequantizeLinear": ["wide", "wide scales", "wide zeros"],
        "Transpose": ["wide numbers"],
    }[reader]
    how = {"axis": 0} if reader == "DequantizeLinear" else {"perm": [0, 1]}
    model.graph.node.append(helper.make_node(reader, given, ["beside"], **how))
    _, turned = straightened(model.SerializeToString(), lambda tensor: codes[tensor.name].T)
    assert turned.keys() == {"narrow"}


def test_turned_codes_live_as_long_as_the_session_that_reads_them(tmp_path, monkeypatch) -> None:
    """onnxruntime reads them where they lie and holds no reference."""
    model, codes = coded_layers(tmp_path)
    (tmp_path / "decode").mkdir()
    (tmp_path / "decode/b1.onnx").write_bytes(model.SerializeToString())
    write_decoder(tmp_path, "int8")
    alive = []

    def noted(graph, turn):
        new, turned = straightened(graph, turn)
        alive.extend(map(weakref.ref, turned.values()))
        return new, turned

    monkeypatch.setattr(onnxruntime, "straightened", noted)
    backend = onnxruntime.OnnxRuntimeBackend(open_bundle(tmp_path))
    inputs = np.random.default_rng(3).standard_normal((4, 32), np.float32)
    image = backend.run("decode", "b1", {"latents": inputs})["image"]
    gc.collect()
    assert len(alive) == 2
    assert all(array() is not None for array in alive)
    assert np.array_equal(image, computed(model, codes))
    del backend
    gc.collect()
    assert not any(array() is not None for array in alive)


def test_a_run_that_fails_is_told_in_one_line(tiny_bundle):
    backend = onnxruntime.OnnxRuntimeBackend(open_bundle(tiny_bundle))
    (profile, *_) = backend.profiles("decode")
    with pytest.raises(TintypeError, match=f"stage decode at {profile} failed in onnxruntime") as e:
        backend.run("decode", profile, {"latents": np.zeros((1, 4, 1, 1), np.float32)})
    assert "\n" not in str(e.value)
