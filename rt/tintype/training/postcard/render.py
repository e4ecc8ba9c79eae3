"""Compose a scene: sky, land, subjects, weather."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from random import Random

import numpy as np
from PIL import Image

from .canvas import UNITS, Canvas, mix
from .light import light_for
from .places import draw_place
from .scene import Scene
from .sky import draw_sky, orb_position
from .subjects import ASPECT, Paint, foot_margin, outlined, sprite
from .view import View
from .weather import before_subjects, behind_subjects


@dataclass(frozen=True)
class Crowd:
    """How big the subjects are and where their group stands, for one count."""

    tallest: float
    widest: float
    gap: float
    left: float


# The more there are, the smaller each and the nearer to the middle the group's centre.
_CROWDS = {1: Crowd(54, 46, 0, 35), 2: Crowd(41, 30, 3.5, 35), 3: Crowd(35, 22.5, 3.0, 38)}


@dataclass(frozen=True)
class Placed:
    """One subject: its foot's middle and its height, in picture units."""

    x: float
    y: float
    height: float


def render(scene: Scene, size: int = 128) -> np.ndarray:
    """Draw a scene as uint8 [size, size, 3]; the same scene is always the same picture."""
    rng = Random(scene.seed)
    canvas = Canvas(size)
    light = light_for(scene.time, scene.weather)
    view = View(scene, canvas, light, rng, orb_position(scene, rng))
    draw_sky(view)
    draw_place(view)
    behind_subjects(view)
    paint = Paint.of(scene.colour, light)
    for placed in arrange(scene, rng):
        _draw_subject(view, placed, paint)
    before_subjects(view)
    return canvas.pixels()


def arrange(scene: Scene, rng: Random) -> list[Placed]:
    """Stand the subjects in a row about the group's centre."""
    crowd, aspect = _CROWDS[scene.count], ASPECT[scene.subject]
    height = min(crowd.tallest, crowd.widest / aspect) * rng.uniform(0.93, 1.0)
    step = height * aspect + crowd.gap
    if aspect < 0.55:
        step = max(step, 0.62 * height)  # slim towers look better with air between them
    middle = {"left": crowd.left, "centre": 64, "right": UNITS - crowd.left}[scene.position]
    middle += rng.uniform(-2, 2) if scene.count < 3 else rng.uniform(-0.5, 0.5)
    first = middle - step * (scene.count - 1) / 2
    return [
        Placed(first + i * step, _foot(scene, i, height, rng), height * rng.uniform(0.95, 1.0))
        for i in range(scene.count)
    ]


def _foot(scene: Scene, index: int, height: float, rng: Random) -> float:
    if scene.subject == "hot-air balloon":
        return 36 + height / 2 + (-4 if index % 2 else 4) * (scene.count > 1) + rng.uniform(-3, 3)
    if scene.subject == "sailing boat":
        return 109 + (3 if index % 2 else 0) + rng.uniform(-2, 2)
    return 112 + (2.5 if index % 2 else 0) + rng.uniform(-1.5, 1.5)


def _draw_subject(view: View, placed: Placed, paint: Paint) -> None:
    kind, canvas = view.scene.subject, view.canvas
    image = sprite(kind, paint, placed.height * canvas.k, view.rng)
    left = round(placed.x * canvas.k - image.width / 2)
    top = round(placed.y * canvas.k) + foot_margin() - image.height
    if kind == "sailing boat":
        _reflection(view, image, left, round(placed.y * canvas.k))
    elif kind != "hot-air balloon":
        _contact_shadow(view, placed)
    if view.light.lamps and kind == "lighthouse":
        _lamp(view, placed)
    canvas.blend(view.light.outline, outlined(image, canvas.px(0.5)), (left, top))
    canvas.image.paste(image, (left, top), image)


@lru_cache(maxsize=8)
def _beams(width: int, height: int) -> Image.Image:
    """Two wedges of light that leave the middle and fade on the way."""
    x = np.abs(np.linspace(-1, 1, width))[None, :]
    y = np.abs(np.linspace(-1, 1, height))[:, None]
    inside = np.clip((x - y) * 6 + 0.5, 0, 1)
    return Image.fromarray((105 * inside * (1 - x)).astype(np.uint8))


def _lamp(view: View, placed: Placed) -> None:
    """The lighthouse's lamp after sunset: a glow and two faint beams."""
    canvas, x, y = view.canvas, placed.x, placed.y - 0.81 * placed.height
    beams = _beams(canvas.px(76), canvas.px(14))
    corner = (round(x * canvas.k) - beams.width // 2, round(y * canvas.k) - beams.height // 2)
    canvas.blend((255, 240, 176), beams, corner)
    canvas.glow(x, y, 11, (255, 236, 150), 0.8)


def _contact_shadow(view: View, placed: Placed) -> None:
    canvas = view.canvas
    half = 0.62 * ASPECT[view.scene.subject] * placed.height
    colour = mix(view.light.outline, (0, 0, 0), 0.2)
    canvas.soft_disc(placed.x + 1, placed.y - 0.3, half, 0.07 * placed.height, colour, 0.75)


def _reflection(view: View, image: Image.Image, left: int, foot: int) -> None:
    """The boat upside down in the water, squeezed and faint."""
    canvas = view.canvas
    body = image.crop((0, 0, image.width, image.height - foot_margin()))
    mirrored = body.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    mirrored = mirrored.resize((image.width, round(image.height * 0.42)))
    faint = mirrored.getchannel("A").point(lambda v: v * 2 // 5)
    canvas.image.paste(mirrored.convert("RGB"), (left, foot), faint)
