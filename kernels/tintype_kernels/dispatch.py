"""Which implementation of an op runs: `TINTYPE_KERNELS` = auto (default) | triton | native | reference.

The variable is read at each call. auto takes the first that can run, and never interprets Triton. An op may have
variants of Triton's form, by names of their own, `triton_...`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from types import MappingProxyType

from tintype_kernels import native as extension

VARIABLE = "TINTYPE_KERNELS"
_FORMS = ("auto", "triton", "native", "reference")


class KernelUnavailable(RuntimeError):
    """An implementation that was asked for and cannot run here; the message lists those that can."""


def interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter: on CPU tensors, exactly, and slowly."""
    return os.environ.get("TRITON_INTERPRET", "") in {"1", "true", "on", "yes"}


def select(
    *,
    triton: str,
    native: str,
    variants: Mapping[str, str] = MappingProxyType({}),
    fastest: Callable[[list[str]], str] = lambda able: "",
) -> str:
    """Name the implementation for this call.

    `triton` and `native` say why that one cannot run, or are empty; so do `variants`, more of Triton's forms, named
    `triton_...`, that go before it. `fastest` is asked, of several that can, which one has been measured to be the
    fastest, and may not know.
    """
    wanted = os.environ.get(VARIABLE, "auto") or "auto"
    obstacles = {**variants, "triton": triton, "native": native, "reference": ""}
    able = [name for name, obstacle in obstacles.items() if not obstacle]
    if wanted == "auto":
        known = fastest(able)
        return known or next(n for n in able if not (n.startswith("triton") and interpreting()))
    # An op without that variant of Triton's has Triton's form.
    other_variant = wanted.startswith("triton_") and wanted not in obstacles
    name = "triton" if other_variant else wanted
    if name in able:
        return name
    why = f": {obstacles[name]}" if name in obstacles else ""
    raise KernelUnavailable(
        f"{VARIABLE}={wanted} cannot run here{why}; choose one of auto, {', '.join(able)}"
    )


def check_requested() -> None:
    """Refuse a name that no op has a form of, before anything long is begun; whether one can run shows at each call."""
    wanted = os.environ.get(VARIABLE, "auto") or "auto"
    if wanted not in _FORMS and not wanted.startswith("triton_"):
        raise KernelUnavailable(
            f"{VARIABLE}={wanted} is unknown; choose one of {', '.join(_FORMS)}"
        )


def select_for_arrays(obstacle: str = "") -> str:
    """Name the implementation for numpy arrays; `obstacle` is why they cannot take the native one."""
    return select(triton="Triton takes torch tensors", native=extension.reason or obstacle)


def implementation() -> dict[str, str]:
    """Say what runs for ordinary arrays, and why: `{"selected", "requested", "note"}`."""
    requested = os.environ.get(VARIABLE, "auto") or "auto"
    return {"selected": select_for_arrays(), "requested": requested, "note": extension.reason}
