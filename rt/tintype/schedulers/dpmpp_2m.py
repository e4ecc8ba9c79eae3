"""DPM-Solver++(2M) as an ODE and as an SDE (Lu et al., arXiv 2211.01095, algorithm 2 and appendix)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tintype.errors import CheckpointError
from tintype.schedulers.config import Plan, ScheduleConfig
from tintype.schedulers.grids import Grid, flow_grid, preserving_grid, refuse_respaced
from tintype.schedulers.predict import clean_weights
from tintype.schedulers.sigmas import Float64
from tintype.schedulers.table import Table


def dpmpp_2m(config: ScheduleConfig, plan: Plan) -> Table:
    """h keeps x0; the second order extrapolates it from the last two, the first and the last step are first order."""
    grid = _grid("dpmpp_2m", config, plan)
    length = np.diff(grid.log_snr)
    gain = -grid.alpha[1:] * np.expm1(-length)
    return _table("dpmpp_2m", config, grid, grid.sigma[1:] / grid.sigma[:-1], gain)


def dpmpp_2m_sde(config: ScheduleConfig, plan: Plan) -> Table:
    """The same with half of the way made by noise."""
    grid = _grid("dpmpp_2m_sde", config, plan)
    length = np.diff(grid.log_snr)
    decay = np.exp(-length)
    gain = -grid.alpha[1:] * np.expm1(-2 * length)
    table = _table(
        "dpmpp_2m_sde", config, grid, grid.sigma[1:] / grid.sigma[:-1] * decay, gain, rate=2.0
    )
    return replace(table, s=grid.sigma[1:] * np.sqrt(-np.expm1(-2 * length)))


def _grid(name: str, config: ScheduleConfig, plan: Plan) -> Grid:
    if not config.is_flow:
        cosine = config.beta_schedule == "squaredcos_cap_v2"
        return preserving_grid(config, plan, round_karras=not cosine)
    refuse_respaced(name, config)
    times = 1 - np.linspace(1, 1 / config.num_train_timesteps, plan.steps + 1)
    grid = flow_grid(config, plan, times[:0:-1])
    return replace(grid, times=np.trunc(grid.times))


def _table(
    name: str, config: ScheduleConfig, grid: Grid, a: Float64, gain: Float64, rate: float = 1.0
) -> Table:
    if config.solver_order not in (None, 1, 2):
        raise CheckpointError(
            f"scheduler config: solver_order={config.solver_order} is not supported by {name}, only 1 or 2; "
            "unipc takes 3"
        )
    alpha, sigma = grid.alpha[:-1], grid.sigma[:-1]
    u_x, u_m = clean_weights(config.prediction_type, alpha, sigma)
    tilt = _tilt(config, grid, gain, rate)
    return Table(
        name=name,
        timesteps=grid.times,
        c_in=np.ones(len(a)),
        u_x=u_x,
        u_m=u_m,
        a=a,
        b=np.stack([gain + tilt, -tilt], axis=1),
        signal=grid.alpha,
        noise=grid.sigma,
        threshold=config.threshold(),
    )


def _tilt(config: ScheduleConfig, grid: Grid, gain: Float64, rate: float) -> Float64:
    """Weight of the last change of x0, [n]; `rate` is how many times the step's length x0 decays over."""
    length = np.diff(grid.log_snr)
    tilt = np.zeros(len(length))
    # A last step of infinite length has no second order, nor has one after a step of no length.
    usable = np.isfinite(length[1:]) & (length[:-1] > 0)
    if config.solver_order == 1 or not usable.any():
        return tilt
    now, last = length[1:][usable], length[:-1][usable]
    half = gain[1:][usable] / 2
    if config.solver_type == "heun":
        moved = now > 0
        drift = np.divide(2 * half, rate * now, out=np.zeros_like(now), where=moved)
        half = np.where(moved, grid.alpha[2:][usable] - drift, 0.0)
    tilt[1:][usable] = half * now / last
    return tilt
