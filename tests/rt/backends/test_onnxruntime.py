"""What onnxruntime holds of a model whose weights it widens."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file

import memory_held
from tintype.backends import compiled
from tiny_bundle import F32, WEIGHTS, constant, external_tensors, save, write_manifest
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
    graph = save(folder, "decode/b1.onnx", (nodes, inputs, outputs, [one]), external, opset=19)
    write_manifest(
        folder,
        precision=precision,
        name="layers",
        family="latent_unet",
        stages={"decode": {"b1": graph}},
        scheduler={},
        defaults={},
    )
    x = torch.from_numpy(latents()).double()
    for weight in weights.values():
        x = x @ weight.double()
    return x.numpy()


def latents() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((4, WIDTH), np.float32)


# A process of its own: what another freed would be filled again.
MEASURE = """
import sys
import numpy as np
import memory_held
from tintype.backends import onnxruntime
from tintype.bundle import open_bundle
folder, latents, memory = sys.argv[1:]
onnxruntime.memory = lambda: float(memory)
backend, inputs = onnxruntime.OnnxRuntimeBackend(open_bundle(folder)), {"latents": np.load(latents)}
before = memory_held.held()
image = backend.run("decode", "b1", inputs)["image"]
held = memory_held.held() - before
np.save(latents, image)
print(held)
"""


@memory_held.told
@pytest.mark.parametrize("precision", TYPES)
def test_weights_that_would_fill_memory_are_widened_one_after_the_other(tmp_path, precision):
    expected = write_layers(tmp_path / "layers", precision)

    def held(memory: float) -> float:
        """In weights of a layer."""
        file = tmp_path / "latents.npy"
        np.save(file, latents())
        command = [sys.executable, "-c", MEASURE, str(tmp_path / "layers"), str(file), str(memory)]
        paths = {**os.environ, "PYTHONPATH": str(Path(memory_held.__file__).parent)}
        done = subprocess.run(command, env=paths, capture_output=True, text=True, check=False)
        assert not done.returncode, done.stderr
        assert relative_error(np.load(file), expected) < TINY_GRAPH
        return int(done.stdout) / WIDE

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
