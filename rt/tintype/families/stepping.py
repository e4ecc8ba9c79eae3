"""Whole steps on the device: model, guidance and the sampler's row in one call, latents staying where they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tintype.backends import Backend
from tintype.families.denoiser import Rows, Told, picture_profiles
from tintype.guidance import Guidance
from tintype.profiles import Profile
from tintype.sampling import StepNoise, require_finite
from tintype.schedulers import Table
from tintype.steps import HISTORY, STEP_OF, STEPS, Step, step_row

Floats = NDArray[np.float32]
# Takes a function that fetches the latents, because few callers want to see them.
OnStep = Callable[[Callable[[], Floats]], None]


@dataclass(frozen=True)
class Stepper:
    """Walks a table by whole steps; ``stages`` has the one of each of its rows.

    Where the model says how much noise it wants (``spreads``), its steps are told of every row what that lies between.
    """

    backend: Backend
    stages: tuple[str, ...]
    width: int
    height: int
    spreads: bool = False

    @property
    def batches(self) -> list[int] | None:
        """How many pictures a call may hold, of what all of the stages have at this size, or None for any."""
        found: list[set[int]] = []
        for stage in set(self.stages):
            profiles = picture_profiles(self.backend, stage)
            if profiles is None:
                return None
            size = (self.width, self.height)
            found.append({p.batch for p in profiles if (p.width, p.height) == size})
        return sorted(set.intersection(*found))

    def profile(self, count: int) -> Profile | None:
        """The smallest that ``count`` pictures walk through; None where none holds them."""
        batches = self.batches
        fitting = [count] if batches is None else [n for n in batches if n >= count]
        return Profile(self.width, self.height, min(fitting)) if fitting else None

    def walk(
        self,
        table: Table,
        guidance: Guidance,
        x: Floats,
        noise: StepNoise,
        alone: Told,
        both: Told,
        on_step: OnStep,
    ) -> Floats:
        """Run every row of the table on x [n, ...] of pictures that are told this, as `Rows.predictor` is.

        Where only a larger batch was built, the last picture fills it up. No step waits for the one before to look at
        it: latents that are not finite at the end are walked again, watched, by a backend that can then do better.
        """
        profile = self.profile(len(x))
        assert profile is not None
        which = np.minimum(np.arange(profile.batch), len(x) - 1)
        rows = self._rows(table, guidance)
        told = {
            stage: self._placed(_paired(both) if STEPS[stage].guided else alone, which, times)
            for stage, times in _times(self.stages, table).items()
        }
        place, count, begun = self.backend.place, len(x), x[which]

        def walked(noise: StepNoise) -> Floats:
            latents, silence = place(begun), place(np.zeros_like(begun))
            history = place(np.zeros((len(begun), HISTORY, *begun.shape[1:]), np.float32))
            for step, (stage, numbers) in enumerate(zip(self.stages, rows, strict=True)):
                inputs = {
                    "sample": latents,
                    "history": history,
                    "row": place(np.tile(numbers, (len(begun), 1))),
                    "noise": place(noise(step)[which]) if table.rows[step].s else silence,
                    **told[stage],
                }
                outputs = self.backend.run_placed(stage, profile.name, inputs)
                latents, history = outputs["next_sample"], outputs["next_history"]
                on_step(partial(self._fetch, latents, count))
            return self._fetch(latents, count)

        result = walked(replace(noise))
        if not np.isfinite(result).all():
            helps = [self.backend.watch(stage) for stage in told]
            if any(helps):
                result = walked(noise)
        require_finite(STEPS[self.stages[0]].model, result, f" within {len(table)} steps")
        return result

    def _rows(self, table: Table, guidance: Guidance) -> Floats:
        """What steps are told of each row, [steps, 13], or [steps, 15]."""
        scaled = (
            row._replace(guidance=scale)
            for row, scale in zip(table.rows, guidance.scales, strict=True)
        )
        each = zip(table.timesteps.tolist(), table.c_in.tolist(), scaled, strict=True)
        rows = np.stack([step_row(*numbers) for numbers in each])
        if not self.spreads:
            return rows
        # Between zero and zero noise is what the table makes it, and where that is none nothing can overflow.
        spread = np.zeros((len(table), 2), np.float32)
        if table.log_spread is not None:
            noisy = np.array([row.s != 0 for row in table.rows])
            spread[noisy] = table.log_spread[noisy]
        return np.concatenate([rows, spread], axis=1)

    def _placed(self, told: Told, which: NDArray[np.int64], times: Floats) -> Mapping[str, Any]:
        """What a stage is told at every step, placed once."""
        placed = {name: self.backend.place(array[which]) for name, array in told.items()}
        return self.backend.foretold(placed, times)

    def _fetch(self, latents: Any, count: int) -> Floats:
        return self.backend.fetch(latents)[:count]


def whole_steps(
    backend: Backend, models: Sequence[str], table: Table, guidance: Guidance
) -> tuple[str, ...]:
    """The step of each row of a table around the model that is named for it; none where they are not all there, or
    cannot do what is asked."""
    steered = guidance.applies and not guidance.is_linear
    if steered or table.history > HISTORY or table.threshold is not None:
        return ()
    guided = (scale > 1 for scale in guidance.scales)
    stages = tuple(STEP_OF[Step(*each)] for each in zip(models, guided, strict=True))
    return stages if {*stages} <= {*backend.stages} else ()


def walked_through(
    stepper: Stepper | None, plain: Sequence[Rows], rows: int
) -> list[tuple[str, str]]:
    """The (stage, profile) pairs of one picture: whole steps, or the plain models for as many rows."""
    if stepper is not None and (whole := stepper.profile(1)):
        return [(stage, whole.name) for stage in sorted({*stepper.stages})]
    return [(each.stage, profile.name) for each in plain for profile in each.profiles(rows)]


def _times(stages: Sequence[str], table: Table) -> dict[str, Floats]:
    """Of each stage the times at which it is asked, as its rows say them."""
    times = table.timesteps.astype(np.float32)
    return {stage: times[np.array(stages) == stage] for stage in dict.fromkeys(stages)}


def _paired(both: Told) -> Told:
    """Of rows [2n, ...], the unconditional first, pairs [n, 2, ...]."""
    return {
        name: array.reshape(2, -1, *array.shape[1:]).swapaxes(0, 1) for name, array in both.items()
    }
