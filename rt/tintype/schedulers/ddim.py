"""DDIM, deterministic (Song, Meng and Ermon, ICLR 2021, equation 12 with eta 0)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tintype.schedulers.config import ScheduleConfig, check_steps
from tintype.schedulers.predict import clean_weights, noise_weights
from tintype.schedulers.table import Table


def ddim(config: ScheduleConfig, steps: int) -> Table:
    """x0 is kept and clipped; the direction back to the noise uses the unclipped prediction."""
    check_steps(steps, config.num_train_timesteps)
    times = _timesteps(config, steps)
    alphas = config.alphas_cumprod()
    final = 1.0 if config.set_alpha_to_one else alphas[0]
    previous = times - config.num_train_timesteps // steps
    now = alphas[times]
    then = np.where(previous >= 0, alphas[np.maximum(previous, 0)], final)

    alpha, sigma = np.sqrt(now), np.sqrt(1 - now)
    u_x, u_m = clean_weights(config.prediction_type, alpha, sigma)
    n_x, n_m = noise_weights(config.prediction_type, alpha, sigma)
    direction = np.sqrt(1 - then)
    return Table(
        name="ddim",
        timesteps=times.astype(np.float64),
        c_in=np.ones(steps),
        u_x=u_x,
        u_m=u_m,
        a=direction * n_x,
        c=direction * n_m,
        b=np.sqrt(then)[:, None],
        s=np.zeros(steps),
        clip=config.clip_sample_range if config.clip_sample else None,
    )


def _timesteps(config: ScheduleConfig, steps: int) -> NDArray[np.int64]:
    """Falling training steps (Lin et al., "Common diffusion noise schedules ... are flawed", table 2)."""
    total = config.num_train_timesteps
    spacing = config.spacing("leading")
    if spacing == "linspace":
        times = np.linspace(0, total - 1, steps).round()[::-1]
    elif spacing == "leading":
        times = np.arange(steps)[::-1] * (total // steps) + config.steps_offset
    else:
        times = np.round(total - np.arange(steps) * (total / steps)) - 1
    # An offset may point past the last training step; it has no noise level there.
    inside: NDArray[np.int64] = np.minimum(times, total - 1).astype(np.int64)
    return inside
