"""The machine's pace: when it counts as settled, and that readings go with the rows that were timed meanwhile."""

from __future__ import annotations

import itertools

import pytest

from bench_reports import report, row
from tintype_bench.markdown import conditions_line, tables
from tintype_bench.measure import Plan, Task, time_group
from tintype_bench.probe import Probe, settle
from tintype_bench.work import Runner, Work


class Machine:
    """A clock that only work moves; `pace` gives the seconds of a piece of work by the time it begins at."""

    def __init__(self, pace):
        self.now, self._pace = 0.0, pace

    def read(self):
        seconds = self._pace(self.now)
        self.now += seconds
        return seconds

    def settle(self):
        return settle(self.read, lambda: self.now)


def test_a_steady_machine_settles_at_once():
    found = Machine(lambda now: 0.05).settle()
    assert found.steady
    assert found.medians == [0.05] * 5
    assert found.seconds == pytest.approx(5, abs=0.5)


def test_a_machine_that_speeds_up_is_waited_for():
    found = Machine(lambda now: 0.07 if now < 3 else 0.05).settle()
    assert found.steady
    assert 8 < found.seconds < 10
    assert max(found.medians[-5:]) == 0.05


def test_a_hiccup_is_no_unrest():
    count = itertools.count()
    found = Machine(lambda now: 0.5 if next(count) % 10 == 9 else 0.05).settle()
    assert (found.steady, len(found.medians)) == (True, 5)


def test_a_machine_that_never_settles_is_not_waited_for_forever():
    found = Machine(lambda now: 0.05 + 0.01 * (int(now) % 2)).settle()
    assert not found.steady
    assert found.seconds == pytest.approx(30, abs=1.5)
    restless = report([row("a", 1.0)]) | {"settlings": [{"steady": True}, {"steady": False}]}
    assert "had not settled" in conditions_line(restless)
    assert "had not settled" not in conditions_line(report([row("a", 1.0)]))


def test_the_probe_is_read_before_between_and_after_runs(monkeypatch):
    """Seconds of fakes: the machine becomes slower with every reading."""
    order = []

    class Worker:
        def __init__(self, runner):
            self.runner = runner

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def load(self, work):
            return {"seconds": 2.0, "first_seconds": 1.0}

        def ask(self, verb):
            order.append(self.runner.label)
            return {"run": {"seconds": 1.0}, "peak": {"host": 1.0, "device": None}}[verb]

    class Slowing:
        seconds = itertools.count(1)

        def read(self):
            order.append("probe")
            return {"product": float(next(self.seconds)), "copy": 1.0}

    monkeypatch.setattr("tintype_bench.measure.WorkerProcess", Worker)
    monkeypatch.setattr("tintype_bench.measure._REST", 0)
    runners = (Runner("openvino"), Runner("onnxruntime"))
    task = Task("a case", Work("", 8, 8), runners, {}, None)
    units = list(time_group(task, runners, 1, Plan(2, 2), Slowing()))
    assert order[:7] == ["probe", *(["openvino fp32", "onnxruntime fp32", "probe"] * 2)]
    assert [unit["probe"] for unit in units] == [{"product": 2.0, "copy": 1.0}] * 2


def test_rows_of_a_slower_round_are_flagged_and_all_rows_noise_holds_the_drift():
    quiet, drifting = (
        report([row("a", 1.0), row("b", 1.0, product=0.0401), row("c", 1.0, product=slow)])
        for slow in (0.0402, 0.06)
    )
    assert not any(each["noisy"] for each in quiet["cases"][0]["rows"])
    a, _, c = drifting["cases"][0]["rows"]
    assert c["pace"] == pytest.approx(0.07 / 0.0501 - 1)
    assert c["noisy"]
    assert a["noise"] > 2 * drifting["drift"] > 0.2
    assert "the machine was 40% slower than usual" in tables(drifting)
    assert "the machine was" not in tables(quiet)


def test_a_probe_reads_products_and_copies_of_this_machine():
    with Probe("cpu") as probe:
        readings = [probe.read() for _ in range(2)]
    for reading in readings:
        assert reading.keys() == {"product", "copy"}
        assert all(0 < seconds < 60 for seconds in reading.values())
