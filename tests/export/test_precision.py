"""Bundles in 16 bits: weights once, true to float32, and plain about which backend computes in what."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from safetensors.torch import load_file, save_file

import tintype
from remembered_traces import GUIDED, remembered_trace
from small_checkpoints import save_smallest
from tintype.errors import RequestError
from tintype_export import bundle as exporting
from tintype_export.bundle import ExportConfig, export_bundle
from tintype_export.quality import psnr
from tolerances import LEAST_DB_16_BITS

SETTINGS = {"seed": 3, "num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "np"}
SETTINGS |= {"width": 16, "height": 16}


def save_loud(folder):
    """A checkpoint whose decoder is finite in float32, overflows float16, and says so."""
    save_smallest(folder)
    path, settings = folder / "vae/diffusion_pytorch_model.safetensors", folder / "vae/config.json"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    for name in ("decoder.conv_in.weight", "decoder.conv_in.bias"):
        tensors[name] *= 2.0**17
    save_file(tensors, path, metadata={"format": "pt"})
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"force_upcast": True}))
    return folder


@pytest.fixture(scope="module", params=["fp16", "bf16"])
def exported(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    save = save_loud if request.param == "fp16" else save_smallest
    source, defaults = save(folder / "checkpoint"), {"width": 16, "height": 16}
    config = ExportConfig(((16, 16),), precision=request.param, defaults=defaults)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "trace", remembered_trace)
        patch.setattr(exporting, "profiles_of", lambda *_: GUIDED)
        return source, export_bundle(source, folder / "bundle", config), request.param


def test_weights_are_stored_once_in_16_bits(exported):
    source, folder, precision = exported
    stored = {path.stem: load_file(path) for path in (folder / "weights").iterdir()}
    assert set(stored) == {"text_encoder", "unet", "vae"}
    names = {"fp16": "torch.float16", "bf16": "torch.bfloat16"}
    types = {str(tensor.dtype) for tensors in stored.values() for tensor in tensors.values()}
    assert types == {names[precision]}
    assert not (folder / "model_index.json").exists()
    whole = sum(path.stat().st_size for path in source.glob("*/*.safetensors"))
    assert sum(path.stat().st_size for path in folder.glob("weights/*")) < 0.55 * whole


def test_graphs_are_written_in_what_they_are_computed_in(exported):
    _, folder, precision = exported
    report = json.loads((folder / "bundle.json").read_text())["provenance"]["verification"]
    written = {"fp16": "float16", "bf16": "float32"}[precision]
    assert all(written in row["computes"] for row in report["stages"])
    assert (report["precision"], report["computed_in"]) == (precision, written)
    for path in folder.glob("*/*.onnx"):
        faces = onnx.load(path, load_external_data=False).graph
        kinds = {value.type.tensor_type.elem_type for value in [*faces.input, *faces.output]}
        assert kinds <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_pictures_are_true_to_float32(exported, backend):
    if backend == "openvino":
        pytest.importorskip("openvino")
    source, folder, _ = exported
    expected = tintype.load(source, backend="torch", dtype="float32")("red", **SETTINGS).images
    actual = tintype.load(folder, backend=backend)("red", **SETTINGS).images
    assert np.isfinite(actual).all()
    assert psnr(actual, expected) > LEAST_DB_16_BITS


@pytest.mark.parametrize("exported", ["fp16"], indirect=True)
def test_overflow_in_openvinos_own_float16_is_noticed(exported):
    ov = pytest.importorskip("openvino")
    if "FP16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("needs float16 instructions: without, OpenVINO computes in float32")
    source, folder, _ = exported
    expected = tintype.load(source, backend="torch", dtype="float32")("red", **SETTINGS).images
    pipe = tintype.load(folder, backend="openvino")
    pipe.family.backend.dtype = "float16"  # which CPUs refuse; other devices rely on the guard
    with pytest.warns(RuntimeWarning, match="stage decode met NaN or infinity in float16"):
        actual = pipe("red", **SETTINGS).images
    assert psnr(actual, expected) > LEAST_DB_16_BITS


def test_a_type_that_onnxruntime_does_not_compute_in_is_refused(exported):
    _, folder, precision = exported
    wanted = {"fp16": "float32", "bf16": "bfloat16"}[precision]
    with pytest.raises(RequestError, match=f"exported in {precision}, which onnxruntime computes"):
        tintype.load(folder, backend="onnxruntime", dtype=wanted)


def test_an_unknown_precision_lists_those_there_are(tmp_path):
    source = save_smallest(tmp_path / "checkpoint")
    with pytest.raises(RequestError, match="'fp12' is unknown; choose one of fp32, fp16, bf16"):
        export_bundle(source, tmp_path / "bundle", ExportConfig(((16, 16),), precision="fp12"))
