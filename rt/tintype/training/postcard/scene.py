"""What a postcard shows: the attributes, which of them go together, and which are held out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

PLACES = ("coast", "mountains", "desert", "forest", "meadow", "city")
TIMES = ("dawn", "noon", "dusk", "night")
WEATHERS = ("clear", "cloudy", "rain", "snow", "fog")
SKIES = ("none", "sun", "moon", "stars")
SUBJECTS = (
    "lighthouse",
    "house",
    "pine",
    "sailing boat",
    "hot-air balloon",
    "windmill",
    "castle",
)
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white")
COUNTS = (1, 2, 3)
POSITIONS = ("left", "centre", "right")

ATTRIBUTES: dict[str, tuple] = {
    "place": PLACES,
    "time": TIMES,
    "weather": WEATHERS,
    "sky": SKIES,
    "subject": SUBJECTS,
    "colour": COLOURS,
    "count": COUNTS,
    "position": POSITIONS,
}

_SKY_AT = {
    "dawn": ("none", "sun"),
    "noon": ("none", "sun"),
    "dusk": ("none", "sun", "moon", "stars"),
    "night": ("none", "moon", "stars"),
}
# Stars would pass for flakes in snow, and rain hides everything behind its cloud.
_SKY_IN = {
    "clear": SKIES,
    "cloudy": ("none", "sun", "moon"),
    "rain": ("none",),
    "snow": ("none", "moon"),
    "fog": ("none", "sun", "moon"),
}


@dataclass(frozen=True)
class Scene:
    """One picture: eight attributes a caption can state, and a seed for everything else."""

    place: str
    time: str
    weather: str
    sky: str
    subject: str
    colour: str
    count: int
    position: str
    seed: int


def valid_skies(time: str, weather: str) -> tuple[str, ...]:
    """What may stand in the sky at this time, in this weather."""
    return tuple(sky for sky in _SKY_AT[time] if sky in _SKY_IN[weather])


def _triple_is_held_out(subject: int, colour: int, place: int) -> bool:
    # One triple in twelve. The factors keep every pair of values in training: a pair loses
    # at most one place, one subject or two colours.
    return (5 * subject + 3 * colour + 7 * place) % 12 == 0


def _triples(held_out: bool) -> tuple[tuple[str, str, str], ...]:
    return tuple(
        (subject, colour, place)
        for s, subject in enumerate(SUBJECTS)
        for c, colour in enumerate(COLOURS)
        for p, place in enumerate(PLACES)
        if _triple_is_held_out(s, c, p) == held_out
    )


_TRIPLES = {held_out: _triples(held_out) for held_out in (False, True)}


def is_held_out(scene: Scene) -> bool:
    """Whether the scene's (subject, colour, place) is kept out of training."""
    return _triple_is_held_out(
        SUBJECTS.index(scene.subject), COLOURS.index(scene.colour), PLACES.index(scene.place)
    )


def sample_scene(rng: np.random.Generator, *, held_out: bool = False) -> Scene:
    """Draw a scene: each attribute uniform, the sky uniform among those that fit the rest."""

    def pick(options: tuple) -> Any:
        return options[int(rng.integers(len(options)))]

    subject, colour, place = pick(_TRIPLES[held_out])
    time, weather = pick(TIMES), pick(WEATHERS)
    return Scene(
        place=place,
        time=time,
        weather=weather,
        sky=pick(valid_skies(time, weather)),
        subject=subject,
        colour=colour,
        count=pick(COUNTS),
        position=pick(POSITIONS),
        seed=int(rng.integers(2**31)),
    )
