"""Who runs a stage. A backend has `stages`, `profiles(stage)`, `compile(stage, profile)` and `run(stage, ...)`."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tintype.errors import BackendUnavailable, RequestError

Arrays = Mapping[str, NDArray[Any]]


class Backend(Protocol):
    """What a pipeline asks of whoever runs its stages.

    Arrays are numpy, but for placed ones: those are the backend's own, where it computes, and stay there between runs.
    """

    name: str
    batch_invariant: (
        bool  # whether a picture must have the bytes that it has alone, wherever it is in a batch
    )

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages it has."""

    def profiles(self, stage: str) -> list[str] | None:
        """The static shapes that it has for a stage, or None where it takes any."""

    def compile(self, stage: str, profile: str) -> None:
        """Begin to make a stage ready; safe to call again, from any thread."""

    def run(self, stage: str, profile: str, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        """Run a stage, compiling it first where that has not happened."""

    def place(self, array: NDArray[Any]) -> Any:
        """An array where the backend computes."""

    def foretold(self, told: Mapping[str, Any], times: NDArray[np.float32]) -> Mapping[str, Any]:
        """What the steps of a picture are told, placed, with what the backend makes of knowing the times [s] of all
        beforehand. Every step that is given it stands at one of them, with all its rows."""

    def run_placed(self, stage: str, profile: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Run a stage on placed arrays; what it gives is placed, too, and need not be there yet."""

    def watch(self, stage: str) -> bool:
        """Look at every result of `run_placed` from now on, and run again in float32 what is not finite.

        Tells whether that can change anything: False where it is looked at already, or there is nothing wider.
        """

    def fetch(self, placed: Any) -> NDArray[np.float32]:
        """A placed array as numpy's."""


class OneType:
    """A backend whose stages are computed in one type alone, and all anew at each step but what a picture tells."""

    def foretold(self, told: Mapping[str, Any], times: NDArray[np.float32]) -> Mapping[str, Any]:
        return told

    def watch(self, stage: str) -> bool:
        return False


class OnHost(OneType):
    """Placed arrays of a backend of one type that computes where numpy's arrays are."""

    def place(self, array: NDArray[Any]) -> Any:
        return array

    def run_placed(self, stage: str, profile: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        ran: dict[str, Any] = self.run(stage, profile, inputs)  # type: ignore[attr-defined]
        return ran

    def fetch(self, placed: Any) -> NDArray[np.float32]:
        array: NDArray[np.float32] = placed
        return array


@dataclass(frozen=True)
class Kind:
    """One backend: the packages of which it needs one, the extra that brings it, and what it runs."""

    packages: tuple[str, ...]
    extra: str
    runs: str  # "bundle" or "checkpoint"
    auto: bool = True  # whether it is tried unasked


# In the order in which `auto` tries them.
KINDS = {
    "onnxruntime": Kind(("onnxruntime",), "cpu", "bundle"),
    "openvino": Kind(("openvino",), "openvino", "bundle"),
    # Runs no bundle but those with engines for this very GPU, and so is not guessed.
    "tensorrt": Kind(("tensorrt_rtx", "tensorrt"), "tensorrt-rtx", "bundle", auto=False),
    "torch": Kind(("torch",), "torch", "checkpoint"),
}


def available(name: str) -> bool:
    """Whether a package of the backend is installed; it is not imported for this."""
    return any(importlib.util.find_spec(each) is not None for each in KINDS[name].packages)


def choose(wanted: str, runs: str) -> tuple[str, str]:
    """Pick the backend for a "bundle" or a "checkpoint": its name, and why it was picked."""
    fitting = [name for name, kind in KINDS.items() if kind.runs == runs]
    if wanted == "auto":
        unasked = [name for name in fitting if KINDS[name].auto]
        for name in unasked:
            if available(name):
                return name, _reason(name, runs, unasked)
        raise _absent(fitting[0], f"no backend for a {runs} is installed")
    if wanted not in KINDS:
        raise RequestError(f"backend={wanted!r} is unknown; choose one of auto, {', '.join(KINDS)}")
    if wanted not in fitting:
        raise RequestError(
            f"backend={wanted!r} does not run a {runs}; choose one of auto, {', '.join(fitting)}"
        )
    if not available(wanted):
        raise _absent(wanted, f"backend={wanted!r} needs the package {_packages(wanted)}")
    return wanted, "it was asked for"


def report() -> dict[str, str]:
    """What is installed, for `tintype inspect`."""
    return {
        name: "available" if available(name) else f'absent: pip install "tintype[{kind.extra}]"'
        for name, kind in KINDS.items()
    }


def _reason(name: str, runs: str, fitting: list[str]) -> str:
    others = [other for other in fitting if other != name and available(other)]
    also = f"; {', '.join(others)} would run it, too, where asked for" if others else ""
    return f"it runs a {runs} and {_packages(name)} is installed{also}"


def _packages(name: str) -> str:
    return " or ".join(KINDS[name].packages)


def _absent(name: str, problem: str) -> BackendUnavailable:
    return BackendUnavailable(
        f'{problem}; install it with: pip install "tintype[{KINDS[name].extra}]"'
    )
