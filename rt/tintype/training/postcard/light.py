"""Palettes: how the time of day and the weather colour everything else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from .canvas import Colour, mix

SNOW_WHITE: Colour = (240, 245, 252)


@dataclass(frozen=True)
class Light:
    """One palette. `tint` multiplies ground colours; `gain` only dims, so that hues survive."""

    top: Colour
    middle: Colour
    low: Colour
    haze: Colour
    tint: tuple[float, float, float]
    grey: Colour
    fog: Colour
    orb: Colour
    cloud: Colour
    cloud_shade: Colour
    water: Colour
    gain: float
    outline: Colour
    lamps: bool
    murk: float = 0.0
    snow: float = 0.0
    wet: float = 0.0

    def on(self, colour: Colour, depth: float = 0.0, cover: float = 1.0) -> Colour:
        """A background colour in this light: `depth` fades it, `cover` lets snow lie on it."""
        if self.snow:
            colour = mix(colour, SNOW_WHITE, self.snow * cover)
        (r, g, b), (tr, tg, tb) = colour, self.tint
        lit = mix((int(r * tr), int(g * tg), int(b * tb)), self.grey, 0.30 * self.wet)
        return mix(lit, self.haze, 1 - (1 - depth) * (1 - 0.2 * self.murk))

    def paint(self, colour: Colour) -> Colour:
        """A subject's colour in this light."""
        return mix((0, 0, 0), colour, self.gain)


_TIMES = {
    "dawn": Light(
        top=(140, 178, 222),
        middle=(248, 200, 198),
        low=(255, 226, 180),
        haze=(246, 208, 200),
        tint=(1.0, 0.90, 0.88),
        grey=(204, 184, 190),
        fog=(232, 210, 208),
        orb=(255, 244, 206),
        cloud=(255, 240, 234),
        cloud_shade=(236, 182, 186),
        water=(150, 178, 200),
        gain=0.97,
        outline=(70, 48, 66),
        lamps=False,
    ),
    "noon": Light(
        top=(30, 118, 220),
        middle=(92, 174, 240),
        low=(196, 230, 250),
        haze=(186, 218, 242),
        tint=(1.0, 1.0, 1.0),
        grey=(168, 180, 192),
        fog=(224, 230, 232),
        orb=(255, 246, 190),
        cloud=(255, 255, 255),
        cloud_shade=(206, 220, 234),
        water=(36, 130, 190),
        gain=1.0,
        outline=(34, 42, 58),
        lamps=False,
    ),
    "dusk": Light(
        top=(62, 38, 108),
        middle=(204, 78, 98),
        low=(255, 166, 70),
        haze=(200, 104, 104),
        tint=(0.72, 0.56, 0.62),
        grey=(112, 80, 104),
        fog=(176, 126, 128),
        orb=(255, 214, 110),
        cloud=(250, 166, 128),
        cloud_shade=(150, 76, 118),
        water=(104, 62, 112),
        gain=0.9,
        outline=(40, 18, 44),
        lamps=True,
    ),
    "night": Light(
        top=(6, 10, 34),
        middle=(14, 26, 68),
        low=(38, 60, 114),
        haze=(34, 54, 100),
        tint=(0.36, 0.42, 0.60),
        grey=(56, 66, 92),
        fog=(78, 90, 120),
        orb=(250, 246, 220),
        cloud=(74, 92, 140),
        cloud_shade=(34, 46, 88),
        water=(18, 36, 78),
        gain=0.88,
        outline=(4, 7, 20),
        lamps=True,
    ),
}

_GREYNESS = {"clear": 0.0, "cloudy": 0.15, "rain": 0.72, "snow": 0.68, "fog": 0.0}


@cache
def light_for(time: str, weather: str) -> Light:
    """The palette of a time of day in a weather."""
    base = _TIMES[time]
    amount = _GREYNESS[weather]
    veil = base.grey
    if weather == "fog":
        veil, amount = base.fog, 0.72
    elif weather == "rain":
        veil = mix(base.grey, base.outline, 0.12)
    elif weather == "snow":
        veil = mix(base.grey, base.fog, 0.6)
    changes = {name: mix(getattr(base, name), veil, amount) for name in ("top", "middle")}
    # The strip over the horizon keeps more of its hue: it is what tells dusk from noon in rain.
    changes["low"] = mix(base.low, veil, 0.75 * amount)
    changes["haze"] = mix(base.haze, veil, amount)
    changes["water"] = mix(base.water, veil, 0.6 * amount)
    return replace(
        base,
        **changes,
        murk=float(weather == "fog"),
        snow=0.86 * (weather == "snow"),
        wet=float(weather == "rain"),
    )
