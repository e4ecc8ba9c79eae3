"""Parts that several places are made of: hills, water, stones, trees."""

from __future__ import annotations

from math import pi, sin
from random import Random

from .canvas import Colour, Point, mix, scaled
from .view import View

BOTTOM = 130.0


def rolling(rng: Random, y: float, swing: float, waves: float = 1.3) -> list[Point]:
    """A smooth hill line across the picture."""
    phase, second = rng.uniform(0, 2 * pi), rng.uniform(0, 2 * pi)
    points = []
    for i in range(33):
        t = i / 32 * 2 * pi * waves
        points.append((i * 4.0, y - swing * (0.65 * sin(t + phase) + 0.35 * sin(2.1 * t + second))))
    return points


def fill_below(view: View, line: list[Point], colour: Colour) -> None:
    """Fill from a line down to the bottom edge."""
    view.canvas.poly([(-2, BOTTOM), (-2, line[0][1]), *line, (130, BOTTOM)], colour)


def water(view: View, y0: float, y1: float = 128, shimmer: int = 26) -> None:
    """A sheet of water with streaks of light, and the sun's or moon's path on it."""
    light, canvas = view.light, view.canvas
    far = mix(light.water, light.low, 0.55)
    canvas.gradient(y0, y1, [(0.0, far), (0.35, light.water), (1.0, scaled(light.water, 0.82))])
    _streaks(view, y0 + 2, y1, mix(light.water, light.low, 0.5), shimmer)
    if view.orb:
        _light_path(view, y0, y1)


def _streaks(view: View, y0: float, y1: float, colour: Colour, count: int) -> None:
    rng = view.rng
    for _ in range(count):
        near = rng.random()
        y = y0 + (y1 - y0) * near
        x, half = rng.uniform(0, 128), 3 + 7 * near * rng.random()
        thick = 0.35 + 0.5 * near
        view.canvas.poly([(x - half, y), (x, y - thick), (x + half, y), (x, y + thick)], colour)


def _light_path(view: View, y0: float, y1: float) -> None:
    assert view.orb is not None
    x, rng = view.orb[0], view.rng
    colour = mix(view.light.orb, view.light.water, 0.15 + 0.5 * view.light.murk)
    y = y0 + 0.8
    while y < y1:
        near = (y - y0) / (y1 - y0)
        half, thick = 4.5 + 5 * near * rng.random(), 0.45 + 0.5 * near
        cx = x + rng.uniform(-1, 1) * (1.5 + 3 * near)
        view.canvas.poly([(cx - half, y), (cx, y - thick), (cx + half, y), (cx, y + thick)], colour)
        y += 1.9 + 1.6 * near


def rock(view: View, x: float, y: float, r: float, base: Colour) -> None:
    """A faceted stone: dark side, lit top."""
    rng, light = view.rng, view.light
    h = r * rng.uniform(0.6, 0.8)
    left, right, peak = (x - r, y), (x + r, y), (x - 0.25 * r, y - h)
    shoulder = (x + 0.5 * r, y - 0.78 * h)
    shade = light.on(scaled(base, 0.68), cover=0.25)
    view.canvas.poly([left, (x - 0.8 * r, y - 0.5 * h), peak, shoulder, right], shade)
    lit = light.on(base, cover=1.0)
    view.canvas.poly([(x - 0.8 * r, y - 0.5 * h), peak, shoulder, (x + 0.05 * r, y - 0.4 * h)], lit)


def tufts(view: View, y0: float, y1: float, colour: Colour, count: int) -> None:
    """Short blades of grass that give a flat ground its scale."""
    rng = view.rng
    for _ in range(count):
        x, y = rng.uniform(0, 128), rng.uniform(y0, y1)
        h = 1.2 + 1.8 * (y - y0) / (y1 - y0)
        view.canvas.poly([(x - 0.7, y), (x - 0.9, y - h), (x + 0.1, y - 0.4)], colour)
        view.canvas.poly([(x - 0.1, y), (x + 0.9, y - 0.9 * h), (x + 0.7, y)], colour)


def round_tree(
    view: View, x: float, y: float, h: float, leaf: Colour, bright: Colour, bark: Colour
) -> None:
    """A broad-leaved tree, all curves, so that it is never taken for a pine."""
    rng, canvas = view.rng, view.canvas
    r = 0.27 * h
    wide, slim = 0.05 * h, 0.025 * h
    canvas.poly([(x - wide, y), (x - slim, y - h), (x + slim, y - h), (x + wide, y)], bark)
    lumps = [(0.0, 0.74, 1.0), (-0.2, 0.6, 0.8), (0.2, 0.62, 0.78)]
    lumps += [(-0.1, 0.86, 0.62), (0.1, 0.88, 0.6)]
    jittered = [(x + (dx + rng.uniform(-0.03, 0.03)) * h, y - dy * h, s * r) for dx, dy, s in lumps]
    for cx, cy, radius in jittered:
        canvas.disc(cx, cy, radius, radius, leaf)
    for cx, cy, radius in jittered[1:]:
        canvas.disc(cx - 0.22 * radius, cy - 0.3 * radius, 0.62 * radius, 0.52 * radius, bright)


def treeline(view: View, y: float, r: float, colour: Colour) -> None:
    """A distant wood: a scalloped band."""
    rng = view.rng
    view.canvas.rect(0, y, 128, BOTTOM, colour)
    x = -r
    while x < 128 + r:
        radius = r * rng.uniform(0.75, 1.25)
        view.canvas.disc(x, y + 0.1 * r, radius, radius * 1.1, colour)
        x += radius * 1.05
