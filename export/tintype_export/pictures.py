"""Pictures that a model is shown while it is calibrated and compared, where it asks for one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from tintype.pipeline import Family

Floats = NDArray[np.float32]


def shown(family: Family, width: int, height: int, seed: int = 0) -> dict[str, Floats]:
    """The pictures, by argument, that the model asks for beside a prompt: what varies one sees a gradient, and what is
    steered by one sees outlines, which most ControlNets know in some form."""
    pictures: dict[str, Floats] = {}
    if "image" in family.needs:
        pictures["image"] = _gradient()
    if "control_image" in family.needs:
        pictures["control_image"] = _outlines(width, height, seed)
    return pictures


def _gradient() -> Floats:
    """[1, 256, 256, 3]: red to the right, green downwards."""
    right, down = np.meshgrid(*[np.linspace(0, 1, 256, dtype=np.float32)] * 2)
    return np.stack([right, down, np.full_like(right, 0.5)], axis=-1)[None]


def _outlines(width: int, height: int, seed: int) -> Floats:
    """[1, h, w, 3]: ellipses and rectangles, white on black."""
    canvas = Image.new("RGB", (width, height))
    pen, rng = ImageDraw.Draw(canvas), np.random.default_rng(seed)
    thickness = max(1, min(width, height) // 128)
    for draw in (pen.ellipse, pen.rectangle, pen.ellipse, pen.rectangle):
        left, top = rng.uniform(0, 0.6, 2) * (width, height)
        wide, high = rng.uniform(0.2, 0.4, 2) * (width, height)
        draw((left, top, left + wide, top + high), outline="white", width=thickness)
    return np.asarray(np.asarray(canvas, np.float32)[None] / 255, np.float32)
