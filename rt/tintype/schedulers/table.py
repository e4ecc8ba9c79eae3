"""A sampler is a table of numbers: what the model is told at each step, and how its answer moves x.

At step i, with g the guided model output:
`h = u_x[i]*x + u_m[i]*g` (clipped where the model asks for it), then
`x <- a[i]*x + c[i]*g + sum_k b[i,k]*h_of_k_steps_ago + s[i]*noise`.
Of a model that says itself how much noise it wants, s is 1 and the noise is scaled element by element.

Methods with two evaluations a step or a corrector need no slot for an earlier x: each update is linear in x, h and
noise, so the earlier x is what the update's inverse gives, and the table holds the product of the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tintype_kernels import Row

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Table:
    """Coefficients of every step, float64; arrays are [steps] but for `b`, `signal` and `noise`."""

    name: str
    timesteps: Float64  # what the model is told
    c_in: Float64  # the model sees c_in * x
    u_x: Float64
    u_m: Float64
    a: Float64
    b: Float64  # [steps, history]
    # Before step i, and after the last, x stands at signal[i]*x0 + noise[i]*unit noise; both [steps + 1].
    signal: Float64
    noise: Float64
    c: Float64 | None = None  # None: zeros
    s: Float64 | None = None  # None: zeros
    # The noise of step i is carry[i, 0] * that of step i - 1 + carry[i, 1] * new noise; [steps, 2]; None: all new.
    carry: Float64 | None = None
    # The logarithms that s lies between where the model says how much noise to add, of further channels; [steps, 2].
    log_spread: Float64 | None = None
    init_scale: float = 1.0  # sampling from nothing starts at init_scale * unit noise
    clip: float | None = None
    threshold: tuple[float, float] | None = None

    def __len__(self) -> int:
        return len(self.timesteps)

    @cached_property
    def history(self) -> int:
        """How many earlier h a step may look back to."""
        return max(len(row.b) for row in self.rows) - 1

    @cached_property
    def rows(self) -> Sequence[Row]:
        """The numbers of every step in the form that the kernel takes; no history before the first step."""
        zeros = np.zeros(len(self))
        c, s = (zeros if column is None else column for column in (self.c, self.s))
        scalars = np.stack((self.u_x, self.u_m, self.a, c, s), axis=1).tolist()
        return tuple(
            Row(u_x, u_m, a, c, self._weights(i), s, clip=self.clip, threshold=self.threshold)
            for i, (u_x, u_m, a, c, s) in enumerate(scalars)
        )

    def _weights(self, step: int) -> tuple[float, ...]:
        """The weights of this h and of those before it, down to the last that counts."""
        weights = self.b[step, : step + 1]
        used = np.flatnonzero(weights)
        return tuple(weights[: max(1, used[-1] + 1) if len(used) else 1].tolist())
