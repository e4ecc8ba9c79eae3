"""Units become the rows of a report: a warm and a first row for each runner of a case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tintype_bench.limits import limit, losses
from tintype_bench.measure import TIMED, Task, Unit
from tintype_bench.spread import NOISY, between_rounds, joined, noise
from tintype_bench.work import Runner

Row = dict[str, Any]


def case_report(task: Task, units: Sequence[Unit], ceilings: Mapping[str, Any]) -> dict[str, Any]:
    """One case with its rows, whose noise is not yet told; `settle` does that when all cases are there."""
    rows: list[Row] = []
    for runner in task.runners:
        own = [unit for unit in units if unit["who"] == runner.label]
        if runner.label in task.unready:
            rows.append(_untimed(runner, "failed", task.unready[runner.label]))
        elif own:
            rows += _rows_of(task, runner, own, ceilings)
    work = asdict(task.work) | {"checkpoint": Path(task.work.checkpoint).name}
    return {"case": task.case, "work": work, "rows": rows}


def settle(cases: Sequence[dict[str, Any]]) -> None:
    """Give every timed row its noise: what rounds differ by is estimated over all rows of a kind."""
    rows = [row for case in cases for row in case["rows"] if row["status"] == TIMED]
    for kind in ("warm", "first"):
        alike = [row for row in rows if row["kind"] == kind]
        between = between_rounds([row["rounds"] for row in alike])
        for row in alike:
            row["noise"] = noise(row["rounds"], between)
            # A first run comes once a process, so its variation is that of rounds, which the noise holds.
            varies = row["variation"] if kind == "warm" else 0.0
            row["noisy"] = max(row["noise"], varies) > NOISY


def throughput(case: Mapping[str, Any], row: Row) -> float | None:
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
    rounds = [[unit["load_seconds"] + unit["first_seconds"]] for unit in units]
    loads = sorted(unit["load_seconds"] for unit in units)
    return [
        warm,
        {**about, "kind": "first", "load_seconds": loads[len(loads) // 2], **_timed(rounds)},
    ]


def _timed(rounds: list[list[float]]) -> Row:
    found = joined(rounds)
    return {"seconds": asdict(found), "variation": found.variation, "rounds": rounds}


def _warm(task: Task, runner: Runner, units: Sequence[Unit], ceilings: Mapping[str, Any]) -> Row:
    timed = _timed([unit["samples"] for unit in units])
    seconds = timed["seconds"]["median"]
    best = limit(task.work, runner.precision, ceilings)
    floor = best.floor if best else {}
    joules = [each for unit in units for each in unit["joules"]]
    shares = units[0].get("stages", {})
    return {
        **timed,
        "stages": {name: share * seconds for name, share in shares.items()},
        "floor": floor,
        **({"flops": best.flops, "bytes": best.bytes} if best else {}),
        "percent_of_limit": 100 * sum(floor.values()) / seconds if floor else None,
        "lost": losses(shares, floor, seconds) if floor else [],
        "peak_megabytes": _peaks(units),
        "joules": sorted(joules)[len(joules) // 2] if joules else None,
    }


def _peaks(units: Sequence[Unit]) -> dict[str, float | None]:
    found = [unit["peak"] for unit in units if "peak" in unit]
    return {
        where: max((peak[where] for peak in found if peak[where] is not None), default=None)
        for where in ("host", "device")
    }
