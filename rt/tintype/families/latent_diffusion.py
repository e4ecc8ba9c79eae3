"""Latent diffusion (Stable Diffusion 1, 2, XL, 3; FLUX; postcard): encode -> denoise -> decode, on numpy.

Stage faces: `encode`, `encode_2`, `encode_3` input_ids int64 [1, t] -> encoder_hidden_states [1, t, d] and, of CLIPs,
text_embeds [1, p]; `denoise` sample [b, c, h, w], timestep [b], encoder_hidden_states [b, t, d] (and text_embeds,
time_ids, guidance) -> model_output [b, c, h, w]; `decode` latents [1, c, h, w] -> image [1, h*f, w*f, 3] in 0..1;
`encode_image` the other way round.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tintype.backends import Backend
from tintype.backends.compiled import memory
from tintype.errors import CheckpointError, ProfileError, RequestError
from tintype.families.conditioning import Conditioning, Reading, TextSide, TextTokenizer
from tintype.families.denoiser import (
    Rows,
    Texts,
    alone_and_both,
    picture_profiles,
    steering_inputs,
    text_inputs,
)
from tintype.families.editing import Edit, mask_latents, masked
from tintype.families.stepping import OnStep, Stepper, walked_through, whole_steps
from tintype.families.timing import Timings, timed
from tintype.guidance import Guidance, scales
from tintype.images import cover, resize_latents
from tintype.noise import initial_noise
from tintype.profiles import Profile
from tintype.request import ImageRequest, require_latents
from tintype.sampling import StepNoise, require_finite, walk
from tintype.schedulers import Table, make_table

Floats = NDArray[np.float32]
_PIXEL = 12  # bytes, of three channels in float32
_MOST_IMAGES = 8  # that are walked together where nothing else sets a limit


@dataclass(frozen=True)
class LatentDiffusion:
    """One loaded generator. Everything here is read-only after loading but the cached empty prompt."""

    backend: Backend
    tokenizers: Sequence[TextTokenizer]
    scheduler_config: Mapping[str, Any]
    defaults: Mapping[str, Any]
    kind: str = "latent_unet"  # or "sd3", "flux": how texts are joined and guidance is told
    _empty: dict[str, Conditioning] = field(default_factory=dict, repr=False)

    @property
    def text(self) -> TextSide:
        """The prompt encoders."""
        return TextSide(self.backend, self.tokenizers, self.kind, self.defaults, self._empty)

    @property
    def factor(self) -> int:
        """Pixels a latent."""
        return int(self.defaults.get("latent_factor", 8))

    @property
    def multiple(self) -> int:
        """Pixels that a side comes in."""
        return int(self.defaults.get("size_multiple", self.factor))

    @property
    def inpaints(self) -> bool:
        """Whether the denoiser is shown a mask and a masked picture besides the latents."""
        channels = int(self.defaults.get("latent_channels", 4))
        return int(self.defaults.get("denoiser_channels", channels)) == 2 * channels + 1

    @property
    def needs(self) -> tuple[str, ...]:
        """The arguments beside a prompt that a request must have."""
        painted = ("image", "mask_image") if self.inpaints else ()
        return (*painted, "control_image") if self.defaults.get("steered") else painted

    def fitted(self, picture: Floats, width: int, height: int) -> Floats:
        """A picture, or a mask, [1, h, w, c] at the size that is asked for."""
        return cover(picture, width, height)

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """[c, h/f, w/f] of one picture."""
        channels = int(self.defaults.get("latent_channels", 4))
        return channels, height // self.factor, width // self.factor

    def check(self, request: ImageRequest) -> None:
        """Refuse what cannot be run, and only then begin to make ready what will be."""
        self._check_edit(request)
        walked: list[tuple[str, str]] = []
        for each in _passes(request):
            self._check_size(each.width, each.height)
            table = self._table(each)
            walked += self._denoising(each, table, self._guidance(each, table))
        require_latents(request, self.latent_shape(*_first_size(request)))
        texts = [(stage, self.text.profile(stage)) for stage in self.text.stages]
        pictured = ["encode_image", "decode"] if request.image is not None else ["decode"]
        name = Profile(request.width, request.height, 1).name
        for stage, profile in [*texts, *walked, *((stage, name) for stage in pictured)]:
            self.backend.compile(stage, profile)

    def evaluations(self, request: ImageRequest) -> int:
        """How often the denoiser is asked for one picture."""
        return sum(len(self._table(each)) for each in _passes(request))

    def together(self, request: ImageRequest) -> int:
        """How many pictures are walked at once; one where each must have the bytes that it has alone."""
        if self.backend.batch_invariant or request.long_prompts:
            return 1
        table = self._table(request)
        guidance = self._guidance(request, table)
        stepper = self._stepper(request, table, guidance)
        batches = [] if stepper is None else stepper.batches
        if batches is None:
            return _MOST_IMAGES
        rows = 2 if guidance.applies else 1
        return max(batches, default=0) or self._plain(request).most(rows) or _MOST_IMAGES

    def conditionings(
        self, request: ImageRequest, known: dict[str, Conditioning], timings: Timings
    ) -> Texts:
        """(unconditional or None, conditional) of a request; `known` is this call's own cache."""
        reading = Reading(request.prompt_weighting, request.long_prompts)
        with timed(timings, "encode"):
            conditional = self.text.encode(request.prompt, known, reading)
            if not any(
                self._guidance(each, self._table(each)).applies for each in _passes(request)
            ):
                return None, conditional
            if request.negative_prompt is None and self.defaults.get(
                "force_zeros_for_empty_prompt"
            ):
                return conditional.zeros(), conditional
            negative = self.text.encode(request.negative_prompt or "", known, reading)
            unconditional, conditional = self.text.same_length([negative, conditional])
            return unconditional, conditional

    def denoise(
        self,
        requests: Sequence[ImageRequest],
        texts: Sequence[Texts],
        pictures: dict[int, Floats],
        on_step: OnStep,
        timings: Timings,
    ) -> Floats:
        """Run the scheduler's table from each seed's noise to clean latents [n, c, h/f, w/f].

        The requests differ in prompt, seed, noise and picture alone. `pictures` is the call's own cache of latents,
        by the identity of the picture that they were encoded from.
        """
        edit = self._edit(requests, pictures, timings)
        with timed(timings, "denoise"):
            if requests[0].interpolate_from is None:
                return self._walk(requests, texts, edit, on_step)
            small, large = zip(*(_passes(request) for request in requests), strict=True)
            first = self._walk(small, texts, edit, on_step)
            _, height, width = self.latent_shape(large[0].width, large[0].height)
            begun = Edit(clean=resize_latents(first, width, height), from_noise=False)
            return self._walk(large, texts, begun, on_step, offset=len(self._table(small[0])))

    def decode(self, request: ImageRequest, latents: Floats, timings: Timings) -> Floats:
        """Latents -> image float32 [1, h, w, 3] in 0..1."""
        with timed(timings, "decode"):
            profile = Profile(request.width, request.height, 1).name
            image = self.backend.run("decode", profile, {"latents": latents})["image"]
            require_finite("decode", image)
            return image

    def sizes(self) -> list[str] | None:
        """The picture sizes that every stage has, or None where any multiple of the factor runs."""
        denoise = "denoise" if "denoise" in self.backend.stages else "step"
        sets = [picture_profiles(self.backend, stage) for stage in (denoise, "decode")]
        found = [
            {(p.width, p.height) for p in profiles} for profiles in sets if profiles is not None
        ]
        if not found:
            return None
        return [f"{width}x{height}" for width, height in sorted(set.intersection(*found))]

    def runs(self, width: int, height: int) -> bool:
        """Whether pictures of this size can be made."""
        sizes = self.sizes()
        if sizes is None:
            return not (width % self.multiple or height % self.multiple)
        return f"{width}x{height}" in sizes

    def _check_size(self, width: int, height: int) -> None:
        if width * height * _PIXEL > min(memory(), sys.maxsize):
            raise ProfileError(
                f"size {width}x{height} does not fit into memory, not even as a picture; ask for a smaller one"
            )
        if self.runs(width, height):
            return
        sizes = self.sizes()
        if sizes is None:
            raise ProfileError(
                f"size {width}x{height}: width and height must be multiples of {self.multiple}"
            )
        raise ProfileError(f"size {width}x{height} is not in this model; it has {', '.join(sizes)}")

    def _check_edit(self, request: ImageRequest) -> None:
        if "control_image" in self.needs and request.control is None:
            raise RequestError("this model is steered by a picture: it needs control_image")
        if self.inpaints and request.mask is None:
            raise RequestError("this model inpaints: it needs image and mask_image")
        channels, _, _ = self.latent_shape(0, 0)
        asked = int(self.defaults.get("denoiser_channels", channels))
        if asked != channels and not self.inpaints:
            raise RequestError(
                f"this model's denoiser takes {asked} channels; {channels} and {2 * channels + 1} are supported"
            )
        if request.image is None:
            return
        if "encode_image" not in self.backend.stages:
            raise RequestError(
                "image needs the stage encode_image, which this bundle lacks; export it again with a newer tintype, "
                "or load the checkpoint on torch"
            )
        profiles = picture_profiles(self.backend, "encode_image")
        wanted = Profile(request.width, request.height, 1)
        if profiles is not None and wanted not in profiles:
            raise ProfileError(
                f"encode_image has no profile {wanted.name}; it has {', '.join(p.name for p in profiles)}"
            )

    def _table(self, request: ImageRequest) -> Table:
        start = self._start(request)
        if start >= request.steps:
            raise RequestError(
                f"strength={request.strength} of num_inference_steps={request.steps} leaves no step to run"
            )
        # Clipping to -1..1 is for pixels; latents go further, and their configs need not say so.
        config = {"clip_sample": False, **self.scheduler_config}
        tokens = request.width * request.height // self.multiple**2
        table = make_table(request.scheduler, config, request.steps, start=start, tokens=tokens)
        if table.log_spread is not None:
            raise CheckpointError(
                "scheduler config: variance_type='learned_range' is for denoisers that predict it, and this one does "
                "not; choose another scheduler"
            )
        return table

    def _denoising(
        self, request: ImageRequest, table: Table, guidance: Guidance
    ) -> list[tuple[str, str]]:
        """The (stage, profile) pairs that one picture of a request walks through."""
        stepper, rows = self._stepper(request, table, guidance), 2 if guidance.applies else 1
        return walked_through(stepper, [self._plain(request)], rows)

    def _plain(self, request: ImageRequest) -> Rows:
        """The denoiser at the request's size."""
        return Rows(self.backend, "denoise", request.width, request.height)

    def _stepper(self, request: ImageRequest, table: Table, guidance: Guidance) -> Stepper | None:
        """The denoiser with the sampler's step around it, where that can do what is asked."""
        stages = whole_steps(self.backend, ["denoise"] * len(table), table, guidance)
        if not stages or request.mask is not None:
            return None
        return Stepper(self.backend, stages, request.width, request.height)

    def _start(self, request: ImageRequest) -> int:
        """How many of the first steps are left out: a step that the strength cuts in two is run by flow pipelines
        alone, as they were published."""
        kept = request.steps * request.strength
        return (
            request.steps - int(kept) if self.kind == "latent_unet" else int(request.steps - kept)
        )

    def _guidance(self, request: ImageRequest, table: Table) -> Guidance:
        begin = self._start(request) / request.steps
        steps = scales(request.guidance, len(table), begin)
        return Guidance(steps, request.guidance_rescale, request.guidance_parallel)

    def _edit(
        self, requests: Sequence[ImageRequest], known: dict[int, Floats], timings: Timings
    ) -> Edit:
        """Encode the pictures, each distinct one once."""
        images = [request.image for request in requests if request.image is not None]
        masks = [request.mask for request in requests if request.mask is not None]
        if not images:
            return Edit()
        first = requests[0]
        with timed(timings, "encode_image"):
            clean = np.concatenate([self.encode_image(first, each, known) for each in images])
            if not masks:
                return Edit(clean, from_noise=False)
            mask = np.concatenate([mask_latents(each, self.factor) for each in masks])
            if not self.inpaints:
                return Edit(clean, mask, from_noise=self._start(first) == 0)
            hidden = [masked(*pair) for pair in zip(images, masks, strict=True)]
            encoded = np.concatenate([self.encode_image(first, each, {}) for each in hidden])
            shown = np.concatenate([mask, encoded], axis=1)
            return Edit(clean, shown=shown, from_noise=self._start(first) == 0)

    def encode_image(
        self, request: ImageRequest, image: Floats, known: dict[int, Floats]
    ) -> Floats:
        """A picture [1, h, w, 3] -> its latents, from `known` by its identity where they are there."""
        if id(image) not in known:
            profile = Profile(request.width, request.height, 1).name
            latents = self.backend.run("encode_image", profile, {"image": image})["latents"]
            require_finite("encode_image", latents)
            known[id(image)] = latents
        return known[id(image)]

    def _walk(
        self,
        requests: Sequence[ImageRequest],
        texts: Sequence[Texts],
        edit: Edit,
        on_step: OnStep,
        offset: int = 0,
    ) -> Floats:
        """One pass over the table; an `offset` says that it is the second, which draws other noise."""
        first = requests[0]
        table = self._table(first)
        shape = self.latent_shape(first.width, first.height)
        seeds = [request.seed for request in requests]
        unit = np.stack(
            [
                initial_noise(request.seed, shape, "renewed" if offset else "picture")
                if request.latents is None
                else request.latents[0]
                for request in requests
            ]
        )

        x, noise = edit.begin(table, unit), StepNoise(table, seeds, shape, offset)
        guidance = self._guidance(first, table)
        alone, both = (
            text_inputs(first, rows, self.kind) | steering_inputs(requests, len(rows))
            for rows in alone_and_both(texts)
        )
        stepper = self._stepper(first, table, guidance)
        if stepper is not None and stepper.profile(len(x)):
            return stepper.walk(table, guidance, x, noise, alone, both, on_step)

        def after(step: int, x: Floats) -> Floats:
            x = edit.blended(table, step, x, unit)
            on_step(lambda: x)
            return x

        predict = self._plain(first).predictor(alone, both, edit.shown)
        return walk(table, x, noise, predict, guidance, after)


def _passes(request: ImageRequest) -> list[ImageRequest]:
    """The request itself, or what is made first at a smaller size and then finished at the one asked for."""
    if request.interpolate_from is None:
        return [request]
    width, height = request.interpolate_from
    control = None if request.control is None else cover(request.control, width, height)
    small = replace(request, width=width, height=height, control=control)
    small = replace(small, strength=1.0, interpolate_from=None)
    return [small, replace(request, latents=None, interpolate_from=None)]


def _first_size(request: ImageRequest) -> tuple[int, int]:
    return request.interpolate_from or (request.width, request.height)
