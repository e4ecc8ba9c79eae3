"""What a user asked for, checked once and spread into one request an image."""

from __future__ import annotations

import operator
import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tintype.errors import RequestError
from tintype.guidance import Scale, as_number
from tintype.images import from_torch, is_tensor

SEEDS = 1 << 64
_MOST_IMAGES = 65_536  # of one call, which has them all in memory
Floats = NDArray[np.float32]
_SIZE = re.compile(r"(\d{1,99})x(\d{1,99})")  # int() has a limit of its own, of thousands


# The arguments that only unCLIP takes, in the order of `Cascade`'s fields.
CASCADE = ("prior_num_inference_steps", "prior_guidance_scale", "super_res_num_inference_steps")


@dataclass(frozen=True)
class Cascade:
    """What unCLIP does before the steps of a request, which draw the small picture, and behind them."""

    prior_steps: int
    prior_guidance: float
    enlarging_steps: int


@dataclass(frozen=True)
class ImageRequest:
    """One image, with nothing left open.

    `latents` is unit noise float32 [1, c, h/f, w/f], or None to draw it; `image` [1, h, w, 3] in 0..1 and `mask`
    [1, h, w, 1], 1 where the picture is painted anew, are what an edit begins with, `strength` the share of steps.
    `control` [1, h, w, 3] in 0..1 is what steers a model with a ControlNet, times `control_scale`.
    `embedded_guidance` is told to models that were distilled with it; `guidance` is the extrapolation's scale.
    `cascade` is unCLIP's.
    """

    prompt: str
    negative_prompt: str | None
    width: int
    height: int
    steps: int
    guidance: Scale
    seed: int
    scheduler: str
    latents: Floats | None = None
    image: Floats | None = None
    mask: Floats | None = None
    strength: float = 1.0
    control: Floats | None = None
    control_scale: float = 1.0
    guidance_rescale: float = 0.0
    guidance_parallel: float = 1.0
    embedded_guidance: float | None = None
    prompt_weighting: bool = False
    long_prompts: bool = False
    interpolate_from: tuple[int, int] | None = None
    cascade: Cascade | None = None


def spread(
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str] | None,
    per_prompt: int,
    seed: int | Sequence[int] | None,
    own: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> list[ImageRequest]:
    """One request an image; the images of a prompt are neighbours. `settings` are the fields they share.

    `own` maps the name of a field of which each image has its own to a function (count) -> one value an image.
    """
    prompts = _prompts(prompt)
    negatives = _negatives(negative_prompt, len(prompts))
    copies = whole_number("num_images_per_prompt", per_prompt, least=1)
    if len(prompts) * copies > _MOST_IMAGES:
        raise RequestError(
            f"num_images_per_prompt={per_prompt!r} makes more than {_MOST_IMAGES} images, which one call holds; "
            "call again for the others"
        )
    seeds = _seeds(seed, len(prompts) * copies)
    each = {name: values(len(seeds)) for name, values in own.items()}
    pairs = [pair for pair in zip(prompts, negatives, strict=True) for _ in range(copies)]
    return [
        ImageRequest(
            prompt=text,
            negative_prompt=negative,
            seed=number,
            **{name: values[index] for name, values in each.items()},
            **settings,
        )
        for index, ((text, negative), number) in enumerate(zip(pairs, seeds, strict=True))
    ]


def whole_number(name: str, value: Any, *, least: int) -> int:
    """An integer of at least `least`, or a RequestError that names the argument."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least or isinstance(value, bool):
        raise RequestError(f"{name}={value!r} is not a whole number of at least {least}")
    return number


def picture_size(text: str) -> tuple[int, int]:
    """A size such as 512x768 -> (512, 768)."""
    found = _SIZE.fullmatch(text)
    if not found:
        raise RequestError(f"size={reprlib.repr(text)} is not of the form WxH, such as 512x768")
    return int(found[1]), int(found[2])


def share(name: str, value: Any, *, least: float) -> float:
    """A number in [least, 1], or, where `least` is the smallest positive one, in (0, 1]; else a RequestError."""
    number = as_number(value)
    if not least <= number <= 1:
        raise RequestError(f"{name}={value!r} is outside {'[0' if least == 0 else '(0'}, 1]")
    return number


def starts(latents: NDArray[Any], count: int) -> list[Floats]:
    """The initial noise of each image [1, c, h/f, w/f]."""
    given = _real_array("latents", latents)
    if given.ndim != 4 or len(given) != count:
        raise RequestError(
            f"latents has shape {list(given.shape)}, expected [{count}, c, h/f, w/f]"
        )
    if not np.isfinite(given).all():
        raise RequestError("latents holds NaN or infinity")
    return [given[image : image + 1] for image in range(count)]


def require_latents(request: ImageRequest, shape: tuple[int, ...]) -> None:
    """Refuse latents that are not of the shape [c, h/f, w/f] of what is walked."""
    if request.latents is not None and request.latents.shape[1:] != shape:
        given = list(request.latents.shape[1:])
        raise RequestError(f"latents has shape [n, {given}], expected [n, {list(shape)}]")


def _real_array(name: str, value: Any) -> Floats:
    """Numbers as a contiguous float32 array, or a RequestError that names the argument."""
    array = from_torch(value, name) if is_tensor(value) else _array(value)
    if array.dtype.kind not in "biuf":
        raise RequestError(f"{name} is a {type(value).__name__} that holds more than real numbers")
    return np.ascontiguousarray(array, np.float32)


def _array(value: Any) -> NDArray[Any]:
    """An array of what another library keeps elsewhere, or of rows of several lengths, is of objects."""
    try:
        return np.asarray(value)
    except (RuntimeError, TypeError, ValueError):
        return np.empty(0, object)


def _prompts(prompt: str | Sequence[str]) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else _texts("prompt", prompt, str)
    if not prompts:
        raise RequestError("prompt is an empty list")
    return prompts


def _negatives(negative: str | Sequence[str] | None, count: int) -> list[str | None]:
    if negative is None or isinstance(negative, str):
        return [negative] * count
    negatives = _texts("negative_prompt", negative, (str, type(None)))
    if len(negatives) != count:
        raise RequestError(f"negative_prompt has {len(negatives)} entries for {count} prompts")
    return negatives


def _texts(name: str, given: Any, kinds: type | tuple[type, ...]) -> list[Any]:
    """A list of what is of these kinds, or a RequestError that names the argument."""
    if not isinstance(given, Sequence):
        raise RequestError(f"{name}={given!r} is neither a string nor a list of strings")
    for text in given:
        if not isinstance(text, kinds):
            raise RequestError(f"{name} holds {text!r}, which is not a string")
    return list(given)


def _seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "little")
    if isinstance(seed, Sequence):
        numbers = [_seed(each) for each in seed]
        if len(numbers) != count:
            raise RequestError(f"seed has {len(numbers)} entries for {count} images")
        return numbers
    first = _seed(seed)
    return [(first + image) % SEEDS for image in range(count)]


def _seed(value: Any) -> int:
    number = whole_number("seed", value, least=0)
    if number >= SEEDS:
        raise RequestError(f"seed={value!r} is not below 2**64")
    return number
