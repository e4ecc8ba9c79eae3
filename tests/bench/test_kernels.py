"""The kernels' benchmark and the script for a GPU, in a smoke run on CPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tintype_bench import cases, cli, kernels
from tintype_bench.device_timing import copy_microseconds

ROOT = Path(__file__).parents[2]
SMOKE = ["--device", "cpu", "--dtype", "float32", "--batch", "1", "--runs", "2", "--limit", "1"]


def test_every_form_has_a_row_with_its_share_of_the_bandwidth(tmp_path, monkeypatch):
    monkeypatch.setenv("TINTYPE_KERNELS", "reference")
    path = tmp_path / "kernels.json"
    forms = ["--form", "ours", "eager"]
    assert (
        kernels.main([*SMOKE, *forms, "--op", "geglu", "scheduler_step", "--json", str(path)]) == 0
    )
    report = json.loads(path.read_text(encoding="utf-8"))
    limit, *rows = report["rows"]
    assert limit["gigabytes_per_second"] > 0
    assert [(row["op"], row["form"]) for row in rows] == [
        ("geglu", "ours"), ("geglu", "eager"), ("scheduler_step", "ours"), ("scheduler_step", "eager")
    ]  # fmt: skip
    for row in rows:
        times = row["microseconds"]
        assert times["count"] == 2
        assert 0 < times["lower"] <= times["median"] <= times["upper"]
        seconds, moved = times["median"] * 1e-6, row["gigabytes_per_second"] * 1e9
        if row["op"] == "geglu":  # 4096 rows: two halves read, one written
            assert moved * seconds == pytest.approx(4096 * 3 * 1280 * 4)
        share = row["gigabytes_per_second"] / limit["gigabytes_per_second"]
        assert row["percent_of_copy"] == pytest.approx(100 * share)
        copied = copy_microseconds(round(moved * seconds), "cpu", 2)
        assert row["percent_of_equal_copy"] == pytest.approx(100 * copied / times["median"])


def test_a_run_that_is_cut_short_goes_on_and_compiles_last(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "_timed", lambda *_: {"failed": "not timed"})
    command = [*SMOKE, "--op", "geglu", "gate_residual", "--json", str(tmp_path / "kernels.json")]
    assert kernels.main([*command, "--time-limit", "0"]) == 75
    found = []
    while kernels.main([*command, "--time-limit", "0", "--resume"]) == 75:
        rows = json.loads((tmp_path / "kernels.json").read_text(encoding="utf-8"))["rows"]
        assert len(rows) == 2 + len(found)
        found.append((rows[-1]["op"], rows[-1]["form"]))
    plain = [(op, form) for op in ("gate_residual", "geglu") for form in ("ours", "eager")]
    assert found == [*plain, ("gate_residual", "compiled"), ("geglu", "compiled")]


def test_the_suite_stops_in_time_and_goes_on_too(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "_timed", lambda *_: {"failed": "not timed"})
    path = tmp_path / "kernels.json"
    command = ["--suite", "kernels", "--device", "cpu", "--tiny", "--runs", "1", "--only", "geglu"]
    command += ["--json", str(path), "--time-limit", "0", "--resume"]
    statuses, counts = [], []
    while not statuses or statuses[-1] == 75:
        statuses.append(cli.main(command))
        counts.append(len(json.loads(path.read_text(encoding="utf-8"))["rows"]))
    assert statuses[-1] == 0
    assert counts[:3] == [1, 2, 3]


def test_a_form_that_fails_says_so_and_the_others_go_on(monkeypatch, capsys):
    monkeypatch.setenv("TINTYPE_KERNELS", "native")
    assert kernels.main([*SMOKE, "--form", "ours", "eager", "--op", "geglu"]) == 0
    ours, eager = capsys.readouterr().out.splitlines()[1:]
    assert "geglu has no native form" in ours
    assert "us [" in eager


def test_the_script_checks_and_times(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [str(ROOT / "bench" / "gpu_check.sh"), str(tmp_path), "kernels", "--", *SMOKE]
    done = subprocess.run(
        [*command, "--form", "ours", "--op", "gate_residual"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gate_residual" in (tmp_path / "kernels.txt").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "kernels.json").read_text(encoding="utf-8"))["rows"]
    assert "0 of " in (tmp_path / "tests.txt").read_text(encoding="utf-8")
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stdout) == (0, "")  # a part that is done is left alone


def test_the_script_names_its_parts(tmp_path):
    command = [str(ROOT / "bench" / "gpu_check.sh"), str(tmp_path), "sd9"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "choose among kernels steps pictures sd15" in done.stderr


def test_every_case_of_the_gpu_suite_is_in_one_part_of_the_script():
    script = (ROOT / "bench" / "gpu_check.sh").read_text(encoding="utf-8")
    patterns = dict(re.findall(r'\) generators (\S+) "([^"]+)"', script))
    assert len(patterns) == 7
    for case in cases.gpu():
        parts = [part for part, text in patterns.items() if fnmatchcase(case.name, f"*{text}*")]
        assert len(parts) == 1, case.name
