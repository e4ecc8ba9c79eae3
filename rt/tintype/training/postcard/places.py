"""The six places, each from far to near."""

from __future__ import annotations

from collections.abc import Callable

from .canvas import Colour, Point, mix, scaled
from .land import fill_below, rock, rolling, round_tree, treeline, tufts, water
from .view import View

GRASS: Colour = (150, 186, 92)
STONE: Colour = (140, 132, 128)


def draw_place(view: View) -> None:
    """Draw the land, from the skyline to the ground under the subjects."""
    _PLACES[view.scene.place](view)


def _free_side(view: View) -> int:
    """+1 where the right side has room, -1 where the left has."""
    return {"left": 1, "right": -1}.get(view.scene.position) or view.rng.choice((-1, 1))


def _coast(view: View) -> None:
    light, canvas, rng = view.light, view.canvas, view.rng
    side = _free_side(view) if view.orb is None else -_free_side(view)
    x = 64 + side * 64
    cliff = light.on((128, 122, 112), depth=0.45)
    top = light.on((142, 164, 108), depth=0.4)
    outline = [(x, 56), (x - side * 16, 57), (x - side * 26, 60), (x - side * 34, 66), (x, 66)]
    water(view, 65, shimmer=34)
    canvas.poly(outline, cliff)
    canvas.poly([(x, 54.5), (x - side * 17, 56), (x - side * 25, 59), (x, 59)], top)
    if view.water:
        _shore_rocks(view)
        return
    line = rolling(rng, 99, 2.2, waves=1.6)
    foam = mix(light.water, light.on((255, 255, 255), cover=0), 0.75)
    fill_below(view, [(px, py - 2.4) for px, py in line], foam)
    fill_below(view, line, light.on((150, 138, 122), cover=0.55))
    fill_below(view, [(px, py + 5) for px, py in rolling(rng, 101, 1.5)], light.on((188, 172, 140)))
    for i in range(9):
        x = 7 + 14.4 * i + rng.uniform(-4, 4)
        rock(view, x, rng.uniform(100, 104), rng.uniform(4, 7), STONE)
    for _ in range(6):
        rock(view, rng.uniform(0, 128), rng.uniform(121, 127), rng.uniform(4, 8), STONE)


def _shore_rocks(view: View) -> None:
    rng = view.rng
    for x, r in ((-2, 13), (12, 9), (24, 5), (104, 6), (117, 10), (130, 13)):
        rock(view, x + rng.uniform(-2, 2), 129, r * rng.uniform(0.9, 1.2), STONE)


def _mountains(view: View) -> None:
    light, rng = view.light, view.rng
    for x in (-6, 30, 62, 96, 132):
        _peak(view, x + rng.uniform(-9, 9), 84, rng.uniform(34, 46), (128, 140, 166), 0.55)
    for x in (8, 56, 108):
        _peak(view, x + rng.uniform(-12, 12), 92, rng.uniform(38, 62), (108, 116, 138), 0.12)
    fill_below(view, rolling(rng, 83, 3, waves=1.0), light.on((92, 122, 98), depth=0.15))
    if view.water:
        _lake(view, 87, (126, 150, 96))
        return
    fill_below(view, rolling(rng, 93, 3, waves=0.8), light.on((134, 160, 100)))
    fill_below(view, rolling(rng, 115, 2.5, waves=1.1), light.on((116, 146, 88)))
    for _ in range(7):
        rock(view, rng.uniform(0, 128), rng.uniform(96, 127), rng.uniform(2.5, 5), (150, 150, 156))
    tufts(view, 100, 127, light.on((92, 122, 70), cover=0.5), 14)


def _peak(view: View, x: float, base: float, h: float, stone: Colour, depth: float) -> None:
    """A mountain with a lit face, a shaded face and a cap of snow."""
    rng, light, canvas = view.rng, view.light, view.canvas
    half, top = h * rng.uniform(0.78, 0.95), base - h
    foot = x + rng.uniform(-0.1, 0.15) * h
    bright, dim = scaled(stone, 1.12), scaled(stone, 0.74)
    canvas.poly([(x - half, base), (x, top), (foot, base)], light.on(bright, depth, 0.55))
    canvas.poly([(x, top), (x + half, base), (foot, base)], light.on(dim, depth, 0.35))

    def on_edge(side: float, drop: float) -> Point:
        return (x + side * half * drop, top + h * drop)

    middle = (x + (foot - x) * 0.3, top + h * 0.3)
    lit = [(x, top), on_edge(-1, 0.34), on_edge(-0.5, 0.25), on_edge(-0.35, 0.36), middle]
    dark = [(x, top), on_edge(1, 0.36), on_edge(0.55, 0.27), on_edge(0.4, 0.38), middle]
    canvas.poly(dark, light.on((190, 204, 228), depth * 0.8, 0))
    canvas.poly(lit, light.on((250, 252, 255), depth * 0.8, 0))


def _lake(view: View, y: float, bank: Colour) -> None:
    """Water between a far bank and a near one."""
    light, rng = view.light, view.rng
    fill_below(view, rolling(rng, y - 1, 0.8), light.on(bank))
    water(view, y + 1.5, shimmer=22)
    near = rolling(rng, 123, 2.0, waves=0.9)
    fill_below(view, [(x, py - 1.2) for x, py in near], light.on(scaled(bank, 1.25)))
    fill_below(view, near, light.on(bank))


def _desert(view: View) -> None:
    light, rng = view.light, view.rng
    for x, w, h in ((18, 17, 15), (64, 11, 10), (106, 20, 18)):
        _mesa(view, x + rng.uniform(-12, 12), w, h * rng.uniform(0.8, 1.1))
    _dune(view, 71, 5, (236, 196, 138), 0.25)
    _dune(view, 82, 6, (232, 186, 120), 0.1)
    if view.water:
        _lake(view, 90, (214, 184, 112))
        for i in range(12):
            _reed(view, 2 + 11 * i + rng.uniform(-4, 4), 127)
        return
    _dune(view, 95, 5, (240, 198, 132), 0.0)
    _dune(view, 117, 4, (228, 180, 110), 0.0)
    side = _free_side(view)
    for reach, h in ((44, 21), (56, 13)):
        _cactus(view, 64 + side * (reach + rng.uniform(-3, 3)), 94 + h / 3, h)
    for _ in range(5):
        y = rng.uniform(119, 127)
        x = rng.uniform(4, 124)
        view.canvas.line([(x - 7, y), (x, y - 0.8), (x + 7, y)], light.on((206, 156, 92)), 0.5)


def _mesa(view: View, x: float, w: float, h: float) -> None:
    light, canvas = view.light, view.canvas
    base, top = 76.0, 70 - h
    right = [(x + w - 1, top), (x + w, top + 3), (x + w + 4, base)]
    left = [(x - w - 4, base), (x - w, top + 3), (x - w + 1, top)]
    canvas.poly([*left, *right], light.on((196, 116, 84), 0.42, 0.4))
    shade = light.on((160, 88, 72), 0.42, 0.2)
    canvas.poly([(x + w * 0.3, base), (x + w * 0.35, top), *right], shade)
    canvas.rect(x - w + 0.5, top + 4, x + w - 0.5, top + 5.4, light.on((222, 150, 112), 0.42, 0.4))


def _dune(view: View, y: float, swing: float, sand: Colour, depth: float) -> None:
    """A sand wave whose lee side falls into shadow."""
    light, rng = view.light, view.rng
    line = rolling(rng, y, swing, waves=rng.uniform(0.8, 1.2))
    fill_below(view, line, light.on(sand, depth))
    shade = light.on(scaled(sand, 0.84), depth, 0.9)
    # Shade each falling slope: from the crest down, drawn as a blade that thins to nothing.
    height = [y for _, y in line]
    crests = [i for i in range(1, 32) if height[i - 1] > height[i] <= height[i + 1]]
    for crest in crests:
        end = crest
        while end < 32 and line[end + 1][1] >= line[end][1]:
            end += 1
        x0, y0 = line[crest]
        x1, y1 = line[end]
        edge = [(x0 - 9, y0 + swing * 2.4), (x0 + 4, y0 + swing * 2.0), (x1 + 4, y1 + swing * 0.9)]
        view.canvas.poly([*line[crest : end + 1], *reversed(edge)], shade)


def _cactus(view: View, x: float, y: float, h: float) -> None:
    canvas, w = view.canvas, 0.085 * h
    green = view.light.on((84, 118, 84), 0.08, 0.15)
    canvas.rect(x - w, y - h + w, x + w, y, green)
    canvas.disc(x, y - h + w, w, w, green)
    for side, low, high in ((-1, 0.38, 0.72), (1, 0.5, 0.84)):
        arm = x + side * 0.26 * h
        canvas.line([(x, y - low * h), (arm, y - low * h), (arm, y - high * h)], green, 1.5 * w)


def _reed(view: View, x: float, y: float) -> None:
    green = view.light.on((112, 140, 74), cover=0.3)
    for lean in (-2.2, -0.6, 1.2, 2.6):
        view.canvas.line([(x, y + 2), (x + lean, y - 7 + abs(lean))], green, 0.7)


def _forest(view: View) -> None:
    light, rng = view.light, view.rng
    treeline(view, 50, 9, light.on((96, 138, 120), depth=0.5, cover=0.35))
    treeline(view, 61, 8, light.on((74, 118, 96), depth=0.28, cover=0.3))
    treeline(view, 78, 5, light.on((52, 92, 74), depth=0.12, cover=0.25))
    bark = light.on((104, 82, 66), cover=0.1)
    for i in range(8):
        green = rng.choice(((60, 104, 76), (74, 114, 74), (52, 96, 80)))
        leaf, bright = light.on(green, 0.06, 0.35), light.on(scaled(green, 1.09), 0.06, 0.6)
        x = 1 + 18 * i + rng.uniform(-5, 5)
        round_tree(view, x, 93 + rng.uniform(-2, 1), rng.uniform(46, 64), leaf, bright, bark)
    if view.water:
        fill_below(view, rolling(rng, 91, 1.5), light.on((84, 112, 70)))
        _lake(view, 92, (96, 122, 74))
        return
    fill_below(view, rolling(rng, 92, 2), light.on((92, 122, 72)))
    fill_below(view, rolling(rng, 113, 2.5), light.on((106, 134, 78)))
    tufts(view, 96, 127, light.on((66, 96, 58), cover=0.5), 26)
    for _ in range(6):
        x, y = rng.uniform(0, 128), rng.uniform(99, 126)
        view.canvas.disc(x, y, 2.6, 1.5, light.on((84, 112, 70), cover=0.6))


def _meadow(view: View) -> None:
    light, rng = view.light, view.rng
    fill_below(view, rolling(rng, 64, 5, waves=0.9), light.on((128, 174, 134), depth=0.45))
    fill_below(view, rolling(rng, 72, 5, waves=1.1), light.on((142, 186, 110), depth=0.22))
    leaf, bright = light.on((92, 140, 92), 0.25, 0.4), light.on((120, 164, 104), 0.25, 0.6)
    bark = light.on((110, 90, 76), 0.25, 0)
    for _ in range(4):
        round_tree(view, rng.uniform(0, 128), 79, rng.uniform(8, 12), leaf, bright, bark)
    fill_below(view, rolling(rng, 81, 4, waves=0.8), light.on((164, 202, 104), depth=0.08))
    if view.water:
        _lake(view, 89, (158, 196, 92))
        _flowers(view, 122, 127, 26)
        return
    fill_below(view, rolling(rng, 92, 3, waves=1.0), light.on((172, 208, 100)))
    fill_below(view, rolling(rng, 114, 2.5, waves=1.2), light.on((150, 190, 84)))
    tufts(view, 96, 127, light.on((110, 156, 66), cover=0.5), 24)
    _flowers(view, 91, 127, 54)


def _flowers(view: View, y0: float, y1: float, count: int) -> None:
    rng, light = view.rng, view.light
    colours = [light.on(c, cover=0.2) for c in ((255, 250, 240), (250, 186, 208), (255, 226, 130))]
    eye = light.on((240, 180, 70), cover=0.0)
    for y in sorted(rng.uniform(y0, y1) for _ in range(count)):
        x, r = rng.uniform(0, 128), 0.7 + 0.9 * (y - 90) / 37
        view.canvas.disc(x, y, r, r * 0.9, rng.choice(colours))
        view.canvas.disc(x, y, 0.35 * r, 0.35 * r, eye)


def _city(view: View) -> None:
    light = view.light
    base = 86 if view.water else 93
    _skyline(view, base, (36, 56), (150, 162, 182), 0.5, lit=0.12)
    _skyline(view, base, (20, 42), (112, 122, 144), 0.14, lit=0.34)
    stone = light.on((168, 164, 168))
    if view.water:
        view.canvas.rect(0, base - 1, 128, base + 2, stone)
        water(view, base + 2, shimmer=24)
        if light.lamps:
            _harbour_lights(view, base + 3)
        _quay(view, 122)
        return
    _quay(view, 93)
    seam = light.on((140, 136, 142), cover=0.7)
    for x in range(-120, 250, 17):
        view.canvas.line([(64 + (x - 64) * 0.55, 98), (x, 128)], seam, 0.5)
    for y in (103, 109, 117, 126):
        view.canvas.rect(0, y, 128, y + 0.6, seam)


def _quay(view: View, y: float) -> None:
    light, canvas = view.light, view.canvas
    canvas.rect(0, y, 128, 130, light.on((178, 172, 170)))
    canvas.rect(0, y, 128, y + 1.4, light.on((206, 200, 196)))
    canvas.rect(0, y + 1.4, 128, y + 3.4, light.on((118, 114, 124), cover=0.2))


def _skyline(
    view: View, base: float, heights: Point, wall: Colour, depth: float, lit: float
) -> None:
    light, canvas, rng = view.light, view.canvas, view.rng
    lamp = mix((255, 214, 120), light.haze, depth * 0.8) if light.lamps else None
    x = rng.uniform(-8, -2)
    while x < 128:
        w, h = rng.uniform(9, 16), rng.uniform(*heights)
        body = light.on(scaled(wall, rng.uniform(0.86, 1.08)), depth, 0.12)
        top = base - h
        canvas.rect(x, top, x + w, base, body)
        crown = rng.random()
        if crown < 0.3:
            canvas.rect(x + w * 0.2, top - 3, x + w * 0.8, top, body)
        elif crown < 0.5:
            canvas.line([(x + w / 2, top - 6), (x + w / 2, top)], body, 0.8)
        if view.light.snow:
            canvas.rect(x, top, x + w, top + 1.3, light.on((255, 255, 255), depth))
        pane = lamp or light.on(scaled(wall, 1.18), depth, 0)
        _windows(view, (x, top, x + w, base), pane, lit if light.lamps else 0.6)
        x += w + (rng.uniform(0, 2.5) if rng.random() < 0.4 else 0)


def _windows(view: View, box: tuple, pane: Colour, share: float) -> None:
    x0, y0, x1, y1 = box
    columns = int((x1 - x0 - 1) / 2.9)
    left = x0 + (x1 - x0 - columns * 2.9) / 2 + 0.75
    y = y0 + 2.6
    while y < y1 - 3:
        for i in range(columns):
            if view.rng.random() < share:
                view.canvas.rect(left + 2.9 * i, y, left + 2.9 * i + 1.4, y + 1.8, pane)
        y += 4.0


def _harbour_lights(view: View, y: float) -> None:
    """Broken reflections of the lit windows."""
    rng = view.rng
    glow = mix((255, 206, 110), view.light.water, 0.35)
    for _ in range(9):
        x, depth = rng.uniform(0, 128), rng.uniform(8, 18)
        for step in range(int(depth / 2.4)):
            half = 1.4 - 0.1 * step
            view.canvas.rect(x - half, y + 2.4 * step, x + half, y + 2.4 * step + 1, glow)


_PLACES: dict[str, Callable[[View], None]] = {
    "coast": _coast,
    "mountains": _mountains,
    "desert": _desert,
    "forest": _forest,
    "meadow": _meadow,
    "city": _city,
}
