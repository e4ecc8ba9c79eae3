"""Linear multistep: Adams and Bashforth's method on uneven sigmas (k-diffusion's LMS, order 4).

An edit begins with no derivatives, so at the first order, as sampling from noise does. diffusers' own begins an edit
at the order of the step that it stands at, with weights for derivatives that there are not; this does not.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tintype.schedulers.config import Plan, ScheduleConfig
from tintype.schedulers.euler import derivative_weights, start_scale
from tintype.schedulers.grids import ratio_grid
from tintype.schedulers.sigmas import Float64, alpha_sigma
from tintype.schedulers.table import Table

_ORDER = 4
# Two Gauss points on -1 .. 1 integrate the cubics below exactly.
_GAUSS = np.array([-1.0, 1.0]) / np.sqrt(3.0)


def lms(config: ScheduleConfig, plan: Plan) -> Table:
    """h keeps the derivative; each step integrates the polynomial through the last four."""
    if config.use_karras_sigmas:  # the published method has no ends of its own for these
        config = replace(config, sigma_min=None, sigma_max=None)
    grid = ratio_grid(config, plan)
    u_x, u_m = derivative_weights(config, grid.sigma[:-1])
    b = np.zeros((len(u_x), _ORDER))
    for step in range(len(b)):
        weights = _weights(grid.sigma[max(0, step - _ORDER + 1) : step + 2][::-1])
        b[step, : len(weights)] = weights
    return Table(
        name="lms",
        timesteps=grid.times,
        c_in=alpha_sigma(grid.sigma[:-1])[0],
        u_x=u_x,
        u_m=u_m,
        a=np.ones(len(u_x)),
        b=b,
        signal=grid.alpha,
        noise=grid.sigma,
        init_scale=start_scale(config, grid),
    )


def _weights(sigmas: Float64) -> Float64:
    """Integrals of Lagrange's basis polynomials over one step.

    `sigmas` holds the step's end, its beginning, and earlier points, newest first. Points of equal sigma carry no
    polynomial: the history is cut before the first.
    """
    end, known = sigmas[0], sigmas[1:]
    same = np.flatnonzero(np.diff(known) == 0)
    known = known[: same[0] + 1] if len(same) else known
    half = (end - known[0]) / 2
    at = known[0] + half * (1 + _GAUSS)
    weights = np.empty(len(known))
    for k, own in enumerate(known):
        others = np.delete(known, k)
        weights[k] = half * np.prod((at[:, None] - others) / (own - others), axis=1).sum()
    return weights
