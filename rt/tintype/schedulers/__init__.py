"""Samplers as tables of numbers. To add one: write its function in a file here and give it a row below."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from tintype.errors import RequestError
from tintype.schedulers.config import ScheduleConfig
from tintype.schedulers.ddim import ddim
from tintype.schedulers.dpmpp_2m import dpmpp_2m
from tintype.schedulers.euler import euler
from tintype.schedulers.table import Table

__all__ = ["ScheduleConfig", "Table", "default_name", "make_table", "names"]

_METHODS: dict[str, Callable[[ScheduleConfig, int], Table]] = {
    "ddim": ddim,
    "euler": euler,
    "dpmpp_2m": dpmpp_2m,
}
_DIFFUSERS_CLASSES = {
    "DDIMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
}


def names() -> list[str]:
    """The names that a request's `scheduler` may take."""
    return list(_METHODS)


def default_name(config: Mapping[str, Any]) -> str:
    """The method that a checkpoint's `scheduler_config.json` names."""
    own = config.get("_class_name")
    if own not in _DIFFUSERS_CLASSES:
        raise RequestError(
            f"the model's own scheduler {own} is not available; choose one of {', '.join(names())}"
        )
    return _DIFFUSERS_CLASSES[own]


def make_table(name: str, config: Mapping[str, Any], steps: int) -> Table:
    """The table of `steps` steps of method `name` for a model with this `scheduler_config.json`."""
    if name not in _METHODS:
        raise RequestError(f"scheduler={name!r} is unknown; choose one of {', '.join(names())}")
    return _METHODS[name](ScheduleConfig.from_config(config), steps)


class _CallableModule(ModuleType):
    """`tintype.schedulers` is this package and also the function that lists the names."""

    def __call__(self) -> list[str]:
        return names()


sys.modules[__name__].__class__ = _CallableModule
