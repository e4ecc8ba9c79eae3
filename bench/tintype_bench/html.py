"""A report as one HTML page: bars against peers, a roofline, cost curves, pictures with their PSNR."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from tintype_bench import ceilings, markdown
from tintype_bench.markdown import timed_rows
from tintype_bench.plots import Axes, Bar, Mark, bars
from tintype_bench.work import Work

Report = Mapping[str, Any]
Row = Mapping[str, Any]
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5c6370; --page: #fcfcfd; --line: #d9dce1;
  --ours: #0b6e5b; --peer: #a9b4c2; --mark: #b3261e; --second: #7a4fbf; --third: #b26a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #9aa3af; --page: #14171a; --line: #353b43;
  --ours: #46c7a8; --peer: #5d6a7a; --mark: #ff8a80; --second: #b79cf0; --third: #f0b35a; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.5rem; }
p, figcaption { color: var(--soft); } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; white-space: nowrap; }
th, td { text-align: left; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid var(--line); }
svg { max-width: 100%; height: auto; } text { fill: var(--hue, var(--ink)); font: 12px system-ui, sans-serif; }
text.own { font-weight: 700; } .name { --hue: var(--soft); }
.ours { fill: var(--ours); } .peer { fill: var(--peer); }
path { fill: none; stroke: var(--soft); } path.grid { stroke: var(--line); } path.whisker { stroke: var(--ink); }
path.floor { stroke: var(--mark); stroke-width: 2; }
.series0 { --hue: var(--ours); } .series1 { --hue: var(--second); } .series2 { --hue: var(--third); }
.series3 { --hue: var(--mark); } .ceiling { --hue: var(--soft); }
polyline { fill: none; stroke: var(--hue); stroke-width: 2; } polyline.ceiling { stroke-dasharray: 6 3; }
.strip { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; width: 160px; font-size: .8rem; }
figure img { width: 160px; border-radius: 4px; }
"""
_KEY = "Bars are medians of a warm run with whiskers for quartiles; the red tick is the machine's own limit."
# What a case is one point of, by the end of its name: the axis, and the case's place on it.
_VARIED: Mapping[str, tuple[str, Callable[[Work], float]]] = {
    "by size": ("pixels", lambda work: work.width * work.height),
    "by batch": ("pictures at once", lambda work: work.batch),
    "by steps": ("steps", lambda work: work.steps),
}


def page(report: Report) -> str:
    """The whole page."""
    sections = [_case(case) for case in report["cases"]]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>tintype bench, {escape(report['suite'])}</title><style>{_STYLE}</style>"
        f"<h1>tintype bench, {escape(report['suite'])}</h1>"
        f"<p>{escape(markdown.conditions_line(report))}</p><p>{_KEY}</p>"
        f"{_roofline(report)}{_curves(report)}{''.join(sections)}</html>\n"
    )


def _case(case: Mapping[str, Any]) -> str:
    rows = timed_rows(case)
    plot = bars([_bar(row) for row in rows], f"seconds of {case['case']}") if rows else ""
    return f"<h2>{escape(case['case'])}</h2>{plot}{_table(case)}{_strip(case)}"


def _bar(row: Row) -> Bar:
    time = row["seconds"]
    share = f", {row['percent_of_limit']:.0f}% of limit" if row["percent_of_limit"] else ""
    text = f"{markdown.seconds(time['median'])}{share}{', noisy' if row['noisy'] else ''}"
    floor = sum(row["floor"].values())
    return Bar(row["who"], time["median"], time["lower"], time["upper"], floor, row["ours"], text)


def _table(case: Mapping[str, Any]) -> str:
    """What the Markdown has, so that both say the same."""
    head, *body = markdown.case_cells(case)
    rows = [_cells(head, "th"), *(_cells(cells, "td") for cells in body)]
    notes = escape(markdown.case_notes(case))
    return f'<div class="scroll"><table>{"".join(rows)}</table></div><p>{notes}</p>'


def _cells(cells: Sequence[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{_inner(cell)}</{tag}>' for cell in cells)}</tr>"


def _inner(cell: str) -> str:
    """A cell's text; bold as Markdown marks it."""
    plain = cell.removeprefix("**").removesuffix("**")
    return escape(cell) if plain == cell else f"<strong>{escape(plain)}</strong>"


def _strip(case: Mapping[str, Any]) -> str:
    """Every runner's first picture, with its PSNR beside the reference."""
    shown = [row for row in case["rows"] if row.get("picture")]
    figures = [
        f'<figure><img alt="{escape(row["who"])}" src="data:image/jpeg;base64,{row["picture"]}">'
        f"<figcaption>{escape(row['who'])}, {row['agreement_db']:.1f} dB</figcaption></figure>"
        for row in shown
    ]
    return f'<div class="strip">{"".join(figures)}</div>' if figures else ""


def _roofline(report: Report) -> str:
    """FLOP/s reached over FLOPs a byte, under the ceilings that were measured."""
    marks = [mark for case in report["cases"] for mark in _roofline_marks(case)]
    if not marks:
        return ""
    limits = ceilings.best(**report["ceilings"])
    least, most = min(m.x for m in marks) / 2, max(m.x for m in marks) * 2
    lines = {}
    for name, flops in limits["flops"].items():
        ridge = min(max(flops / limits["bandwidth"], least), most)
        xs = sorted({least, ridge, most})
        lines[name] = [(x, min(flops, x * limits["bandwidth"]) / 1e12) for x in xs]
    axes = Axes("roofline", "FLOPs a byte", "TFLOP/s", _plain, _plain)
    return f"<h2>Roofline</h2><p>A point a runner; hover for its name.</p>{axes.draw(marks, lines)}"


def _roofline_marks(case: Mapping[str, Any]) -> Iterator[Mark]:
    for row in timed_rows(case):
        if row.get("flops"):
            reached = row["flops"] / row["seconds"]["median"] / 1e12
            label = f"{row['who']}: {case['case']}"
            yield Mark(row["flops"] / row["bytes"], reached, label, row["ours"])


def _curves(report: Report) -> str:
    """What a picture costs by pixels, batch and steps, where the suite varies them."""
    plots = []
    for note, (name, place) in _VARIED.items():
        cases = [case for case in report["cases"] if case["case"].endswith(note)]
        lines: dict[str, list[tuple[float, float]]] = {}
        for ours in (True, False):  # the first line has our colour
            for case, row in _rows(cases, ours=ours):
                point = (place(Work(**case["work"])), row["seconds"]["median"])
                lines.setdefault(row["who"], []).append(point)
        if any(len(line) > 1 for line in lines.values()):
            axes = Axes(f"cost {note}", name, "seconds a call", _plain, markdown.seconds)
            plots.append(axes.draw([], lines))
    return f"<h2>Cost</h2>{''.join(plots)}" if plots else ""


def _rows(
    cases: Sequence[Mapping[str, Any]], *, ours: bool
) -> Iterator[tuple[Mapping[str, Any], Row]]:
    for case in cases:
        yield from ((case, row) for row in timed_rows(case) if row["ours"] == ours)


def _plain(value: float) -> str:
    return f"{value:g}" if value < 1e4 else f"{value / 1000:g}k"
