"""What this machine does at best, measured: `python -m tintype_bench.ceilings [--device cuda]` prints JSON.

Square matrix products by precision, and a copy. They are measured in a process of their own before a suite and again
after it, and the higher of the two counts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from tintype.errors import TintypeError

_SIDE = {"cpu": 1024, "cuda": 8192}
_RUNS = {"cpu": 15, "cuda": 30}
_LONGEST = 2.0  # seconds of a precision that a CPU only imitates


def measured(device: str = "cpu") -> dict[str, Any]:
    """{"flops": {precision: FLOP/s}, "bandwidth": bytes/s}, from a fresh process."""
    command = [sys.executable, "-m", "tintype_bench.ceilings", "--device", device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise TintypeError(f"the machine's ceilings cannot be measured: {''.join(last)}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def best(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The higher of each ceiling: what a busy moment hid."""
    flops = {n: max(v, after["flops"].get(n, v)) for n, v in before["flops"].items()}
    return {"flops": flops, "bandwidth": max(before["bandwidth"], after["bandwidth"])}


def _measure(device: str) -> dict[str, Any]:
    """A precision that the device does not multiply in is left out."""
    from tintype_bench.device_timing import copy_bandwidth, time_call

    side, runs = _SIDE[device], _RUNS[device]
    flops = {}
    for name, product in _products(side, device).items():
        try:
            seconds = time_call(product, device, runs, longest=_LONGEST).least * 1e-6
        except (RuntimeError, AttributeError, NotImplementedError):
            continue
        flops[name] = 2 * side**3 / seconds
    return {"flops": flops, "bandwidth": copy_bandwidth(device, runs)}


def _products(side: int, device: str) -> dict[str, Callable[[], Any]]:
    import torch

    values = torch.randn(side, side, device=device)
    codes = torch.randint(-127, 127, (side, side), dtype=torch.int8, device=device)
    half, brain = values.half(), values.bfloat16()
    products: dict[str, Callable[[], Any]] = {
        "fp32": lambda: values @ values,
        "bf16": lambda: brain @ brain,
        "int8": lambda: torch._int_mm(codes, codes.t()),
    }
    if device == "cuda":
        scale = torch.ones((), device=device)
        eighth = values.to(torch.float8_e4m3fn)
        products["fp16"] = lambda: half @ half
        products["fp8"] = lambda: torch._scaled_mm(
            eighth, eighth.t(), scale, scale, out_dtype=torch.bfloat16
        )
    return products


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=sorted(_SIDE), default="cpu")
    print(json.dumps(_measure(parser.parse_args().device)))


if __name__ == "__main__":
    main()
