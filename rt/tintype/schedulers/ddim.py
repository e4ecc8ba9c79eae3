"""DDIM, deterministic (Song, Meng and Ermon, ICLR 2021, equation 12 with eta 0)."""

from __future__ import annotations

import numpy as np

from tintype.schedulers.config import Plan, ScheduleConfig
from tintype.schedulers.grids import training_steps
from tintype.schedulers.predict import clean_weights, noise_weights
from tintype.schedulers.table import Float64, Table


def ddim(config: ScheduleConfig, plan: Plan) -> Table:
    """x0 is kept and clipped; the direction back to the noise uses the unclipped prediction."""
    times = training_steps(config, plan.steps, "leading")[plan.start :]
    alphas = config.alphas_cumprod()
    final = final_alpha(config, alphas, default=True)
    previous = times - config.num_train_timesteps // plan.steps
    now = alphas[times]
    then = np.where(previous >= 0, alphas[np.maximum(previous, 0)], final)

    alpha, sigma = np.sqrt(now), np.sqrt(1 - now)
    u_x, u_m = clean_weights(config.prediction_type, alpha, sigma)
    n_x, n_m = noise_weights(config.prediction_type, alpha, sigma)
    direction = np.sqrt(1 - then)
    every = np.append(now, then[-1])
    return Table(
        name="ddim",
        timesteps=times.astype(np.float64),
        c_in=np.ones(len(times)),
        u_x=u_x,
        u_m=u_m,
        a=direction * n_x,
        c=direction * n_m,
        b=np.sqrt(then)[:, None],
        signal=np.sqrt(every),
        noise=np.sqrt(1 - every),
        clip=config.clip(default=True),
        threshold=config.threshold(),
    )


def final_alpha(config: ScheduleConfig, alphas: Float64, *, default: bool) -> float:
    """The signal's share after the last step: all, or what training step zero had."""
    whole = default if config.set_alpha_to_one is None else config.set_alpha_to_one
    return 1.0 if whole else float(alphas[0])
