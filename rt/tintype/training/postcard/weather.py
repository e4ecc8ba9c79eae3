"""What the weather puts between the land and the viewer."""

from __future__ import annotations

from .canvas import mix
from .view import View


def behind_subjects(view: View) -> None:
    """Fog lies thickest over the far land."""
    if view.scene.weather == "fog":
        stops = [(0.0, 0.1), (0.25, 0.4), (0.55, 0.6), (0.7, 0.38), (0.9, 0.1), (1.0, 0.1)]
        view.canvas.veil(view.light.fog, stops)


def before_subjects(view: View) -> None:
    """The overlay in front of everything."""
    if view.scene.weather == "fog":
        _mist(view)
    elif view.scene.weather == "rain":
        _rain(view)
    elif view.scene.weather == "snow":
        _snow(view)


def _mist(view: View) -> None:
    """A thin veil, and drifting banks at the subjects' feet."""
    light, canvas, rng = view.light, view.canvas, view.rng
    canvas.veil(light.fog, [(0.0, 0.0), (0.4, 0.12), (0.75, 0.18), (0.9, 0.3), (1.0, 0.42)])
    bank, pen = canvas.mask()
    k = canvas.k
    for row in (84, 98, 112, 122):
        x, y = rng.uniform(10, 118), row + rng.uniform(-3, 3)
        rx, ry = rng.uniform(30, 52), rng.uniform(1.8, 3.2)
        pen.ellipse(((x - rx) * k, (y - ry) * k, (x + rx) * k, (y + ry) * k), fill=95)
    canvas.blend(mix(light.fog, (255, 255, 255), 0.15), bank)


def _rain(view: View) -> None:
    canvas, rng, k = view.canvas, view.rng, view.canvas.k
    canvas.veil(view.light.grey, [(0.0, 0.1), (1.0, 0.16)])
    mask, pen = canvas.mask()
    for _ in range(95):
        x, y, length = rng.uniform(-4, 140), rng.uniform(-8, 124), rng.uniform(7, 12)
        ends = [(x * k, y * k), ((x - 0.34 * length) * k, (y + length) * k)]
        pen.line(ends, fill=rng.randrange(110, 185), width=canvas.px(0.7))
    canvas.blend(mix(view.light.low, (236, 242, 250), 0.7), mask)


def _snow(view: View) -> None:
    canvas, rng, k = view.canvas, view.rng, view.canvas.k
    mask, pen = canvas.mask()
    for i in range(100):
        r = (0.7 if i % 3 else 1.35) * rng.uniform(0.85, 1.25)
        x, y = rng.uniform(0, 128), rng.uniform(0, 128)
        pen.ellipse(((x - r) * k, (y - r) * k, (x + r) * k, (y + r) * k), fill=225)
    white = mix((255, 255, 255), view.light.haze, 0.15 if view.scene.time == "night" else 0.0)
    canvas.blend(white, mask)
