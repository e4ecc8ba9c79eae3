"""`tintype bench --compare`: what is slower beyond noise is told and fails, what is not is not."""

from __future__ import annotations

import json

import pytest

from bench_reports import report, row, untimed
from tintype.cli import main
from tintype_bench.comparison import compare


def verdicts(first, second):
    return [each.verdict for each in compare(first, second)]


def test_a_slower_row_a_faster_row_and_one_within_noise():
    before = report([row("a", 1.0), row("b", 1.0), row("c", 1.0)])
    after = report([row("a", 1.5), row("b", 0.5), row("c", 1.005)])
    assert verdicts(before, after) == ["slower", "faster", "within noise"]
    assert verdicts(after, before) == ["faster", "slower", "within noise"]


def test_a_noisy_row_needs_a_larger_change():
    before, after = (report([row("a", s, jitter=0.3), row("b", s)]) for s in (1.0, 1.15))
    assert verdicts(before, after) == ["within noise", "slower"]


def test_a_machine_that_was_slower_meanwhile_is_allowed_for_and_no_more():
    before = report([row("a", 1.0), row("b", 1.0), row("c", 1.0)])
    rows = [row(who, s, product=0.048) for who, s in (("a", 1.2), ("b", 1.0), ("c", 1.3))]
    assert verdicts(before, report(rows)) == ["within noise", "within noise", "slower"]
    assert verdicts(report(rows), before) == ["within noise", "within noise", "faster"]


def test_a_row_that_is_no_longer_timed_is_a_regression_and_a_new_one_is_not():
    before = report([row("a", 1.0), untimed("b", "failed", "absent")])
    after = report([untimed("a", "differs", "at 3 dB"), row("b", 1.0)])
    lost, still = compare(before, after)
    assert (lost.verdict, lost.note, lost.regressed) == ("lost", "at 3 dB", True)
    assert not still.regressed


@pytest.mark.parametrize(("seconds", "status"), [(1.0, 0), (1.5, 1)])
def test_the_command_leaves_with_1_where_anything_regressed(tmp_path, capsys, seconds, status):
    for name, value in (("a", 1.0), ("b", seconds)):
        (tmp_path / name).write_text(json.dumps(report([row("tintype", value)])))
    assert main(["bench", "--compare", str(tmp_path / "a"), str(tmp_path / "b")]) == status
    assert f"{status} of 1 rows regressed" in capsys.readouterr().out


def test_reports_of_different_suites_are_refused(tmp_path, capsys):
    other = report([row("a", 1.0)]) | {"suite": "cpu"}
    for name, content in (("a", report([row("a", 1.0)])), ("b", other)):
        (tmp_path / name).write_text(json.dumps(content))
    assert main(["bench", "--compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "'quick' and 'cpu'" in capsys.readouterr().err


def test_a_report_of_another_form_is_refused(tmp_path, capsys):
    old = tmp_path / "old.json"
    old.write_text(json.dumps(report([row("a", 1.0)]) | {"format": 1}))
    assert main(["bench", "--compare", str(old), str(old)]) == 2
    assert "run the suite again" in capsys.readouterr().err


def test_what_differs_of_the_conditions_is_said_before_the_rows(tmp_path, capsys):
    own = {"load_before": 0.1, "cpu_mhz": 2000.0, "threads": {}, "python": "3.11.7"}
    before = report([row("a", 1.0)])
    before["conditions"] |= own
    after = json.loads(json.dumps(before))
    after["conditions"] |= {
        **{"cpu": "another", "cores": 4, "gpu": "NVIDIA H200", "threads": {"OMP_NUM_THREADS": "1"}},
        **{"load_before": 3.0, "cpu_mhz": 2001.0, "date": "2026-01-02"},
        "versions": {"a": "2", "b": "1"},
    }
    for name, content in (("a", before), ("b", after)):
        (tmp_path / name).write_text(json.dumps(content))
    assert main(["bench", "--compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == (
        "the conditions differ: cpu a processor, then another; cores 2, then 4; gpu none, then NVIDIA H200; "
        "OMP_NUM_THREADS none, then 1; a 1, then 2; b none, then 1"
    )
    assert said[1].startswith("within noise")
    assert main(["bench", "--compare", str(tmp_path / "a"), str(tmp_path / "a")]) == 0
    assert capsys.readouterr().out.startswith("within noise")


@pytest.mark.parametrize("content", ["[]", "3", "null", '{"format": 2}', "{"])
def test_what_is_no_report_is_refused_in_one_line(tmp_path, capsys, content):
    other, own = tmp_path / "other", tmp_path / "own"
    other.write_text(content)
    own.write_text(json.dumps(report([row("a", 1.0)])))
    for pair in ((own, other), (other, own)):
        assert main(["bench", "--compare", *map(str, pair)]) == 2
        said = capsys.readouterr().err
        assert f"{other} is no" in said
        assert said.count("\n") == 1
