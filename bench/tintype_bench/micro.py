"""Rows of single calls in the form that pytest-benchmark writes, so that its own tools compare and plot them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_VERSION = "5.0.0"  # of the form


def benchmarks(rows: Sequence[Mapping[str, Any]], conditions: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a pytest-benchmark report; rows that were not timed are left out."""
    timed = [row for row in rows if "microseconds" in row]
    return {
        "machine_info": dict(conditions),
        "commit_info": {},
        "benchmarks": [_benchmark(row) for row in timed],
        "datetime": conditions["date"],
        "version": _VERSION,
    }


def _benchmark(row: Mapping[str, Any]) -> dict[str, Any]:
    group = f"{row['op']}, {row['case']}, batch {row['batch']}, {row['dtype']}"
    name = f"{row['op']}[{row['form']}-{row['case']}-{row['batch']}-{row['dtype']}]"
    further = ("gigabytes_per_second", "percent_of_copy", "percent_of_equal_copy", "teraflops")
    return {
        "group": group,
        "name": name,
        "fullname": f"tintype_bench.kernels::{name}",
        "params": {key: row[key] for key in ("case", "batch", "dtype", "form")},
        "param": f"{row['form']}-{row['case']}-{row['batch']}-{row['dtype']}",
        "extra_info": {key: row[key] for key in further if key in row},
        "options": {"timer": "tintype_bench.device_timing", "warmup": True},
        "stats": _stats(row["microseconds"]),
    }


def _stats(spread: Mapping[str, float]) -> dict[str, float | str]:
    """Seconds, by the names that pytest-benchmark has for them; outliers are Tukey's, and not kept here."""
    second = {name: 1e-6 * value for name, value in spread.items() if name != "count"}
    return {
        "min": second["least"],
        "max": second["most"],
        "mean": second["mean"],
        "stddev": second["deviation"],
        "rounds": spread["count"],
        "median": second["median"],
        "iqr": second["upper"] - second["lower"],
        "q1": second["lower"],
        "q3": second["upper"],
        "iqr_outliers": 0,
        "stddev_outliers": 0,
        "outliers": "0;0",
        "ld15iqr": second["least"],
        "hd15iqr": second["most"],
        "ops": 1 / second["mean"],
        "total": second["mean"] * spread["count"],
        "iterations": 1,
    }
