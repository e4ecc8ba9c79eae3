"""A sampler is a table of numbers: what the model is told at each step, and how its answer moves x.

At step i, with g the guided model output:
`h = u_x[i]*x + u_m[i]*g` (clipped to +-clip where the model asks for it), then
`x <- a[i]*x + c[i]*g + sum_k b[i,k]*h_of_k_steps_ago + s[i]*noise`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tintype_kernels import Row

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Table:
    """Coefficients of every step, float64; arrays are [steps] but for `b`, [steps, history]."""

    name: str
    timesteps: Float64  # what the model is told
    c_in: Float64  # the model sees c_in * x
    u_x: Float64
    u_m: Float64
    a: Float64
    c: Float64
    b: Float64
    s: Float64
    init_scale: float = 1.0  # sampling starts at init_scale * unit noise
    clip: float | None = None

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def history(self) -> int:
        """How many earlier h a step may look back to."""
        return int(self.b.shape[1]) - 1

    def row(self, step: int, guidance: float = 1.0) -> Row:
        """The numbers of one step, in the form that the kernel takes; no history before the first step."""
        depth = min(step, self.history) + 1
        return Row(
            u_x=float(self.u_x[step]),
            u_m=float(self.u_m[step]),
            a=float(self.a[step]),
            c=float(self.c[step]),
            b=tuple(float(weight) for weight in self.b[step, :depth]),
            s=float(self.s[step]),
            clip=self.clip,
            guidance=guidance,
        )
