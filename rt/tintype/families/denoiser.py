"""A model as a function of latents, time and whether to guide, whatever batch sizes a bundle was built for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tintype.backends import Backend
from tintype.errors import RequestError
from tintype.families.conditioning import Conditioning
from tintype.profiles import Profile, cut
from tintype.request import ImageRequest
from tintype.sampling import Predict

Floats = NDArray[np.float32]
T = TypeVar("T")
Told = Mapping[str, NDArray[Any]]
Texts = tuple[
    Conditioning | None, Conditioning
]  # unconditional where guidance applies, conditional


@dataclass(frozen=True)
class Rows:
    """Runs a stage for pictures of a size, with as many rows as are asked for."""

    backend: Backend
    stage: str
    width: int
    height: int

    @property
    def batches(self) -> list[int] | None:
        """The batch sizes that there are, or None for any."""
        if self.stage not in self.backend.stages:
            raise RequestError(
                "masks, rescaled or projected guidance, pndm and schedulers with thresholds need the plain stage "
                f"{self.stage}, which has no engine here; export with --plain, or ask for something else"
            )
        profiles = picture_profiles(self.backend, self.stage)
        if profiles is None:
            return None
        size = (self.width, self.height)
        return [p.batch for p in profiles if (p.width, p.height) == size]

    def most(self, rows: int) -> int | None:
        """How many pictures of so many rows each one run holds, at least one; None where nothing sets a limit."""
        batches = self.batches
        return None if batches is None else max(1, max(batches) // rows)

    def profiles(self, rows: int) -> list[Profile]:
        """The profiles that run this many rows, one after the other; the last may have rows to spare."""
        return [Profile(self.width, self.height, count) for count in cut(rows, self.batches)]

    def run(self, profiles: Sequence[Profile], inputs: Told) -> Floats:
        """The model's output for all rows, through one profile after the other."""
        rows = len(inputs["sample"])
        if profiles[0].batch == rows:
            return self._output(profiles[0], inputs)
        begin, outputs = 0, []
        for profile in profiles:  # the last is filled up with its last row
            index = np.minimum(np.arange(begin, begin + profile.batch), rows - 1)
            output = self._output(profile, {name: array[index] for name, array in inputs.items()})
            outputs.append(output[: rows - begin])
            begin += profile.batch
        return np.concatenate(outputs)

    def predictor(self, alone: Told, both: Told, shown: Floats | None = None) -> Predict:
        """A function (x, timestep, guided) of what is told without guidance and, [unconditional, conditional], with
        it; `shown` are further channels of each picture."""
        doubled = None if shown is None else np.concatenate([shown, shown])

        def predict(x: Floats, timestep: float, guided: bool) -> tuple[Floats, Floats | None]:
            count = len(x)
            if not guided:
                return run(x, timestep, alone, shown), None
            output = run(np.concatenate([x, x]), timestep, both, doubled)
            return output[count:], output[:count]

        def run(x: Floats, timestep: float, told: Told, beside: Floats | None) -> Floats:
            sample = x if beside is None else np.concatenate([x, beside], axis=1)
            times = np.full(len(x), timestep, np.float32)
            return self.run(profiles(len(x)), {"sample": sample, "timestep": times, **told})

        profiles = cache(self.profiles)
        return predict

    def _output(self, profile: Profile, inputs: Told) -> Floats:
        return self.backend.run(self.stage, profile.name, inputs)["model_output"]


def alone_and_both(pairs: Sequence[tuple[T | None, T]]) -> tuple[list[T], list[T]]:
    """The rows of a step without guidance and of one with it, the unconditional first, of each picture's pair."""
    conditional = [pair[1] for pair in pairs]
    return conditional, [*(pair[0] for pair in pairs if pair[0] is not None), *conditional]


def picture_profiles(backend: Backend, stage: str) -> list[Profile] | None:
    """The shapes with a picture size that a stage has, or None where it takes any."""
    names = backend.profiles(stage)
    if names is None:
        return None
    return [profile for name in names if (profile := Profile.parse(name))]


def text_inputs(
    request: ImageRequest, texts: Sequence[Conditioning], family: str
) -> dict[str, NDArray[Any]]:
    """What is told besides the time; a stage takes of it what it has inputs for."""
    inputs: dict[str, NDArray[Any]] = {
        "encoder_hidden_states": np.concatenate([text.hidden for text in texts])
    }
    pooled = [text.pooled for text in texts if text.pooled is not None]
    if pooled:
        inputs["text_embeds"] = np.concatenate(pooled)
    if pooled and family == "latent_unet":
        sizes = _time_ids(request.width, request.height)
        inputs["time_ids"] = np.repeat(sizes, len(texts), axis=0)
    if request.embedded_guidance is not None:
        inputs["guidance"] = np.full(len(texts), request.embedded_guidance, np.float32)
    return inputs


def steering_inputs(requests: Sequence[ImageRequest], rows: int) -> dict[str, NDArray[Any]]:
    """What a model with a ControlNet is told besides: each request's picture and its strength, as often as there are
    rows of it."""
    controls = [request.control for request in requests if request.control is not None]
    if not controls:
        return {}
    scale = np.full(rows, requests[0].control_scale, np.float32)
    return {"control": np.concatenate(controls * (rows // len(controls))), "control_scale": scale}


def _time_ids(width: int, height: int) -> Floats:
    """XL's size conditioning [1, 6]: original size, crop corner, target size, each (height, width)."""
    return np.array([[height, width, 0, 0, height, width]], np.float32)
