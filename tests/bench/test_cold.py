"""The cold-start measurement: its parts are complete, and its report says under which conditions."""

from __future__ import annotations

import json

import pytest

from small_checkpoints import save_smallest
from tintype.cli import main
from tintype_bench.cold import PARTS, measure
from tintype_bench.footprint import footprint


def test_parts_add_up_and_the_report_is_whole(tiny_bundle, tmp_path, capsys):
    target = tmp_path / "cold.json"
    assert (
        main(["bench", str(tiny_bundle), "--suite", "cold", "--runs", "2", "--json", str(target)])
        == 0
    )
    report = json.loads(target.read_text())
    (model,) = report["models"]
    assert len(model["runs"]) == 2
    assert "no folder in its layout" in model["diffusers"]["reason"]
    for run in model["runs"]:
        assert all(run[name] >= 0 for name in PARTS)
        assert sum(run[name] for name in PARTS) == pytest.approx(run["total"])
    assert {"cpu", "cores", "python", "versions", "date"} <= report["conditions"].keys()
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*PARTS, "total", "slim installation"))


def test_diffusers_loads_the_same_folder_and_each_part_of_it_is_told(tmp_path):
    folder = save_smallest(tmp_path / "model")
    peer = measure(str(folder), 1)["diffusers"]
    assert peer["status"] == "timed", peer
    (run,) = peer["runs"]
    assert all(run[part] > 0 for part in ("interpreter", "import", "load", "draw", "save"))
    assert sum(run.values()) == pytest.approx(2 * run["total"])
    assert peer["ratio"] > 0


def test_a_model_that_fails_is_an_error(tmp_path, capsys):
    assert main(["bench", str(tmp_path), "--runs", "1"]) == 1
    assert "neither bundle.json" in capsys.readouterr().err
    assert main(["bench", "--runs", "0"]) == 2


def test_the_slim_closure_has_no_torch():
    sizes = footprint()
    assert {"tintype", "numpy", "onnxruntime", "tokenizers", "pillow"} <= sizes.keys()
    assert not {"torch", "transformers", "onnx", "diffusers"} & sizes.keys()
    assert all(size >= 0 for size in sizes.values())
