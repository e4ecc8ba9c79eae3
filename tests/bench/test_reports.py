"""The page, the tables and the JSON of single calls, from reports of any numbers."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from bench_reports import report, row, untimed
from tintype.cli import main
from tintype_bench.agreement import agreement_db, thumbnail
from tintype_bench.html import page
from tintype_bench.markdown import best_batches, case_table, tables
from tintype_bench.micro import benchmarks
from tintype_bench.work import Work

ROWS = [
    row("tintype openvino bf16", 0.5, ours=True),
    row("diffusers fp32", 1.0),
    row("diffusers fp32", 9.0, kind="first"),
    untimed("openvino bf16", "differs", "its output is at 3.0 dB <of> the reference"),
]


class Outline(HTMLParser):
    """Collects tags and addresses, and that every element that was opened is closed."""

    VOID = frozenset({"meta", "img"})

    def __init__(self):
        super().__init__()
        self.tags, self.addresses, self.open = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_asks_nothing_of_the_network():
    shown = thumbnail(np.zeros((1, 300, 200, 3), np.float32))
    content = page(report([{**ROWS[0], "picture": shown}, *ROWS[1:]]))
    outline = Outline()
    outline.feed(content)
    assert not outline.open
    assert {"svg", "table", "img", "circle"} <= set(outline.tags)
    assert all(address.startswith("data:") for address in outline.addresses)
    assert "<script" not in content
    assert "prefers-color-scheme: dark" in content
    assert "58.1 dB" in content
    assert "&lt;of&gt;" in content


def test_costs_are_drawn_where_the_suite_varies_one_thing():
    cases = []
    for batch, seconds in ((1, 1.0), (2, 1.7), (4, 3.1)):
        made = report(
            [row("a", seconds)], case=f"m, batch {batch}, by batch", work=Work("", 8, 8, batch)
        )
        cases += made["cases"]
    whole = made | {"cases": cases}
    assert "pictures at once" in page(whole)
    assert list(best_batches(whole)) == ["m,, a: best throughput 1.29 pictures/s at batch 4."]


def test_a_table_has_ours_beside_the_best_peer_and_says_what_was_not_timed():
    fast, slow, not_timed = case_table(report(ROWS)["cases"][0]).split("\n\n")[0].splitlines()[2:]
    assert fast.startswith("| **tintype openvino bf16** | 500 ms |")
    assert "| 2.00x |" in fast
    assert slow.endswith("| 9 s |")
    assert "differs: its output is at 3.0 dB" in not_timed


def test_an_earlier_run_is_reported_again(tmp_path, capsys):
    kept, html, md = (tmp_path / name for name in ("a.json", "a.html", "a.md"))
    kept.write_text(json.dumps(report(ROWS)))
    asked = ["bench", "--from-json", str(kept), "--report", str(html), "--markdown", str(md)]
    assert main(asked) == 0
    assert md.read_text() == tables(report(ROWS)) == capsys.readouterr().out
    assert html.read_text() == page(report(ROWS))


def test_pytest_benchmark_reads_rows_of_single_calls(tmp_path):
    stats = {"count": 3, "median": 2.0, "lower": 1.5, "upper": 2.5, "mean": 2.0}
    stats |= {"deviation": 0.5, "least": 1.0, "most": 3.0}
    about = {"op": "geglu", "case": "a case", "batch": 1, "dtype": "float32"}
    rows = [{**about, "form": form, "microseconds": stats} for form in ("ours", "eager")]
    rows += [{**about, "form": "compiled", "failed": "no compiler"}]
    target = tmp_path / "0001_kernels.json"
    target.write_text(json.dumps(benchmarks(rows, {"date": "2026-01-01"})))
    done = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare", str(target), "--columns", "median"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "geglu[ours-a case-1-float32]" in done.stdout
    assert "compiled" not in done.stdout


def test_agreement_is_psnr_of_pictures_and_signal_over_error_of_a_component():
    reference = np.full((1, 4, 4, 3), 0.5, np.float32)
    pictures, component = Work("", 4, 4), Work("", 4, 4, component="denoise")
    assert agreement_db(reference + 0.1, reference, pictures) == pytest.approx(20, abs=1e-3)
    assert agreement_db(reference + 0.005, reference, component) == pytest.approx(40, abs=1e-3)
    assert agreement_db(reference, reference, pictures) == 100
    assert agreement_db(reference * np.nan, reference, pictures) == 0
    assert agreement_db(reference[:, :2], reference, pictures) == 0


def test_a_thumbnail_keeps_the_picture():
    pixels = np.zeros((1, 320, 160, 3), np.float32)
    pixels[..., 0] = 1
    image = Image.open(io.BytesIO(base64.b64decode(thumbnail(pixels))))
    assert image.size == (80, 160)
    assert np.asarray(image)[80, 40] == pytest.approx([254, 0, 0], abs=2)
