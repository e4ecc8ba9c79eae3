"""`tintype verify`: a sound bundle passes, and of another the stage at fault is named."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import small_checkpoints
import tintype
from tintype.bundle import describe, open_bundle, save_manifest
from tintype.checkpoints import open_checkpoint
from tintype.cli import BAD_USAGE, FAILED, main
from tintype.errors import RequestError
from tintype.loading import BOX
from tintype_export import verify as verifying
from tintype_export import verify_cli
from tintype_export.quality import psnr, ssim
from tintype_export.report import Budget, Report, StageReport
from tintype_export.verify import _accuracy, verify
from tolerances import SSIM, STAGE_FP32

POSTCARD = BOX / "postcard"
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    """The command as the entry point brings it, whatever was installed when."""
    monkeypatch.setattr("tintype.cli._register_plugins", lambda sub, name: verify_cli.register(sub))


def describe_again(folder, *names):
    bundle = open_bundle(folder, check_hashes=False)
    files = bundle.files | {name: describe(folder / name) for name in names}
    save_manifest(replace(bundle, files=files))


def test_the_model_in_the_box_passes_and_says_so_as_json(capsys):
    assert main(["verify", "postcard", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    graphs = {(s, p) for s, ps in open_bundle(POSTCARD).stages.items() for p in ps}
    assert {(row["stage"], row["profile"]) for row in report["stages"]} == graphs
    assert all(row["relative_error"] < STAGE_FP32 and row["finite"] for row in report["stages"])
    assert all(row["computes"] == ["float32"] for row in report["stages"])
    assert (report["precision"], report["computed_in"]) == ("fp32", "float32")
    assert "float32" in report["reference"]
    assert report["faults"] == []
    assert report["picture"]["psnr_db"] > 60 > report["picture"]["other_seed_db"]


@pytest.mark.parametrize("other", ["postcard-flow", "sdxl"])
def test_a_checkpoint_of_another_model_is_told_in_one_line(tmp_path, capsys, other):
    against = BOX / other
    if other == "sdxl":  # of the same family, with an encoder more
        against = small_checkpoints.save("sdxl", tmp_path / "model")
        capsys.readouterr()
    assert main(["verify", "postcard", "--against", str(against)]) == BAD_USAGE
    error = capsys.readouterr().err
    assert f"{against} is not what {POSTCARD} was exported from" in error
    assert error.count("\n") == 1


def test_a_checkpoint_of_other_widths_is_told_by_stage_and_both_shapes(tmp_path, capsys):
    against = small_checkpoints.save_smallest(tmp_path / "model")
    capsys.readouterr()
    assert main(["verify", "postcard", "--against", str(against)]) == BAD_USAGE
    error = capsys.readouterr().err
    assert f"{against} is not what {POSTCARD} was exported from: stage encode" in error
    assert "encoder_hidden_states [1, 77, 192]" in error
    assert "encoder_hidden_states [1, 77, 64]" in error
    assert error.count("\n") == 1


def test_a_changed_weight_is_found_by_its_stage(tmp_path, capsys):
    """The manifest's hashes are made to fit, as whoever changes a file on purpose would."""
    folder = shutil.copytree(POSTCARD, tmp_path / "bundle")
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    changed["decoder.conv_out.bias"] += 0.1
    save_file(changed, path, metadata={"format": "pt"})
    describe_again(folder, "vae/diffusion_pytorch_model.safetensors")
    assert main(["verify", str(folder), "--against", str(POSTCARD)]) == FAILED
    printed = capsys.readouterr()
    assert "stage decode at 128x128-b1 differs from the reference" in printed.err
    assert len(printed.err.splitlines()) == 1
    assert "another seed" in printed.out


def test_a_changed_byte_is_found_whatever_this_machine_remembers(tmp_path, capsys):
    folder = shutil.copytree(POSTCARD, tmp_path / "bundle")
    path, stat = folder / UNET, (folder / UNET).stat()
    open_bundle(folder)  # remembered
    blob = bytearray(path.read_bytes())
    blob[-1] ^= 1
    path.write_bytes(bytes(blob))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert main(["verify", str(folder)]) == FAILED
    assert f"{UNET} has another sha256" in capsys.readouterr().err


def test_a_bundle_without_a_checkpoint_asks_for_one(tiny_bundle, capsys):
    assert main(["verify", str(tiny_bundle)]) == 2
    assert "name the one that it came from with --against" in capsys.readouterr().err


def test_a_denoiser_is_compared_on_what_its_text_encoder_says(monkeypatch):
    """Scales that calibration finds on texts do not fit noise in their place."""
    bundle, told = open_bundle(POSTCARD), {}

    def example_inputs(*arguments, **options):
        inputs = own(*arguments, **options)
        told[arguments[2]] = inputs
        return inputs

    own = verifying.example_inputs
    monkeypatch.setattr(verifying, "example_inputs", example_inputs)
    profiles = {"encode": "b1", "denoise": "128x128-b2", "guided_step": "128x128-b1"}
    stages = {name: {each: bundle.stages[name][each]} for name, each in profiles.items()}
    few = replace(bundle, stages=stages)
    list(verifying._stage_reports(few, open_checkpoint(POSTCARD), "onnxruntime"))
    backend = tintype.load(POSTCARD).family.backend
    said = backend.run("encode", "b1", told["encode"])["encoder_hidden_states"][0]
    assert np.allclose(told["denoise"]["encoder_hidden_states"], np.stack([said] * 2), atol=1e-4)
    unconditional, conditional = told["guided_step"]["encoder_hidden_states"][0]
    assert np.allclose(conditional, said, atol=1e-4)
    assert not np.allclose(unconditional, said, atol=0.1)


def test_nan_is_found_and_named(tmp_path):
    folder = shutil.copytree(POSTCARD, tmp_path / "bundle")
    changed = {name: tensor.clone() for name, tensor in load_file(folder / UNET).items()}
    changed["conv_out.bias"][2] = torch.nan
    save_file(changed, folder / UNET, metadata={"format": "pt"})
    describe_again(folder, UNET)
    bundle = open_bundle(folder)
    stages = {"denoise": {"128x128-b1": bundle.stages["denoise"]["128x128-b1"]}}
    report = verify(
        replace(bundle, stages=stages, tokenizers=[]), open_checkpoint(POSTCARD), "onnxruntime"
    )
    assert report.faults(Budget(0, 1)) == ["stage denoise at 128x128-b1 gave NaN or infinity"]
    assert report.stages[0].worst_at.startswith("model_output[0, 2,")
    assert report.as_json()["stages"][0]["relative_error"] is None
    assert report.picture is None


def test_a_precision_that_the_manifest_does_not_declare_is_a_fault():
    stage = StageReport("decode", "16x16-b1", ["float16", "float32"], 0, 1, 0, "image[0]", True)
    report = Report("onnxruntime", "fp32", "float32", "torch", [stage], None)
    (fault,) = report.faults(Budget(40, 1))
    assert "stage decode at 16x16-b1 computes in float16, and the bundle declares fp32" in fault
    assert not replace(report, precision="fp16").faults(Budget(40, 1))


def test_the_judge_reads_what_a_bundle_draws():
    read = _accuracy(open_bundle(POSTCARD), open_checkpoint(POSTCARD), "onnxruntime", 2)
    assert read["overall"] > 0.8  # a guess is right about once in four
    report = Report("onnxruntime", "fp32", "float32", "torch", [], None, accuracy=read)
    assert any(line.startswith("prompt accuracy: place") for line in report.lines())


def test_prompt_accuracy_wants_a_judge_beside_the_model(tiny_bundle):
    checkpoint = replace(open_checkpoint(POSTCARD), source=tiny_bundle)
    with pytest.raises(RequestError, match="has no judge; .* models in the box"):
        _accuracy(open_bundle(POSTCARD), checkpoint, "onnxruntime", 2)


def test_what_the_manifest_says_that_graphs_are_written_in_is_declared():
    stage = StageReport("denoise", "16x16-b1", ["float16"], 0, 1, 0, "model_output[0]", True)
    report = Report("onnxruntime", "int8", "float32", "torch", [stage], None)
    assert "computes in float16, and the bundle declares int8" in report.faults(Budget(30, 1))[0]
    assert not replace(report, written="float16").faults(Budget(30, 1))


def test_psnr_is_the_textbook_formula():
    image = np.zeros((1, 4, 4, 3))
    assert psnr(image + 0.1, image) == pytest.approx(20.0)
    assert psnr(image, image) == 100.0


def test_ssim_is_what_its_definition_says():
    rng = np.random.default_rng(0)
    x, y = rng.random((1, 14, 13, 2)), rng.random((1, 14, 13, 2))
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for top, left, channel in np.ndindex(4, 3, 2):
        a, b = (z[0, top : top + 11, left : left + 11, channel] for z in (x, y))
        mean_a, mean_b = (window * a).sum(), (window * b).sum()
        var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
        shared = (window * (a - mean_a) * (b - mean_b)).sum()
        c1, c2 = 0.01**2, 0.03**2
        likeness = (2 * mean_a * mean_b + c1) * (2 * shared + c2)
        values.append(likeness / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))
    assert ssim(x, y) == pytest.approx(np.mean(values), abs=SSIM)
    assert ssim(x, x) == pytest.approx(1, abs=SSIM)


def test_ssim_equals_scikit_images():
    metrics = pytest.importorskip("skimage.metrics")
    rng = np.random.default_rng(1)
    x = rng.random((32, 40, 3))
    y = np.clip(x + 0.1 * rng.standard_normal(x.shape), 0, 1)
    _, field = metrics.structural_similarity(
        x, y, data_range=1, channel_axis=2, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False, full=True,
    )  # fmt: skip
    assert ssim(x[None], y[None]) == pytest.approx(field[5:-5, 5:-5].mean(), abs=SSIM)
