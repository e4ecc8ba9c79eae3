"""Units become the rows of a report: a warm and a first row for each runner of a case."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tintype_bench.limits import limit, losses
from tintype_bench.measure import TIMED, Task, Unit
from tintype_bench.spread import (
    NOISY,
    Reading,
    between_rounds,
    joined,
    noise,
    relative_deviation,
)
from tintype_bench.work import Runner

Row = dict[str, Any]


def case_report(task: Task, units: Sequence[Unit], ceilings: Mapping[str, Any]) -> dict[str, Any]:
    """One case with its rows, whose noise is not yet told; `state_noise` does that when all cases are there."""
    rows: list[Row] = []
    for runner in task.runners:
        own = [unit for unit in units if unit["who"] == runner.label]
        if runner.label in task.unready:
            rows.append(_untimed(runner, "failed", task.unready[runner.label]))
        elif own:
            rows += _rows_of(task, runner, own, ceilings)
    work = asdict(task.work) | {"checkpoint": Path(task.work.checkpoint).name}
    return {"case": task.case, "work": work, "rows": rows}


def state_noise(cases: Sequence[dict[str, Any]]) -> float:
    """Give every timed row its noise and the machine's pace meanwhile; the drift of that pace over the run.

    What rounds differ by is estimated over all rows of a kind.
    """
    rows = [row for case in cases for row in case["rows"] if row["status"] == TIMED]
    # Rows that were timed together share their readings, which count once.
    readings = {sum(reading.values()) for row in rows for reading in row["probe"]}
    drift = relative_deviation(readings)
    for kind in ("warm", "first"):
        alike = [row for row in rows if row["kind"] == kind]
        between = between_rounds([row["rounds"] for row in alike])
        for row in alike:
            row["pace"] = _pace(row["probe"], readings)
            row["noise"] = noise(row["rounds"], between, drift)
            # A first run comes once a process, so its variation is that of rounds, which the noise holds.
            varies = row["variation"] if kind == "warm" else 0.0
            row["noisy"] = max(row["noise"], varies, abs(row["pace"])) > NOISY
    return drift


def _pace(own: Sequence[Reading], readings: Collection[float]) -> float:
    """How much slower, relatively, the machine was than usual in the run, in the row's most unusual round."""
    usual = statistics.median(readings)
    return max((sum(reading.values()) / usual - 1 for reading in own), key=abs)


def throughput(case: Mapping[str, Any], row: Mapping[str, Any]) -> float | None:
    """Pictures a second of a timed warm row."""
    if row["status"] != TIMED or row["kind"] != "warm" or case["work"]["component"]:
        return None
    return float(case["work"]["batch"] / row["seconds"]["median"])


def _untimed(runner: Runner, status: str, reason: str, **further: Any) -> Row:
    about = {"who": runner.label, "ours": runner.ours, "kind": "warm"}
    return {**about, "status": status, "reason": reason, **further}


def _rows_of(
    task: Task, runner: Runner, units: Sequence[Unit], ceilings: Mapping[str, Any]
) -> list[Row]:
    first = units[0]
    shown: Row = {
        name: first[name] for name in ("agreement_db", "reference", "picture") if name in first
    }
    wrong = [unit for unit in units if unit["status"] != TIMED]
    if wrong:
        return [_untimed(runner, wrong[0]["status"], wrong[0]["reason"], **shown)]
    about: Row = {"who": runner.label, "ours": runner.ours, "status": TIMED}
    warm = {**about, "kind": "warm", **shown, **_warm(task, runner, units, ceilings)}
    firsts = [[unit["load_seconds"] + unit["first_seconds"]] for unit in units]
    load = statistics.median(unit["load_seconds"] for unit in units)
    return [warm, {**about, "kind": "first", "load_seconds": load, **_timed(firsts, units)}]


def _timed(rounds: list[list[float]], units: Sequence[Unit]) -> Row:
    found = joined(rounds)
    return {
        "seconds": asdict(found),
        "variation": found.variation,
        "rounds": rounds,
        "probe": [unit["probe"] for unit in units],
    }


def _warm(task: Task, runner: Runner, units: Sequence[Unit], ceilings: Mapping[str, Any]) -> Row:
    timed = _timed([unit["samples"] for unit in units], units)
    seconds = timed["seconds"]["median"]
    best = limit(task.work, runner.precision, ceilings)
    floor = best.floor if best else {}
    shares = units[0].get("stages", {})
    return {
        **timed,
        "stages": {name: share * seconds for name, share in shares.items()},
        "floor": floor,
        **({"flops": best.flops, "bytes": best.bytes} if best else {}),
        "percent_of_limit": 100 * sum(floor.values()) / seconds if floor else None,
        "lost": losses(shares, floor, seconds) if floor else [],
        "peak_megabytes": _peaks(units),
        "joules": _median(units, "joules"),
        "mhz": _median(units, "mhz"),
    }


def _median(units: Sequence[Unit], name: str) -> float | None:
    """Of what every run of a GPU tells; None elsewhere."""
    found = [each for unit in units for each in unit[name]]
    return statistics.median(found) if found else None


def _peaks(units: Sequence[Unit]) -> dict[str, float | None]:
    found = [unit["peak"] for unit in units if "peak" in unit]
    return {
        where: max((peak[where] for peak in found if peak[where] is not None), default=None)
        for where in ("host", "device")
    }
