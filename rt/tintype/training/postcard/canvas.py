"""A supersampled drawing surface measured in the units of a 128-unit-wide picture."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

UNITS = 128
OVERSAMPLE = 3

Colour = tuple[int, int, int]
Point = tuple[float, float]


def mix(a: Colour, b: Colour, t: float) -> Colour:
    """`a` at t=0, `b` at t=1."""
    return (
        round(a[0] + (b[0] - a[0]) * t),
        round(a[1] + (b[1] - a[1]) * t),
        round(a[2] + (b[2] - a[2]) * t),
    )


def scaled(colour: Colour, gain: float) -> Colour:
    """The colour, brighter or darker, without a change of hue."""
    return mix((0, 0, 0), colour, gain) if gain <= 1 else mix(colour, (255, 255, 255), gain - 1)


@lru_cache(maxsize=32)
def _glow(diameter: int) -> Image.Image:
    """A round mask that is full in the middle and falls off smoothly to nothing."""
    axis = np.linspace(-1, 1, diameter)
    distance = np.sqrt(axis[:, None] ** 2 + axis[None, :] ** 2)
    return Image.fromarray((255 * np.clip(1 - distance, 0, 1) ** 2).astype(np.uint8))


def _column(stops: Sequence[tuple[float, Sequence[float]]], height: int) -> np.ndarray:
    """Interpolate `(y, values)` stops at the middle of each of `height` rows over [0, 1]."""
    rows = (np.arange(height) + 0.5) / height
    at = [y for y, _ in stops]
    channels = [np.interp(rows, at, [v[i] for _, v in stops]) for i in range(len(stops[0][1]))]
    return np.stack(channels, axis=-1)


class Canvas:
    """Draws opaque shapes and soft veils; y grows downwards, the picture is UNITS square."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.k = size * OVERSAMPLE / UNITS
        self.image = Image.new("RGB", (size * OVERSAMPLE, size * OVERSAMPLE))
        self._draw = ImageDraw.Draw(self.image)

    def poly(self, points: Sequence[Point], colour: Colour) -> None:
        k = self.k
        self._draw.polygon([(x * k, y * k) for x, y in points], fill=colour)

    def disc(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        k = self.k
        box = ((x - rx) * k, (y - ry) * k, (x + rx) * k, (y + ry) * k)
        self._draw.ellipse(box, fill=colour)

    def rect(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        k = self.k
        # Pillow includes the far corner; without the -1 every box would be a subpixel too big.
        box = (x0 * k, y0 * k, max(x1 * k - 1, x0 * k), max(y1 * k - 1, y0 * k))
        self._draw.rectangle(box, fill=colour)

    def line(self, points: Sequence[Point], colour: Colour, width: float) -> None:
        k = self.k
        self._draw.line([(x * k, y * k) for x, y in points], fill=colour, width=self.px(width))

    def px(self, units: float) -> int:
        """A length in supersampled pixels, at least one."""
        return max(1, round(units * self.k))

    def gradient(self, y0: float, y1: float, stops: Sequence[tuple[float, Colour]]) -> None:
        """Fill the rows from y0 to y1 with a vertical gradient."""
        top, bottom = round(y0 * self.k), round(y1 * self.k)
        width = self.image.width
        column = np.rint(_column(stops, bottom - top)).astype(np.uint8)
        band = np.repeat(column[:, None, :], width, axis=1)
        self.image.paste(Image.fromarray(band), (0, top))

    def veil(self, colour: Colour, stops: Sequence[tuple[float, float]]) -> None:
        """Cover the whole picture with a colour whose opacity changes with height."""
        edge = self.image.width
        alpha = _column([(y, (a,)) for y, a in stops], edge)[:, 0]
        rows = np.rint(255 * alpha).astype(np.uint8)
        mask = Image.fromarray(np.repeat(rows[:, None], edge, axis=1))
        self.image.paste(colour, (0, 0), mask)

    def glow(self, x: float, y: float, radius: float, colour: Colour, strength: float) -> None:
        """A soft round light."""
        self.soft_disc(x, y, radius, radius, colour, strength)

    def soft_disc(
        self, x: float, y: float, rx: float, ry: float, colour: Colour, strength: float
    ) -> None:
        """An ellipse that fades out from its middle."""
        mask = _glow(64).resize((2 * self.px(rx), 2 * self.px(ry)), Image.Resampling.BILINEAR)
        mask = mask.point(lambda v: v * strength)
        corner = (round(x * self.k) - mask.width // 2, round(y * self.k) - mask.height // 2)
        self.blend(colour, mask, corner)

    def mask(self) -> tuple[Image.Image, ImageDraw.ImageDraw]:
        """An empty opacity mask of the canvas' size, and a pen for it (in subpixels)."""
        image = Image.new("L", self.image.size)
        return image, ImageDraw.Draw(image)

    def blend(self, colour: Colour, mask: Image.Image, at: tuple[int, int] = (0, 0)) -> None:
        """Paint a colour through an opacity mask."""
        box = (at[0], at[1], at[0] + mask.width, at[1] + mask.height)
        self.image.paste(colour, box, mask)

    def pixels(self) -> np.ndarray:
        """The finished picture: uint8 [size, size, 3]."""
        return np.asarray(self.image.reduce(OVERSAMPLE)).copy()
