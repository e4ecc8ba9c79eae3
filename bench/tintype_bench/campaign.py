"""Runs the cases of a suite, keeping what is done, and makes the report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

from tintype.errors import TintypeError
from tintype_bench import ceilings
from tintype_bench.agreement import find_reference
from tintype_bench.cases import Case
from tintype_bench.conditions import conditions
from tintype_bench.measure import TIMED, Plan, Reference, Task, Unit, time_group
from tintype_bench.probe import Probe
from tintype_bench.rows import case_report, state_noise
from tintype_bench.sources import Sources
from tintype_bench.work import Runner
from tintype_kernels.cache import replace_text

FORMAT = 2


class Unfinished(TintypeError):
    """The time limit came first; what is done is kept."""


@dataclass
class Progress:
    """Units that are done, in a file that a next run goes on from. Another plan or other cases begin anew."""

    path: Path | None
    key: dict[str, Any]
    units: list[Unit] = field(default_factory=list)
    begin: dict[str, Any] | None = None
    settlings: list[dict[str, Any]] = field(default_factory=list)  # one for each time it went on

    def resume(self) -> None:
        """Read what an earlier run with the same key left."""
        if self.path is not None and self.path.is_file():
            kept = json.loads(self.path.read_text(encoding="utf-8"))
            if kept["key"] == self.key:
                self.units, self.begin = kept["units"], kept["begin"]
                self.settlings = kept["settlings"]

    def has(self, case: str, number: int, runners: Sequence[Runner]) -> bool:
        """Whether a round of these runners is done, or one of them has failed for good."""
        done = {(u["who"], u["round"]) for u in self.units if u["case"] == case}
        return all((runner.label, number) in done for runner in runners)

    def failed(self, case: str) -> set[str]:
        """Runners that are not tried again."""
        return {u["who"] for u in self.units if u["case"] == case and u["status"] != TIMED}

    def keep(self, units: Sequence[Unit]) -> None:
        """Add what a group gave, and write everything down."""
        self.units += units
        if self.path is not None:
            names = ("key", "begin", "settlings", "units")
            kept = {name: getattr(self, name) for name in names}
            replace_text(self.path, json.dumps(kept) + "\n")

    def forget(self) -> None:
        """The report is written; what led to it may go."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


class Clock:
    """Stops before a group of runs that, by the longest so far, would pass the limit."""

    def __init__(self, limit: float | None) -> None:
        self._begin, self._limit, self._longest = time.monotonic(), limit, 0.0

    def check(self, case: str, number: int) -> None:
        """Unfinished where the next group, of this round of this case, would be too late."""
        spent = time.monotonic() - self._begin
        if self._limit is not None and spent + self._longest > self._limit:
            raise Unfinished(
                f"stopped after {spent:.0f} s, before the limit of {self._limit:.0f} s, at round {number + 1} of "
                f"{case}; run the same command with --resume to go on"
            )

    def timed(self, act: Callable[[], list[Unit]]) -> list[Unit]:
        """The units of a group, whose seconds are remembered."""
        begin = time.monotonic()
        units = act()
        self._longest = max(self._longest, time.monotonic() - begin)
        return units


@dataclass(frozen=True)
class Campaign:
    """A suite's cases, their sources, and how often they are timed on which device."""

    suite: str
    cases: Sequence[Case]
    sources: Sources
    plan: Plan
    device: str = "cpu"
    limit: float | None = None

    def run(self, kept: Path | None, *, resume: bool) -> dict[str, Any]:
        """The report; `kept` is where progress goes on the way."""
        progress = Progress(kept, self._key())
        if resume:
            progress.resume()
        self._begin(progress)
        clock = Clock(self.limit)
        tasks = [self._task(case) for case in self.cases]
        with Probe(self.device) as probe:
            if next(self._pending(tasks, progress), None):
                progress.settlings.append(asdict(probe.settle()))
            for task, number, group in self._pending(tasks, progress):
                clock.check(task.case, number)
                progress.keep(clock.timed(partial(self._time, task, number, group, probe)))
        report = self._report(tasks, progress)
        progress.forget()
        return report

    def _key(self) -> dict[str, Any]:
        """What must be the same for units to be gone on from."""
        return {
            "format": FORMAT,
            "suite": self.suite,
            "plan": asdict(self.plan),
            "cases": [case.name for case in self.cases],
            "device": self.device,
            "versions": conditions()["versions"],
        }

    def _begin(self, progress: Progress) -> None:
        if progress.begin is None:
            self.sources.say("measuring the machine's own ceilings")
            found = ceilings.measured(self.device)
            progress.begin = {"conditions": conditions(), "ceilings": found}

    def _task(self, case: Case) -> Task:
        work = self.sources.work(case)
        runners, unready = [], {}
        for runner in case.runners:
            try:
                runners.append(self.sources.ready(runner, case))
            except (TintypeError, OSError) as error:  # a result; the others go on
                runners.append(runner)
                unready[runner.label] = str(error)
        folder = self.sources.folder / "references"
        own = next((runner for runner in runners if runner.bundle), runners[0])

        @cache
        def reference() -> Reference:
            return find_reference(work, own, folder)

        in_turn = self.plan.in_turn or case.in_turn
        return Task(case.name, work, tuple(runners), unready, reference, in_turn)

    def _pending(
        self, tasks: Sequence[Task], progress: Progress
    ) -> Iterator[tuple[Task, int, list[Runner]]]:
        """Groups that are not done; all cases before the next round, so that rounds of one are minutes apart."""
        for number, task in product(range(self.plan.rounds), tasks):
            for group in task.groups():
                failed = progress.failed(task.case)
                going = [runner for runner in group if runner.label not in failed]
                if going and not progress.has(task.case, number, going):
                    yield task, number, going

    def _time(self, task: Task, number: int, group: Sequence[Runner], probe: Probe) -> list[Unit]:
        if number == 0:
            task.reference()  # made while no runner is in memory
        self.sources.say(
            f"{task.case}: round {number + 1} of {self.plan.rounds}, {len(group)} runners"
        )
        return list(time_group(task, group, number, self.plan, probe))

    def _report(self, tasks: Sequence[Task], progress: Progress) -> dict[str, Any]:
        assert progress.begin is not None
        begin, end = progress.begin["ceilings"], ceilings.measured(self.device)
        best = ceilings.best(begin, end)
        cases = [
            case_report(task, [u for u in progress.units if u["case"] == task.case], best)
            for task in tasks
        ]
        drift = state_noise(cases)
        return {
            "format": FORMAT,
            "suite": self.suite,
            "conditions": progress.begin["conditions"],
            "plan": asdict(self.plan),
            "ceilings": {"before": begin, "after": end},
            "settlings": progress.settlings,
            "drift": drift,
            "cases": cases,
        }


def default_progress(target: Path | None) -> Path | None:
    """Progress lies beside the report until that is written."""
    return None if target is None else target.with_name(f".{target.name}.progress")


def write_json(report: dict[str, Any], target: Path) -> None:
    """Write a report whole."""
    replace_text(target, json.dumps(report, indent=1) + "\n")
