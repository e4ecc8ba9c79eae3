"""DPM-Solver++ as an SDE with a look at the middle of each step (k-diffusion's dpmpp_sde, eta 1, r 1/2)."""

from __future__ import annotations

import numpy as np

from tintype.schedulers.config import Plan, ScheduleConfig
from tintype.schedulers.euler import ancestral, start_scale
from tintype.schedulers.grids import ratio_grid
from tintype.schedulers.predict import clean_weights
from tintype.schedulers.sigmas import Float64, alpha_sigma, timestep_of, training_sigmas
from tintype.schedulers.table import Table


def dpmpp_sde(config: ScheduleConfig, plan: Plan) -> Table:
    """h keeps x0. The middle is the geometric mean of the step's ends; the last step has none."""
    grid = ratio_grid(config, plan)
    middle = np.sqrt(grid.sigma[:-2] * grid.sigma[1:-1])
    sigma = _interleaved(grid.sigma[:-1], middle)
    alpha, noise = alpha_sigma(sigma)
    w_x, w_m = clean_weights(config.prediction_type, alpha, noise)
    a, b, s, carry = _coefficients(grid.sigma, middle)
    return Table(
        name="dpmpp_sde",
        timesteps=_interleaved(grid.times, timestep_of(middle, training_sigmas(config))),
        c_in=alpha,
        u_x=w_x * alpha,
        u_m=w_m,
        a=a,
        b=b,
        s=s,
        carry=carry,
        signal=np.ones(len(sigma) + 1),
        noise=np.append(sigma, 0.0),
        init_scale=start_scale(config, grid),
    )


def _interleaved(points: Float64, between: Float64) -> Float64:
    """points[0], between[0], points[1], ..., points[-1]."""
    both = np.empty(len(points) + len(between))
    both[::2], both[1::2] = points, between
    return both


def _coefficients(sigma: Float64, middle: Float64) -> tuple[Float64, Float64, Float64, Float64]:
    """(a [n], b [n, 2], s [n], carry [n, 2]) of the interleaved rows.

    From the step's beginning x to the middle: `y = p*x + (1 - p)*h1 + up1*z1`. From x again to the end:
    `q*x + (1 - q)*h2 + up2*z`, with x taken from y. z and z1 are the same Brownian path over the whole step and
    over its first part, so z is correlated with z1 by the root of that part's share.
    """
    begin, end = sigma[:-2], sigma[1:-1]
    (down1, up1), (down2, up2) = ancestral(begin, middle), ancestral(begin, end)
    p, q = down1 / begin, down2 / begin
    share = np.divide(begin - middle, begin - end, out=np.zeros_like(end), where=begin > end)

    rows = 2 * len(sigma) - 3
    a, b, s, carry = np.zeros(rows), np.zeros((rows, 2)), np.zeros(rows), np.zeros((rows, 2))
    a[:-1:2], b[:-1:2, 0], s[:-1:2] = p, 1 - p, up1
    a[1::2] = q / p
    b[1::2] = np.stack([1 - q, -q / p * (1 - p)], axis=1)
    s[1::2] = 1.0
    carry[::2, 1] = 1.0
    carry[1::2, 0] = up2 * np.sqrt(share) - q / p * up1
    carry[1::2, 1] = up2 * np.sqrt(1 - share)
    b[-1, 0] = 1.0
    return a, b, s, carry
