"""Under which conditions a figure was measured; a figure without them is not worth keeping."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tintype_bench import nvml

_PACKAGES = (
    *("tintype", "numpy", "onnxruntime", "openvino", "tokenizers", "torch", "triton"),
    *("diffusers", "transformers", "safetensors", "stable_diffusion_cpp_python"),
)
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TINTYPE_NUM_THREADS")


def conditions() -> dict[str, Any]:
    """Machine, versions and time, for the JSON beside every result."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "cpu_mhz": _cpu_clock(),
        "cpu_bf16": computes_bf16("cpu"),
        "cpu_vnni": multiplies_codes(),
        "threads": {name: os.environ[name] for name in _THREADS if name in os.environ},
        **nvml.describe(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def machine_name(surroundings: dict[str, Any]) -> str:
    """The folder under `bench/results/`: the GPU's name, or the CPU's cores and what it lacks for fewer bits."""
    gpu = surroundings.get("gpu")
    if gpu:
        return str(gpu).lower().removeprefix("nvidia ").replace(" ", "-")
    lacks = {"cpu_vnni": "-without-vnni", "cpu_bf16": "-without-bf16"}
    lacking = next((said for name, said in lacks.items() if not surroundings[name]), "")
    return f"cpu-{surroundings['cores']}core{lacking}"


@cache
def computes_bf16(device: str) -> bool:
    """Whether the device computes in bfloat16; of a CPU OpenVINO tells, and where it is missing, yes is supposed.

    A CPU that does not imitates it, in torch at a hundredth of float32's speed.
    """
    if device != "cpu" or find_spec("openvino") is None:
        return True
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def multiplies_codes() -> bool:
    """Whether the CPU adds up products of int8 in one instruction, as x86 does with VNNI; yes where nothing tells."""
    if find_spec("onnxruntime") is None:
        return True
    from tintype.backends.codes import LARGEST_CODE
    from tintype.backends.onnxruntime import adds_codes

    return adds_codes(LARGEST_CODE)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    return next(_cpu_info("model name"), platform.processor())


def _cpu_clock() -> float | None:
    """The first core's clock, as the system tells it; many virtual machines tell the nominal one."""
    return next(map(float, _cpu_info("cpu MHz")), None)


def _cpu_info(field: str) -> Iterator[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == field:
            yield value.strip()
