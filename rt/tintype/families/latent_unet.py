"""Latent diffusion with a UNet (Stable Diffusion 1, 2 and XL, postcard): encode -> denoise -> decode, on numpy.

Stage faces: `encode` input_ids int64 [1, 77] -> encoder_hidden_states [1, 77, d]; `encode_2` likewise with
text_embeds [1, p]; `denoise` sample [b, c, h, w], timestep [b], encoder_hidden_states [b, 77, d] (and text_embeds,
time_ids) -> model_output [b, c, h, w]; `decode` latents [1, c, h, w] -> image [1, h*f, w*f, 3] in 0..1.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tintype.backends import Backend
from tintype.errors import ProfileError, RequestError, TintypeError
from tintype.noise import initial_noise, step_noise
from tintype.profiles import Profile
from tintype.request import ImageRequest
from tintype.schedulers import make_table
from tintype.tokenizer import ClipTokenizer
from tintype_kernels import scheduler_step

Floats = NDArray[np.float32]
Timings = dict[str, float]


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is told about a prompt: hidden states [1, 77, d] and, for XL, pooled [1, p]."""

    hidden: Floats
    pooled: Floats | None = None

    def zeros(self) -> Conditioning:
        """The blank that XL was trained with in place of a negative prompt."""
        return Conditioning(
            np.zeros_like(self.hidden), None if self.pooled is None else np.zeros_like(self.pooled)
        )


@dataclass(frozen=True)
class LatentUNet:
    """One loaded generator. Everything here is read-only after loading but the cached empty prompt."""

    backend: Backend
    tokenizers: Sequence[ClipTokenizer]
    scheduler_config: Mapping[str, Any]
    defaults: Mapping[str, Any]
    _empty: dict[str, Conditioning] = field(default_factory=dict, repr=False)

    @property
    def factor(self) -> int:
        """Pixels a latent."""
        return int(self.defaults.get("latent_factor", 8))

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int, int]:
        """[1, c, h/f, w/f] of one picture."""
        channels = int(self.defaults.get("latent_channels", 4))
        return 1, channels, height // self.factor, width // self.factor

    def check(self, request: ImageRequest) -> None:
        """Refuse what cannot be run, and begin to make ready what will be."""
        expected = self.latent_shape(request.width, request.height)
        if self.defaults.get("denoiser_channels", expected[1]) != expected[1]:
            raise RequestError(
                "this model inpaints: it needs image and mask_image, which are not supported yet"
            )
        self._check_size(request.width, request.height)
        if request.latents is not None and request.latents.shape != expected:
            given = list(request.latents.shape[1:])
            raise RequestError(
                f"latents has shape [n, {given}], expected [n, {list(expected[1:])}]"
            )
        make_table(request.scheduler, self.scheduler_config, request.steps)
        for stage in self._encoders():
            self.backend.compile(stage, self._encoder_profile(stage))
        self.backend.compile("denoise", self._denoise_profile(request).name)
        self.backend.compile("decode", Profile(request.width, request.height, 1).name)

    def conditionings(
        self, request: ImageRequest, known: dict[str, Conditioning], timings: Timings
    ) -> tuple[Conditioning | None, Conditioning]:
        """(unconditional or None, conditional) of a request; `known` is this call's own cache."""
        with timed(timings, "encode"):
            conditional = self._encode(request.prompt, known)
            if request.guidance <= 1:
                return None, conditional
            if request.negative_prompt is None and self.defaults.get(
                "force_zeros_for_empty_prompt"
            ):
                return conditional.zeros(), conditional
            return self._encode(request.negative_prompt or "", known), conditional

    def denoise(
        self,
        request: ImageRequest,
        unconditional: Conditioning | None,
        conditional: Conditioning,
        on_step: Callable[[int, Floats], None],
        timings: Timings,
    ) -> Floats:
        """Run the scheduler's table from the seed's noise to clean latents [1, c, h/f, w/f]."""
        with timed(timings, "denoise"):
            table = make_table(request.scheduler, self.scheduler_config, request.steps)
            predict = self._predictor(request, unconditional, conditional)
            shape = self.latent_shape(request.width, request.height)
            start = (
                initial_noise(request.seed, shape) if request.latents is None else request.latents
            )
            x: Floats = np.float32(table.init_scale) * start
            history: list[Floats] = []
            for step in range(len(table)):
                row = table.row(step, request.guidance)
                m, m_uncond = predict(np.float32(table.c_in[step]) * x, table.timesteps[step])
                noise = step_noise(request.seed, step, shape) if row.s else None
                x, h = scheduler_step(x, m, m_uncond, history, row, noise)
                require_finite("denoise", x, f" at step {step + 1} of {len(table)}")
                history = [h, *history][: table.history]
                on_step(step, x)
            return x

    def decode(self, request: ImageRequest, latents: Floats, timings: Timings) -> Floats:
        """Latents -> image float32 [1, h, w, 3] in 0..1."""
        with timed(timings, "decode"):
            profile = Profile(request.width, request.height, 1).name
            image = self.backend.run("decode", profile, {"latents": latents})["image"]
            require_finite("decode", image)
            return image

    def sizes(self) -> list[str] | None:
        """The picture sizes that every stage has, or None where any multiple of the factor runs."""
        sets = [self._stage_profiles(stage) for stage in ("denoise", "decode")]
        found = [
            {(p.width, p.height) for p in profiles} for profiles in sets if profiles is not None
        ]
        if not found:
            return None
        return [f"{width}x{height}" for width, height in sorted(set.intersection(*found))]

    def _check_size(self, width: int, height: int) -> None:
        sizes = self.sizes()
        if sizes is None and (width % self.factor or height % self.factor):
            raise ProfileError(
                f"size {width}x{height}: width and height must be multiples of {self.factor}"
            )
        if sizes is not None and f"{width}x{height}" not in sizes:
            raise ProfileError(
                f"size {width}x{height} is not in this model; it has {', '.join(sizes)}"
            )

    def _stage_profiles(self, stage: str) -> list[Profile] | None:
        names = self.backend.profiles(stage)
        if names is None:
            return None
        return [profile for name in names if (profile := Profile.parse(name))]

    def _denoise_profile(self, request: ImageRequest) -> Profile:
        """Two rows where guidance applies; one where it does not, unless the bundle has only two."""
        rows = 2 if request.guidance > 1 else 1
        wanted = Profile(request.width, request.height, rows)
        profiles = self._stage_profiles("denoise")
        if profiles is None or wanted in profiles:
            return wanted
        double = Profile(request.width, request.height, 2)
        if rows == 1 and double in profiles:
            return double
        raise ProfileError(
            f"the denoiser has no profile {wanted.name}; it has {', '.join(p.name for p in profiles)}"
        )

    def _predictor(
        self, request: ImageRequest, unconditional: Conditioning | None, conditional: Conditioning
    ) -> Callable[[Floats, float], tuple[Floats, Floats | None]]:
        """A function (x, timestep) -> (conditional, unconditional) outputs of the denoiser, each [1, c, h, w]."""
        profile = self._denoise_profile(request)
        rows = [unconditional or conditional, conditional][-profile.batch :]
        inputs: dict[str, NDArray[Any]] = {
            "encoder_hidden_states": np.concatenate([row.hidden for row in rows])
        }
        pooled = [row.pooled for row in rows if row.pooled is not None]
        if pooled:
            inputs["text_embeds"] = np.concatenate(pooled)
            inputs["time_ids"] = np.repeat(
                _time_ids(request.width, request.height), len(rows), axis=0
            )

        def predict(x: Floats, timestep: float) -> tuple[Floats, Floats | None]:
            sample = np.repeat(x, len(rows), axis=0)
            told = np.full(len(rows), timestep, np.float32)
            request_inputs = {"sample": sample, "timestep": told, **inputs}
            output = self.backend.run("denoise", profile.name, request_inputs)["model_output"]
            return output[-1:], None if unconditional is None else output[:1]

        return predict

    def _encoders(self) -> list[str]:
        return [stage for stage in ("encode", "encode_2") if stage in self.backend.stages]

    def _encoder_profile(self, stage: str) -> str:
        profiles = self.backend.profiles(stage)
        return profiles[0] if profiles else "b1"

    def _encode(self, prompt: str, known: dict[str, Conditioning]) -> Conditioning:
        if prompt == "" and "" in self._empty:
            return self._empty[""]
        if prompt not in known:
            known[prompt] = self._run_encoders(prompt)
        if prompt == "":
            self._empty[""] = known[""]
        return known[prompt]

    def _run_encoders(self, prompt: str) -> Conditioning:
        hidden, pooled = [], None
        for stage, tokenizer in zip(self._encoders(), self.tokenizers, strict=True):
            inputs = {"input_ids": tokenizer(prompt)}
            outputs = self.backend.run(stage, self._encoder_profile(stage), inputs)
            require_finite(stage, outputs["encoder_hidden_states"])
            hidden.append(outputs["encoder_hidden_states"])
            pooled = outputs.get("text_embeds", pooled)
        return Conditioning(np.concatenate(hidden, axis=-1), pooled)


def _time_ids(width: int, height: int) -> Floats:
    """XL's size conditioning [1, 6]: original size, crop corner, target size, each (height, width)."""
    return np.array([[height, width, 0, 0, height, width]], np.float32)


def require_finite(stage: str, array: Floats, where: str = "") -> None:
    """Fail where a stage gave NaN or infinity: a black picture is never returned in silence."""
    if not np.isfinite(array).all():
        raise TintypeError(
            f"stage {stage} gave NaN or infinity{where}; the weights are damaged, or the guidance too strong"
        )


@contextmanager
def timed(timings: Timings, name: str) -> Iterator[None]:
    """Add the seconds that the block takes to `timings[name]`."""
    begin = time.perf_counter()
    try:
        yield
    finally:
        timings[name] = timings.get(name, 0.0) + time.perf_counter() - begin
