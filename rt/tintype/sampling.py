"""The loop: walks a scheduler's table from noisy to clean latents, for one picture or several at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tintype.errors import TintypeError
from tintype.guidance import Guidance
from tintype.noise import Walk, step_noise
from tintype.schedulers import Table
from tintype_kernels import scheduler_step

Floats = NDArray[np.float32]
# (what the model sees [n, c, ...], the time that it is told, whether to guide) -> (conditional, unconditional), with
# further channels where the model says how much noise to add
Predict = Callable[[Floats, float, bool], tuple[Floats, Floats | None]]


@dataclass
class StepNoise:
    """Draws each step's noise [n, c, ...] for pictures of these seeds; belongs to one walk."""

    table: Table
    seeds: Sequence[int]
    shape: tuple[int, ...]  # of one picture, [c, h, w]
    offset: int = 0  # added to the step's number, where a picture is walked twice
    walk: Walk = "picture"
    _last: Floats | None = field(default=None, repr=False)

    def __call__(self, step: int) -> Floats:
        draws = [step_noise(seed, self.offset + step, self.shape, self.walk) for seed in self.seeds]
        noise = np.stack(draws)
        if self.table.carry is not None:
            kept, new = (np.float32(weight) for weight in self.table.carry[step])
            # A plain draw keeps its bits.
            if self._last is not None and kept:
                noise = kept * self._last + new * noise
            self._last = noise
        return noise


def walk(
    table: Table,
    x: Floats,
    noise: StepNoise,
    predict: Predict,
    guidance: Guidance,
    after: Callable[[int, Floats], Floats],
) -> Floats:
    """Run every row of the table on x; `after(step, x)` may change the latents, and sees those that it returns last."""
    history: list[Floats] = []
    c_in, times = table.c_in.astype(np.float32), table.timesteps.tolist()
    for step, (plain, scale) in enumerate(zip(table.rows, guidance.scales, strict=True)):
        m, m_uncond = predict(c_in[step] * x, times[step], scale > 1)
        (m, wanted), row = _parted(m, x), plain
        if m_uncond is not None:
            m_uncond, _ = _parted(m_uncond, x)
            if guidance.is_linear:
                row = plain._replace(guidance=scale)
            else:
                m, m_uncond = guidance.steered(m, m_uncond, scale), None
        drawn = noise(step) if row.s else None
        if drawn is not None and table.log_spread is not None:
            drawn = drawn * spread(wanted, table.log_spread[step])
        x, h = scheduler_step(x, m, m_uncond, history, row, drawn)
        require_finite("denoise", x, f" at step {step + 1} of {len(table)}")
        history = [h, *history][: table.history]
        x = after(step, x)
    return x


def spread(wanted: Floats, logarithms: NDArray[np.float64]) -> Floats:
    """What noise is scaled by where the model wants `wanted` of it, [n, c, ...] from -1 to 1.

    Nichol and Dhariwal, ICML 2021, equation 15.
    """
    least, most = logarithms.astype(np.float32)
    share = (wanted + 1) / 2
    return np.asarray(np.exp(share * most + (1 - share) * least), np.float32)


def _parted(m: Floats, x: Floats) -> tuple[Floats, Floats]:
    """A model's output for x [n, c, ...], and its further channels."""
    channels = x.shape[1]
    if m.shape[1] == channels:
        return m, m[:, :0]
    return np.ascontiguousarray(m[:, :channels]), m[:, channels:]


def require_finite(stage: str, array: Floats, where: str = "") -> None:
    """Fail where a stage gave NaN or infinity: a black picture is never returned in silence."""
    if not np.isfinite(array).all():
        raise TintypeError(
            f"stage {stage} gave NaN or infinity{where}; the weights are damaged, or the guidance too strong"
        )
