"""Times a case: its runners side by side, A B A B, in rounds of fresh processes.

What is kept of one runner in one round is a unit, a plain JSON object; a run that was cut short goes on from its units.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from tintype.errors import TintypeError
from tintype_bench.agreement import agreement_db, least_db, thumbnail
from tintype_bench.probe import Probe
from tintype_bench.protocol import WorkerFailed, WorkerProcess
from tintype_bench.runners import Pictures
from tintype_bench.spread import Reading, typical
from tintype_bench.work import Runner, Work

Unit = dict[str, Any]
_T = TypeVar("_T")
Reference = tuple[Pictures, str]  # the output that others are held to, and who made it
TIMED, DIFFERS, FAILED = "timed", "differs", "failed"
# Seconds before a run: threads of the one before spin on, onnxruntime's for up to 40 ms, on cores that the next needs.
_REST = 0.05


@dataclass(frozen=True)
class Plan:
    """How often. ``in_turn`` has one runner in memory at a time in every case."""

    rounds: int = 3
    runs: int = 5
    in_turn: bool = False


@dataclass(frozen=True)
class Task:
    """A case ready to be timed, with all that is loaded made; ``unready`` has why a runner's was not.

    ``in_turn`` has one runner in memory at a time: rounds, not runs, then alternate.
    """

    case: str
    work: Work
    runners: Sequence[Runner]
    unready: dict[str, str]
    reference: Callable[[], Reference]
    in_turn: bool = False

    def groups(self) -> list[list[Runner]]:
        """Runners that are loaded together."""
        ready = [runner for runner in self.runners if runner.label not in self.unready]
        return [[runner] for runner in ready] if self.in_turn else [ready]


def time_group(
    task: Task, group: Sequence[Runner], number: int, plan: Plan, probe: Probe
) -> Iterator[Unit]:
    """The units of one round of runners that are loaded together: load all, then run them in turns with the probe."""
    with ExitStack() as stack:
        live: list[tuple[WorkerProcess, Unit]] = []
        for runner in group:
            unit: Unit = {"case": task.case, "who": runner.label, "round": number}
            try:
                worker = stack.enter_context(WorkerProcess(runner))
            except OSError as error:  # a command of the user's that is not there
                yield {**unit, "status": FAILED, "reason": str(error)}
                continue
            _load(worker, unit, task)
            if unit["status"] == TIMED:
                live.append((worker, unit))
            else:
                worker.close()
                yield unit
        pace = _alternate(live, plan.runs, probe)
        for worker, unit in live:
            unit["probe"] = pace
            if number == 0:  # apart from the timed runs: watching a stage makes the device wait
                _attempt(unit, partial(_watch_stages, worker, unit))
            _attempt(unit, partial(_look_at_memory, worker, unit))
            yield unit


def _alternate(live: Sequence[tuple[WorkerProcess, Unit]], runs: int, probe: Probe) -> Reading:
    """Run all in turns, the probe before, between and after; the machine's typical reading meanwhile."""
    readings = [_rested(probe.read)]
    for _ in range(runs):
        for worker, unit in live:
            _attempt(unit, partial(_rested, partial(_run, worker, unit)))
        readings.append(_rested(probe.read))
    return typical(readings)


def _rested(act: Callable[[], _T]) -> _T:
    time.sleep(_REST)
    return act()


def _load(worker: WorkerProcess, unit: Unit, task: Task) -> None:
    """Load and run once; in the first round the output is compared, and what differs is not timed."""
    unit.update(status=TIMED, samples=[], joules=[], mhz=[])

    def load() -> None:
        answer = worker.load(task.work)
        unit.update(load_seconds=answer["seconds"], first_seconds=answer["first_seconds"])
        if unit["round"] == 0:
            _compare(worker.output(), worker.runner, unit, task)

    _attempt(unit, load)


def _compare(output: Pictures, runner: Runner, unit: Unit, task: Task) -> None:
    reference, name = task.reference()
    found, least = agreement_db(output, reference, task.work), least_db(task.work, runner)
    unit.update(agreement_db=found, reference=name)
    if not task.work.component and output.ndim == 4:
        unit["picture"] = thumbnail(output)
    if not found >= least:
        reason = f"its output is at {found:.1f} dB of {name}, {least:.0f} dB are asked of {runner.precision}"
        unit.update(status=DIFFERS, reason=reason)


def _run(worker: WorkerProcess, unit: Unit) -> None:
    answer = worker.ask("run")
    unit["samples"].append(answer["seconds"])
    for name in ("joules", "mhz"):
        if answer.get(name) is not None:
            unit[name].append(answer[name])


def _watch_stages(worker: WorkerProcess, unit: Unit) -> None:
    answer = worker.ask("stages")
    unit["stages"] = {name: each / answer["seconds"] for name, each in answer["stages"].items()}


def _look_at_memory(worker: WorkerProcess, unit: Unit) -> None:
    unit["peak"] = worker.ask("peak")


def _attempt(unit: Unit, act: Callable[[], Any]) -> None:
    """A worker that fails is a result, and the others go on."""
    if unit["status"] != TIMED:
        return
    try:
        act()
    except (WorkerFailed, TintypeError) as error:
        unit.update(status=FAILED, reason=str(error))
