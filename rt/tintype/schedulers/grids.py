"""Where on the way from noise to picture the model is asked: times that it is told, and the noise level there.

The three conventions that published schedulers follow differ in how many points they place and how they round.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tintype.errors import CheckpointError, RequestError
from tintype.schedulers.config import SIGMAS, Plan, ScheduleConfig
from tintype.schedulers.flow import stretched, time_shifted
from tintype.schedulers.sigmas import (
    Float64,
    alpha_sigma,
    respaced,
    timestep_of,
    training_sigmas,
)


@dataclass(frozen=True)
class Grid:
    """`times` [n] as the model is told them; x = alpha*x0 + sigma*noise at each, and at the end, [n + 1]."""

    times: Float64
    alpha: Float64
    sigma: Float64

    def after(self, start: int) -> Grid:
        """The grid without its first `start` points."""
        return Grid(self.times[start:], self.alpha[start:], self.sigma[start:])

    @property
    def log_snr(self) -> Float64:
        """log(alpha/sigma), infinite at the end, [n + 1]."""
        with np.errstate(divide="ignore"):
            ratio: Float64 = np.log(self.alpha) - np.log(self.sigma)
        return ratio


def training_steps(config: ScheduleConfig, steps: int, default: str) -> NDArray[np.int64]:
    """Falling whole training steps (Lin et al., "Common diffusion noise schedules ... are flawed", table 2)."""
    total = config.num_train_timesteps
    spacing = config.spacing(default)
    if spacing == "linspace":
        times = np.linspace(0, total - 1, steps).round()[::-1]
    elif spacing == "leading":
        times = np.arange(steps)[::-1] * (total // steps) + config.steps_offset
    else:
        times = np.round(total - np.arange(steps) * (total / steps)) - 1
    # An offset may point past the last training step; it has no noise level there.
    inside: NDArray[np.int64] = np.minimum(times, total - 1).astype(np.int64)
    return inside


def ratio_grid(config: ScheduleConfig, plan: Plan) -> Grid:
    """For methods that keep x = x0 + sigma*noise; linspace places fractional steps."""
    total, steps = config.num_train_timesteps, plan.steps
    if config.spacing("linspace") == "linspace":
        # float32, because that is what such models were told when they were evaluated
        times = np.linspace(0, total - 1, steps, dtype=np.float32)[::-1].astype(np.float64)
    elif config.timestep_spacing == "leading":
        times = (np.arange(steps)[::-1] * (total // steps) + config.steps_offset).astype(np.float64)
    else:
        times = training_steps(config, steps, "trailing").astype(np.float64)
    training = training_sigmas(config)
    sigmas = np.interp(times, np.arange(total), training)
    own = respaced(config, sigmas[0], sigmas[-1], steps)
    if own is not None:
        sigmas, times = own, timestep_of(own, training)
    return Grid(times, np.ones(steps + 1), np.append(sigmas, 0.0)).after(plan.start)


def preserving_grid(config: ScheduleConfig, plan: Plan, *, round_karras: bool) -> Grid:
    """For solvers in log signal-to-noise, x = alpha*x0 + sigma*noise; the model is told whole steps."""
    training = training_sigmas(config)
    own = respaced(config, training[-1], training[0], plan.steps)
    if own is not None:
        times = timestep_of(own, training)
        times = times.round() if config.use_karras_sigmas and round_karras else np.trunc(times)
        sigmas = own
    else:
        times = _points(config, plan.steps)
        sigmas = np.interp(times, np.arange(len(training)), training)
    return Grid(times, *alpha_sigma(np.append(sigmas, 0.0))).after(plan.start)


def _points(config: ScheduleConfig, steps: int) -> Float64:
    """Falling training steps; the point after the last is time zero, which gets no evaluation."""
    total = config.num_train_timesteps
    spacing = config.spacing("linspace")
    if spacing == "linspace":
        points: Float64 = np.linspace(0, total - 1, steps + 1).round()
        return points[:0:-1]
    if spacing == "leading":
        stride = total // (steps + 1)
        if stride == 0:
            raise RequestError(
                f"num_inference_steps={steps}: this scheduler with leading spacing places at most {total - 1} steps"
            )
        return (np.arange(1, steps + 1)[::-1] * stride + config.steps_offset).astype(np.float64)
    return training_steps(config, steps, "trailing").astype(np.float64)


def flow_grid(config: ScheduleConfig, plan: Plan, times: Float64, most: float = 1.0) -> Grid:
    """For straight paths: `times` falling in (0, 1], shifted for the picture's size, at most `most`."""
    shifted = stretched(config, time_shifted(config, times, plan.tokens))
    _check_ends(config)
    own = respaced(config, shifted[0], shifted[-1], plan.steps)
    return _straight(config, plan, np.minimum(shifted if own is None else own, most))


def karras_flow_grid(config: ScheduleConfig, plan: Plan) -> Grid:
    """For straight paths: Karras' sigmas of the noise schedule as times of their ratio; no shift has a say."""
    training = training_sigmas(config)
    sigmas = respaced(config, training[-1], training[0], plan.steps)
    assert sigmas is not None
    return _straight(config, plan, sigmas / (sigmas + 1))


def refuse_respaced(name: str, config: ScheduleConfig, *fields: str) -> None:
    """Refuse distributions for which published solvers put ratios where a straight path has times."""
    for field in fields or SIGMAS:
        if getattr(config, field):
            raise CheckpointError(
                f"scheduler config: {field} with use_flow_sigmas is not supported by {name}, whose published form "
                "leaves straight paths there; flow_euler takes it"
            )


def _straight(config: ScheduleConfig, plan: Plan, times: Float64) -> Grid:
    sigmas = np.append(times, 0.0)
    told = times * config.num_train_timesteps
    return Grid(told, 1 - sigmas, sigmas).after(plan.start)


def _check_ends(config: ScheduleConfig) -> None:
    """Refuse a least or a largest sigma that is no time of a straight path, where it has a say."""
    if not any(getattr(config, field) for field in SIGMAS):
        return
    for name in ("sigma_min", "sigma_max"):
        value = getattr(config, name)
        if value is not None and not 0 < value <= 1:
            raise CheckpointError(
                f"scheduler config: {name}={value!r} is outside (0, 1], in which a flow model's times lie; "
                "set it to null to leave it to the shift"
            )
