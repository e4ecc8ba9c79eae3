"""Export: graphs without weights, equal to torch, written whole or not at all."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import onnx
import pytest
import torch

import original_layout
import tintype
from small_checkpoints import save, save_smallest
from tintype.backends.graphs import read_graph
from tintype.backends.remembering import parted
from tintype.bundle import describe, open_bundle
from tintype.cli import BAD_USAGE, main
from tintype.errors import BundleError, CheckpointError, ProfileError, RequestError
from tintype_export import bundle as exporting
from tintype_export import cli
from tintype_export.bundle import ExportConfig, export_bundle
from tintype_export.calibration import Calibration
from tolerances import STAGE_FP32, relative_error

SIZE = (64, 64)
CONFIG = ExportConfig(sizes=(SIZE,), defaults={"num_inference_steps": 2, "width": 64, "height": 64})


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def exported(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    source = folder / "checkpoint"
    save(request.param, source)
    return source, export_bundle(source, folder / "bundle", CONFIG)


def difference_from_torch(source, folder, *, steps, side=64):
    """Relative error of the bundle's picture against float32 torch's."""
    settings = {"seed": 3, "num_inference_steps": steps, "output_type": "np"}
    settings |= {"width": side, "height": side, "guidance_scale": 3.0}
    expected = tintype.load(source, backend="torch", dtype="float32")("red", **settings)
    actual = tintype.load(folder)("red", **settings)
    return relative_error(actual.images, expected.images)


def test_the_bundle_draws_what_torch_draws(exported):
    source, folder = exported
    assert difference_from_torch(source, folder, steps=3) < STAGE_FP32


def test_graphs_hold_no_weights_and_point_into_the_checkpoints_files(exported):
    source, folder = exported
    weights = sum(path.stat().st_size for path in source.glob("*/*.safetensors"))
    graphs = list(folder.glob("*/*.onnx"))
    assert graphs
    for path in graphs:
        model = onnx.load(path, load_external_data=False)
        outside = [
            t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL
        ]
        assert outside
        for tensor in outside:
            location = next(
                entry.value for entry in tensor.external_data if entry.key == "location"
            )
            assert (folder / location).is_file()
        inside = [
            t for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL
        ]
        assert sum(len(t.raw_data) for t in inside) < weights / 20


def test_what_a_picture_tells_can_be_cut_out_of_every_denoisers_graph(exported):
    bundle = open_bundle(exported[1])
    pooled = {"text_embeds", "time_ids"} if "encode_2" in bundle.stages else set()
    for stage in ("denoise", "step", "guided_step"):
        for file in bundle.stages[stage].values():
            parts = parted(read_graph(bundle, file))
            assert parts.told == parts.unread == {"encoder_hidden_states"} | pooled


def test_the_report_in_the_manifest_covers_every_graph(exported):
    _, folder = exported
    manifest = json.loads((folder / "bundle.json").read_text())
    report = manifest["provenance"]["verification"]
    graphs = {(s, p) for s, profiles in manifest["stages"].items() for p in profiles}
    assert {(row["stage"], row["profile"]) for row in report["stages"]} == graphs
    assert all(row["relative_error"] < STAGE_FP32 for row in report["stages"])
    picture = report["picture"]
    assert picture["psnr_db"] > picture["other_seed_db"]
    assert picture["ssim"] > picture["other_seed_ssim"]
    assert len(picture["latents_error"]) == picture["steps"]
    assert max(picture["latents_error"]) < STAGE_FP32


@pytest.mark.usefixtures("traced_once")
def test_weights_stored_in_half_precision_are_computed_with_in_single(tmp_path):
    from safetensors.torch import load_file, save_file

    source = save_smallest(tmp_path / "checkpoint")
    for path in source.glob("*/*.safetensors"):
        halves = {name: tensor.to(torch.float16) for name, tensor in load_file(path).items()}
        save_file(halves, path, metadata={"format": "pt"})
    config = ExportConfig(((16, 16),), defaults={"width": 16, "height": 16})
    folder = export_bundle(source, tmp_path / "bundle", config)
    assert difference_from_torch(source, folder, steps=2, side=16) < STAGE_FP32


@pytest.mark.usefixtures("traced_once")
def test_what_an_export_takes_is_said_beforehand_and_its_time_from_the_second_on(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("TINTYPE_CACHE", str(tmp_path / "cache"))
    source, said = save_smallest(tmp_path / "checkpoint"), []
    config = ExportConfig(((16, 16),), defaults={"width": 16, "height": 16})
    for name in ("first", "second"):
        export_bundle(source, tmp_path / name, config, said.append)
    first, second = (line for line in said if "of memory" in line)
    assert re.fullmatch(r"\d+ graphs: about .* of disk \(.* free\), and .* of memory .*own", first)
    (seconds,) = json.loads((tmp_path / "cache/exports.json").read_text()).values()
    assert 0 < seconds < 600
    assert re.search(r"; the last one like it took \d+ s$", second)


@pytest.mark.usefixtures("traced_once")
def test_a_bundle_over_budget_is_not_written(tmp_path):
    source = save_smallest(tmp_path / "checkpoint")
    config = ExportConfig(((16, 16),), tolerance_db=1000.0, defaults={"width": 16, "height": 16})
    with pytest.raises(BundleError, match=r"dB of the reference"):
        export_bundle(source, tmp_path / "bundle", config)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_size_that_the_model_cannot_draw_is_refused_before_any_work(tmp_path):
    source = tmp_path / "checkpoint"
    save("sd1", source)
    with pytest.raises(ProfileError, match="60x64"):
        export_bundle(source, tmp_path / "bundle", ExportConfig(sizes=((60, 64),)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_single_file_is_exported_as_a_folder_is_and_in_its_own_type(tmp_path, dtype):
    tensors = {
        name: each.to(dtype) for name, each in original_layout.SMALL["sd1"].tensors().items()
    }
    source = original_layout.save("sd1", tmp_path, tensors)
    folder = export_bundle(source, tmp_path / "bundle", CONFIG)
    assert difference_from_torch(source, folder, steps=2) < STAGE_FP32
    made_of = json.loads((folder / "bundle.json").read_text())["provenance"]["source"]
    assert made_of == {"name": source.name, "files": {source.name: describe(source)}}
    stored = sum(path.stat().st_size for path in folder.glob("weights/*.safetensors"))
    assert stored < 1.01 * source.stat().st_size


def test_a_family_without_graphs_is_refused_with_what_runs_it(tmp_path, monkeypatch):
    source = save_smallest(tmp_path / "checkpoint")
    flow = replace(exporting.open_checkpoint(source), family="latent_flow")
    monkeypatch.setattr(exporting, "open_checkpoint", lambda folder: flow)
    with pytest.raises(CheckpointError, match="is a latent_flow; .* backend='torch'"):
        export_bundle(source, tmp_path / "bundle", CONFIG)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"gpus": ("sm_89",)}, "--gpu: for engines"),
        ({"plain": True}, "--plain: for engines"),
        ({"weightless": True}, "--weightless: for engines"),
        ({"gpus": ("sm_89",), "plain": True}, "--gpu, --plain: for engines"),
        ({"batches": (1, 99_999_999)}, "batch=99999999 .* at most 1024"),
        ({"defaults": {"num_inference_steps": 5000}}, r"num_inference_steps=5000 .* 1\.\.1000"),
        ({"precision": "int8", "calibration": Calibration(steps=5000)}, r"steps=5000 .* 1\.\.1000"),
    ],
)  # fmt: skip
def test_what_has_no_effect_or_no_bundle_can_do_is_refused_before_any_work(
    tmp_path, monkeypatch, changes, says
):
    monkeypatch.setattr(exporting, "_estimate", lambda *_: pytest.fail("work has begun"))
    source = save_smallest(tmp_path / "checkpoint")
    config = replace(ExportConfig(((16, 16),)), **changes)
    with pytest.raises(RequestError, match=says) as raised:
        export_bundle(source, tmp_path / "bundle", config)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--calibration-steps 4", "--calibration-steps is for weights in int8, int4, fp8, and --precision is fp32"),
        ("--calibration-steps 0", "--calibration-steps is for weights in int8, int4, fp8, and --precision is fp32"),
        ("--calibration-prompts f --precision fp16", "--calibration-prompts is for weights in int8, int4, fp8, and"),
        ("--group 64", "--group is for weights in int4, and --precision is"),
        ("--group 32 --precision int8", "--group is for weights in int4, and --precision is"),
        ("--calibration-prompts f --calibration-steps 0 --precision int8", "calibrate nothing with 0"),
        ("--calibration-steps -1 --precision int8", "'-1' is no whole number of at least 0"),
        ("--steps 5000", "num_inference_steps=5000 is outside 1..1000"),
        ("--plain", "--plain: for engines"),
    ],
)  # fmt: skip
def test_options_without_effect_are_bad_usage(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(exporting, "_estimate", lambda *_: pytest.fail("work has begun"))
    target = str(tmp_path / "bundle")
    assert main(["export", "postcard", "-o", target, *words.split()]) == BAD_USAGE
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "calibration", "group"),
    [
        ("--precision int4", Calibration(), 64),
        ("--precision int4 --calibration-steps 3 --group 32", Calibration(steps=3), 32),
        ("--precision int8 --calibration-steps 0", None, 64),
        ("", Calibration(), 64),
    ],
)
def test_options_of_codes_reach_the_export(tmp_path, monkeypatch, words, calibration, group):
    seen = []
    monkeypatch.setattr(cli, "export_bundle", lambda *given: seen.append(given[2]))
    assert main(["export", "postcard", "-o", str(tmp_path / "bundle"), *words.split()]) == 0
    assert (seen[0].calibration, seen[0].group) == (calibration, group)


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--batch", "0", "'0' is no whole number of at least 1"),
        ("--steps", "-5", "'-5' is no whole number of at least 1"),
        ("--guidance", "nan", "'nan' is no finite number"),
        ("--tolerance", "high", "'high' is no finite number"),
    ],
)
def test_numbers_that_no_bundle_can_have_are_bad_usage(option, value, says, capsys):
    assert main(["export", "postcard", "-o", "never", f"{option}={value}"]) == 2
    assert says in capsys.readouterr().err
