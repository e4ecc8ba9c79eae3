"""Samplers as tables of numbers. To add one: write its function in a file here and give it a row below."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np

from tintype.errors import CheckpointError, RequestError, TintypeError
from tintype.schedulers.config import Plan, ScheduleConfig
from tintype.schedulers.ddim import ddim
from tintype.schedulers.ddpm import ddpm
from tintype.schedulers.dpmpp_2m import dpmpp_2m, dpmpp_2m_sde
from tintype.schedulers.dpmpp_sde import dpmpp_sde
from tintype.schedulers.edm_euler import edm_euler
from tintype.schedulers.euler import euler, euler_ancestral
from tintype.schedulers.flow_euler import flow_euler, flow_heun
from tintype.schedulers.heun import heun
from tintype.schedulers.lcm import lcm
from tintype.schedulers.lms import lms
from tintype.schedulers.pndm import pndm
from tintype.schedulers.table import Table
from tintype.schedulers.unipc import unipc

__all__ = ["Plan", "ScheduleConfig", "Table", "default_name", "fitting", "make_table", "names"]

_DIFFUSION, _FLOW, _EDM = "diffusion", "flow", "EDM"


@dataclass(frozen=True)
class _Method:
    """A function that fills a table, the kinds of model that it samples, and diffusers' name for it."""

    fill: Callable[[ScheduleConfig, Plan], Table]
    published: str
    kinds: tuple[str, ...] = (_DIFFUSION,)


_METHODS = {
    "ddpm": _Method(ddpm, "DDPMScheduler"),
    "ddim": _Method(ddim, "DDIMScheduler"),
    "pndm": _Method(pndm, "PNDMScheduler"),
    "lms": _Method(lms, "LMSDiscreteScheduler"),
    "euler": _Method(euler, "EulerDiscreteScheduler"),
    "euler_ancestral": _Method(euler_ancestral, "EulerAncestralDiscreteScheduler"),
    "heun": _Method(heun, "HeunDiscreteScheduler"),
    "dpmpp_2m": _Method(dpmpp_2m, "DPMSolverMultistepScheduler", (_DIFFUSION, _FLOW)),
    "dpmpp_2m_sde": _Method(dpmpp_2m_sde, "DPMSolverMultistepScheduler", (_DIFFUSION, _FLOW)),
    "dpmpp_sde": _Method(dpmpp_sde, "DPMSolverSDEScheduler"),
    "unipc": _Method(unipc, "UniPCMultistepScheduler", (_DIFFUSION, _FLOW)),
    "lcm": _Method(lcm, "LCMScheduler"),
    "flow_euler": _Method(flow_euler, "FlowMatchEulerDiscreteScheduler", (_FLOW,)),
    "flow_heun": _Method(flow_heun, "FlowMatchHeunDiscreteScheduler", (_FLOW,)),
    "edm_euler": _Method(edm_euler, "EDMEulerScheduler", (_EDM,)),
}


def names() -> list[str]:
    """The names that a request's `scheduler` may take."""
    return list(_METHODS)


def fitting(config: Mapping[str, Any]) -> list[str]:
    """The methods that sample a model with this `scheduler_config.json`."""
    kind = _kind(config, ScheduleConfig.from_config(config))
    return [name for name, method in _METHODS.items() if kind in method.kinds]


def default_name(config: Mapping[str, Any]) -> str:
    """The method that a checkpoint's `scheduler_config.json` names."""
    own = config.get("_class_name")
    found = [name for name, method in _METHODS.items() if method.published == own]
    if not found:
        raise RequestError(
            f"the model's own scheduler {own} is not available; choose one of {', '.join(names())}"
        )
    # One published class holds an ODE and an SDE solver.
    return found[-1] if config.get("algorithm_type") == "sde-dpmsolver++" else found[0]


def make_table(
    name: str,
    config: Mapping[str, Any],
    steps: int,
    *,
    start: int = 0,
    tokens: int | None = None,
) -> Table:
    """The table of method `name` for a model with this `scheduler_config.json`; shared, not to be written to.

    `start` leaves out the first of `steps` steps, as image to image does; `tokens` is the picture's length to a
    transformer whose times shift with it.
    """
    if not isinstance(name, str) or name not in _METHODS:
        raise RequestError(f"scheduler={name!r} is unknown; choose one of {', '.join(names())}")
    parsed = ScheduleConfig.from_config(config)
    kind = _kind(config, parsed)
    if kind not in _METHODS[name].kinds:
        raise RequestError(
            f"scheduler={name!r} does not sample a {kind} model; choose one of {', '.join(fitting(config))}"
        )
    return _filled(name, parsed, Plan(steps, start, tokens))


def _kind(config: Mapping[str, Any], parsed: ScheduleConfig) -> str:
    return _EDM if "sigma_data" in config else _FLOW if parsed.is_flow else _DIFFUSION


@lru_cache(maxsize=64)
def _filled(name: str, config: ScheduleConfig, plan: Plan) -> Table:
    plan.check(config.num_train_timesteps)
    try:
        with np.errstate(divide="ignore", invalid="ignore"):
            table = _METHODS[name].fill(config, plan)
    except TintypeError:
        raise
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"scheduler config: its numbers give {name} no steps ({error}); compare it with the published one"
        ) from error
    for field in fields(table):
        value = getattr(table, field.name)
        if isinstance(value, np.ndarray) and not np.isfinite(value).all():
            raise CheckpointError(
                f"scheduler config: {name} has no finite {field.name} for {plan.steps} steps; a model that predicts "
                f"{config.prediction_type} cannot begin where there is no signal or end where there is no noise"
            )
    return table


class _CallableModule(ModuleType):
    """`tintype.schedulers` is this package and also the function that lists the names."""

    def __call__(self) -> list[str]:
        return names()


sys.modules[__name__].__class__ = _CallableModule
