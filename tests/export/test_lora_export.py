"""Low-rank updates go into the weights of a bundle, at every precision, and into its record."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import tintype
from small_checkpoints import save_smallest
from tintype.bundle import open_bundle
from tintype.checkpoints import open_checkpoint
from tintype.checkpoints.lora import Lora
from tintype_export.bundle import ExportConfig, export_bundle
from tolerances import relative_error

LAYER = "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"
REQUEST = {"num_inference_steps": 2, "seed": 1, "output_type": "np"}


pytestmark = pytest.mark.usefixtures("traced_once")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_smallest(tmp_path_factory.mktemp("checkpoint") / "sd1")


@pytest.fixture
def update(checkpoint, tmp_path):
    outputs, inputs = (
        open_checkpoint(checkpoint).component("unet").get_submodule(LAYER).weight.shape
    )
    generator = torch.Generator().manual_seed(5)
    path = tmp_path / "style.safetensors"
    pair = {"lora_A": (4, inputs), "lora_B": (outputs, 4)}
    save_file(
        {f"unet.{LAYER}.{n}.weight": torch.randn(s, generator=generator) for n, s in pair.items()},
        path,
    )
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
