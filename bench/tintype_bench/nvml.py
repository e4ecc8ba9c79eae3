"""What NVIDIA's driver tells of the first GPU in sight, through its own library: energy, clocks, name."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import Any

_LIBRARY = "libnvidia-ml.so.1"
_SM, _MEMORY = 1, 2  # nvmlClockType_t
_NAME_BYTES = 96


@cache
def _opened() -> tuple[Any, ctypes.c_void_p] | None:
    """The library and the device's handle, or None where there is no driver."""
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError:
        return None
    handle = ctypes.c_void_p()
    if library.nvmlInit_v2():
        return None
    if library.nvmlDeviceGetHandleByIndex_v2(_index(), ctypes.byref(handle)):
        return None
    return library, handle


def _index() -> int:
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return int(first) if first.isdigit() else 0


def energy() -> float | None:
    """Joules that the GPU has used since its driver was loaded, where it counts them."""
    if (opened := _opened()) is None:
        return None
    library, handle = opened
    millijoules = ctypes.c_ulonglong()
    if library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)):
        return None
    return millijoules.value / 1000


def clock() -> float | None:
    """MHz that the multiprocessors run at right now."""
    return None if (opened := _opened()) is None else _clock(*opened, "", _SM)


def describe() -> dict[str, Any]:
    """Name, driver, and present and highest clocks in MHz; empty where there is no GPU."""
    if (opened := _opened()) is None:
        return {}
    library, handle = opened
    found: dict[str, Any] = {}
    text = ctypes.create_string_buffer(_NAME_BYTES)
    if not library.nvmlDeviceGetName(handle, text, _NAME_BYTES):
        found["gpu"] = text.value.decode()
    if not library.nvmlSystemGetDriverVersion(text, _NAME_BYTES):
        found["driver"] = text.value.decode()
    for name, kind in (("sm", _SM), ("memory", _MEMORY)):
        for word in ("", "Max"):
            if (mhz := _clock(library, handle, word, kind)) is not None:
                found[f"{name}_{word.lower() or 'now'}_mhz"] = mhz
    return found


def _clock(library: Any, handle: ctypes.c_void_p, word: str, kind: int) -> float | None:
    """The present clock of a kind, or with the word "Max" the highest."""
    number = ctypes.c_uint()
    ask = getattr(library, f"nvmlDeviceGet{word}ClockInfo")
    return None if ask(handle, kind, ctypes.byref(number)) else number.value
