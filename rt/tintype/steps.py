"""Stages that are whole steps, a model with guidance and the sampler's row around it: names, and a row's numbers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tintype_kernels import Row

HISTORY = 3  # earlier quantities that a step looks back to
ROW = 13  # numbers of `step_row`
# For no clipping: engines treat infinities each in their own way.
_LARGEST = float(np.finfo(np.float32).max)


class Step(NamedTuple):
    """The stage of the model that a step has inside, and whether it is asked for two rows, to guide."""

    model: str
    guided: bool


STEPS = {
    "step": Step("denoise", False),
    "guided_step": Step("denoise", True),
    "prior_step": Step("prior", False),
    "prior_guided_step": Step("prior", True),
    "enlarge_step": Step("enlarge", False),
    "enlarge_last_step": Step("enlarge_last", False),
}
STEP_OF = {step: name for name, step in STEPS.items()}


def step_row(time: float, c_in: float, row: Row) -> NDArray[np.float32]:
    """A step in numbers, float32 [13]: time, c_in, and the row's coefficients with a weight for every age.

    A model that says how much noise it wants is told the two logarithms that this lies between as well, behind them.
    """
    numbers = [time, c_in, *row.coefficients()]
    numbers += [0.0] * (ROW - len(numbers))
    return np.array(numbers, np.float64).clip(-_LARGEST, _LARGEST).astype(np.float32)
