"""Bundles of models that a ControlNet steers: drawn without torch as torch draws, at every precision."""

from __future__ import annotations

import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import small_checkpoints
import tintype
from remembered_traces import GUIDED, remembered_trace
from tintype.backends.graphs import read_graph
from tintype.backends.remembering import parted
from tintype.bundle import open_bundle
from tintype.checkpoints.lora_files import Lora
from tintype.cli import main
from tintype.errors import RequestError
from tintype_export import bundle as exporting
from tintype_export.bundle import ExportConfig, export_bundle, wanted_engines
from tintype_export.calibration import Calibration
from tintype_export.quality import psnr
from tintype_export.tensorrt import build_engines

SETTINGS = {"seed": 3, "num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "np"}
SETTINGS |= {"width": 16, "height": 16}
PROFILES = GUIDED | {"guided_step": ["16x16-b1"]}
LEAST_DB = {"fp32": 60.0, "fp16": 40.0, "int8": 27.0, "int4": 24.0}


def shown(seed):
    return np.random.default_rng(seed).random((16, 16, 3))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return small_checkpoints.save_smallest(tmp_path_factory.mktemp("steered") / "checkpoint")


@pytest.fixture(scope="module")
def controlnet(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("steered") / "edges"
    unet = diffusers.UNet2DConditionModel.from_pretrained(source, subfolder="unet")
    # The small autoencoder halves pictures once.
    small_checkpoints.controlnet(
        unet, conditioning_embedding_out_channels=(16, 32)
    ).save_pretrained(folder)
    return folder


def exported_to(target, source, controlnet, precision="fp32", **more):
    config = ExportConfig(
        ((16, 16),),
        precision,
        tolerance_db=LEAST_DB[precision],
        defaults={"width": 16, "height": 16},
        calibration=Calibration(("the red",), 2),
        controlnet=controlnet,
        **more,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "trace", remembered_trace)
        patch.setattr(exporting, "profiles_of", lambda *_: PROFILES)
        return export_bundle(source, target, config)


@pytest.fixture(scope="module", params=LEAST_DB)
def exported(request, source, controlnet, tmp_path_factory):
    target = tmp_path_factory.mktemp("steered") / "bundle"
    return exported_to(target, source, controlnet, request.param), request.param


@pytest.fixture(params=["onnxruntime", "openvino"])
def pipelines(request, source, controlnet, exported):
    """Of torch, and of the bundle."""
    if request.param == "openvino":
        pytest.importorskip("openvino")
    whole = tintype.load(source, controlnet=controlnet, backend="torch")
    return whole, tintype.load(exported[0], backend=request.param)


# Euler walks by whole steps, PNDM by the plain denoiser.
@pytest.mark.parametrize("scheduler", ["euler", "pndm"])
def test_the_bundle_is_steered_as_torch_is(pipelines, exported, scheduler):
    asked = {**SETTINGS, "scheduler": scheduler, "controlnet_conditioning_scale": 0.8}
    pictures = [shown(1), shown(2)]
    expected, actual = (
        pipe("the red", **asked, num_images_per_prompt=2, control_image=pictures).images
        for pipe in pipelines
    )
    assert psnr(actual, expected) > LEAST_DB[exported[1]]
    otherwise = pipelines[1]("the red", **asked, control_image=shown(2)).images
    assert psnr(actual[:1], otherwise) < psnr(actual, expected) - 6


def test_a_pair_of_settings_that_a_picture_has_alone_is_the_batchs(pipelines):
    pictures = [shown(1), shown(2)]
    both = pipelines[1]("a", **SETTINGS, num_images_per_prompt=2, control_image=pictures).images
    alone = pipelines[1]("a", **SETTINGS | {"seed": 4}, control_image=shown(2)).images
    assert (both[1] == alone[0]).all()


@pytest.mark.parametrize("exported", ["fp32"], indirect=True)
def test_a_bundle_says_what_it_was_made_of_and_is_verified_against_that(
    exported, source, controlnet, capsys
):
    folder, _ = exported
    manifest = json.loads((folder / "bundle.json").read_text())
    assert (
        "controlnet/diffusion_pytorch_model.safetensors"
        in manifest["provenance"]["source"]["files"]
    )
    assert manifest["defaults"]["steered"] is True
    against = ["verify", str(folder), "--against", str(source)]
    assert main([*against, "--controlnet", str(controlnet)]) == 0
    assert main(against) == 2
    assert "--controlnet" in capsys.readouterr().err


@pytest.mark.parametrize("exported", ["fp32"], indirect=True)
@pytest.mark.parametrize(
    ("stage", "profile"), [("denoise", "16x16-b2"), ("guided_step", "16x16-b1")]
)
def test_a_picture_is_embedded_once_for_all_steps(exported, stage, profile):
    bundle = open_bundle(exported[0])
    parts = parted(read_graph(bundle, bundle.stages[stage][profile]))
    embedding = b"controlnet_cond_embedding.conv_out.weight"
    assert embedding in parts.remember
    assert embedding not in parts.recall
    assert b"controlnet_mid_block.weight" in parts.recall


@pytest.mark.parametrize("exported", ["fp32"], indirect=True)
def test_a_steered_bundle_asks_for_its_picture_and_takes_no_other_controlnet(exported, controlnet):
    with pytest.raises(RequestError, match="it needs control_image"):
        tintype.load(exported[0])("a")
    with pytest.raises(RequestError, match="controlnet=.* is for checkpoints"):
        tintype.load(exported[0], controlnet=controlnet)


def test_a_saved_pipeline_is_exported_with_the_controlnet_in_it(source, controlnet, tmp_path):
    part = diffusers.ControlNetModel.from_pretrained(controlnet)
    pipe = diffusers.StableDiffusionControlNetPipeline.from_pretrained(source, controlnet=part)
    pipe.save_pretrained(tmp_path / "whole")
    folder = exported_to(tmp_path / "bundle", tmp_path / "whole", None)
    expected, actual = (
        tintype.load(tmp_path / name)("the red", **SETTINGS, control_image=shown(1)).images
        for name in ("whole", "bundle")
    )
    assert psnr(actual, expected) > LEAST_DB["fp32"]
    assert main(["verify", str(folder)]) == 0  # its files are the checkpoint, too


@pytest.mark.parametrize("exported", ["fp16"], indirect=True)
def test_a_steered_step_has_an_engine(exported, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    folder, precision = exported
    config = ExportConfig(((16, 16),), precision, target="tensorrt")
    wanted = wanted_engines(open_bundle(folder).stages, config)
    copy = shutil.copytree(folder, tmp_path / "bundle")
    (entry,) = build_engines(copy, wanted, ("sm_89",), lambda line: None).values()
    assert "guided_step" in entry["stages"]


def test_low_rank_updates_and_a_controlnet_go_together(source, controlnet, tmp_path):
    """Merged as the bundle is written, as it is loaded, and on torch."""
    torch.manual_seed(0)
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v"
    parts = {"lora_A": 3 * torch.randn(4, 32), "lora_B": torch.randn(32, 4)}
    style = tmp_path / "style.safetensors"
    save_file({f"{layer}.{part}.weight": value for part, value in parts.items()}, style)
    loras = (Lora(style),)
    merged = exported_to(tmp_path / "merged", source, controlnet, loras=loras)
    plain = exported_to(tmp_path / "plain", source, controlnet)
    whole = tintype.load(source, controlnet=controlnet, lora=style)
    asked = {**SETTINGS, "control_image": shown(1)}
    expected = whole("the red", **asked).images
    for pipe in (tintype.load(merged), tintype.load(plain, lora=style)):
        assert psnr(pipe("the red", **asked).images, expected) > LEAST_DB["fp32"]
    assert psnr(tintype.load(plain)("the red", **asked).images, expected) < 50


def test_the_commands_export_and_draw(source, controlnet, tmp_path, traced_once):
    from PIL import Image

    Image.fromarray(np.uint8(shown(1) * 255)).save(tmp_path / "edges.png")
    steer = ["--controlnet", str(controlnet)]
    bundle, picture = str(tmp_path / "bundle"), str(tmp_path / "out.png")
    assert main(["export", str(source), "-o", bundle, "--size", "16x16", *steer]) == 0
    draw = ["generate", "the red", "-m", bundle, "-o", picture, "--seed", "3", "--steps", "2"]
    assert main([*draw, "--control", str(tmp_path / "edges.png"), "--control-scale", "0.5"]) == 0
    with Image.open(picture) as image:
        assert image.size == (16, 16)
    assert main(draw) == 2
