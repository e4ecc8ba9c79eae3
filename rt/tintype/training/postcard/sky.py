"""The sky: its gradient, the sun, the moon, stars and clouds."""

from __future__ import annotations

from random import Random

from .canvas import Colour, mix
from .scene import Scene
from .view import View

# How high the far land reaches, so that a low sun sits on it and not behind it.
SKYLINE = {"coast": 64, "mountains": 40, "desert": 58, "forest": 44, "meadow": 56, "city": 42}


def orb_position(scene: Scene, rng: Random) -> tuple[float, float] | None:
    """Where the sun or moon stands: on the side the subjects leave free."""
    if scene.sky not in ("sun", "moon"):
        return None
    free = {"left": 1, "right": -1}.get(scene.position) or rng.choice((-1, 1))
    offset = rng.uniform(26, 42) if scene.position != "centre" else rng.uniform(40, 48)
    low = scene.sky == "sun" and scene.time in ("dawn", "dusk")
    y = SKYLINE[scene.place] - rng.uniform(5, 9) if low else rng.uniform(17, 24)
    return 64 + free * offset, y


def draw_sky(view: View) -> None:
    """Everything behind the land."""
    light = view.light
    stops = [(0.0, light.top), (0.34, light.middle), (0.6, light.low), (1.0, light.low)]
    view.canvas.gradient(0, 128, stops)
    if view.scene.sky == "stars":
        _stars(view)
    elif view.scene.sky == "sun":
        _sun(view)
    elif view.scene.sky == "moon":
        _moon(view)
    if view.scene.weather == "cloudy":
        _cumulus(view)
    elif view.scene.weather == "rain":
        _rain_cloud(view)


def _sun(view: View) -> None:
    assert view.orb is not None
    (x, y), light, canvas = view.orb, view.light, view.canvas
    veiled = 0.45 * light.murk
    radius = 9.5 if view.scene.time == "noon" else 11.5
    warm = mix(light.orb, (255, 120, 60), 0.35) if view.scene.time == "dusk" else light.orb
    canvas.glow(x, y, 44, warm, 0.75 - veiled)
    canvas.glow(x, y, 24, light.orb, 0.7 - veiled)
    canvas.disc(x, y, radius, radius, mix(light.orb, light.haze, veiled))


def _moon(view: View) -> None:
    assert view.orb is not None
    (x, y), light, canvas = view.orb, view.light, view.canvas
    pale = mix((250, 246, 222), light.haze, 0.3 * light.murk)
    at = (round(x * canvas.k), round(y * canvas.k))
    behind = canvas.image.getpixel(at)
    canvas.glow(x, y, 30, pale, 0.42)
    canvas.disc(x, y, 9.5, 9.5, pale)
    # A crescent cannot be taken for the sun, not even at sixteen pixels.
    dark = mix(behind[:3], pale, 0.14)  # type: ignore[index,arg-type]
    canvas.disc(x + 4.2, y - 2.2, 8, 8, dark)


def _stars(view: View) -> None:
    rng, canvas = view.rng, view.canvas
    faint = mix((255, 250, 225), view.light.middle, 0.25)
    for _ in range(34):
        radius = rng.uniform(0.35, 0.75)
        canvas.disc(rng.uniform(0, 128), rng.uniform(1, 56), radius, radius, faint)
    for column in range(9):
        x = 7 + 14.2 * column + rng.uniform(-4, 4)
        _sparkle(view, x, rng.uniform(4, 34), rng.uniform(2.6, 3.8))


def _sparkle(view: View, x: float, y: float, r: float) -> None:
    inner = 0.24 * r
    points = [(x, y - r), (x + inner, y - inner), (x + r, y), (x + inner, y + inner)]
    points += [(x, y + r), (x - inner, y + inner), (x - r, y), (x - inner, y - inner)]
    view.canvas.glow(x, y, 1.6 * r, (255, 246, 210), 0.5)
    view.canvas.poly(points, (255, 250, 228))


def _cumulus(view: View) -> None:
    rng = view.rng
    for column in range(5):
        x = 4 + 30 * column + rng.uniform(-8, 8)
        y = (14 if column % 2 else 33) + rng.uniform(-5, 5)
        # The cloud must not swallow the sun or the moon.
        width = rng.uniform(10, 17)
        if view.orb and abs(x - view.orb[0]) < 27 and abs(y - 4 - view.orb[1]) < 19:
            y = view.orb[1] + 9 + 0.75 * width
        _cloud(view, x, y, width)


def _cloud(view: View, x: float, y: float, w: float) -> None:
    """A flat-bottomed heap: the shaded heap first, the lit one a little higher on top."""
    rng, canvas, light = view.rng, view.canvas, view.light
    heap = [(-0.72, 0.26), (-0.32, 0.46), (0.16, 0.56), (0.56, 0.38), (0.84, 0.2)]
    flip = rng.choice((-1, 1))
    lumps = [(flip * dx, r * rng.uniform(0.85, 1.12)) for dx, r in heap]
    for rise, shrink, colour in ((0.0, 1.0, light.cloud_shade), (0.15, 0.93, light.cloud)):
        for dx, r in lumps:
            cy, radius = y - (r * 0.62 + rise) * w, r * w * shrink
            canvas.disc(x + dx * w, cy, radius, radius * (1 - 0.4 * rise), colour)
    canvas.disc(x, y - 0.06 * w, 1.0 * w, 0.18 * w, light.cloud_shade)


def _rain_cloud(view: View) -> None:
    rng, canvas, light = view.rng, view.canvas, view.light
    for row, darkness in ((22, 0.25), (12, 0.5)):
        colour: Colour = mix(mix(light.grey, light.top, 0.3), (24, 26, 36), darkness * 0.75)
        canvas.rect(0, 0, 128, row - 6, colour)
        x = -6.0
        while x < 134:
            r = rng.uniform(8, 12)
            canvas.disc(x, row - 8 + rng.uniform(-2, 2), r, r * 0.85, colour)
            x += r * 1.15
