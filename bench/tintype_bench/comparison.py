"""Two reports of one suite, row by row: what changed by more than both runs' noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tintype.errors import RequestError
from tintype_bench.ceilings import change
from tintype_bench.measure import TIMED
from tintype_bench.spread import allowance

SLOWER, FASTER, SAME, LOST, NEW = "slower", "faster", "within noise", "lost", "new"
_Key = tuple[str, str, str]


@dataclass(frozen=True)
class Difference:
    """A row in both reports; ``change`` is relative, above 0 where the second is slower."""

    case: str
    who: str
    kind: str
    verdict: str
    change: float | None = None
    allowed: float | None = None
    note: str = ""

    @property
    def regressed(self) -> bool:
        """Whether it is worse than chance explains."""
        return self.verdict in (SLOWER, LOST)

    def line(self) -> str:
        """One row of the table."""
        moved = "" if self.change is None else f"{100 * self.change:+7.1f}%"
        allowed = "" if self.allowed is None else f"(allowed {100 * self.allowed:.1f}%)"
        what = f"{self.case}: {self.who}, {self.kind}"
        return f"{self.verdict:13}{moved:9}{allowed:17} {what}{self.note and ': '}{self.note}"


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Difference]:
    """What became of every row of `first`, and which rows are new."""
    if first.get("suite") != second.get("suite") or "cases" not in first:
        raise RequestError(
            f"--compare takes two reports of one suite of cases; these are of {first.get('suite')!r} and "
            f"{second.get('suite')!r}"
        )
    drift = change(first["ceilings"]["before"], second["ceilings"]["before"])
    before, after = dict(_rows(first)), dict(_rows(second))
    found = [_difference(key, row, after.get(key), drift) for key, row in before.items()]
    fresh = [key for key, row in after.items() if key not in before and row["status"] == TIMED]
    return [*found, *(Difference(*key, NEW) for key in fresh)]


def _rows(report: Mapping[str, Any]) -> Iterator[tuple[_Key, dict[str, Any]]]:
    for case in report["cases"]:
        for row in case["rows"]:
            if row["status"] == TIMED:
                yield (case["case"], row["who"], row["kind"]), row
            else:
                yield (case["case"], row["who"], "warm"), row


def _difference(
    key: _Key, before: Mapping[str, Any], after: Mapping[str, Any] | None, drift: float
) -> Difference:
    if before["status"] != TIMED:
        return Difference(*key, SAME, note="was not timed before")
    if after is None or after["status"] != TIMED:
        return Difference(*key, LOST, note=(after or {}).get("reason", "not in the second report"))
    moved = after["seconds"]["median"] / before["seconds"]["median"] - 1
    allowed = allowance(before["noise"], after["noise"], drift)
    # A change is judged as a ratio, so that slower and faster by the same factor are the same distance.
    distance = max(moved, -moved / (1 + moved))
    verdict = SAME if distance <= allowed else SLOWER if moved > 0 else FASTER
    return Difference(*key, verdict, moved, allowed)
