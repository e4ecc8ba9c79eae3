"""Two reports of one suite, row by row: what changed by more than noise and the machine's own pace explain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tintype.errors import RequestError
from tintype_bench.measure import TIMED
from tintype_bench.spread import allowed, typical

SLOWER, FASTER, SAME, LOST, NEW = "slower", "faster", "within noise", "lost", "new"
# Conditions that are another at every run, of which the probe and the noise tell what matters.
_PASSING = ("date", "load_before", "cpu_mhz", "sm_now_mhz", "memory_now_mhz")
_Key = tuple[str, str, str]


@dataclass(frozen=True)
class Difference:
    """A row in both reports.

    ``change`` is relative, above 0 where the second is slower; ``allowed`` are the changes that chance and the machine
    explain, from the least to the most.
    """

    case: str
    who: str
    kind: str
    verdict: str
    change: float | None = None
    allowed: tuple[float, float] | None = None
    note: str = ""

    @property
    def regressed(self) -> bool:
        """Whether it is worse than chance explains."""
        return self.verdict in (SLOWER, LOST)

    def line(self) -> str:
        """One row of the table."""
        moved = "" if self.change is None else f"{100 * self.change:+7.1f}%"
        allowed = ""
        if self.allowed is not None:
            least, most = (100 * each for each in self.allowed)
            allowed = f"(allowed {least:+.1f}% to {most:+.1f}%)"
        what = f"{self.case}: {self.who}, {self.kind}"
        return f"{self.verdict:13}{moved:9}{allowed:30} {what}{self.note and ': '}{self.note}"


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Difference]:
    """What became of every row of `first`, and which rows are new."""
    if first["suite"] != second["suite"]:
        raise RequestError(
            f"--compare takes two reports of one suite; these are of {first['suite']!r} and {second['suite']!r}"
        )
    before, after = dict(_rows(first)), dict(_rows(second))
    found = [_difference(key, row, after.get(key)) for key, row in before.items()]
    fresh = [key for key, row in after.items() if key not in before and row["status"] == TIMED]
    return [*found, *(Difference(*key, NEW) for key in fresh)]


def other_conditions(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """What differs of machine, settings and versions, in one line; "" where nothing does.

    Two machines may well be compared, but whoever reads the rows should know that there are two.
    """
    moved = [
        f"{name} {before.get(name, 'none')}, then {after.get(name, 'none')}"
        for before, after in zip(_kept(first), _kept(second), strict=True)
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    ]
    return f"the conditions differ: {'; '.join(moved)}" if moved else ""


def _kept(report: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """What does not pass: the machine, the variables that set its threads, the versions."""
    conditions, nested = report["conditions"], ("threads", "versions")
    machine = {name: v for name, v in conditions.items() if name not in (*_PASSING, *nested)}
    return machine, *(conditions.get(part, {}) for part in nested)


def _rows(report: Mapping[str, Any]) -> Iterator[tuple[_Key, dict[str, Any]]]:
    for case in report["cases"]:
        for row in case["rows"]:
            if row["status"] == TIMED:
                yield (case["case"], row["who"], row["kind"]), row
            else:
                yield (case["case"], row["who"], "warm"), row


def _difference(
    key: _Key, before: Mapping[str, Any], after: Mapping[str, Any] | None
) -> Difference:
    if before["status"] != TIMED:
        return Difference(*key, SAME, note="was not timed before")
    if after is None or after["status"] != TIMED:
        return Difference(*key, LOST, note=(after or {}).get("reason", "not in the second report"))
    factor = after["seconds"]["median"] / before["seconds"]["median"]
    least, most = allowed((before["noise"], after["noise"]), _paces(before, after))
    verdict = SLOWER if factor > most else FASTER if factor < least else SAME
    return Difference(*key, verdict, factor - 1, (least - 1, most - 1))


def _paces(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[float]:
    """How many times longer each part of the probe took while the second was timed."""
    first, second = typical(before["probe"]), typical(after["probe"])
    return [second[part] / first[part] for part in first]
