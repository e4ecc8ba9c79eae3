"""Export: graphs without weights, equal to torch, written whole or not at all."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest

import tintype
from small_checkpoints import save
from tintype.errors import BundleError, CheckpointError, ProfileError
from tintype_export import bundle as exporting
from tintype_export.bundle import ExportConfig, export_bundle
from tolerances import STAGE_FP32, relative_error

SIZE = (64, 64)
CONFIG = ExportConfig(sizes=(SIZE,), defaults={"num_inference_steps": 2, "width": 64, "height": 64})


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def exported(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    source = folder / "checkpoint"
    save(request.param, source)
    return source, export_bundle(source, folder / "bundle", CONFIG)


def difference_from_torch(source, folder, *, steps):
    """Relative error of the bundle's picture against float32 torch's."""
    settings = {"seed": 3, "num_inference_steps": steps, "output_type": "np"}
    settings |= {"width": 64, "height": 64, "guidance_scale": 3.0}
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


def test_the_report_in_the_manifest_covers_every_graph(exported):
    _, folder = exported
    manifest = json.loads((folder / "bundle.json").read_text())
    report = manifest["provenance"]["verification"]
    graphs = {(s, p) for s, profiles in manifest["stages"].items() for p in profiles}
    assert {(row["stage"], row["profile"]) for row in report["stages"]} == graphs
    assert all(row["relative_error"] < STAGE_FP32 for row in report["stages"])
    assert report["psnr_db"] > report["other_seed_db"]


def test_weights_stored_in_half_precision_are_computed_with_in_single(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    source = tmp_path / "checkpoint"
    save("sd1", source)
    for path in source.glob("*/*.safetensors"):
        halves = {name: tensor.to(torch.float16) for name, tensor in load_file(path).items()}
        save_file(halves, path, metadata={"format": "pt"})
    folder = export_bundle(source, tmp_path / "bundle", CONFIG)
    assert difference_from_torch(source, folder, steps=2) < STAGE_FP32


def test_a_bundle_over_budget_is_not_written(tmp_path):
    source = tmp_path / "checkpoint"
    save("sd1", source)
    with pytest.raises(BundleError, match=r"dB of the reference"):
        export_bundle(
            source, tmp_path / "bundle", ExportConfig(**{**vars(CONFIG), "tolerance_db": 1000.0})
        )
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_an_export_that_dies_leaves_nothing(tmp_path, monkeypatch):
    source = tmp_path / "checkpoint"
    save("sd1", source)

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(exporting, "save", fail)
    with pytest.raises(OSError, match="No space"):
        export_bundle(source, tmp_path / "bundle", CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_size_that_the_model_cannot_draw_is_refused_before_any_work(tmp_path):
    source = tmp_path / "checkpoint"
    save("sd1", source)
    with pytest.raises(ProfileError, match="60x64"):
        export_bundle(source, tmp_path / "bundle", ExportConfig(sizes=((60, 64),)))


def test_a_single_file_is_refused_with_a_reason(tmp_path):
    with pytest.raises(CheckpointError):
        export_bundle(tmp_path / "absent.safetensors", tmp_path / "bundle", CONFIG)


def test_psnr_is_the_textbook_formula():
    from tintype_export.verify import psnr

    image = np.zeros((1, 4, 4, 3))
    assert psnr(image + 0.1, image) == pytest.approx(20.0)
    assert psnr(image, image) == 100.0
