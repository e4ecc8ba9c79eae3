"""DDPM's ancestral sampling over any falling choice of training steps (Ho et al., NeurIPS 2020, equation 7).

A model may say itself how much noise a step should add, between the two bounds that theory gives (Nichol and Dhariwal,
ICML 2021, equation 15).
"""

from __future__ import annotations

import numpy as np

from tintype.schedulers.config import Plan, ScheduleConfig
from tintype.schedulers.grids import training_steps
from tintype.schedulers.predict import clean_weights
from tintype.schedulers.table import Table

_LEAST = 1e-20  # a variance, whose logarithm is taken


def ddpm(config: ScheduleConfig, plan: Plan) -> Table:
    """h keeps x0, clipped; x moves to the mean of what is known of the step before, given x and x0, plus noise."""
    times = training_steps(config, plan.steps, "leading")[plan.start :]
    now = config.alphas_cumprod()[times]
    then = np.append(now[1:], 1.0)
    beta = 1 - now / then
    u_x, u_m = clean_weights(config.prediction_type, np.sqrt(now), np.sqrt(1 - now))
    least = beta * (1 - then) / (1 - now)
    learned = config.variance_type == "learned_range"
    spread = np.sqrt(beta if config.variance_type == "fixed_large" else least)
    if learned:
        spread = np.ones_like(spread)
    # The last step ends in a picture and adds no noise; the larger variance leaves its noise out at step zero alone.
    if config.variance_type != "fixed_large" or times[-1] == 0:
        spread[-1] = 0.0
    every = np.append(now, 1.0)
    return Table(
        name="ddpm",
        timesteps=times.astype(np.float64),
        c_in=np.ones(len(times)),
        u_x=u_x,
        u_m=u_m,
        a=np.sqrt(now / then) * (1 - then) / (1 - now),
        b=(np.sqrt(then) * beta / (1 - now))[:, None],
        s=spread,
        log_spread=np.log(np.maximum([least, beta], _LEAST).T) / 2 if learned else None,
        signal=np.sqrt(every),
        noise=np.sqrt(1 - every),
        clip=config.clip(default=True),
        threshold=config.threshold(),
    )
