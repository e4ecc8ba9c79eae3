"""The page, the tables and the JSON of single calls, from reports of any numbers."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from bench_reports import report, row, untimed
from tintype.cli import main
from tintype_bench.agreement import agreement_db, thumbnail
from tintype_bench.html import page
from tintype_bench.markdown import best_batches, case_table, seconds, tables
from tintype_bench.micro import benchmarks
from tintype_bench.plots import Axes
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


def cases_of(note, works, seconds):
    """A report with a case for each work, timed by "a"."""
    made = [
        report([row("a", each)], case=f"m 8x8, {number}, {note}", work=work)
        for number, (work, each) in enumerate(zip(works, seconds, strict=True))
    ]
    return made[0] | {"cases": [each["cases"][0] for each in made]}


def test_costs_are_drawn_where_the_suite_varies_one_thing():
    whole = cases_of("by batch", [Work("", 8, 8, batch) for batch in (1, 2, 4)], (1.0, 1.7, 3.1))
    assert "pictures at once" in page(whole)
    assert "cost by size" not in page(whole)


def test_the_best_batch_is_told_for_one_setting_at_a_time():
    batches = [Work("", 8, 8, batch) for batch in (1, 2, 4)]
    whole = cases_of("by batch", [*batches, Work("", 8, 8, 1, steps=1)], (1.0, 1.7, 3.1, 0.1))
    assert list(best_batches(whole)) == [
        "m 8x8, 20 steps, guidance 5, a: best throughput 1.29 pictures/s at batch 4."
    ]


def test_names_of_lines_that_end_together_do_not_cover_each_other():
    lines = {name: [(1.0, 1.0), (2.0, end)] for name, end in (("a", 2.0), ("b", 2.01), ("c", 9.0))}
    drawn = Axes("a plot", "x", "y", str, str).draw([], lines)
    heights = [float(re.search(rf' y="([\d.]+)"[^>]*>{name}<', drawn)[1]) for name in lines]
    ordered = sorted(heights)
    assert min(after - before for before, after in pairwise(ordered)) >= 14


def test_a_table_has_ours_beside_the_best_peer_and_says_what_was_not_timed():
    fast, slow, not_timed = case_table(report(ROWS)["cases"][0]).split("\n\n")[0].splitlines()[2:]
    assert fast.startswith("| **tintype openvino bf16** | 500 ms |")
    assert "| 2.00x |" in fast
    assert slow.endswith("| 9 s |")
    assert "differs: its output is at 3.0 dB" in not_timed


def test_a_bar_in_a_reason_is_a_bar_in_the_table():
    case = report([row("a", 1.0), untimed("b", "failed", "this | that")])["cases"][0]
    assert "failed: this \\| that" in case_table(case)
    assert "<td>failed: this | that</td>" in page(report(case["rows"]))


def test_joules_have_a_column_where_the_driver_counts_them():
    told = case_table(report([row("a", 1.0, joules=123.4)])["cases"][0])
    assert ("| energy |" in told, "| 123 J |" in told) == (True, True)
    assert "energy" not in case_table(report([row("a", 1.0)])["cases"][0])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0009996, "1 ms"), (0.9994, "999 ms"), (0.9996, "1 s"), (12.34, "12.3 s"),
        (999.7, "1000 s"), (12e-6, "12 us"),
    ],
)  # fmt: skip
def test_seconds_have_three_digits_and_the_unit_that_suits_them(value, text):
    assert seconds(value) == text


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
