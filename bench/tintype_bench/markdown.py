"""A report as Markdown tables, as the README and `docs/measurements.md` show them; also what the command prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import compress
from typing import Any

from tintype_bench.measure import TIMED
from tintype_bench.rows import throughput
from tintype_bench.spread import NOISY

Row = Mapping[str, Any]
_HEAD = (
    "who",
    "median",
    "quartiles",
    "noise",
    "against the best peer",
    "of the limit",
    "agrees",
    "energy",
    "memory",
    "first run",
)


def tables(report: Mapping[str, Any]) -> str:
    """Every case with a table, and what conditions all of them had."""
    parts = [conditions_line(report)]
    parts += [f"**{case['case']}**\n\n{case_table(case)}" for case in report["cases"]]
    parts += best_batches(report)
    return "\n\n".join(parts) + "\n"


def conditions_line(report: Mapping[str, Any]) -> str:
    """Machine, versions, and how steady the machine was."""
    about, limits = report["conditions"], report["ceilings"]["before"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    flops = ", ".join(f"{n} {v / 1e12:.3g}" for n, v in limits["flops"].items())
    steady = all(each["steady"] for each in report["settlings"])
    return (
        f"{about.get('gpu') or about['cpu']}, {about['cores']} cores, {about['date']}; {versions}. "
        f"Ceilings: matrix product {flops} TFLOP/s, copy {limits['bandwidth'] / 1e9:.3g} GB/s. "
        f"The machine's own pace varied by {100 * report['drift']:.1f}%"
        f"{'' if steady else ', and had not settled before the first case'}."
    )


def case_table(case: Mapping[str, Any]) -> str:
    """A case's rows as a table, and its notes under it."""
    head, *lines = case_cells(case)
    rule = ["---"] * len(head)
    table = "\n".join(_line(cells) for cells in (head, rule, *lines))
    return f"{table}\n\n{case_notes(case)}".rstrip()


def case_cells(case: Mapping[str, Any]) -> list[list[str]]:
    """The head, then a line a runner, the fastest first; what was not timed says why. Columns without a cell go."""
    warm = [row for row in case["rows"] if row["kind"] == "warm"]
    first = {row["who"]: row for row in case["rows"] if row["kind"] == "first"}
    best = best_peer(case)
    lines = [_cells(row, first.get(row["who"]), best) for row in timed_rows(case)]
    lines += [_untimed(row) for row in warm if row["status"] != TIMED]
    told = [any(line[column] for line in lines) for column in range(len(_HEAD))]
    return [list(compress(line, told)) for line in (_HEAD, *lines)]


def case_notes(case: Mapping[str, Any]) -> str:
    """Who made the reference, where each lost most, and where the machine was not as usual."""
    made_by = sorted({row["reference"] for row in case["rows"] if row.get("reference")})
    timed = timed_rows(case)
    losses = [f"{row['who']}: {_lost(row)}" for row in timed if row["lost"]]
    paces = [row["pace"] for row in timed]
    notes = [f"Agreement with {', '.join(made_by)}."] if made_by else []
    notes += [f"Lost most: {'; '.join(losses)}."] if losses else []
    if paces and abs(furthest := max(paces, key=abs)) > NOISY:
        how = "slower" if furthest > 0 else "faster"
        notes.append(f"In one round the machine was {100 * abs(furthest):.0f}% {how} than usual.")
    return " ".join(notes)


def timed_rows(case: Mapping[str, Any]) -> list[Row]:
    """The warm rows that were timed, the fastest first."""
    timed = [r for r in case["rows"] if r["status"] == TIMED and r["kind"] == "warm"]
    return sorted(timed, key=lambda row: float(row["seconds"]["median"]))


def best_peer(case: Mapping[str, Any]) -> Row | None:
    """The fastest timed warm row that is not ours."""
    return next((row for row in timed_rows(case) if not row["ours"]), None)


def best_batches(report: Mapping[str, Any]) -> Iterator[str]:
    """For each runner of a setting that was timed at several batches, the one with the most pictures a second."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for case in report["cases"]:
        for row in timed_rows(case):
            if (rate := throughput(case, row)) is not None:
                rates = found.setdefault((_setting(case), row["who"]), {})
                rates[case["work"]["batch"]] = rate
    for (setting, who), rates in found.items():
        if len(rates) > 1:
            batch = max(rates, key=lambda each: rates[each])
            yield f"{setting}, {who}: best throughput {rates[batch]:.3g} pictures/s at batch {batch}."


def _setting(case: Mapping[str, Any]) -> str:
    """What cases of several batches have in common."""
    work = case["work"]
    return f"{case['case'].split(',')[0]}, {work['steps']} steps, guidance {work['guidance']:g}"


def seconds(value: float) -> str:
    """Seconds for people, three digits."""
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if value * scale >= 0.9995:  # less is 1,000 of the next unit after rounding
            return f"{_three_digits(value * scale)} {unit}"
    return f"{_three_digits(1e6 * value)} us"


def _three_digits(value: float) -> str:
    return f"{float(f'{value:.3g}'):g}"


def _cells(row: Row, first: Row | None, best: Row | None) -> Sequence[str]:
    time, peak = row["seconds"], row["peak_megabytes"]
    device = f" + {peak['device']:.0f} on the device" if peak["device"] else ""
    return (
        f"**{row['who']}**" if row["ours"] else row["who"],
        seconds(time["median"]),
        f"{seconds(time['lower'])} to {seconds(time['upper'])}",
        f"{100 * row['noise']:.1f}%{' noisy' if row['noisy'] else ''}",
        f"{best['seconds']['median'] / time['median']:.2f}x" if best and row["ours"] else "",
        f"{row['percent_of_limit']:.1f}%" if row["percent_of_limit"] else "",
        f"{row['agreement_db']:.1f} dB" if row.get("agreement_db") is not None else "",
        f"{row['joules']:.3g} J" if row["joules"] else "",
        f"{peak['host']:.0f} MB{device}" if peak["host"] else "",
        seconds(first["seconds"]["median"]) if first else "",
    )


def _untimed(row: Row) -> Sequence[str]:
    return (row["who"], f"{row['status']}: {row['reason']}", *[""] * (len(_HEAD) - 2))


def _lost(row: Row) -> str:
    return ", ".join(f"{each['stage']} {100 * each['share']:.0f}%" for each in row["lost"])


def _line(cells: Sequence[str]) -> str:
    escaped = (cell.replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"
