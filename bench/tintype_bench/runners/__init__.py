"""Who can be timed. A runner is made in a worker process, loads once, and does the same work again and again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tintype.errors import RequestError
from tintype_bench.work import Runner, Work

Pictures = NDArray[np.float32]


class Running(Protocol):
    """A loaded runner."""

    def run(self) -> Pictures:
        """Do the work: pictures [n, h, w, 3] in 0..1, or a component's output."""

    def stages(self) -> dict[str, float]:
        """Do the work once more and give the seconds of each stage, as far as the runner can tell them apart."""


Make = Callable[[Work, Runner], Running]


def _tintype(work: Work, runner: Runner) -> Running:
    from tintype_bench.runners import own

    return own.load(work, runner)


def _diffusers(work: Work, runner: Runner) -> Running:
    from tintype_bench.runners import diffusers_pipeline

    return diffusers_pipeline.load(work, runner)


def _graphs(work: Work, runner: Runner) -> Running:
    from tintype_bench.runners import plain_graphs

    return plain_graphs.load(work, runner)


def _stable_diffusion_cpp(work: Work, runner: Runner) -> Running:
    from tintype_bench.runners import stable_diffusion_cpp

    return stable_diffusion_cpp.load(work, runner)


def _command(work: Work, runner: Runner) -> Running:
    from tintype_bench.runners import command

    return command.load(work, runner)


def _machine(work: Work, runner: Runner) -> Running:
    from tintype_bench.runners import machine

    return machine.load(work, runner)


STABLE_DIFFUSION_CPP = "stable-diffusion.cpp"
KINDS: dict[str, Make] = {
    "tintype": _tintype,
    "diffusers": _diffusers,
    "diffusers-compiled": _diffusers,
    "onnxruntime": _graphs,
    "openvino": _graphs,
    STABLE_DIFFUSION_CPP: _stable_diffusion_cpp,
    "command": _command,
    "machine": _machine,
}
PEERS = ("diffusers", "diffusers-compiled", "onnxruntime", "openvino", STABLE_DIFFUSION_CPP)


def make(description: dict[str, Any]) -> Running:
    """Load what a description, made by `work.as_json`, names."""
    work, runner = Work(**description["work"]), Runner(**description["runner"])
    if runner.kind not in KINDS:
        raise RequestError(f"runner {runner.kind!r} is unknown; choose one of {', '.join(KINDS)}")
    return KINDS[runner.kind](work, runner)
