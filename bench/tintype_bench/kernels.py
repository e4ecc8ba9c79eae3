"""Time every kernel against what it replaces: `python -m tintype_bench.kernels --json F`.

Forms: ours, in Triton, and beside libraries the one that was chosen by measurement, where `TINTYPE_AUTOTUNE` is set;
PyTorch eager; `torch.compile(mode="max-autotune-no-cudagraphs")`; and the libraries that an op's file names in
`LIBRARIES`. Each row says how far it is from the copy bandwidth that was measured first, counting each tensor once, and
from the time in which as many bytes are copied, which small ones take longer for than by the bandwidth; and where the
op's file has `flops`, how many TFLOP/s it reached. What the compiler makes is timed last: max-autotune takes longer
over it than all the others take together. A status of 75 says that --time-limit came first; `--resume` goes on from the
rows that are in --json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tintype_bench.conditions import conditions
from tintype_bench.device_timing import copy_bandwidth, copy_microseconds, time_call
from tintype_bench.micro import benchmarks
from tintype_kernels.ahead_of_time import op_modules
from tintype_kernels.dispatch import VARIABLE, KernelUnavailable

_UNAVAILABLE = KernelUnavailable.__name__
FORMS = ("ours", "eager", "compiled", "library")
Row = dict[str, Any]


def measure(options: argparse.Namespace, known: list[Row]) -> Iterator[Row]:
    """A row for each case and form that is not `known`; a form that fails says why instead of a time."""
    limit = next((row for row in known if row["form"] == "limit"), None)
    if limit is None:
        limit = _limit(options)
        yield limit
    found = {_key(row) for row in known}
    for forms in (set(options.form) - {"compiled"}, set(options.form) & {"compiled"}):
        for batch in options.batch:
            for module in op_modules():
                if not options.op or _name(module) in options.op:
                    yield from _of_op(module, batch, forms, limit, found, options)


def _limit(options: argparse.Namespace) -> Row:
    bandwidth = copy_bandwidth(options.device, options.runs)
    return {"op": "copy", "case": "1 GiB", "form": "limit", "gigabytes_per_second": bandwidth / 1e9}


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("op", "case", "batch", "dtype", "form"))


def _of_op(
    module: ModuleType,
    batch: int,
    forms: set[str],
    limit: Row,
    found: set[tuple[Any, ...]],
    options: argparse.Namespace,
) -> Iterator[Row]:
    bandwidth = 1e9 * limit["gigabytes_per_second"]
    for case, arguments in _cases(module, batch, options):
        for form, call, implementation in _forms(module, forms, options.device):
            row = {"op": _name(module), "case": case, "batch": batch, "dtype": options.dtype}
            row["form"] = form
            if _key(row) not in found:
                with _forced(implementation if options.device == "cuda" else ""):
                    timed = _timed(call, arguments, module, bandwidth, options)
                # A variant that does not take this case has no row.
                if not (form.startswith("ours, ") and _UNAVAILABLE in timed.get("failed", "")):
                    yield {**row, **timed}


def _forced(implementation: str) -> AbstractContextManager[Any]:
    """Ours is Triton's form on a GPU, whatever was measured to be the fastest there."""
    return mock.patch.dict(os.environ, {VARIABLE: implementation} if implementation else {})


def _name(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def _cases(
    module: ModuleType, batch: int, options: argparse.Namespace
) -> Iterator[tuple[str, dict[str, Any]]]:
    generator = torch.Generator(options.device).manual_seed(0)
    dtype = getattr(torch, options.dtype)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=options.device, dtype=dtype)

    for index, case in enumerate(module.cases(make, batch=batch)):
        if options.limit is None or index < options.limit:
            yield case


def _forms(
    module: ModuleType, wanted: set[str], device: str
) -> Iterator[tuple[str, Callable[..., Any], str]]:
    """Names, calls, and the implementation that each is to take on a GPU."""
    function = getattr(module, _name(module))
    plain = getattr(module, "baseline", function.reference)
    if "ours" in wanted:
        yield "ours", function, "triton"
        variants = getattr(getattr(module, "FORWARD", None), "variants", ())
        for variant in variants if device == "cuda" else ():
            yield variant.replace("triton_", "ours, "), function, variant
        if device == "cuda" and hasattr(module, "LIBRARIES"):
            yield "ours, chosen", function, "auto"
    if "eager" in wanted:
        yield "eager", plain, ""
    if "compiled" in wanted:
        torch.compiler.reset()
        yield "compiled", torch.compile(plain, mode="max-autotune-no-cudagraphs"), ""
    if "library" in wanted:
        for name, call in getattr(module, "LIBRARIES", {}).items():
            yield name, call, ""


def _timed(
    call: Callable[..., Any],
    arguments: dict[str, Any],
    module: ModuleType,
    bandwidth: float,
    options: argparse.Namespace,
) -> Row:
    try:
        with torch.no_grad():
            outputs = call(**arguments)
            found = time_call(lambda: call(**arguments), options.device, options.runs)
    except Exception as error:  # one form's failure is a result; the others still count
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
    seconds = found.median * 1e-6
    moved = _bytes(list(arguments.values())) + _bytes(outputs)
    row = {
        "microseconds": asdict(found),
        "gigabytes_per_second": moved / seconds / 1e9,
        "percent_of_copy": 100 * moved / seconds / bandwidth,
        "percent_of_equal_copy": 100
        * copy_microseconds(moved, options.device, options.runs)
        / found.median,
    }
    if hasattr(module, "flops"):
        row["teraflops"] = module.flops(**arguments) / seconds / 1e12
    return row


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_bytes, tensors)) if isinstance(tensors, (list, tuple)) else 0


def line(row: Row) -> str:
    """One row of the table."""
    start = f"{row['op']:30} {row['case']:40} {row.get('batch', ''):>2} {row['form']:11}"
    if "failed" in row:
        return f"{start} {row['failed'][:160]}"
    if "microseconds" not in row:
        return f"{start} {'':26} {row['gigabytes_per_second']:8.0f} GB/s"
    lower, median, upper = (row["microseconds"][name] for name in ("lower", "median", "upper"))
    text = f"{start} {median:9.1f} us [{lower:.1f}, {upper:.1f}]"
    shares = f"{row['percent_of_copy']:5.1f}% {row['percent_of_equal_copy']:5.1f}%"
    speeds = f"{row['gigabytes_per_second']:7.0f} GB/s {shares}"
    return f"{text:115} {speeds} {row.get('teraflops', ''):.5}".rstrip()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--op", nargs="+", help="these ops alone")
    parser.add_argument("--form", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--runs", type=int, default=50, help="timed runs of each")
    parser.add_argument("--limit", type=int, help="at most so many cases of an op")
    parser.add_argument("--json", type=Path, metavar="F", help="write the rows and the conditions")
    parser.add_argument("--resume", action="store_true", help="go on from the rows in --json")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="stop behind it")
    options = parser.parse_args(arguments)
    if options.resume and options.json is None:
        parser.error("--resume goes on from a report; name it with --json")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA GPU; --device cpu runs a smoke test")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    surroundings = conditions()
    if options.device == "cuda":
        surroundings["device"] = torch.cuda.get_device_name()
    begun = time.monotonic()
    rows = _known(options.json) if options.resume else []
    for row in measure(options, [*rows]):
        print(line(row), flush=True)
        rows.append(row)
        if options.json:  # after each row, so that a run that is cut short is not lost
            report = {"suite": "kernels", "rows": rows, **benchmarks(rows, surroundings)}
            options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        if options.time_limit is not None and time.monotonic() - begun > options.time_limit:
            print("not at the end; run the same command with --resume to go on", flush=True)
            return 75
    return 0


def _known(path: Path) -> list[Row]:
    """The rows that a stopped run left."""
    if not path.is_file():
        return []
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def run_suite(options: argparse.Namespace) -> int:
    """The suite of `tintype bench`, by its options."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    small = ["--limit", "1", "--batch", "1"] if options.tiny else []
    small += ["--dtype", "float32"] if device == "cpu" else []
    runs = ["--runs", str(options.runs)] if options.runs else []
    only = ["--op", options.only] if options.only else []
    target = ["--json", str(options.json)] if options.json else []
    limit = ["--time-limit", str(options.time_limit)] if options.time_limit is not None else []
    resume = ["--resume"] if options.resume else []
    return main(["--device", device, *small, *runs, *only, *target, *limit, *resume])


if __name__ == "__main__":
    sys.exit(main())
