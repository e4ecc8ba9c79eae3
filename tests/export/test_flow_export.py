"""SD3 and FLUX as bundles: true to torch, in every precision, on every backend that runs them without torch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import small_flow_checkpoints as small
import tintype
from tintype.backends.graphs import read_graph
from tintype.backends.remembering import parted
from tintype.bundle import open_bundle
from tintype.errors import ProfileError
from tintype_export.bundle import ExportConfig, export_bundle
from tintype_export.quality import psnr
from tolerances import LEAST_DB_16_BITS, STAGE_FP32, relative_error

PROMPT = "a red lighthouse, two blue boats in the rain!"
SIZE = (48, 32)
SETTINGS = {"seed": 3, "num_inference_steps": 3, "output_type": "np", "width": 48, "height": 32}
DEFAULTS = {"width": SIZE[0], "height": SIZE[1], "num_inference_steps": 3}
WHOLE = [(kind, "fp32") for kind in ("sd3 without T5", "sd35", "flux-dev", "flux-schnell")]
CASES = [*WHOLE, ("sd35", "fp16"), ("flux-dev", "fp16"), ("flux-dev", "bf16")]
in_float32 = pytest.mark.parametrize("exported", WHOLE, ids="-".join, indirect=True)
ENCODERS = {"sd3 without T5": 2, "sd35": 3, "flux-dev": 2, "flux-schnell": 2}


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def exported(request, tmp_path_factory):
    kind, precision = request.param
    folder = tmp_path_factory.mktemp("flow")
    source = small.save(kind, folder / "checkpoint")
    config = ExportConfig((SIZE,), precision, defaults=DEFAULTS)
    return source, export_bundle(source, folder / "bundle", config), kind, precision


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_bundle_draws_what_torch_draws(exported, backend):
    if backend == "openvino":
        pytest.importorskip("openvino")
    source, folder, _, precision = exported
    expected = tintype.load(source, backend="torch", dtype="float32")(PROMPT, **SETTINGS).images
    actual = tintype.load(folder, backend=backend)(PROMPT, **SETTINGS).images
    if precision == "fp32":
        assert relative_error(actual, expected) < STAGE_FP32
    else:
        assert psnr(actual, expected) > LEAST_DB_16_BITS


def test_a_bundle_has_every_stage_and_its_report_every_graph(exported):
    _, folder, kind, _ = exported
    bundle = open_bundle(folder)
    encoders = ["encode", "encode_2", "encode_3"][: ENCODERS[kind]]
    told = kind.startswith("flux")  # its guidance, so that one row a picture is enough
    steps = ["step"] if told else ["step", "guided_step"]
    assert list(bundle.stages) == [*encoders, "denoise", *steps, "decode", "encode_image"]
    assert bundle.family == ("flux" if told else "sd3")
    assert len(bundle.stages["denoise"]) == (1 if told else 2)
    report = bundle.provenance["verification"]
    graphs = {(stage, profile) for stage, profiles in bundle.stages.items() for profile in profiles}
    assert {(row["stage"], row["profile"]) for row in report["stages"]} == graphs


def test_what_a_picture_tells_can_be_cut_out_of_the_graph(exported):
    _, folder, kind, _ = exported
    bundle = open_bundle(folder)
    parts = parted(read_graph(bundle, next(iter(bundle.stages["denoise"].values()))))
    guidance = {"guidance"} if kind == "flux-dev" else set()
    assert parts.unread == {"encoder_hidden_states", "text_embeds"} | guidance


@in_float32
def test_true_guidance_and_edits_run_as_on_torch(exported):
    source, folder, kind, _ = exported
    rng = np.random.default_rng(0)
    request = SETTINGS | {"image": rng.random((32, 48, 3), np.float32), "strength": 0.7}
    guided = "true_cfg_scale" if kind.startswith("flux") else "guidance_scale"
    request |= {"negative_prompt": "the fog", guided: 3.0}
    expected = tintype.load(source, backend="torch", dtype="float32")(PROMPT, **request).images
    actual = tintype.load(folder)(PROMPT, **request).images
    assert relative_error(actual, expected) < STAGE_FP32


@in_float32
def test_a_bundle_runs_without_torch(exported):
    _, folder, _, _ = exported
    code = (
        "import sys, tintype\n"
        f"tintype.load({str(folder)!r})('red', seed=1, num_inference_steps=1, output_type='np')\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_sizes_come_in_multiples_of_the_patches(tmp_path):
    source = small.save("flux-dev", tmp_path / "checkpoint")
    with pytest.raises(ProfileError, match="40x32: width and height must be multiples of 16"):
        export_bundle(source, tmp_path / "bundle", ExportConfig(((40, 32),)))
