"""The subjects, drawn in a box one unit high whose foot is at (0, 0); y grows upwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import cos, pi, sin
from random import Random

from PIL import Image, ImageChops, ImageDraw

from .canvas import Colour, Point, mix, scaled
from .light import Light

PAINTS: dict[str, Colour] = {
    "red": (214, 34, 40),
    "orange": (245, 128, 16),
    "yellow": (250, 216, 36),
    "green": (28, 152, 62),
    "blue": (30, 92, 222),
    "purple": (134, 48, 184),
    "white": (248, 247, 243),
}

# Width over height: what the composition needs to keep neighbours apart.
ASPECT = {
    "lighthouse": 0.46,
    "house": 0.86,
    "pine": 0.64,
    "sailing boat": 0.84,
    "hot-air balloon": 0.74,
    "windmill": 0.7,
    "castle": 0.88,
}
_MARGIN = 3  # subpixels around the box, for the outline


@dataclass(frozen=True)
class Paint:
    """The colours of one subject in one light."""

    base: Colour
    lit: Colour
    shade: Colour
    trim: Colour
    dark: Colour
    wood: Colour
    glass: Colour

    @classmethod
    def of(cls, colour: str, light: Light) -> Paint:
        """Mix the paint; the trim is what stands off it."""
        base = PAINTS[colour]
        trim = (188, 196, 206) if colour == "white" else (250, 248, 240)
        shade = (208, 212, 222) if colour == "white" else scaled(base, 0.8)
        glass = (255, 222, 120) if light.lamps else light.paint((60, 78, 104))
        return cls(
            base=light.paint(base),
            lit=light.paint(mix(base, (255, 255, 255), 0.22)),
            shade=light.paint(shade),
            trim=light.paint(trim),
            dark=light.paint((58, 54, 70)),
            wood=light.paint((134, 84, 50)),
            glass=glass,
        )


class Pen:
    """Draws opaque shapes on a transparent sprite of a given height in subpixels."""

    def __init__(self, aspect: float, height: float) -> None:
        self.h = height
        self._x0 = aspect * height / 2 + _MARGIN
        self._y0 = height + _MARGIN
        size = (round(2 * self._x0), round(self._y0 + _MARGIN))
        self.image = Image.new("RGBA", size)
        self._draw = ImageDraw.Draw(self.image)

    def _at(self, point: Point) -> Point:
        return (self._x0 + point[0] * self.h, self._y0 - point[1] * self.h)

    def poly(self, points: Sequence[Point], colour: Colour) -> None:
        self._draw.polygon([self._at(p) for p in points], fill=colour)

    def rect(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        self.poly([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], colour)

    def disc(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        (left, top), (right, bottom) = self._at((x - rx, y + ry)), self._at((x + rx, y - ry))
        self._draw.ellipse((left, top, right, bottom), fill=colour)

    def line(self, points: Sequence[Point], colour: Colour, width: float) -> None:
        pixels = max(1, round(width * self.h))
        self._draw.line([self._at(p) for p in points], fill=colour, width=pixels)

    def arch(self, x: float, y0: float, y1: float, half: float, colour: Colour) -> None:
        """A doorway: straight sides, round top."""
        self.rect(x - half, y0, x + half, y1 - half, colour)
        self.disc(x, y1 - half, half, half, colour)


def _lighthouse(pen: Pen, paint: Paint, rng: Random) -> None:
    def half(y: float) -> float:
        return 0.185 - 0.1 * y

    def band(y0: float, y1: float, left: Colour, right: Colour) -> None:
        pen.poly([(-half(y0), y0), (-half(y1), y1), (0.04, y1), (0.04, y0)], left)
        pen.poly([(half(y0), y0), (half(y1), y1), (0.04, y1), (0.04, y0)], right)

    pen.rect(-0.22, 0, 0.22, 0.06, paint.dark)
    band(0.06, 0.72, paint.base, paint.shade)
    for y in (0.27, 0.52):
        band(y, y + 0.085, paint.trim, scaled(paint.trim, 0.84))
    pen.arch(-0.02, 0.06, 0.2, 0.05, paint.dark)
    pen.rect(-0.045, 0.42, 0.015, 0.49, paint.glass)
    pen.rect(-0.165, 0.72, 0.165, 0.755, paint.dark)
    pen.rect(-0.095, 0.755, 0.095, 0.86, (255, 232, 140))
    pen.rect(-0.012, 0.755, 0.012, 0.86, paint.dark)
    pen.poly([(-0.135, 0.86), (0, 0.98), (0.135, 0.86)], paint.base)
    pen.poly([(0.03, 0.86), (0, 0.98), (0.135, 0.86)], paint.shade)


def _house(pen: Pen, paint: Paint, rng: Random) -> None:
    side = rng.choice((-1, 1))
    pen.rect(side * 0.2 - 0.055, 0.6, side * 0.2 + 0.055, 0.98, paint.dark)
    pen.poly([(-0.35, 0), (-0.35, 0.52), (0, 0.9), (0.35, 0.52), (0.35, 0)], paint.base)
    pen.poly([(0.2, 0), (0.2, 0.68), (0.35, 0.52), (0.35, 0)], paint.shade)
    roof = [(-0.43, 0.45), (0, 0.92), (0.43, 0.45)]
    pen.line(roof, paint.dark, 0.1)
    pen.disc(0, 0.92, 0.05, 0.05, paint.dark)
    pen.rect(-0.35, 0, 0.35, 0.05, paint.dark)
    for x in (-0.23, 0.23):
        pen.rect(x - 0.085, 0.2, x + 0.085, 0.42, paint.trim)
        pen.rect(x - 0.06, 0.225, x + 0.06, 0.395, paint.glass)
        pen.rect(x - 0.01, 0.225, x + 0.01, 0.395, paint.trim)
    pen.rect(-0.085, 0, 0.085, 0.32, paint.trim)
    pen.rect(-0.06, 0, 0.06, 0.295, paint.wood)
    pen.disc(0, 0.57, 0.075, 0.075, paint.trim)
    pen.disc(0, 0.57, 0.05, 0.05, paint.glass)


def _pine(pen: Pen, paint: Paint, rng: Random) -> None:
    pen.rect(-0.045, 0, 0.045, 0.16, paint.wood)
    tiers = ((0.1, 0.5, 0.31), (0.32, 0.7, 0.25), (0.53, 0.86, 0.19), (0.7, 1.0, 0.13))
    for low, high, half in tiers:
        drop = 0.045
        hem = [(half * t, low + (drop if i % 2 else 0)) for i, t in enumerate((1, 0.6, 0.3, 0.0))]
        left = [(-x, y) for x, y in hem]
        pen.poly([(0, high), *left], paint.base)
        pen.poly([(0, high), *hem], paint.shade)
        pen.poly([(0, high), (-half * 0.8, low + 0.06), (-half * 0.45, low + 0.1)], paint.lit)


def _boat(pen: Pen, paint: Paint, rng: Random) -> None:
    pen.rect(-0.02, 0.16, 0.02, 1.0, paint.wood)
    pen.poly([(0.03, 0.25), (0.03, 0.99), (0.16, 0.7), (0.4, 0.25)], paint.base)
    pen.poly([(0.03, 0.25), (0.2, 0.25), (0.03, 0.7)], paint.lit)
    pen.poly([(-0.04, 0.25), (-0.04, 0.9), (-0.2, 0.55), (-0.37, 0.25)], paint.shade)
    pen.poly([(-0.4, 0.2), (0.41, 0.2), (0.3, 0.0), (-0.27, 0.0)], paint.wood)
    pen.poly([(-0.41, 0.21), (0.42, 0.21), (0.39, 0.145), (-0.37, 0.145)], paint.trim)


def _balloon(pen: Pen, paint: Paint, rng: Random) -> None:
    gores = ((0.36, paint.shade), (0.31, paint.base), (0.17, paint.trim), (0.11, paint.base))
    for half, colour in gores:
        pen.disc(0, 0.65, half, 0.345, colour)
        wide, neck = 0.86 * half, 0.25 * half
        pen.poly([(-wide, 0.475), (-neck, 0.2), (neck, 0.2), (wide, 0.475)], colour)
    pen.disc(-0.2, 0.76, 0.05, 0.1, paint.lit)
    for x in (-0.08, 0.08):
        pen.line([(x, 0.2), (x * 0.8, 0.11)], paint.dark, 0.018)
    pen.rect(-0.09, 0.185, 0.09, 0.22, paint.dark)
    pen.poly([(-0.085, 0.12), (0.085, 0.12), (0.07, 0.0), (-0.07, 0.0)], paint.wood)
    pen.rect(-0.095, 0.1, 0.095, 0.13, paint.dark)


def _windmill(pen: Pen, paint: Paint, rng: Random) -> None:
    pen.poly([(-0.28, 0), (-0.18, 0.68), (0.18, 0.68), (0.28, 0)], paint.base)
    pen.poly([(0.06, 0), (0.06, 0.68), (0.18, 0.68), (0.28, 0)], paint.shade)
    pen.disc(0, 0.68, 0.18, 0.13, paint.dark)
    pen.rect(-0.205, 0.66, 0.205, 0.69, paint.dark)
    pen.arch(-0.03, 0, 0.2, 0.065, paint.dark)
    pen.rect(-0.07, 0.28, 0.01, 0.37, paint.glass)
    turn = rng.uniform(0.5, 1.07)  # near a saltire: upright sails would hide the tower
    for quarter in range(4):
        _sail(pen, paint, turn + quarter * pi / 2)
    pen.disc(0, 0.68, 0.04, 0.04, paint.wood)


def _sail(pen: Pen, paint: Paint, angle: float) -> None:
    c, s = cos(angle), sin(angle)

    def turned(along: float, across: float) -> Point:
        return (along * c - across * s, 0.68 + along * s + across * c)

    pen.line([turned(0, 0), turned(0.36, 0)], paint.wood, 0.035)
    cloth = [turned(0.12, 0.012), turned(0.36, 0.012), turned(0.36, 0.09), turned(0.12, 0.075)]
    pen.poly(cloth, mix(paint.trim, (255, 240, 205), 0.4))
    for along in (0.2, 0.29):
        pen.line([turned(along, 0.0), turned(along, 0.1)], paint.wood, 0.014)


def _castle(pen: Pen, paint: Paint, rng: Random) -> None:
    pen.rect(-0.12, 0.4, 0.12, 0.74, paint.shade)
    _cone(pen, 0, 0.74, 0.16, 0.98, paint)
    pen.rect(-0.3, 0, 0.3, 0.46, paint.base)
    for i in range(5):
        pen.rect(-0.29 + 0.125 * i, 0.46, -0.215 + 0.125 * i, 0.52, paint.base)
    for x in (-0.32, 0.32):
        pen.rect(x - 0.105, 0, x + 0.105, 0.62, paint.base)
        pen.rect(x + 0.02, 0, x + 0.105, 0.62, paint.shade)
        _cone(pen, x, 0.62, 0.125, 0.86, paint)
        pen.rect(x - 0.05, 0.42, x + 0.01, 0.53, paint.glass)
    pen.rect(-0.035, 0.56, 0.035, 0.68, paint.glass)
    pen.arch(0, 0, 0.28, 0.105, paint.trim)
    pen.arch(0, 0, 0.25, 0.08, paint.dark)


def _cone(pen: Pen, x: float, y: float, half: float, top: float, paint: Paint) -> None:
    pen.poly([(x - half, y), (x, top), (x + half, y)], paint.dark)
    pen.poly([(x - half, y), (x, top), (x - 0.2 * half, y)], mix(paint.dark, (150, 150, 170), 0.3))


_SUBJECTS: dict[str, Callable[[Pen, Paint, Random], None]] = {
    "lighthouse": _lighthouse,
    "house": _house,
    "pine": _pine,
    "sailing boat": _boat,
    "hot-air balloon": _balloon,
    "windmill": _windmill,
    "castle": _castle,
}


def sprite(kind: str, paint: Paint, height: float, rng: Random) -> Image.Image:
    """The subject as RGBA, its foot `foot_margin()` subpixels above the sprite's lower edge."""
    pen = Pen(ASPECT[kind], height)
    _SUBJECTS[kind](pen, paint, rng)
    return pen.image


def foot_margin() -> int:
    """Empty subpixels under a sprite's foot."""
    return _MARGIN


def outlined(image: Image.Image, thickness: int) -> Image.Image:
    """The sprite's silhouette grown by a few subpixels: the mask of its outline."""
    alpha = image.getchannel("A")
    grown = alpha
    for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        grown = ImageChops.lighter(grown, ImageChops.offset(alpha, dx * thickness, dy * thickness))
    return grown
