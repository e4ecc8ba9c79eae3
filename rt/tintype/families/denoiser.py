"""The denoiser as a function of latents, time and whether to guide, whatever batch sizes a bundle was built for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tintype.backends import Backend
from tintype.errors import RequestError
from tintype.families.conditioning import Conditioning
from tintype.profiles import Profile, cut
from tintype.request import ImageRequest
from tintype.sampling import Predict

Floats = NDArray[np.float32]
Texts = tuple[
    Conditioning | None, Conditioning
]  # unconditional where guidance applies, conditional


@dataclass(frozen=True)
class Denoiser:
    """Runs the stage `denoise`; guided rows are [unconditional, conditional], in one run where a profile holds both."""

    backend: Backend
    family: str

    def most(self, request: ImageRequest, rows: int) -> int | None:
        """How many pictures of so many rows each one run holds, at least one; None where nothing sets a limit."""
        batches = self._batches(request)
        return None if batches is None else max(1, max(batches) // rows)

    def _batches(self, request: ImageRequest) -> list[int] | None:
        """The batch sizes that there are at the request's size, or None for any."""
        if "denoise" not in self.backend.stages:
            raise RequestError(
                "masks, rescaled or projected guidance and the schedulers pndm and those with thresholds need the "
                "plain denoiser, which has no engine here; export with --plain, or ask for something else"
            )
        profiles = picture_profiles(self.backend, "denoise")
        if profiles is None:
            return None
        size = (request.width, request.height)
        return [p.batch for p in profiles if (p.width, p.height) == size]

    def profiles(self, request: ImageRequest, rows: int) -> list[Profile]:
        """The profiles that run this many rows, one after the other; the last may have rows to spare."""
        counts = cut(rows, self._batches(request))
        return [Profile(request.width, request.height, count) for count in counts]

    def predictor(
        self, request: ImageRequest, texts: Sequence[Texts], shown: Floats | None
    ) -> Predict:
        """A function (x, timestep, guided) for the pictures of these texts; `shown` are further channels for each."""
        conditional = [pair[1] for pair in texts]
        unconditional = [pair[0] for pair in texts if pair[0] is not None]
        alone = self._runner(request, conditional, shown)
        doubled = None if shown is None else np.concatenate([shown, shown])
        both = self._runner(request, [*unconditional, *conditional], doubled)
        count = len(texts)

        def predict(x: Floats, timestep: float, guided: bool) -> tuple[Floats, Floats | None]:
            if not guided:
                return alone(x, timestep), None
            output = both(np.concatenate([x, x]), timestep)
            return output[count:], output[:count]

        return predict

    def _runner(
        self, request: ImageRequest, texts: Sequence[Conditioning], shown: Floats | None
    ) -> Callable[[Floats, float], Floats]:
        """A function (x [rows, c, h, w], timestep) -> the output for a row of each text."""
        rows = len(texts)
        inputs = text_inputs(request, texts, self.family)
        profiles = self.profiles(request, rows)

        def run(x: Floats, timestep: float) -> Floats:
            sample = x if shown is None else np.concatenate([x, shown], axis=1)
            told = np.full(rows, timestep, np.float32)
            given = {"sample": sample, "timestep": told, **inputs}
            if profiles[0].batch == rows:
                return self.backend.run("denoise", profiles[0].name, given)["model_output"]
            return self._run_in_parts(profiles, given)

        return run

    def _run_in_parts(
        self, profiles: Sequence[Profile], inputs: Mapping[str, NDArray[Any]]
    ) -> Floats:
        """Rows through one profile after the other; the last is filled up with its last row."""
        rows, begin, outputs = len(inputs["sample"]), 0, []
        for profile in profiles:
            index = np.minimum(np.arange(begin, begin + profile.batch), rows - 1)
            part = {name: array[index] for name, array in inputs.items()}
            output = self.backend.run("denoise", profile.name, part)["model_output"]
            outputs.append(output[: rows - begin])
            begin += profile.batch
        return np.concatenate(outputs)


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


def _time_ids(width: int, height: int) -> Floats:
    """XL's size conditioning [1, 6]: original size, crop corner, target size, each (height, width)."""
    return np.array([[height, width, 0, 0, height, width]], np.float32)
