"""A random bundle with the stage faces of a latent UNet: small graphs that point into one safetensors file."""

from __future__ import annotations

import json
import struct

import numpy as np
import onnx
from onnx import TensorProto, helper
from safetensors.numpy import save_file
from tokenizers import pre_tokenizers

from tintype.bundle import MANIFEST, Bundle, describe, save_manifest

WIDTH = 8  # channels of the embedding
SIZES = [(32, 32), (48, 32)]
WEIGHTS = "weights/model.safetensors"
SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
DEFAULTS = {"width": 32, "height": 32, "num_inference_steps": 4, "guidance_scale": 3.0}
I64, F32 = TensorProto.INT64, TensorProto.FLOAT


def write_manifest(folder, *, precision="fp32", tokenizers=("tokenizer",), **fields):
    """Hash every visible file of the folder into its `bundle.json`; `fields` are the other ones of a Bundle."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    visible = (path for path in found if not any(part.startswith(".") for part in path.parts))
    names = sorted(path.as_posix() for path in visible if path.as_posix() != MANIFEST)
    files = {name: describe(folder / name) for name in names}
    return save_manifest(
        Bundle(folder, precision=precision, tokenizers=list(tokenizers), files=files, **fields)
    )


def write_decoder(folder, precision):
    """The manifest of a bundle whose only graph is `decode/b1.onnx`."""
    stages = {"decode": {"b1": "decode/b1.onnx"}}
    parts = {"family": "latent_unet", "stages": stages, "scheduler": {}, "defaults": {}}
    return write_manifest(folder, precision=precision, name="layers", **parts)


def write_tiny_bundle(folder):
    """Write the bundle and return its folder."""
    weights = random_weights()
    (folder / "weights").mkdir(parents=True)
    save_file(weights, folder / WEIGHTS)
    write_tokenizer(folder / "tokenizer")
    external = external_tensors(folder / WEIGHTS)
    stages = {"encode": {"b1": save(folder, "encode/b1.onnx", encode_graph(), external)}}
    for width, height in SIZES:
        for batch in (1, 2):
            name = f"{width}x{height}-b{batch}"
            graph = denoise_graph(batch, height // 8, width // 8)
            path = save(folder, f"denoise/{name}.onnx", graph, external)
            stages.setdefault("denoise", {})[name] = path
        name = f"{width}x{height}-b1"
        path = save(folder, f"decode/{name}.onnx", decode_graph(height // 8, width // 8), external)
        stages.setdefault("decode", {})[name] = path
        path = save(
            folder, f"encode_image/{name}.onnx", encode_image_graph(height, width), external
        )
        stages.setdefault("encode_image", {})[name] = path
    write_manifest(
        folder,
        name="tiny",
        family="latent_unet",
        stages=stages,
        scheduler=SCHEDULER,
        defaults=DEFAULTS,
    )
    return folder


def random_weights():
    rng = np.random.default_rng(7)
    shapes = {
        "embed": (514, WIDTH),
        "conv": (4, 4, 3, 3),
        "mix": (WIDTH, 4),
        "paint": (4, 192),
        "look": (4, 3, 1, 1),
    }
    return {
        name: rng.standard_normal(shape).astype(np.float32) / 3 for name, shape in shapes.items()
    }


def write_tokenizer(folder):
    """CLIP's byte alphabet without merges."""
    folder.mkdir(parents=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(t + "</w>" for t in alphabet), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77}))


def external_tensors(path, data_type=F32):
    """Initialisers of one type that point into the file, by its own header: length, JSON of offsets, data."""
    blob = path.read_bytes()
    (length,) = struct.unpack("<Q", blob[:8])
    tensors = {}
    for name, entry in json.loads(blob[8 : 8 + length]).items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        tensor = TensorProto(name=name, data_type=data_type, dims=entry["shape"])
        tensor.data_location = TensorProto.EXTERNAL
        fields = {"location": WEIGHTS, "offset": 8 + length + begin, "length": end - begin}
        for key, value in fields.items():
            tensor.external_data.add(key=key, value=str(value))
        tensors[name] = tensor
    return tensors


def constant(name, value, dtype=np.int64):
    return onnx.numpy_helper.from_array(np.asarray(value, dtype), name)


def encode_graph():
    nodes = [helper.make_node("Gather", ["embed", "input_ids"], ["encoder_hidden_states"])]
    inputs = [helper.make_tensor_value_info("input_ids", I64, [1, 77])]
    outputs = [helper.make_tensor_value_info("encoder_hidden_states", F32, [1, 77, WIDTH])]
    return nodes, inputs, outputs, []


def denoise_graph(batch, height, width):
    """conv(sample) + mean(text) @ mix + timestep/1000, through tanh."""
    nodes = [
        helper.make_node("Conv", ["sample", "conv"], ["local"], pads=[1, 1, 1, 1]),
        helper.make_node("ReduceMean", ["encoder_hidden_states", "axis"], ["pooled"], keepdims=0),
        helper.make_node("MatMul", ["pooled", "mix"], ["mixed"]),
        helper.make_node("Reshape", ["mixed", "channels"], ["told"]),
        helper.make_node("Div", ["timestep", "thousand"], ["t"]),
        helper.make_node("Reshape", ["t", "scalars"], ["time"]),
        helper.make_node("Add", ["local", "told"], ["sum"]),
        helper.make_node("Add", ["sum", "time"], ["total"]),
        helper.make_node("Tanh", ["total"], ["model_output"]),
    ]
    constants = [
        constant("axis", [1]),
        constant("channels", [batch, 4, 1, 1]),
        constant("scalars", [batch, 1, 1, 1]),
        constant("thousand", [1000.0], np.float32),
    ]
    latent = [batch, 4, height, width]
    inputs = [
        helper.make_tensor_value_info("sample", F32, latent),
        helper.make_tensor_value_info("timestep", F32, [batch]),
        helper.make_tensor_value_info("encoder_hidden_states", F32, [batch, 77, WIDTH]),
    ]
    outputs = [helper.make_tensor_value_info("model_output", F32, latent)]
    return nodes, inputs, outputs, constants


def denoise_inputs(seed=0):
    """What the denoiser takes for a row of the first size."""
    rng = np.random.default_rng(seed)
    return {
        "sample": rng.standard_normal((1, 4, 4, 4), np.float32),
        "timestep": np.array([500.0], np.float32),
        "encoder_hidden_states": rng.standard_normal((1, 77, WIDTH), np.float32),
    }


def decode_graph(height, width):
    """Each latent paints its own 8x8 block of colours."""
    nodes = [
        helper.make_node("Transpose", ["latents"], ["last"], perm=[0, 2, 3, 1]),
        helper.make_node("MatMul", ["last", "paint"], ["blocks"]),
        helper.make_node("Sigmoid", ["blocks"], ["colours"]),
        helper.make_node("Reshape", ["colours", "split"], ["parts"]),
        helper.make_node("Transpose", ["parts"], ["rows"], perm=[0, 1, 3, 2, 4, 5]),
        helper.make_node("Reshape", ["rows", "picture"], ["image"]),
    ]
    constants = [
        constant("split", [1, height, width, 8, 8, 3]),
        constant("picture", [1, 8 * height, 8 * width, 3]),
    ]
    inputs = [helper.make_tensor_value_info("latents", F32, [1, 4, height, width])]
    outputs = [helper.make_tensor_value_info("image", F32, [1, 8 * height, 8 * width, 3])]
    return nodes, inputs, outputs, constants


def encode_image_graph(height, width):
    """Each latent mixes the mean colours of its own 8x8 block."""
    nodes = [
        helper.make_node("Transpose", ["image"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("AveragePool", ["planes"], ["means"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Conv", ["means", "look"], ["latents"]),
    ]
    inputs = [helper.make_tensor_value_info("image", F32, [1, height, width, 3])]
    latent = [1, 4, height // 8, width // 8]
    outputs = [helper.make_tensor_value_info("latents", F32, latent)]
    return nodes, inputs, outputs, []


def save(folder, relative, parts, external, opset=18):
    nodes, inputs, outputs, constants = parts
    used = {name for node in nodes for name in node.input}
    initializers = [*constants, *(tensor for name, tensor in external.items() if name in used)]
    graph = helper.make_graph(nodes, "stage", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    path = folder / relative
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(onnx.shape_inference.infer_shapes(model).SerializeToString())
    return relative
