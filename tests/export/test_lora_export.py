"""Low-rank updates go into a bundle's weights, when it is exported or when it is loaded."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file, save_file

import tintype
from small_checkpoints import save_smallest
from tintype.backends.updated_weights import UpdatedWeights, _narrowed, _widened
from tintype.bundle import open_bundle
from tintype.checkpoints import open_checkpoint
from tintype.checkpoints.files import stored_whole
from tintype.checkpoints.lora_files import Lora
from tintype.errors import CheckpointError, RequestError
from tintype_export.bundle import ExportConfig, export_bundle
from tintype_export.calibration import Calibration
from tintype_export.quantisation import read_layers
from tolerances import MODULE_FP32, relative_error

BLOCK = "mid_block.attentions.0.transformer_blocks.0"
# A layer that graphs read as two, one of attention, one that is kept high in codes, a convolution, another stage's.
LAYERS = {
    "unet": [
        f"{BLOCK}.ff.net.0.proj",
        f"{BLOCK}.attn1.to_q",
        "conv_in",
        "mid_block.resnets.0.conv1",
    ],
    "text_encoder": ["text_model.encoder.layers.0.self_attn.q_proj"],
}
REQUEST = {"num_inference_steps": 2, "seed": 1, "output_type": "np"}


pytestmark = pytest.mark.usefixtures("traced_once")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_smallest(tmp_path_factory.mktemp("checkpoint") / "sd1")


@pytest.fixture
def update(checkpoint, tmp_path):
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for component, layers in LAYERS.items():
        module = open_checkpoint(checkpoint).component(component)
        for layer in layers:
            outputs, inputs, *kernel = module.get_submodule(layer).weight.shape
            pair = {"lora_A": (4, inputs, *kernel), "lora_B": (outputs, 4, *[1] * len(kernel))}
            tensors |= {
                f"{component}.{layer}.{half}.weight": 0.2 * torch.randn(shape, generator=generator)
                for half, shape in pair.items()
            }
    path = tmp_path / "style.safetensors"
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(("precision", "error"), [("fp32", 1e-3), ("fp16", 5e-2)])
def test_a_bundle_draws_what_the_updated_checkpoint_draws(
    checkpoint, update, tmp_path, precision, error
):
    config = ExportConfig(((16, 16),), precision, 20.0, loras=(Lora(update, 0.5),))
    folder = export_bundle(checkpoint, tmp_path / "bundle", config)
    made = tintype.load(folder, backend="onnxruntime")("red", **REQUEST).images
    styled = tintype.load(checkpoint, lora=f"{update}:0.5")
    assert relative_error(made, styled("red", **REQUEST).images) < error
    plain = tintype.load(checkpoint)("red", **REQUEST).images
    assert relative_error(made, plain) > error
    (told,) = open_bundle(folder).provenance["options"]["loras"]
    assert (told["file"], told["scale"]) == ("style.safetensors", 0.5)
    assert not list(tmp_path.glob(".bundle*"))


def test_a_float32_bundle_is_the_updated_checkpoint(checkpoint, update, tmp_path):
    config = ExportConfig(((16, 16),), loras=(Lora(update),))
    folder = export_bundle(checkpoint, tmp_path / "bundle", config)
    merged = open_checkpoint(folder).component("unet").state_dict()
    updated = open_checkpoint(checkpoint).with_loras([Lora(update)]).component("unet")
    assert all(torch.equal(merged[name], value) for name, value in updated.state_dict().items())


@pytest.fixture(scope="module")
def bundle_in(checkpoint, tmp_path_factory):
    """A bundle of the checkpoint in a precision, without updates."""

    def made(precision):
        folder = tmp_path_factory.mktemp("plain") / precision
        calibration = Calibration(("red",), steps=1, shown=1)
        config = ExportConfig(((16, 16),), precision, 10.0, calibration=calibration, group=32)
        return export_bundle(checkpoint, folder, config)

    return cache(made)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    ("precision", "error"), [("fp32", 1e-3), ("fp16", 5e-2), ("bf16", 5e-2), ("int8", 0.15)]
)
def test_a_loaded_bundle_draws_what_the_updated_checkpoint_draws(
    checkpoint, bundle_in, update, backend, precision, error
):
    folder, how = bundle_in(precision), {"backend": backend, "dtype": "float32"}
    if (backend, precision) == ("onnxruntime", "fp16"):
        how["dtype"] = "auto"
    expected = tintype.load(checkpoint, lora=f"{update}:0.5")("red", **REQUEST).images
    made = tintype.load(folder, lora=f"{update}:0.5", **how)("red", **REQUEST).images
    plain = tintype.load(folder, **how)("red", **REQUEST).images
    assert relative_error(made, expected) < min(error, 0.7 * relative_error(plain, expected))
    undone = [f"{update}:0.5", f"{update}:-0.5"]
    back = tintype.load(folder, lora=undone, **how)("red", **REQUEST).images
    assert relative_error(back, plain) < error


def test_weights_are_those_that_torch_merges(checkpoint, bundle_in, update):
    bundle = open_bundle(bundle_in("fp32"))
    updated = UpdatedWeights(bundle, [Lora(update, 0.7), Lora(update, -0.2)])
    merged = open_checkpoint(checkpoint).with_loras([Lora(update, 0.5)])
    for component, layers in LAYERS.items():
        expected = merged.component(component).state_dict()
        weights = open_checkpoint(bundle.folder).components[component].weights
        for name, stored in stored_whole(weights):
            file = stored.path.relative_to(bundle.folder).as_posix()
            new = updated.find(file, stored.begin, stored.size)
            assert (new is None) == (name.removesuffix(".weight") not in layers)
            if new is not None:
                actual = torch.from_numpy(new.view(np.float32)).reshape(stored.shape)
                assert relative_error(actual, expected[name]) < MODULE_FP32


def test_codes_are_rounded_anew_on_scales_of_their_own(checkpoint, bundle_in, update):
    folder = bundle_in("int8")
    updated = UpdatedWeights(open_bundle(folder), [Lora(update)])
    file = folder / "weights/unet.safetensors"
    model = open_checkpoint(checkpoint).component("unet")
    before = read_layers(file, model)
    written = rewritten(file, updated.stretches["weights/unet.safetensors"])
    (again := folder.parent / "again.safetensors").write_bytes(written)
    after = read_layers(again, model)
    tensors = load_file(update)
    rounded = [layer for layer in LAYERS["unet"] if layer in after]
    assert rounded
    assert "conv_in" not in rounded
    for layer in rounded:
        down, up = (
            tensors[f"unet.{layer}.lora_{half}.weight"].flatten(1).double() for half in "AB"
        )
        smoothing = before[layer].smoothing
        change = up @ down if smoothing is None else up @ down / smoothing
        expected = before[layer].weight().double().flatten(1) + change
        scale = after[layer].weight_scale.double()[:, None]
        assert ((after[layer].weight().flatten(1) - expected).abs() <= 0.5001 * scale).all()
        assert (after[layer].codes.flatten(1).abs().amax(1) == 127).all()


def test_codes_are_halved_for_cpus_that_add_them_in_16_bits_where_they_are_added(bundle_in):
    folder = bundle_in("int8")
    updated = UpdatedWeights(open_bundle(folder), largest_code=64)
    before = {file: load_file(folder / file) for file in updated.stretches}
    assert before.keys() == {"weights/unet.safetensors", "weights/vae.safetensors"}
    for file, tensors in before.items():
        after = load(rewritten(folder / file, updated.stretches[file]))
        layers = [n.removesuffix(".input_scale") for n in tensors if n.endswith(".input_scale")]
        assert layers
        for layer in layers:
            old, new = (
                t[f"{layer}.weight"].flatten(1) * t[f"{layer}.weight_scale"][:, None]
                for t in (tensors, after)
            )
            assert after[f"{layer}.weight"].abs().max() <= 64
            assert ((new - old).abs() <= 0.5001 * after[f"{layer}.weight_scale"][:, None]).all()
        keys = {n for n in tensors if n.endswith("to_k.output_scale")}
        for name in keys:
            assert float(after[name] / tensors[name]) == pytest.approx(127 / 64)
        touched = {f"{layer}.{leaf}" for layer in layers for leaf in ("weight", "weight_scale")}
        for name in tensors.keys() - touched - keys:
            assert torch.equal(after[name], tensors[name])


def rewritten(file, stretches):
    """A file's bytes with what stands in the place of some."""
    written = bytearray(file.read_bytes())
    for begin, new in zip(*stretches, strict=True):
        written[begin : begin + len(new)] = new.tobytes()
    return bytes(written)


def test_bfloat16_is_rounded_as_torch_rounds_it():
    bits = torch.arange(0, 2**31, 4099, dtype=torch.int64)
    ties = (torch.arange(0, 0x7F80, dtype=torch.int64) << 16) + 0x8000
    values = torch.cat([bits[bits < 0x7F800000], ties]).to(torch.int32).view(torch.float32)
    expected = values.to(torch.bfloat16).float().numpy()
    assert np.array_equal(_widened(_narrowed(values.numpy(), "BF16"), "BF16"), expected)


@pytest.mark.parametrize("precision", ["int4", "fp8"])
def test_codes_that_take_no_updates_say_so(bundle_in, update, precision):
    with pytest.raises(RequestError, match=rf"a bundle in {precision} takes no updates.*--lora"):
        tintype.load(bundle_in(precision), lora=update)


def test_updates_of_another_model_are_refused(bundle_in, tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"unet.nowhere.lora_A.weight": torch.zeros(4, 8)}, path)
    with pytest.raises(CheckpointError, match="no layer here for unet.nowhere"):
        tintype.load(bundle_in("fp32"), lora=path)
