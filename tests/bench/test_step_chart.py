"""The picture of where steps go."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tintype_bench import step_chart

MEASURED = Path(__file__).parents[2] / "bench" / "results" / "h200" / "steps.json"
ROW = {
    "shape": "sd15",
    "stage": "step",
    "precision": "bf16",
    "milliseconds": 10.0,
    "kernel_milliseconds": 8.0,
    "kernels": [
        {"name": "sm90_xmma_fprop_implicit_gemm_bf16", "milliseconds": 3.0},
        {"name": "cudnn_generated_fort_native_sdpa_sm90", "milliseconds": 2.0},
        {"name": "pieces_kernel", "milliseconds": 1.0},
    ],
}


def test_a_step_is_cut_into_what_its_kernels_were_and_what_is_between_them():
    found = step_chart.shares(ROW)
    assert found["convolutions"] == pytest.approx(0.3)
    assert found["attention"] == pytest.approx(0.2)
    assert found["norms, rounding, gates"] == pytest.approx(0.1)
    assert found["rest"] == found["between kernels"] == pytest.approx(0.2)


def test_kernels_that_a_profile_slowed_fill_the_bar():
    found = step_chart.shares({**ROW, "milliseconds": 7.0})
    assert found["between kernels"] == 0
    assert sum(found.values()) == pytest.approx(1)


def test_no_kernel_that_takes_a_fiftieth_of_a_measured_step_is_without_a_kind():
    for row in json.loads(MEASURED.read_text(encoding="utf-8"))["rows"]:
        large = [k for k in row["kernels"] if k["milliseconds"] > row["milliseconds"] / 50]
        alone = {**row, "kernels": large}
        alone["kernel_milliseconds"] = sum(k["milliseconds"] for k in large)
        assert step_chart.shares(alone)["rest"] == pytest.approx(0)


def test_bars_are_as_wide_as_each_other(tmp_path, monkeypatch):
    report, picture = tmp_path / "steps.json", tmp_path / "steps.svg"
    failed = {"shape": "sdxl", "stage": "step", "precision": "int8", "failed": "no memory"}
    decoding = {**ROW, "stage": "decode"}
    slow = {**ROW, "precision": "fp8", "milliseconds": 50.0}
    report.write_text(json.dumps({"rows": [ROW, failed, decoding, slow]}), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["step_chart", str(report), "-o", str(picture)])
    step_chart.main()
    parts = [p for p in ElementTree.parse(picture).iter() if p.tag.endswith("rect") and len(p)]
    widths: dict[str, float] = {}
    for part in parts:
        top = part.attrib["y"]
        widths[top] = widths.get(top, 0.0) + float(part.attrib["width"])
    assert len(widths) == 2
    assert list(widths.values()) == pytest.approx([560, 560], abs=0.5)


def test_a_report_without_steps_is_refused(tmp_path, monkeypatch, capsys):
    report = tmp_path / "steps.json"
    report.write_text('{"rows": []}', encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["step_chart", str(report), "-o", str(tmp_path / "F.svg")])
    with pytest.raises(SystemExit):
        step_chart.main()
    assert "has no step that was timed" in capsys.readouterr().err
