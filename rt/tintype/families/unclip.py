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
from tintype.families.stepping import OnStep
from tintype.families.timing import Timings, timed
from tintype.guidance import Guidance, scales
from tintype.images import cover, resize_latents
from tintype.request import Cascade, ImageRequest, require_latents
from tintype.sampling import Predict, StepNoise, require_finite, walk
from tintype.schedulers import Table, default_name, make_table

Floats = NDArray[np.float32]
_MOST_IMAGES = 8  # that are walked together
_UNGUIDED = 1.0


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
        return () if "prior" in self.backend.stages else ("image",)

    def fitted(self, picture: Floats, width: int, height: int) -> Floats:
        """A picture [1, h, w, 3] to be varied, as CLIP sees it, [1, s, s, 3]; as it is where no CLIP does."""
        side = int(self.defaults.get("image_side", 0))
        return cover(picture, side, side, "bicubic") if side else picture

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """[c, h/f, w/f] of what the decoder draws."""
        return int(self.defaults["latent_channels"]), height // self.factor, width // self.factor

    def check(self, request: ImageRequest) -> None:
        """Refuse what cannot be run, and begin to make ready what will be."""
        self._check_kind(request)
        if not self.runs(request.width, request.height):
            raise ProfileError(
                f"size {request.width}x{request.height} is not in this model; it draws {self._size}"
            )
        require_latents(request, self.latent_shape(request.width, request.height))
        self.evaluations(request)  # every table can be filled
        for stage in self.text.stages:
            self.backend.compile(stage, self.text.profile(stage))
        guided = self._guided(request)
        for stage, rows in self._rows(request).items():
            for profile in rows.profiles(2 if stage in guided else 1):
                self.backend.compile(stage, profile.name)

    def evaluations(self, request: ImageRequest) -> int:
        """How often a model is asked for one picture."""
        tables = [self._table, self._enlarging_table]
        tables += [] if _varies(request) else [self._prior_table]
        return sum(len(table(request)) for table in tables)

    def together(self, request: ImageRequest) -> int:
        """How many pictures are walked at once; one where each must have the bytes that it has alone."""
        return 1 if self.backend.batch_invariant else _MOST_IMAGES

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
    def _size(self) -> str:
        return f"{self.defaults['width']}x{self.defaults['height']}"

    def _image_embeds(
        self, requests: Sequence[ImageRequest], texts: Sequence[Texts], on_step: OnStep
    ) -> Floats:
        """How CLIP would embed pictures of the texts, [n, e]."""
        first, table = requests[0], self._prior_table(requests[0])
        guidance = Guidance(scales(_cascade(first).prior_guidance, len(table), 0))
        rows = self._rows(first)
        alone, both = map(_told, alone_and_both(texts))
        predict = rows["prior"].predictor(alone, both)
        shape = (int(self.defaults["embedding_width"]),)
        latents = _walked(requests, "prior", shape, table, predict, guidance, on_step)
        embeds = [self._run(rows["embed"], {"latents": each[None]}) for each in latents]
        return np.concatenate([each["image_embeds"] for each in embeds])

    def _embedded(self, request: ImageRequest, known: dict[int, Floats]) -> Floats:
        """How CLIP embeds the picture that was given, [1, e], from `known` by its identity where it is there."""
        assert request.image is not None
        if id(request.image) not in known:
            ran = self._run(self._rows(request)["embed_image"], {"image": request.image})
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
        first, table = requests[0], self._table(requests[0])
        pairs = zip(texts, embeds[:, None], strict=True)
        projected = [self._projected(first, *pair) for pair in pairs]
        alone, both = map(_stacked, alone_and_both(projected))
        predict = self._rows(first)["denoise"].predictor(alone, both)
        guidance = self._guidance(first, table)
        shape = self.latent_shape(first.width, first.height)
        return _walked(requests, "picture", shape, table, predict, guidance, on_step).clip(-1, 1)

    def _projected(
        self, request: ImageRequest, texts: Texts, embeds: Floats
    ) -> tuple[Told | None, Told]:
        """What the decoder is told of one picture without its embedding [1, e] and text, and with them."""
        rows = self._rows(request)["project"]
        tokens = int(self.defaults["context_tokens"])

        def told(text: Conditioning, shown: float) -> Told:
            inputs = {"image_embeds": embeds, "shown": np.full(1, shown, np.float32)}
            inputs |= {"encoder_hidden_states": text.hidden, "text_embeds": _pooled(text)}
            read = np.pad(_own(text), [(0, 0), (tokens, 0)], constant_values=1)
            return {**self._run(rows, inputs), "context_mask": read}

        unconditional, conditional = texts
        blank = None if unconditional is None else told(unconditional, 0.0)
        return blank, told(conditional, 1.0)

    def _enlarged(self, requests: Sequence[ImageRequest], small: Floats, on_step: OnStep) -> Floats:
        """Pictures [n, 3, h, w], which may leave -1..1 a little."""
        first, table = requests[0], self._enlarging_table(requests[0])
        begun = resize_latents(small, first.width, first.height)
        rows = self._rows(first)
        most, last = (rows[name].predictor({}, {}, begun) for name in ("enlarge", "enlarge_last"))

        def predict(x: Floats, timestep: float, guided: bool) -> tuple[Floats, Floats | None]:
            return (last if timestep == table.timesteps[-1] else most)(x, timestep, guided)

        guidance = Guidance(scales(_UNGUIDED, len(table), 0))
        shape = (small.shape[1], first.height, first.width)
        return _walked(requests, "enlarged", shape, table, predict, guidance, on_step)

    def _check_kind(self, request: ImageRequest) -> None:
        """Refuse what this kind of unCLIP does not begin with, or none does."""
        for argument in ("mask", "interpolate_from", "long_prompts"):
            given = getattr(request, argument)
            if given is not None and given is not False:
                named = "mask_image" if argument == "mask" else argument
                raise RequestError(f"{named} is not for unCLIP models; leave it out")
        needed = "embed_image" if _varies(request) else "prior"
        if needed not in self.backend.stages:
            raise RequestError(
                "this model has no image_encoder, and draws from a text alone; leave image out"
                if _varies(request)
                else "this model has no prior, and varies pictures; give image"
            )

    def _run(self, rows: Rows, inputs: Told) -> dict[str, Floats]:
        """One row of a stage that no step repeats."""
        (profile,) = rows.profiles(1)
        outputs = self.backend.run(rows.stage, profile.name, inputs)
        for array in outputs.values():
            require_finite(rows.stage, array)
        return outputs

    def _rows(self, request: ImageRequest) -> dict[str, Rows]:
        """The stages behind the text encoder's that a request takes."""
        unused = ("prior", "embed") if _varies(request) else ("embed_image",)
        return {
            stage: Rows(self.backend, stage, request.width, request.height)
            for stage in self.backend.stages
            if stage not in (*self.text.stages, *unused)
        }

    def _guided(self, request: ImageRequest) -> set[str]:
        """The stages that take an unconditional row beside each picture's own."""
        guided = {
            "prior": _cascade(request).prior_guidance > 1 and not _varies(request),
            "denoise": self._guidance(request, self._table(request)).applies,
        }
        return {stage for stage, applies in guided.items() if applies}

    def _guidance(self, request: ImageRequest, table: Table) -> Guidance:
        steps = scales(request.guidance, len(table), 0)
        return Guidance(steps, request.guidance_rescale, request.guidance_parallel)

    def _prior_table(self, request: ImageRequest) -> Table:
        return _own_table(self.defaults["prior_scheduler"], _cascade(request).prior_steps)

    def _table(self, request: ImageRequest) -> Table:
        return make_table(request.scheduler, self.scheduler_config, request.steps)

    def _enlarging_table(self, request: ImageRequest) -> Table:
        steps = _cascade(request).enlarging_steps
        return _own_table(self.defaults["super_res_scheduler"], steps)


def _varies(request: ImageRequest) -> bool:
    """Whether a picture was given, in the place of what a prior draws."""
    return request.image is not None


def _cascade(request: ImageRequest) -> Cascade:
    assert request.cascade is not None
    return request.cascade


def _own_table(config: Mapping[str, Any], steps: int) -> Table:
    return make_table(default_name(config), config, steps)


def _walked(
    requests: Sequence[ImageRequest],
    name: noise.Walk,
    shape: tuple[int, ...],
    table: Table,
    predict: Predict,
    guidance: Guidance,
    on_step: OnStep,
) -> Floats:
    """From each seed's noise to the table's end, [n, *shape]."""
    seeds = [request.seed for request in requests]
    begun = [noise.initial_noise(seed, shape, name) for seed in seeds]
    if name == "picture":
        given = [request.latents for request in requests]
        begun = [own if each is None else each[0] for own, each in zip(begun, given, strict=True)]

    def after(_: int, x: Floats) -> Floats:
        on_step(lambda: x)
        return x

    x = np.float32(table.init_scale) * np.stack(begun)
    drawn = StepNoise(table, seeds, shape, walk=name)
    return walk(table, x, drawn, predict, guidance, after)


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
