"""Engines on the GPU that they were built for draw what torch draws: whole, filled, updated, and as a CUDA graph."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from safetensors.torch import save_file

import tintype
from tintype.checkpoints import open_checkpoint
from tintype.errors import BackendUnavailable
from tintype.loading import BOX
from tolerances import LEAST_DB_16_BITS

pytest.importorskip("onnxscript", reason="exporting takes it")
from tintype_export.bundle import ExportConfig, export_bundle
from tintype_export.quality import psnr
from tintype_export.tensorrt import targets

SOURCE = BOX / "postcard"
PROMPT = "a red lighthouse on a rocky coast at dusk"
REQUEST = {"num_inference_steps": 4, "seed": 3, "guidance_scale": 4.0, "output_type": "np"}
IN_FLOAT32 = {"backend": "torch", "device": "cuda", "dtype": "float32"}
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_v"


@pytest.fixture(scope="module")
def gpu():
    """This machine's, as exports call it."""
    name = "sm_{}{}".format(*torch.cuda.get_device_capability())
    try:
        known = targets()
    except BackendUnavailable as error:
        pytest.skip(str(error))
    if name not in known:
        pytest.skip(f"no installed package builds engines for {name}; for {', '.join(known)}")
    return name


@pytest.fixture(scope="module")
def bundle(gpu, tmp_path_factory):
    """Postcard's, with engines that hold their weights or do not."""

    def made(weightless):
        folder = tmp_path_factory.mktemp("engines") / "bundle"
        config = ExportConfig(
            ((128, 128),), "fp16", target="tensorrt", gpus=(gpu,), weightless=weightless
        )
        return export_bundle(SOURCE, folder, config)

    return cache(made)


def draw(source, **how):
    return tintype.load(source, **how)(PROMPT, **REQUEST).images


@pytest.mark.parametrize("execution", ["eager", "graph"])
@pytest.mark.parametrize("weightless", [False, True])
def test_engines_draw_what_torch_draws(bundle, weightless, execution):
    expected = draw(SOURCE, **IN_FLOAT32)
    actual = draw(bundle(weightless), backend="tensorrt", execution=execution)
    assert psnr(actual, expected) > LEAST_DB_16_BITS


def test_engines_without_weights_draw_with_updates_what_torch_draws_with_them(bundle, tmp_path):
    layer = open_checkpoint(SOURCE).component("unet").get_submodule(LAYER)
    outputs, inputs = layer.weight.shape
    generator = torch.Generator().manual_seed(5)
    tensors = {
        f"unet.{LAYER}.lora_A.weight": 0.2 * torch.randn(4, inputs, generator=generator),
        f"unet.{LAYER}.lora_B.weight": 0.2 * torch.randn(outputs, 4, generator=generator),
    }
    update = tmp_path / "style.safetensors"
    save_file(tensors, update)
    expected = draw(SOURCE, lora=update, **IN_FLOAT32)
    actual = draw(bundle(weightless=True), backend="tensorrt", lora=update)
    assert psnr(actual, expected) > LEAST_DB_16_BITS
    plain = draw(bundle(weightless=True), backend="tensorrt")
    assert psnr(plain, expected) < LEAST_DB_16_BITS
