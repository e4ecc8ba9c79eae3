"""Whole steps on the device: model, guidance and the sampler's row in one call, latents staying where they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tintype.backends import Backend
from tintype.families.denoiser import Texts, picture_profiles, text_inputs
from tintype.guidance import Guidance
from tintype.profiles import Profile
from tintype.request import ImageRequest
from tintype.sampling import StepNoise, require_finite
from tintype.schedulers import Table
from tintype_kernels import Row

Floats = NDArray[np.float32]
HISTORY = 3  # earlier quantities that the stages look back to
# For no clipping: engines treat infinities each in their own way.
_LARGEST = float(np.finfo(np.float32).max)
# Takes a function that fetches the latents, because few callers want to see them.
OnStep = Callable[[Callable[[], Floats]], None]


@dataclass(frozen=True)
class Stepper:
    """Runs the stages `step` and `guided_step`, where a backend has them for what is asked."""

    backend: Backend
    family: str

    def profile(
        self, request: ImageRequest, table: Table, guidance: Guidance, count: int
    ) -> Profile | None:
        """The smallest that ``count`` pictures walk through; None where they need the plain denoiser."""
        if not self._serves(request, table, guidance):
            return None
        batches = self._batches(request, guidance)
        fitting = [count] if batches is None else [n for n in batches if n >= count]
        return Profile(request.width, request.height, min(fitting)) if fitting else None

    def most(self, request: ImageRequest, table: Table, guidance: Guidance) -> int | None:
        """How many pictures one call holds; 0 where they need the plain denoiser, None where nothing sets a limit."""
        if not self._serves(request, table, guidance):
            return 0
        batches = self._batches(request, guidance)
        return None if batches is None else max(batches, default=0)

    def walk(
        self,
        request: ImageRequest,
        table: Table,
        x: Floats,
        noise: StepNoise,
        texts: Sequence[Texts],
        guidance: Guidance,
        on_step: OnStep,
    ) -> Floats:
        """Run every row of the table on x [n, c, h, w] of pictures that differ in text, seed and x alone.

        Where only a larger batch was built, the last picture fills it up. No step waits for the one before to look at
        it: latents that are not finite at the end are walked again, watched, by a backend that can then do better.
        """
        profile = self.profile(request, table, guidance, len(x))
        assert profile is not None
        which = np.minimum(np.arange(profile.batch), len(x) - 1)
        texts = [texts[i] for i in which]
        rows = list(_rows(table, guidance))
        times = np.array([numbers[0] for numbers in rows])
        told = {
            name: self.backend.foretold(self._told(name, request, texts), times)
            for name in stages(guidance)
        }
        place, count, begun = self.backend.place, len(x), x[which]

        def walked(noise: StepNoise) -> Floats:
            latents, silence = place(begun), place(np.zeros_like(begun))
            history = place(np.zeros((len(begun), HISTORY, *begun.shape[1:]), np.float32))
            for step, numbers in enumerate(rows):
                inputs = {
                    "sample": latents,
                    "history": history,
                    "row": place(np.tile(numbers, (len(begun), 1))),
                    "noise": place(noise(step)[which]) if table.rows[step].s else silence,
                }
                stage = _stage(guidance.scales[step])
                inputs.update(told[stage])
                outputs = self.backend.run_placed(stage, profile.name, inputs)
                latents, history = outputs["next_sample"], outputs["next_history"]
                on_step(partial(self._fetch, latents, count))
            return self._fetch(latents, count)

        result = walked(replace(noise))
        if not np.isfinite(result).all():
            helps = [self.backend.watch(stage) for stage in stages(guidance)]
            if any(helps):
                result = walked(noise)
        require_finite("denoise", result, f" within {len(table)} steps")
        return result

    def _serves(self, request: ImageRequest, table: Table, guidance: Guidance) -> bool:
        """Whether these stages are there, and can do what is asked."""
        steered = guidance.applies and not guidance.is_linear
        beyond = table.history > HISTORY or table.threshold is not None
        return not (request.mask is not None or beyond or steered) and (
            set(stages(guidance)) <= set(self.backend.stages)
        )

    def _batches(self, request: ImageRequest, guidance: Guidance) -> list[int] | None:
        """The batch sizes that all of the stages have at the request's size, or None for any."""
        found: list[set[int]] = []
        for stage in stages(guidance):
            profiles = picture_profiles(self.backend, stage)
            if profiles is None:
                return None
            size = (request.width, request.height)
            found.append({p.batch for p in profiles if (p.width, p.height) == size})
        return sorted(set.intersection(*found))

    def _fetch(self, latents: Any, count: int) -> Floats:
        return self.backend.fetch(latents)[:count]

    def _told(self, stage: str, request: ImageRequest, texts: Sequence[Texts]) -> dict[str, Any]:
        """What a stage is told at every step, placed once; in pairs, the unconditional first, where it guides."""
        if stage == "step":
            inputs = text_inputs(request, [pair[1] for pair in texts], self.family)
        else:
            rows = [text for pair in texts for text in pair if text is not None]
            inputs = {
                name: array.reshape(len(texts), 2, *array.shape[1:])
                for name, array in text_inputs(request, rows, self.family).items()
            }
        return {name: self.backend.place(array) for name, array in inputs.items()}


def step_row(time: float, c_in: float, row: Row) -> Floats:
    """A step in numbers, float32 [13]: time, c_in, and the row's coefficients with a weight for every age."""
    numbers = [time, c_in, *row.coefficients()]
    numbers += [0.0] * (HISTORY + 1 - len(row.b))
    return np.array(numbers, np.float64).clip(-_LARGEST, _LARGEST).astype(np.float32)


def stages(guidance: Guidance) -> list[str]:
    """The stages that a walk takes."""
    return sorted({_stage(scale) for scale in guidance.scales})


def _rows(table: Table, guidance: Guidance) -> Iterator[Floats]:
    scaled = (
        row._replace(guidance=scale) for row, scale in zip(table.rows, guidance.scales, strict=True)
    )
    times, c_in = table.timesteps.tolist(), table.c_in.tolist()
    return (step_row(*each) for each in zip(times, c_in, scaled, strict=True))


def _stage(scale: float) -> str:
    return "guided_step" if scale > 1 else "step"
