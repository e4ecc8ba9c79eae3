"""The pipeline that a user calls: arguments in, pictures out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from inspect import signature
from math import isfinite
from typing import Any, Concatenate, ParamSpec

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tintype import images
from tintype.errors import Cancelled, RequestError, TintypeError
from tintype.families.conditioning import Conditioning
from tintype.families.latent_diffusion import LatentDiffusion
from tintype.families.unclip import Unclip
from tintype.guidance import Scale, as_number, check_scale
from tintype.images import Floats, to_pil
from tintype.request import Cascade, ImageRequest, share, spread, starts, whole_number
from tintype.schedulers import default_name

Arguments = ParamSpec("Arguments")
Family = LatentDiffusion | Unclip
OnStep = Callable[[int, int, Floats], Any]
OUTPUT_TYPES = ("pil", "np", "latent")
# The share of the steps that an edit runs where the caller leaves it open, as in diffusers.
_STRENGTH = {"image": 0.8, "mask": 1.0, "interpolated": 0.5}


@dataclass(frozen=True)
class Output:
    """Pictures, the seed of each, and the seconds that each stage took."""

    images: list[Image.Image] | NDArray[np.float32]
    seeds: list[int]
    timings: dict[str, float]


def _at_once(
    prepare: Callable[Concatenate[Pipeline, Arguments], Call],
) -> Callable[Concatenate[Pipeline, Arguments], Output]:
    """The method that takes `prepare`'s arguments, whose call it runs."""

    @wraps(prepare)
    def run(pipeline: Pipeline, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Output:
        return prepare(pipeline, *args, **kwargs).run()

    shown = signature(prepare).replace(return_annotation="Output")
    run.__signature__ = shown  # type: ignore[attr-defined]
    return run


@dataclass(frozen=True)
class Pipeline:
    """A loaded model. Safe to call from many threads: whatever a request changes is local to the call."""

    name: str
    family: Family
    backend_reason: str

    def settings(
        self,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: Scale | None = None,
        scheduler: str | None = None,
    ) -> dict[str, Any]:
        """The settings of a request, with the model's own where they are left open."""
        defaults = self.family.defaults
        given = {"height": height, "width": width, "steps": num_inference_steps}
        names = {"height": "height", "width": "width", "steps": "num_inference_steps"}
        whole = {
            field: whole_number(
                names[field], defaults[names[field]] if value is None else value, least=1
            )
            for field, value in given.items()
        }
        guidance = defaults["guidance_scale"] if guidance_scale is None else guidance_scale
        method = (
            scheduler or defaults.get("scheduler") or default_name(self.family.scheduler_config)
        )
        checked = check_scale(guidance, whole["steps"])
        return {**whole, "guidance": checked, "scheduler": method}

    def prepare(  # noqa: PLR0913 - the contract's arguments, which are diffusers'
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: Scale | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        scheduler: str | None = None,
        latents: NDArray[Any] | None = None,
        image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
        output_type: str = "pil",
        callback_on_step_end: OnStep | None = None,
        guidance_rescale: float = 0.0,
        guidance_parallel: float = 1.0,
        true_cfg_scale: float = 1.0,
        prompt_weighting: bool = False,
        long_prompts: bool = False,
        interpolate_from: tuple[int, int] | None = None,
        prior_num_inference_steps: int | None = None,
        prior_guidance_scale: float | None = None,
        super_res_num_inference_steps: int | None = None,
        control_image: Any = None,
        controlnet_conditioning_scale: float = 1.0,
    ) -> Call:
        """Make pictures; names follow diffusers. `prepare(...)` takes the same arguments and only checks them: what
        it returns makes the pictures when it is `run()`.

        `guidance_scale` is a number, a list of one a step, or a function of progress in 0..1, such as
        `tintype.guidance.interval(7.5, 0.1, 0.8)`; 1 or less means no guidance, and `guidance_rescale` draws the
        guided output's deviation back to the prompt's own; `guidance_parallel` below 1 keeps only that share of what
        guidance does along the output itself, which lets strong scales stay true to colour. FLUX is told its
        `guidance_scale`; `true_cfg_scale` is what extrapolates from its negative prompt.

        `latents` is the unit noise to begin from, [n, c, h/f, w/f].

        `image` (PIL, numpy, torch, or a list) is what to begin from, after `strength` of the steps' noise, and
        `mask_image` says, in white, where to paint it anew; both are cropped and scaled to the size asked for, by
        default the image's own where the model runs it. An unCLIP with an image encoder varies the image.
        `interpolate_from` is a (width, height) that the picture is first made at, before its latents are
        interpolated and finished at the size asked for.

        `control_image` is what a model with a ControlNet is steered by, such as edges or a pose, in the form that it
        was trained on; `controlnet_conditioning_scale` is how strongly.

        `prompt_weighting` reads `(word:1.3)`, `(word)` and `[word]`; `long_prompts` reads all of a prompt that
        is longer than the text encoder's window.

        The steps and the guidance of unCLIP's prior, and the steps of its upsamplers, are the three last; what has no
        such name is of its decoder.

        `callback_on_step_end(step, total, latents)` counts the steps of all images, from 0, and cancels the
        call by returning False, which raises `Cancelled`.
        """
        if output_type not in OUTPUT_TYPES:
            raise RequestError(
                f"output_type={output_type!r} is unknown; choose one of {', '.join(OUTPUT_TYPES)}"
            )
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise RequestError(f"callback_on_step_end={callback_on_step_end!r} cannot be called")
        if interpolate_from is not None and image is not None:
            raise RequestError("interpolate_from makes a picture of its own, so it takes no image")
        if control_image is not None and "control_image" not in self.family.needs:
            raise RequestError(
                "control_image is for models with a ControlNet, and this one has none; load it with controlnet=..."
            )
        control_scale = _control_scale(controlnet_conditioning_scale)
        if control_image is None and control_scale != 1.0:
            raise RequestError(
                "controlnet_conditioning_scale says how strongly a control_image steers; give that, too"
            )
        if strength is not None and self.family.kind == "unclip":
            raise RequestError(
                f"strength={strength!r} is not for unCLIP models, which vary a picture as a whole; leave it out"
            )
        name, shown = ("image", image) if image is not None else ("control_image", control_image)
        if shown is not None and width is None and height is None:
            width, height = self._own_size(name, shown)
        settings = {
            **self.settings(
                height=height,
                width=width,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                scheduler=scheduler,
            ),
            "strength": _strength(strength, image, mask_image, interpolate_from),
            "guidance_rescale": share("guidance_rescale", guidance_rescale, least=0),
            "guidance_parallel": share("guidance_parallel", guidance_parallel, least=0),
            "prompt_weighting": prompt_weighting,
            "long_prompts": long_prompts,
            "interpolate_from": None if interpolate_from is None else _sides(interpolate_from),
            "control_scale": control_scale,
        }
        settings |= self._told(settings["guidance"], true_cfg_scale, negative_prompt)
        settings["cascade"] = self._cascade(
            prior_num_inference_steps=prior_num_inference_steps,
            prior_guidance_scale=prior_guidance_scale,
            super_res_num_inference_steps=super_res_num_inference_steps,
        )
        fit = partial(self.family.fitted, width=settings["width"], height=settings["height"])
        own = _own_arrays(latents, image, mask_image, control_image, fit)
        with _told_where_memory_lacks(settings["width"], settings["height"]):
            requests = spread(prompt, negative_prompt, num_images_per_prompt, seed, own, settings)
            for request in requests:
                self.family.check(request)
        return Call(self.family, requests, output_type, callback_on_step_end)

    __call__ = _at_once(prepare)

    def _told(
        self, guidance: Scale, true_cfg_scale: float, negative_prompt: str | Sequence[str] | None
    ) -> dict[str, Any]:
        """Guidance of a model that is told it, beside the one that extrapolates."""
        if self.family.kind != "flux":
            if true_cfg_scale != 1.0:
                raise RequestError(
                    f"true_cfg_scale={true_cfg_scale!r} is for models that are told guidance_scale; use that"
                )
            return {}
        if not isinstance(guidance, (int, float)):
            raise RequestError(
                "guidance_scale is one number for a model that is told it; vary true_cfg_scale instead"
            )
        if true_cfg_scale != 1.0 and negative_prompt is None:
            raise RequestError(
                f"true_cfg_scale={true_cfg_scale!r} extrapolates from a negative_prompt, and there is none; give one, "
                "which may be empty"
            )
        told = float(guidance) if self.family.defaults["guidance_embeds"] else None
        return {"guidance": check_scale(true_cfg_scale, 1), "embedded_guidance": told}

    def _cascade(self, **given: float | None) -> Cascade | None:
        """What unCLIP does around its decoder, with the model's own where it is left open."""
        if self.family.kind != "unclip":
            if asked := next((n for n, value in given.items() if value is not None), None):
                raise RequestError(
                    f"{asked}={given[asked]!r} is for unCLIP models, and this is a {self.family.kind}; leave it out"
                )
            return None
        filled = {n: self.family.defaults[n] if v is None else v for n, v in given.items()}
        steps = {n: whole_number(n, v, least=1) for n, v in filled.items() if n.endswith("steps")}
        guidance = filled["prior_guidance_scale"]
        if not isinstance(guidance, float | int) or not isfinite(guidance):
            raise RequestError(f"prior_guidance_scale={guidance!r} is not a finite number")
        return Cascade(
            steps["prior_num_inference_steps"],
            float(guidance),
            steps["super_res_num_inference_steps"],
        )

    def _own_size(self, name: str, image: Any) -> tuple[int | None, int | None]:
        """The size of the (first) picture where the model runs it; else the model's own."""
        first = image[0] if isinstance(image, Sequence) and image else image
        height, width = images.to_numpy(first, name).shape[1:3]
        return (width, height) if self.family.runs(width, height) else (None, None)


@dataclass(frozen=True)
class Call:
    """A call of a pipeline that has been checked and not yet run; `requests` has one an image."""

    family: Family
    requests: Sequence[ImageRequest]
    output_type: str
    on_step: OnStep | None

    def run(self) -> Output:
        """Make the pictures."""
        timings: dict[str, float] = {}
        with _told_where_memory_lacks(self.requests[0].width, self.requests[0].height):
            arrays = np.concatenate(self._arrays(timings))
            made = [to_pil(array) for array in arrays] if self.output_type == "pil" else arrays
        return Output(made, [request.seed for request in self.requests], timings)

    def _arrays(self, timings: dict[str, float]) -> list[Floats]:
        """As many images at a time as the backend holds without their bytes depending on their neighbours."""
        known: dict[str, Conditioning] = {}
        pictures: dict[int, Floats] = {}
        size = self.family.together(self.requests[0])
        chunks = [self.requests[i : i + size] for i in range(0, len(self.requests), size)]
        total = len(chunks) * self.family.evaluations(self.requests[0])
        notify = _counter(self.on_step, total)
        results = []
        for chunk in chunks:
            texts = [self.family.conditionings(request, known, timings) for request in chunk]
            latents = self.family.denoise(chunk, texts, pictures, notify, timings)
            for request, own in zip(chunk, latents, strict=True):
                result = own[None]
                if self.output_type != "latent":
                    result = self.family.decode(request, result, timings)
                results.append(result)
        return results


@contextmanager
def _told_where_memory_lacks(width: int, height: int) -> Iterator[None]:
    """An allocation that fails as one line; torch has no error of its own for the host's memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
            raise
        raise TintypeError(
            f"a picture of {width}x{height} does not fit into memory; ask for a smaller one"
        ) from error


def _strength(
    strength: float | None, image: Any, mask: Any, interpolate_from: tuple[int, int] | None
) -> float:
    if image is None:
        if mask is not None:
            raise RequestError("mask_image says where to paint an image anew; give image, too")
        if interpolate_from is None and strength is not None:
            raise RequestError("strength says how far to change an image; give image, too")
    kind = "mask" if mask is not None else "image" if image is not None else "interpolated"
    if image is None and interpolate_from is None:
        return 1.0
    return share(
        "strength",
        _STRENGTH[kind] if strength is None else strength,
        least=float(np.nextafter(0, 1)),
    )


def _control_scale(value: Any) -> float:
    number = as_number(value)
    if not isfinite(number):
        raise RequestError(f"controlnet_conditioning_scale={value!r} is not a finite number")
    return number


def _sides(size: Any) -> tuple[int, int]:
    """What `interpolate_from` says."""
    try:
        width, height = size
    except (TypeError, ValueError) as error:
        raise RequestError(f"interpolate_from={size!r} is not (width, height)") from error
    first, second = (whole_number("interpolate_from", side, least=1) for side in (width, height))
    return first, second


def _own_arrays(
    latents: Any, image: Any, mask: Any, control: Any, fit: Callable[[Floats], Floats]
) -> dict[str, Callable[[int], list[Floats]]]:
    """The arrays of which every image has its own, as functions of how many images there are."""

    def fitted(count: int) -> list[Floats]:
        return _fitted(images.each(image, count), fit)

    def masks(count: int) -> list[Floats]:
        pictures = images.each(image, count)
        found = images.each(mask, count, "mask_image", channels=1)
        for picture, own in zip(pictures, found, strict=True):
            if picture.shape[1:3] != own.shape[1:3]:
                raise RequestError(
                    f"mask_image is {_size(own)} and image {_size(picture)}; make them the same size"
                )
        return [np.float32(1) * (each >= 0.5) for each in _fitted(found, fit)]

    makers: dict[str, Callable[[int], list[Floats]]] = {}
    if latents is not None:
        makers["latents"] = lambda count: starts(latents, count)
    if image is not None:
        makers["image"] = fitted
    if mask is not None:
        makers["mask"] = masks
    if control is not None:
        makers["control"] = lambda count: _fitted(images.each(control, count, "control_image"), fit)
    return makers


def _fitted(pictures: list[Floats], fit: Callable[[Floats], Floats]) -> list[Floats]:
    """Each as the model is shown it; one object stays one, so that it is encoded once."""
    made = {id(each): fit(each) for each in pictures}
    return [made[id(each)] for each in pictures]


def _size(picture: Floats) -> str:
    return f"{picture.shape[2]}x{picture.shape[1]}"


def _counter(on_step: OnStep | None, total: int) -> Callable[[Callable[[], Floats]], None]:
    """Counts steps, and shows the caller a copy of the latents: what it writes there is its own."""
    done = 0

    def notify(fetch: Callable[[], Floats]) -> None:
        nonlocal done
        step, done = done, done + 1
        answer = None if on_step is None else on_step(step, total, fetch().copy())
        if isinstance(answer, bool | np.bool_) and not answer:
            raise Cancelled(f"the callback cancelled the request at step {done} of {total}")

    return notify
