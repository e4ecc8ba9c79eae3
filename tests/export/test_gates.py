"""Gates are two layers in a graph, over the halves of what is stored once."""

from __future__ import annotations

import onnx
import pytest

from small_checkpoints import save_smallest
from tintype_export import bundle as exporting
from tintype_export.bundle import ExportConfig, export_bundle
from tintype_export.report import Report

GATE = "unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj"


@pytest.fixture
def denoise(tmp_path, monkeypatch, traced_once):
    """precision -> the denoiser's graph of the smallest checkpoint; nothing is compared."""
    monkeypatch.setattr(exporting, "profiles_of", lambda *_: {"denoise": ["16x16-b2"]})
    nothing = Report("none", "fp32", "nothing", "nothing", [], None)
    monkeypatch.setattr(exporting, "verify", lambda *_: nothing)
    source = save_smallest(tmp_path / "checkpoint")

    def graph(precision):
        defaults = {"width": 16, "height": 16}
        config = ExportConfig(((16, 16),), precision, defaults=defaults, calibration=None, group=32)
        folder = export_bundle(source, tmp_path / precision, config)
        return onnx.load(folder / "denoise/16x16-b2.onnx", load_external_data=False).graph

    return graph


def stored(graph, suffix):
    """Where the tensors whose names end so lie: (offset, length, file), in their order there."""
    found = []
    for tensor in graph.initializer:
        if tensor.name.startswith(GATE) and tensor.name.endswith(suffix):
            entry = {each.key: each.value for each in tensor.external_data}
            found.append((int(entry["offset"]), int(entry["length"]), entry["location"]))
    return sorted(found)


@pytest.mark.parametrize(
    ("precision", "leaves"),
    [
        ("fp32", [".weight", ".bias"]),
        ("int8", [".weight.codes", ".weight_scale", ".bias.stored"]),
        ("fp8", [".weight.codes"]),
    ],
)
def test_both_halves_are_read_from_where_the_whole_is_stored(denoise, precision, leaves):
    graph = denoise(precision)
    assert "Split" not in {node.op_type for node in graph.node}
    for leaf in leaves:
        (first, length, location), (second, *others) = stored(graph, leaf)
        assert second == first + length
        assert others == [length, location]


def test_int4_gates_stay_whole(denoise):
    graph = denoise("int4")
    assert "Split" in {node.op_type for node in graph.node}
    assert len(stored(graph, ".weight.codes")) == 1
