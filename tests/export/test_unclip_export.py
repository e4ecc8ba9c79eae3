"""unCLIP as bundles: true to torch, in every precision, on every backend that runs them without torch."""

from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import pytest

import small_unclip_checkpoint as small
import tintype
from remembered_traces import remembered_trace
from tintype.backends.graphs import read_graph
from tintype.backends.remembering import parted
from tintype.bundle import open_bundle
from tintype.cli import main
from tintype.errors import ProfileError, RequestError
from tintype.request import CASCADE
from tintype_export import bundle as exporting
from tintype_export import cli
from tintype_export.bundle import ExportConfig, export_bundle, wanted_engines
from tintype_export.calibration import Calibration
from tintype_export.quality import psnr
from tintype_export.tensorrt import build_engines
from tolerances import LEAST_DB_16_BITS

PROMPT = "a red lighthouse, two blue boats in the rain!"
SIZE = (32, 32)
STEPS = {
    "num_inference_steps": 3,
    "prior_num_inference_steps": 3,
    "super_res_num_inference_steps": 3,
}
SETTINGS = {"seed": 3, "output_type": "np"}
# Steps of random weights end at clipped noise, where a rounding now and then turns a pixel over.
LEAST_DB = {"fp32": 60.0, "fp16": LEAST_DB_16_BITS, "int8": 20.0, "int4": 20.0}
STAGES = [
    "encode",
    *("prior", "prior_step", "prior_guided_step"),
    "embed",
    "project",
    *("denoise", "step", "guided_step"),
    *("enlarge", "enlarge_step"),
    *("enlarge_last", "enlarge_last_step"),
]
# What steps have inside.
PLAIN = {"prior", "denoise", "enlarge", "enlarge_last"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return small.save("unclip", tmp_path_factory.mktemp("unclip") / "checkpoint")


@pytest.fixture(scope="module", params=LEAST_DB)
def exported(request, source, tmp_path_factory):
    config = ExportConfig(
        (SIZE,),
        request.param,
        tolerance_db=LEAST_DB[request.param],
        defaults=STEPS,
        calibration=Calibration(("the red", "two boats"), 3) if request.param == "int8" else None,
        group=32,
    )
    target = tmp_path_factory.mktemp("unclip") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "trace", remembered_trace)
        return export_bundle(source, target, config), request.param


in_float32 = pytest.mark.parametrize("exported", ["fp32"], indirect=True)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_bundle_draws_what_torch_draws(source, exported, backend):
    if backend == "openvino":
        pytest.importorskip("openvino")
    folder, precision = exported
    expected = tintype.load(source, backend="torch")(PROMPT, **STEPS, **SETTINGS).images
    actual = tintype.load(folder, backend=backend)(PROMPT, **SETTINGS).images
    assert psnr(actual, expected) > LEAST_DB[precision]


def test_a_bundle_has_every_stage_and_its_report_every_graph(exported):
    folder, _ = exported
    bundle = open_bundle(folder)
    assert (bundle.family, list(bundle.stages)) == ("unclip", STAGES)
    guided = {stage for stage, profiles in bundle.stages.items() if len(profiles) == 2}
    assert guided == {"prior", "denoise"}
    report = bundle.provenance["verification"]
    graphs = {(stage, profile) for stage, profiles in bundle.stages.items() for profile in profiles}
    assert {(row["stage"], row["profile"]) for row in report["stages"]} == graphs
    assert len(report["picture"]["latents_error"]) == 3 + 8 + 3


@pytest.mark.parametrize("exported", ["int8", "int4"], indirect=True)
def test_all_that_is_walked_by_is_in_codes(exported):
    folder, precision = exported
    kept = open_bundle(folder).provenance["quantisation"]
    weights = {name: part["weights"] for name, part in kept.items()}
    walked = ("prior", "decoder", "super_res_first", "super_res_last")
    assert weights == {"text_encoder": "int8"} | dict.fromkeys(walked, precision)
    for part in kept.values():
        layers = [layer["stored"] for layer in part["sensitivity"]["layers"]]
        assert layers.count("high") < len(layers) / 2


def test_what_a_picture_tells_can_be_cut_out_of_the_graph(exported):
    folder, _ = exported
    bundle = open_bundle(folder)
    told = {"prior": "encoder_hidden_states", "prior_guided_step": "text_mask"}
    told |= {"denoise": "context", "guided_step": "context"}
    for stage, unread in told.items():
        parts = parted(read_graph(bundle, next(iter(bundle.stages[stage].values()))))
        assert parts is not None
        assert unread in parts.unread


@in_float32
@pytest.mark.parametrize("batch", [None, False], ids=["alone", "together"])
def test_pictures_of_one_call_run_on_profiles_of_fewer_rows(source, exported, batch):
    folder, _ = exported
    request = {"prompt": [PROMPT, "the", "red"], "seed": [3, 4, 5], "output_type": "np"}
    expected = tintype.load(source, backend="torch")(**request, **STEPS).images
    actual = tintype.load(folder, batch_invariant=batch)(**request).images
    assert psnr(actual, expected) > LEAST_DB["fp32"]


@in_float32
def test_a_bundle_runs_without_torch(exported):
    folder, _ = exported
    code = (
        "import sys, tintype\n"
        f"tintype.load({str(folder)!r})('red', seed=1, output_type='np')\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@in_float32
def test_what_a_bundle_cannot_do_is_told(exported):
    folder, _ = exported
    pipeline = tintype.load(folder)
    with pytest.raises(ProfileError, match="it draws 32x32"):
        pipeline("the", width=64, height=64)
    with pytest.raises(RequestError, match="no image_encoder, and draws from a text alone"):
        pipeline("the", image=np.zeros((32, 32, 3)))


@pytest.mark.parametrize("exported", ["fp16"], indirect=True)
def test_every_stage_has_an_engine(exported, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    folder, precision = exported
    bundle = open_bundle(folder)
    wanted = wanted_engines(bundle.stages, ExportConfig((SIZE,), precision, target="tensorrt"))
    copy = shutil.copytree(folder, tmp_path / "bundle")
    (entry,) = build_engines(copy, wanted, ("sm_89",), lambda line: None).values()
    assert entry["stages"].keys() == set(STAGES) - PLAIN


def test_a_bundle_varies_pictures_as_torch_does(tmp_path):
    source = small.save("unclip_variation", tmp_path / "checkpoint")
    target = tmp_path / "bundle"
    with pytest.raises(RequestError, match="int8 is calibrated on what prompts draw"):
        export_bundle(source, target, ExportConfig((SIZE,), "int8"))
    config = ExportConfig((SIZE,), tolerance_db=LEAST_DB["fp32"], defaults=STEPS)
    bundle = open_bundle(export_bundle(source, target, config))
    assert list(bundle.stages) == ["encode", "embed_image", *STAGES[STAGES.index("project") :]]
    picture = np.random.default_rng(0).random((48, 64, 3), np.float32)
    request = {"prompt": "red", "image": picture, **SETTINGS}
    expected = tintype.load(source, backend="torch")(**request, **STEPS).images
    assert psnr(tintype.load(target)(**request).images, expected) > LEAST_DB["fp32"]


def test_the_command_takes_settings_of_a_cascade_and_of_a_cascade_alone(
    source, tmp_path, monkeypatch, capsys
):
    seen = []
    monkeypatch.setattr(cli, "export_bundle", lambda *given: seen.append(given))
    asked = ["--prior-steps", "9", "--prior-guidance", "1.5", "--super-res-steps", "4"]
    target = str(tmp_path / "bundle")
    assert main(["export", str(source), "-o", target, *asked]) == 0
    defaults = seen[0][2].defaults
    assert {name: defaults[name] for name in CASCADE} == dict(
        zip(CASCADE, (9, 1.5, 4), strict=True)
    )
    assert main(["export", "postcard", "-o", target, *asked]) == 2
    assert "prior_num_inference_steps, prior_gu" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in CASCADE if name.endswith("steps")])
def test_steps_that_no_request_can_have_are_refused_before_any_work(
    source, tmp_path, monkeypatch, name
):
    monkeypatch.setattr(exporting, "_estimate", lambda *_: pytest.fail("work has begun"))
    config = ExportConfig((SIZE,), defaults={name: 5000})
    with pytest.raises(RequestError, match=rf"{name}=5000 is outside 1\.\.1000"):
        export_bundle(source, tmp_path / "bundle", config)


def test_no_other_size_is_exported(source, tmp_path):
    with pytest.raises(ProfileError, match="64x64: an unCLIP model draws its own, 32x32"):
        export_bundle(source, tmp_path / "bundle", ExportConfig(((64, 64),)))
