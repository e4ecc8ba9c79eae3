"""UniPC, a predictor that corrects its last step with what the model says at its end (Zhao et al., NeurIPS 2023).

The corrected x needs no slot of its own: corrector and predictor of one step share their first-order part, so the
corrected x is the predicted one plus a sum of h, which goes into the next step's weights.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from tintype.schedulers.config import Plan, ScheduleConfig
from tintype.schedulers.grids import (
    Grid,
    flow_grid,
    karras_flow_grid,
    preserving_grid,
    refuse_respaced,
)
from tintype.schedulers.predict import clean_weights
from tintype.schedulers.sigmas import Float64
from tintype.schedulers.table import Table

# On a straight path time one has no signal at all, and its log signal-to-noise no number.
_MOST_NOISE = 1 - 1e-6


def unipc(config: ScheduleConfig, plan: Plan) -> Table:
    """h keeps x0."""
    grid = _grid(config, plan)
    u_x, u_m = clean_weights(config.prediction_type, grid.alpha[:-1], grid.sigma[:-1])
    return Table(
        name="unipc",
        timesteps=grid.times,
        c_in=np.ones(len(u_x)),
        u_x=u_x,
        u_m=u_m,
        a=grid.sigma[1:] / grid.sigma[:-1],
        b=_history_weights(config, grid, skipped=plan.start),
        signal=grid.alpha,
        noise=grid.sigma,
        threshold=config.threshold(),
    )


def _grid(config: ScheduleConfig, plan: Plan) -> Grid:
    if not config.is_flow:
        return preserving_grid(config, plan, round_karras=True)
    refuse_respaced("unipc", config, "use_exponential_sigmas", "use_beta_sigmas")
    if config.use_karras_sigmas:
        grid = karras_flow_grid(config, plan)
    else:
        times = np.linspace(1, 1 / config.num_train_timesteps, plan.steps + 1)[:-1]
        grid = flow_grid(config, plan, times, most=_MOST_NOISE)
    return replace(grid, times=np.trunc(grid.times))


def _history_weights(config: ScheduleConfig, grid: Grid, skipped: int) -> Float64:
    """Weights of this and earlier x0, [n, order + 1]."""
    log_snr, steps = grid.log_snr, len(grid.times)
    most = config.solver_order or 2
    ratio = grid.sigma[1:] / grid.sigma[:-1]
    b = np.zeros((steps, most + 1))
    correction = np.zeros(most + 1)
    for i in range(steps):
        room = steps - i if config.lower_order_final or i == steps - 1 else most
        order = _distinct(log_snr[: i + 1], min(most, room, i + 1))
        predictor, corrector = _step_weights(config, log_snr, i, order)
        b[i] = ratio[i] * correction
        b[i, :most] += grid.alpha[i + 1] * predictor[1 : most + 1]
        allowed = i + skipped not in config.disable_corrector
        correction = grid.alpha[i + 1] * (corrector - predictor) * allowed
    return b


def _distinct(log_snr: Float64, order: int) -> int:
    """The order that the last points allow: points of equal noise level carry no difference."""
    gaps = np.diff(log_snr[-order:])[::-1]
    same = np.flatnonzero(gaps <= 0)
    return int(same[0]) + 1 if len(same) else order


def _step_weights(
    config: ScheduleConfig, log_snr: Float64, i: int, order: int
) -> tuple[Float64, Float64]:
    """(predictor, corrector) of the step from point i to i + 1: weights of x0 there, at i, at i - 1, ...

    Both [solver order + 1] and without the factor alpha of the step's end (equations 3 and 9 of the paper).
    """
    size = (config.solver_order or 2) + 1
    predictor, corrector = np.zeros(size), np.zeros(size)
    length = log_snr[i + 1] - log_snr[i]
    if length <= 0:
        return predictor, corrector
    first_order = -np.expm1(-length)
    predictor[1] = corrector[1] = first_order
    if not np.isfinite(length):
        return predictor, corrector
    scale = length if config.solver_type == "bh1" else first_order
    ratios = np.append((log_snr[i - np.arange(1, order)] - log_snr[i]) / length, 1.0)
    powers = np.vander(ratios, order, increasing=True).T
    moments = _moments(-length, order) / -scale
    inner = np.array([0.5]) if order == 2 else np.linalg.solve(powers[:-1, :-1], moments[:-1])
    outer = np.array([0.5]) if order == 1 else np.linalg.solve(powers, moments)
    _add_differences(predictor, scale * inner, ratios[:-1])
    _add_differences(corrector, scale * outer, ratios)
    return predictor, corrector


def _moments(hh: float, order: int) -> Float64:
    """k! * phi_{k+1}(hh) * hh, for k = 1 .. order, with phi the exponential integrator's functions."""
    moments, phi = [], math.expm1(hh) / hh - 1
    for k in range(1, order + 1):
        moments.append(phi * math.factorial(k))
        phi = phi / hh - 1 / math.factorial(k + 1)
    return np.array(moments)


def _add_differences(weights: Float64, rho: Float64, ratios: Float64) -> None:
    """Add sum_k rho_k*(x0 at point k - x0 at i)/ratio_k; the ratio 1 is the step's end, others are earlier points."""
    for k, (part, ratio) in enumerate(zip(rho / ratios, ratios, strict=True)):
        weights[0 if ratio == 1.0 else k + 2] += part
        weights[1] -= part
