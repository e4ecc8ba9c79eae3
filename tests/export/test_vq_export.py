"""Bundles of latents that are rounded to a codebook: entries are found in float32, whatever else is computed in."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
from safetensors.torch import load_file

import tintype
from remembered_traces import GUIDED, remembered_trace
from small_checkpoints import save_smallest, vq_model
from tintype_export import bundle as exporting
from tintype_export.bundle import ExportConfig, export_bundle
from tintype_export.calibration import Calibration
from tintype_export.quality import psnr

SETTINGS = {"seed": 3, "num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}
SETTINGS |= {"width": 16, "height": 16}
PROFILES = GUIDED | {"encode_image": ["16x16-b1"]}
# What random weights draw has no smooth places, and a cell that lies between two entries is rounded to the other one
# where latents differ by little: below what trained models keep to, and far above the 13 dB of another seed.
LEAST_DB = {"fp32": 60.0, "fp16": 40.0, "int8": 20.0}
# What the decoder's layers round; entries that were searched for in bfloat16 would make it 5e-2 where it is 1e-2.
DECODED = {"fp32": 1e-5, "fp16": 2e-3, "int8": 2e-2}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    autoencoder = partial(vq_model, num_vq_embeddings=1024)
    return save_smallest(tmp_path_factory.mktemp("vq") / "checkpoint", autoencoder)


@pytest.fixture(scope="module", params=LEAST_DB)
def exported(request, source, tmp_path_factory):
    config = ExportConfig(
        ((16, 16),),
        request.param,
        tolerance_db=LEAST_DB[request.param],
        defaults={"width": 16, "height": 16},
        calibration=Calibration(("the red",), 2),
    )
    target = tmp_path_factory.mktemp("vq") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "trace", remembered_trace)
        patch.setattr(exporting, "profiles_of", lambda *_: PROFILES)
        return export_bundle(source, target, config), request.param


@pytest.fixture(params=["onnxruntime", "openvino"])
def pipelines(request, source, exported):
    """Of torch, and of the bundle."""
    if request.param == "openvino":
        pytest.importorskip("openvino")
    folder, _ = exported
    return tintype.load(source, backend="torch"), tintype.load(folder, backend=request.param)


def test_the_bundle_draws_what_torch_draws(pipelines, exported):
    expected, actual = (pipe("the red", **SETTINGS).images for pipe in pipelines)
    assert psnr(actual, expected) > LEAST_DB[exported[1]]


def test_a_picture_is_edited_as_torch_edits_it(pipelines, exported):
    picture = np.random.default_rng(0).random((16, 16, 3))
    edit = {**SETTINGS, "image": picture, "strength": 0.5}
    expected, actual = (pipe("the red", **edit).images for pipe in pipelines)
    assert psnr(actual, expected) > LEAST_DB[exported[1]]


def test_entries_are_found_in_float32_at_every_precision(pipelines, exported):
    latents = np.random.default_rng(1).standard_normal((1, 4, 8, 8)).astype(np.float32)
    expected, actual = (
        pipe.family.backend.run("decode", "16x16-b1", {"latents": latents})["image"]
        for pipe in pipelines
    )
    difference = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert difference < DECODED[exported[1]]


@pytest.mark.parametrize("exported", ["fp16"], indirect=True)
def test_what_is_computed_in_float16_searches_in_float32(exported):
    folder, _ = exported
    rows = json.loads((folder / "bundle.json").read_text())["provenance"]["verification"]["stages"]
    computed = {row["stage"]: row["computes"] for row in rows}
    assert computed["decode"] == ["float16", "float32"]
    assert computed["encode_image"] == ["float16"]


@pytest.mark.parametrize("exported", ["int8"], indirect=True)
def test_of_int8_the_codebook_and_what_reads_it_stay_as_they_are(source, exported):
    folder, _ = exported
    stored = load_file(folder / "weights/vae.safetensors")
    published = load_file(source / "vae/diffusion_pytorch_model.safetensors")
    for name in ("quantize.embedding.weight", "quant_conv.weight", "post_quant_conv.weight"):
        assert stored[name].equal(published[name].half())
    codes = {name for name in stored if name.endswith(".weight_scale")}
    assert len(codes) > 5
    assert all(name.startswith("decoder.") for name in codes)
