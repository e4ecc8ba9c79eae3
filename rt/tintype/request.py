"""What a user asked for, checked once and spread into one request an image."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tintype.errors import RequestError

SEEDS = 1 << 64


@dataclass(frozen=True)
class ImageRequest:
    """One image, with nothing left open. `latents` is unit noise float32 [1, c, h/f, w/f], or None to draw it."""

    prompt: str
    negative_prompt: str | None
    width: int
    height: int
    steps: int
    guidance: float
    seed: int
    scheduler: str
    latents: NDArray[np.float32] | None = None


def spread(
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str] | None,
    per_prompt: int,
    seed: int | Sequence[int] | None,
    latents: NDArray[Any] | None,
    settings: Mapping[str, Any],
) -> list[ImageRequest]:
    """One request an image; the images of a prompt are neighbours. `settings` are the fields they share."""
    prompts = _prompts(prompt)
    negatives = _negatives(negative_prompt, len(prompts))
    copies = whole_number("num_images_per_prompt", per_prompt, least=1)
    seeds = _seeds(seed, len(prompts) * copies)
    starts = _starts(latents, len(seeds))
    pairs = [pair for pair in zip(prompts, negatives, strict=True) for _ in range(copies)]
    return [
        ImageRequest(prompt=text, negative_prompt=negative, seed=number, latents=start, **settings)
        for (text, negative), number, start in zip(pairs, seeds, starts, strict=True)
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


def guidance_number(value: Any) -> float:
    """A finite float, or a RequestError."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RequestError(f"guidance_scale={value!r} is not a finite number")
    return number


def _prompts(prompt: str | Sequence[str]) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    for text in prompts:
        if not isinstance(text, str):
            raise RequestError(f"prompt holds {text!r}, which is not a string")
    if not prompts:
        raise RequestError("prompt is an empty list")
    return prompts


def _negatives(negative: str | Sequence[str] | None, count: int) -> list[str | None]:
    if negative is None or isinstance(negative, str):
        return [negative] * count
    if len(negative) != count:
        raise RequestError(f"negative_prompt has {len(negative)} entries for {count} prompts")
    return list(negative)


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


def _starts(latents: NDArray[Any] | None, count: int) -> list[NDArray[np.float32] | None]:
    if latents is None:
        return [None] * count
    starts = np.ascontiguousarray(latents, np.float32)
    if starts.ndim != 4 or len(starts) != count:
        raise RequestError(
            f"latents has shape {list(starts.shape)}, expected [{count}, c, h/f, w/f]"
        )
    if not np.isfinite(starts).all():
        raise RequestError("latents holds NaN or infinity")
    return [starts[image : image + 1] for image in range(count)]
