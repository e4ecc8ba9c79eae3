"""unCLIP (DALL-E 2, Karlo): encode -> prior -> denoise -> enlarge, on numpy.

A prior draws how CLIP would embed a picture of the text, or CLIP embeds one that shall be varied; a decoder draws a
small picture of that embedding and the text; two upsamplers, the second of which makes the last step alone, enlarge it.
All walk tables, and each picture's noise is its seed's own. Stage faces are in `models.unclip_stages`. Ramesh et al.
2022 (arXiv 2204.06125).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tintype import noise
from tintype.backends import Backend
from tintype.errors import ProfileError, RequestError
from tintype.families.conditioning import Conditioning, Reading, TextSide, TextTokenizer
from tintype.families.denoiser import Rows, Texts, Told, alone_and_both
from tintype.families.stepping import OnStep, Stepper, walked_through, whole_steps
from tintype.families.timing import Timings, timed
from tintype.guidance import Guidance, scales
from tintype.images import resize_latents, shortest_side
from tintype.profiles import Profile
from tintype.request import Cascade, ImageRequest, require_latents
from tintype.sampling import StepNoise, require_finite, walk
from tintype.schedulers import Table, default_name, make_table

Floats = NDArray[np.float32]
_MOST_IMAGES = 8  # that are walked together
_UNGUIDED = 1.0


@dataclass(frozen=True)
class _Leg:
    """One of the walks to a picture: whose noise it takes, the shape of what is walked, and the model of each row."""

    name: noise.Walk
    shape: tuple[int, ...]
    table: Table
    guidance: Guidance
    models: tuple[str, ...]


@dataclass(frozen=True)
class Unclip:
    """One loaded generator. Everything here is read-only after loading but the cached empty prompt."""

    backend: Backend
    tokenizers: Sequence[TextTokenizer]
    scheduler_config: Mapping[str, Any]  # of the decoder; the others' are among the defaults
    defaults: Mapping[str, Any]
    kind: str = "unclip"
    _empty: dict[str, Conditioning] = field(default_factory=dict, repr=False)

    @property
    def text(self) -> TextSide:
        """The prompt encoder."""
        return TextSide(self.backend, self.tokenizers, self.kind, self.defaults, self._empty)

    @property
    def factor(self) -> int:
        """Pixels of the picture for one that the decoder draws."""
        return int(self.defaults["latent_factor"])

    @property
    def needs(self) -> tuple[str, ...]:
        """The arguments beside a prompt that a request must have."""
        return () if self._has_prior else ("image",)

    def fitted(self, picture: Floats, width: int, height: int) -> Floats:
        """A picture [1, h, w, 3] to be varied, as CLIP sees it, [1, s, s, 3]; as it is where no CLIP does."""
        side = int(self.defaults.get("image_side", 0))
        return shortest_side(picture, side) if side else picture

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """[c, h/f, w/f] of what the decoder draws."""
        return int(self.defaults["latent_channels"]), height // self.factor, width // self.factor

    def check(self, request: ImageRequest) -> None:
        """Refuse what cannot be run, and only then begin to make ready what will be."""
        self._check_kind(request)
        if not self.runs(request.width, request.height):
            raise ProfileError(
                f"size {request.width}x{request.height} is not in this model; it draws {self._size}"
            )
        require_latents(request, self.latent_shape(request.width, request.height))
        walked = [each for leg in self._legs(request) for each in self._walking(request, leg)]
        texts = [(stage, self.text.profile(stage)) for stage in self.text.stages]
        whole = ("embed_image", "project") if _varies(request) else ("embed", "project")
        between = [(stage, _profile(request)) for stage in whole]
        for stage, profile in [*texts, *between, *walked]:
            self.backend.compile(stage, profile)

    def evaluations(self, request: ImageRequest) -> int:
        """How often a model is asked for one picture."""
        return sum(len(leg.table) for leg in self._legs(request))

    def together(self, request: ImageRequest) -> int:
        """How many pictures are walked at once; one where each must have the bytes that it has alone."""
        if self.backend.batch_invariant:
            return 1
        steppers = [self._stepper(request, leg) for leg in self._legs(request)]
        batches = [each.batches for each in steppers if each is not None]
        most = (max(each, default=0) or _MOST_IMAGES for each in batches if each is not None)
        return min(most, default=_MOST_IMAGES)

    def conditionings(
        self, request: ImageRequest, known: dict[str, Conditioning], timings: Timings
    ) -> Texts:
        """(unconditional or None, conditional) of a request; `known` is this call's own cache."""
        with timed(timings, "encode"):
            reading = Reading(request.prompt_weighting)
            conditional = self.text.encode(request.prompt, known, reading)
            if not self._guided(request):
                return None, conditional
            return self.text.encode(request.negative_prompt or "", known, reading), conditional

    def denoise(
        self,
        requests: Sequence[ImageRequest],
        texts: Sequence[Texts],
        pictures: dict[int, Floats],
        on_step: OnStep,
        timings: Timings,
    ) -> Floats:
        """Pixels [n, 3, h, w] around -1..1 of requests that differ in prompt, picture and seed alone.

        `pictures` is the call's own cache of image embeddings, by the identity of the picture that they are of.
        """
        with timed(timings, "prior"):
            if _varies(requests[0]):
                embeds = np.concatenate([self._embedded(each, pictures) for each in requests])
            else:
                embeds = self._image_embeds(requests, texts, on_step)
        with timed(timings, "denoise"):
            small = self._drawn(requests, texts, embeds, on_step)
        with timed(timings, "enlarge"):
            return self._enlarged(requests, small, on_step)

    def decode(self, request: ImageRequest, latents: Floats, timings: Timings) -> Floats:
        """Pixels -> image float32 [1, h, w, 3] in 0..1."""
        with timed(timings, "decode"):
            pixels = (latents / 2 + np.float32(0.5)).clip(0, 1)
            return np.ascontiguousarray(np.moveaxis(pixels, 1, -1))

    def sizes(self) -> list[str]:
        """The one picture size that its upsamplers were trained for."""
        return [self._size]

    def runs(self, width: int, height: int) -> bool:
        """Whether pictures of this size can be made."""
        return f"{width}x{height}" == self._size

    @property
    def _has_prior(self) -> bool:
        """By what follows its steps, which engines have, too."""
        return "embed" in self.backend.stages

    @property
    def _size(self) -> str:
        return f"{self.defaults['width']}x{self.defaults['height']}"

    def _image_embeds(
        self, requests: Sequence[ImageRequest], texts: Sequence[Texts], on_step: OnStep
    ) -> Floats:
        """How CLIP would embed pictures of the texts, [n, e]."""
        first = requests[0]
        alone, both = map(_told, alone_and_both(texts))
        latents = self._walk(requests, self._prior_leg(first), alone, both, on_step)
        embeds = [self._run("embed", first, {"latents": each[None]}) for each in latents]
        return np.concatenate([each["image_embeds"] for each in embeds])

    def _embedded(self, request: ImageRequest, known: dict[int, Floats]) -> Floats:
        """How CLIP embeds the picture that was given, [1, e], from `known` by its identity where it is there."""
        assert request.image is not None
        if id(request.image) not in known:
            ran = self._run("embed_image", request, {"image": request.image})
            known[id(request.image)] = ran["image_embeds"]
        return known[id(request.image)]

    def _drawn(
        self,
        requests: Sequence[ImageRequest],
        texts: Sequence[Texts],
        embeds: Floats,
        on_step: OnStep,
    ) -> Floats:
        """Small pictures [n, 3, h/f, w/f] in -1..1."""
        first = requests[0]
        pairs = zip(texts, embeds[:, None], strict=True)
        projected = [self._projected(first, *pair) for pair in pairs]
        alone, both = map(_stacked, alone_and_both(projected))
        return self._walk(requests, self._drawing_leg(first), alone, both, on_step).clip(-1, 1)

    def _projected(
        self, request: ImageRequest, texts: Texts, embeds: Floats
    ) -> tuple[Told | None, Told]:
        """What the decoder is told of one picture without its embedding [1, e] and text, and with them."""
        tokens = int(self.defaults["context_tokens"])

        def told(text: Conditioning, shown: float) -> Told:
            inputs = {"image_embeds": embeds, "shown": np.full(1, shown, np.float32)}
            inputs |= {"encoder_hidden_states": text.hidden, "text_embeds": _pooled(text)}
            read = np.pad(_own(text), [(0, 0), (tokens, 0)], constant_values=1)
            return {**self._run("project", request, inputs), "context_mask": read}

        unconditional, conditional = texts
        blank = None if unconditional is None else told(unconditional, 0.0)
        return blank, told(conditional, 1.0)

    def _enlarged(self, requests: Sequence[ImageRequest], small: Floats, on_step: OnStep) -> Floats:
        """Pictures [n, 3, h, w], which may leave -1..1 a little."""
        first = requests[0]
        shown = {"low_res": resize_latents(small, first.width, first.height)}
        return self._walk(requests, self._enlarging_leg(first), shown, {}, on_step)

    def _walk(
        self,
        requests: Sequence[ImageRequest],
        leg: _Leg,
        alone: Told,
        both: Told,
        on_step: OnStep,
    ) -> Floats:
        """From each seed's noise to the end of a leg, [n, ...]."""
        seeds, table = [request.seed for request in requests], leg.table
        begun = [noise.initial_noise(seed, leg.shape, leg.name) for seed in seeds]
        if leg.name == "picture":
            given = [request.latents for request in requests]
            begun = [
                own if each is None else each[0] for own, each in zip(begun, given, strict=True)
            ]
        x = np.float32(table.init_scale) * np.stack(begun)
        drawn = StepNoise(table, seeds, leg.shape, walk=leg.name)
        stepper = self._stepper(requests[0], leg)
        if stepper is not None and stepper.profile(len(x)):
            return stepper.walk(table, leg.guidance, x, drawn, alone, both, on_step)

        predictors = {
            model: rows.predictor(alone, both)
            for model, rows in self._plain(requests[0], leg).items()
        }
        model_at = dict(zip(table.timesteps.tolist(), leg.models, strict=True))

        def predict(x: Floats, timestep: float, guided: bool) -> tuple[Floats, Floats | None]:
            return predictors[model_at[timestep]](x, timestep, guided)

        def after(_: int, x: Floats) -> Floats:
            on_step(lambda: x)
            return x

        return walk(table, x, drawn, predict, leg.guidance, after)

    def _walking(self, request: ImageRequest, leg: _Leg) -> list[tuple[str, str]]:
        """The (stage, profile) pairs that one picture of a request walks a leg through."""
        plain = [*self._plain(request, leg).values()]
        return walked_through(self._stepper(request, leg), plain, 2 if leg.guidance.applies else 1)

    def _stepper(self, request: ImageRequest, leg: _Leg) -> Stepper | None:
        """Whole steps of a leg, where they can do what is asked."""
        stages = whole_steps(self.backend, leg.models, leg.table, leg.guidance)
        spreads = leg.name == "picture" and bool(self.defaults["learned_variance"])
        size = (request.width, request.height)
        return Stepper(self.backend, stages, *size, spreads) if stages else None

    def _plain(self, request: ImageRequest, leg: _Leg) -> dict[str, Rows]:
        """A leg's models."""
        size = (request.width, request.height)
        return {model: Rows(self.backend, model, *size) for model in sorted({*leg.models})}

    def _check_kind(self, request: ImageRequest) -> None:
        """Refuse what this kind of unCLIP does not begin with, or none does."""
        for argument in ("mask", "interpolate_from", "long_prompts"):
            given = getattr(request, argument)
            if given is not None and given is not False:
                named = "mask_image" if argument == "mask" else argument
                raise RequestError(f"{named} is not for unCLIP models; leave it out")
        if _varies(request) and "embed_image" not in self.backend.stages:
            raise RequestError(
                "this model has no image_encoder, and draws from a text alone; leave image out"
            )
        if not (_varies(request) or self._has_prior):
            raise RequestError("this model has no prior, and varies pictures; give image")

    def _run(self, stage: str, request: ImageRequest, inputs: Told) -> dict[str, Floats]:
        """One row of a stage that no step repeats."""
        outputs = self.backend.run(stage, _profile(request), inputs)
        for array in outputs.values():
            require_finite(stage, array)
        return outputs

    def _guided(self, request: ImageRequest) -> bool:
        """Whether anything is told an unconditional text beside each picture's own."""
        return any(leg.guidance.applies for leg in self._legs(request))

    def _legs(self, request: ImageRequest) -> list[_Leg]:
        """What one picture walks, in this order."""
        first = [] if _varies(request) else [self._prior_leg(request)]
        return [*first, self._drawing_leg(request), self._enlarging_leg(request)]

    def _prior_leg(self, request: ImageRequest) -> _Leg:
        cascade = _cascade(request)
        table = self._own_table("prior", cascade.prior_steps)
        guidance = Guidance(scales(cascade.prior_guidance, len(table), 0))
        shape = (int(self.defaults["embedding_width"]),)
        return _Leg("prior", shape, table, guidance, ("prior",) * len(table))

    def _drawing_leg(self, request: ImageRequest) -> _Leg:
        table = make_table(request.scheduler, self.scheduler_config, request.steps)
        steps = scales(request.guidance, len(table), 0)
        guidance = Guidance(steps, request.guidance_rescale, request.guidance_parallel)
        shape = self.latent_shape(request.width, request.height)
        return _Leg("picture", shape, table, guidance, ("denoise",) * len(table))

    def _own_table(self, walk: str, steps: int) -> Table:
        """The table of a walk whose method is the checkpoint's alone."""
        config = self.defaults[f"{walk}_scheduler"]
        try:
            return make_table(default_name(config), config, steps)
        except RequestError as error:
            raise RequestError(f"{walk}_{error}") from error

    def _enlarging_leg(self, request: ImageRequest) -> _Leg:
        table = self._own_table("super_res", _cascade(request).enlarging_steps)
        models = ("enlarge",) * (len(table) - 1) + ("enlarge_last",)
        guidance = Guidance(scales(_UNGUIDED, len(table), 0))
        shape = (int(self.defaults["latent_channels"]), request.height, request.width)
        return _Leg("enlarged", shape, table, guidance, models)


def _varies(request: ImageRequest) -> bool:
    """Whether a picture was given, in the place of what a prior draws."""
    return request.image is not None


def _cascade(request: ImageRequest) -> Cascade:
    assert request.cascade is not None
    return request.cascade


def _profile(request: ImageRequest) -> str:
    """Of what is run for one picture at a time."""
    return Profile(request.width, request.height, 1).name


def _told(texts: Sequence[Conditioning]) -> Told:
    """What the prior is told of texts, a row each."""
    return {
        "encoder_hidden_states": np.concatenate([text.hidden for text in texts]),
        "text_embeds": np.concatenate([_pooled(text) for text in texts]),
        "text_mask": np.concatenate([_own(text) for text in texts]),
    }


def _stacked(rows: Sequence[Told]) -> Told:
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def _pooled(text: Conditioning) -> Floats:
    assert text.pooled is not None
    return text.pooled


def _own(text: Conditioning) -> Floats:
    assert text.own is not None
    return text.own
