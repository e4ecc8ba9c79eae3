"""`tintype bench`: run a suite of measurements, print it, and write it as JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tintype.errors import RequestError, TintypeError


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser("bench", help="measure speed and size")
    parser.add_argument(
        "model", nargs="?", default="postcard", help="what `tintype generate -m` takes"
    )
    parser.add_argument(
        "--suite", choices=["cold"], default="cold", help="cold: process start to PNG on disk"
    )
    parser.add_argument("--runs", type=int, default=5, help="fresh processes to take the median of")
    parser.add_argument(
        "--json", type=Path, metavar="F", help="write the result with its conditions"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure, print, and write where asked."""
    from tintype_bench import cold
    from tintype_bench.conditions import conditions
    from tintype_bench.footprint import footprint

    if options.runs < 1:
        raise RequestError(f"--runs {options.runs} is not at least 1")
    surroundings = conditions()
    try:
        result = cold.measure(options.model, options.runs)
    except RuntimeError as error:
        raise TintypeError(str(error)) from error
    sizes = footprint()
    print(cold.table(result))
    print(f"slim installation {sum(sizes.values()):.0f} MB:", ", ".join(_largest(sizes)))
    if options.json:
        report = {"suite": "cold", "conditions": surroundings, **result, "slim_megabytes": sizes}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _largest(sizes: dict[str, float], count: int = 6) -> list[str]:
    return [f"{name} {megabytes:.0f}" for name, megabytes in list(sizes.items())[:count]]
