"""Which implementation of an op runs: `TINTYPE_KERNELS` = auto (default) | native | reference, read at each call."""

from __future__ import annotations

import os

from tintype_kernels import native

VARIABLE = "TINTYPE_KERNELS"


class KernelUnavailable(RuntimeError):
    """An implementation that was asked for and cannot run here; the message lists those that can."""


def select(obstacle: str = "") -> str:
    """Name the implementation for this call. `obstacle` says why these arguments cannot take the native one."""
    wanted = os.environ.get(VARIABLE, "auto") or "auto"
    obstacle = native.reason or obstacle
    able = ["reference"] if obstacle else ["native", "reference"]
    if wanted == "auto":
        return able[0]
    if wanted in able:
        return wanted
    why = f": {obstacle}" if wanted == "native" else ""
    raise KernelUnavailable(
        f"{VARIABLE}={wanted} cannot run here{why}; choose one of auto, {', '.join(able)}"
    )


def implementation() -> dict[str, str]:
    """Say what runs for ordinary arguments, and why: `{"selected", "requested", "note"}`."""
    requested = os.environ.get(VARIABLE, "auto") or "auto"
    return {"selected": select(), "requested": requested, "note": native.reason}
