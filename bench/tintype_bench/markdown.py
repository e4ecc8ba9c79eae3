"""A report as Markdown tables, as the README and `docs/measurements.md` show them; also what the command prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tintype_bench.measure import TIMED
from tintype_bench.rows import throughput

Row = Mapping[str, Any]
_HEAD = (
    "who",
    "median",
    "quartiles",
    "noise",
    "against the best peer",
    "of the limit",
    "agrees",
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
    about, limits = report["conditions"], report["ceilings"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    flops = ", ".join(f"{n} {v / 1e12:.3g}" for n, v in limits["before"]["flops"].items())
    return (
        f"{about.get('gpu') or about['cpu']}, {about['cores']} cores, {about['date']}; {versions}. "
        f"Ceilings: matrix product {flops} TFLOP/s, copy {limits['before']['bandwidth'] / 1e9:.3g} GB/s; "
        f"{100 * limits['change']:+.1f}% slower at the end."
    )


def case_table(case: Mapping[str, Any]) -> str:
    """One line a runner, the fastest first; what was not timed says why."""
    warm = [row for row in case["rows"] if row["kind"] == "warm"]
    first = {row["who"]: row for row in case["rows"] if row["kind"] == "first"}
    timed = sorted((r for r in warm if r["status"] == TIMED), key=lambda r: r["seconds"]["median"])
    best = best_peer(case)
    lines = [_line(_HEAD), _line(["---"] * len(_HEAD))]
    lines += [_line(_cells(row, first.get(row["who"]), best)) for row in timed]
    lines += [
        _line([row["who"], f"{row['status']}: {row['reason']}", *[""] * 7])
        for row in warm
        if row not in timed
    ]
    made_by = sorted({row["reference"] for row in warm if row.get("reference")})
    losses = [f"{row['who']}: {_lost(row)}" for row in timed if row["lost"]]
    notes = [f"Agreement with {', '.join(made_by)}."] if made_by else []
    notes += [f"Lost most: {'; '.join(losses)}."] if losses else []
    return "\n\n".join(["\n".join(lines), " ".join(notes)]).rstrip()


def best_peer(case: Mapping[str, Any]) -> Row | None:
    """The fastest timed warm row that is not ours."""
    rows = [
        r for r in case["rows"] if r["status"] == TIMED and r["kind"] == "warm" and not r["ours"]
    ]
    return min(rows, key=lambda row: row["seconds"]["median"], default=None)


def best_batches(report: Mapping[str, Any]) -> Iterator[str]:
    """For each runner of a model that was timed at several batches, the one with the most pictures a second."""
    found: dict[tuple[str, str], list[tuple[float, int]]] = {}
    for case in report["cases"]:
        for row in case["rows"]:
            if (rate := throughput(case, row)) is not None:
                model = case["case"].split()[0]
                found.setdefault((model, row["who"]), []).append((rate, case["work"]["batch"]))
    for (model, who), rates in found.items():
        if len({batch for _, batch in rates}) > 1:
            rate, batch = max(rates)
            yield f"{model}, {who}: best throughput {rate:.3g} pictures/s at batch {batch}."


def seconds(value: float) -> str:
    """Seconds for people, three digits."""
    if value >= 1:
        return f"{value:.3g} s" if value < 1000 else f"{value:.0f} s"
    return f"{1e3 * value:.3g} ms" if value >= 1e-3 else f"{1e6 * value:.3g} us"


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
        f"{peak['host']:.0f} MB{device}" if peak["host"] else "",
        seconds(first["seconds"]["median"]) if first else "",
    )


def _lost(row: Row) -> str:
    return ", ".join(f"{each['stage']} {100 * each['share']:.0f}%" for each in row["lost"])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
