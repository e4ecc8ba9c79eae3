"""Where steps go, as a picture: `python -m tintype_bench.step_chart bench/results/h200/steps.json -o F.svg`.

A bar for each row that `tintype_bench.steps` measured, cut into what its kernels were. A file by itself: it brings its
colours for light and dark pages.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tintype_bench.plots import svg, text
from tintype_kernels.cache import replace_text

# By what is in the names of kernels; the first that fits counts.
_NAMES = {
    "attention": r"sdpa|flash|fmha",
    "convolutions": r"fprop|convolve|nhwc",
    "products": r"nvjet|gemm|matmul",
    "norms, rounding, gates": r"^\w*kernel$",  # Triton's, which are ours
    "copies, additions": r"at::native|^Mem|memcpy|splitK",
}
KINDS = (*_NAMES, "rest", "between kernels")
# In pixels: a bar's height and distance, and the widths of names, bars and milliseconds.
_BAR, _GAP, _LABELS, _PLOT, _VALUES, _LEGEND = 22, 8, 170, 560, 80, 34
_LIGHT = ("#0b6e5b", "#4c9f70", "#2f5d8a", "#b26a00", "#a9b4c2", "#d3d8de", "#f3f4f6")
_DARK = ("#46c7a8", "#7fd19b", "#6fa8dc", "#f0b35a", "#5d6a7a", "#3b434d", "#20252b")
Row = Mapping[str, Any]


def shares(row: Row) -> dict[str, float]:
    """What part of the row's time each kind took; kernels that a profile slowed are held to the time without one."""
    found = dict.fromkeys(KINDS, 0.0)
    for kernel in row["kernels"]:
        fitting = (kind for kind, names in _NAMES.items() if re.search(names, kernel["name"]))
        found[next(fitting, "rest")] += kernel["milliseconds"]
    busy, whole = row["kernel_milliseconds"], row["milliseconds"]
    found["rest"] += busy - sum(found.values())  # of kernels that took too little to be listed
    found["between kernels"] = max(0.0, whole - busy)
    return {kind: spent / max(busy, whole) for kind, spent in found.items()}


def chart(rows: Sequence[Row]) -> str:
    """The picture, as an SVG file's text."""
    height = _LEGEND + len(rows) * (_BAR + _GAP) + _GAP
    bars = [_bar(row, _LEGEND + number * (_BAR + _GAP)) for number, row in enumerate(rows)]
    parts = [f"<style>{_style()}</style>", _legend(), *bars]
    drawn = svg("where a step's time goes", _LABELS + _PLOT + _VALUES, height, parts)
    return drawn.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)  # as files ask for


def _bar(row: Row, top: float) -> str:
    middle = top + _BAR / 2 + 4
    parts = [text(_LABELS - 10, middle, f"{row['shape']}, {row['precision']}", "end")]
    left = float(_LABELS)
    for number, (kind, share) in enumerate(shares(row).items()):
        parts.append(
            f'<rect class="k{number}" x="{left:.1f}" y="{top}" width="{share * _PLOT:.1f}" height="{_BAR}">'
            f"<title>{kind}: {share:.1%}</title></rect>"
        )
        left += share * _PLOT
    parts.append(text(left + 8, middle, f"{row['milliseconds']:.1f} ms", "start"))
    return "".join(parts)


def _legend() -> str:
    """The kinds' names behind squares of their colours, in one line."""
    parts, left = [], 8.0
    for number, kind in enumerate(KINDS):
        parts.append(
            f'<rect class="k{number}" x="{left:.1f}" y="8" width="12" height="12"/>'
            + text(left + 17, 18, kind, "start")
        )
        left += 30 + 6.4 * len(kind)
    return "".join(parts)


def _style() -> str:
    light, dark = (
        "".join(f".k{number}{{fill:{hue}}}" for number, hue in enumerate(hues))
        for hues in (_LIGHT, _DARK)
    )
    ink = "text{{font:12px system-ui,sans-serif;fill:{}}}"
    return (
        ink.format("#1c1e21")
        + light
        + f"@media (prefers-color-scheme:dark){{{ink.format('#e6e8eb')}{dark}}}"
    )


def main() -> None:
    """Draw the steps of a report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("report", type=Path, help="that tintype_bench.steps wrote")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="F.svg")
    options = parser.parse_args()
    rows = json.loads(options.report.read_text(encoding="utf-8"))["rows"]
    steps = [row for row in rows if row["stage"] == "step" and "failed" not in row]
    if not steps:
        parser.error(f"{options.report} has no step that was timed")
    replace_text(options.output, chart(steps) + "\n")


if __name__ == "__main__":
    main()
