"""Captions: what a person would write under a postcard, in many wordings, often leaving things out.

Each attribute becomes a phrase, a sentence shape puts the phrases in order, and a lead such as
"an illustration of" may go in front. `WORDS` is the vocabulary; every phrase built here contains
one of the words of the value it states, so a reader can check a caption against it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .scene import ATTRIBUTES, Scene

WORDS: dict[str, dict[object, tuple[str, ...]]] = {
    "place": {
        "coast": ("coast", "seashore", "sea"),
        "mountains": ("mountains", "mountain", "alpine"),
        "desert": ("desert", "dunes"),
        "forest": ("forest", "woods"),
        "meadow": ("meadow", "field"),
        "city": ("city", "skyline"),
    },
    "time": {
        "dawn": ("dawn", "sunrise", "early morning"),
        "noon": ("noon", "midday", "daylight"),
        "dusk": ("dusk", "sunset", "evening"),
        "night": ("night", "after dark"),
    },
    "weather": {
        "clear": ("clear", "cloudless"),
        "cloudy": ("cloudy", "clouds", "overcast"),
        "rain": ("rain", "rainy"),
        "snow": ("snow", "snowy"),
        "fog": ("fog", "foggy", "mist", "misty"),
    },
    "sky": {
        "none": ("empty sky", "no sun", "no moon"),
        "sun": ("sun",),
        "moon": ("moon", "moonlight", "moonlit"),
        "stars": ("stars", "starry", "starlight"),
    },
    "subject": {
        "lighthouse": ("lighthouse",),
        "house": ("house", "cottage"),
        "pine": ("pine", "pine tree", "fir tree"),
        "sailing boat": ("sailing boat", "sailboat", "boat"),
        "hot-air balloon": ("hot-air balloon", "hot air balloon", "balloon"),
        "windmill": ("windmill",),
        "castle": ("castle",),
    },
    "colour": {
        "red": ("red", "scarlet"),
        "orange": ("orange",),
        "yellow": ("yellow",),
        "green": ("green",),
        "blue": ("blue",),
        "purple": ("purple", "violet"),
        "white": ("white",),
    },
    "count": {1: ("a", "an", "one"), 2: ("two", "a pair of"), 3: ("three",)},
    "position": {
        "left": ("left",),
        "centre": ("centre", "middle"),
        "right": ("right",),
    },
}

_KEEP = {
    "colour": 0.85,
    "place": 0.8,
    "time": 0.75,
    "weather": 0.65,
    "position": 0.6,
    "sky": 0.5,
}
_KEEP_EMPTY_SKY = 0.06  # nobody remarks on what is not there

# Phrases that follow the subject, by attribute and value.
_TAILS: dict[str, dict[str, tuple[str, ...]]] = {
    "place": {
        "coast": ("on a rocky coast", "on the coast", "at the seashore", "by the sea"),
        "mountains": ("in the mountains", "in a mountain valley", "in an alpine valley"),
        "desert": ("in the desert", "among desert dunes", "in a sandy desert"),
        "forest": ("in a forest", "in the woods", "at the edge of the forest"),
        "meadow": ("in a meadow", "in a flowering meadow", "in a grassy field"),
        "city": ("in the city", "in front of a city skyline", "in a big city"),
    },
    "time": {
        "dawn": ("at dawn", "at sunrise", "in the early morning"),
        "noon": ("at noon", "at midday", "in broad daylight"),
        "dusk": ("at dusk", "at sunset", "in the evening"),
        "night": ("at night", "after dark", "under a night sky"),
    },
    "weather": {
        "clear": ("in clear weather", "under a clear sky", "with a cloudless sky"),
        "cloudy": ("in cloudy weather", "under an overcast sky", "with clouds in the sky"),
        "rain": ("in the rain", "in rainy weather", "with rain falling"),
        "snow": ("in the snow", "in snowy weather", "with snow falling"),
        "fog": ("in the fog", "in misty weather", "wrapped in mist", "in thick fog"),
    },
    "sky": {
        "none": ("under an empty sky", "with an empty sky"),
        "sun": ("with the sun in the sky", "under the sun", "with the sun shining"),
        "moon": ("in the moonlight", "with the moon in the sky", "under the moon"),
        "stars": ("in the starlight", "with stars in the sky", "under a starry sky"),
    },
    "position": {
        "left": ("on the left", "to the left", "on the left side"),
        "centre": ("in the middle", "in the centre"),
        "right": ("on the right", "to the right", "on the right side"),
    },
}

# For "a misty forest at dawn with ...".
_NOUNS = {
    "coast": ("rocky coast", "coast", "seashore"),
    "mountains": ("mountain valley", "alpine valley", "mountain landscape"),
    "desert": ("desert", "desert landscape"),
    "forest": ("forest",),
    "meadow": ("meadow", "field"),
    "city": ("city", "city skyline"),
}
# No "clear": a clear desert is not a desert under a clear sky.
_ADJECTIVES = {
    "cloudy": ("cloudy", "overcast"),
    "rain": ("rainy",),
    "snow": ("snowy",),
    "fog": ("foggy", "misty"),
}
# For the comma-separated shorthand: "two red boats, seashore, dusk, fog".
_TAGS = {
    "place": _NOUNS,
    "time": {
        "dawn": ("dawn", "sunrise"),
        "noon": ("noon", "midday"),
        "dusk": ("dusk", "sunset"),
        "night": ("night",),
    },
    "weather": {
        "clear": ("clear sky", "clear"),
        "cloudy": ("cloudy", "overcast"),
        "rain": ("rain", "rainy"),
        "snow": ("snow", "snowy"),
        "fog": ("fog", "misty"),
    },
    "sky": {"none": ("empty sky",), "sun": ("sun",), "moon": ("moon",), "stars": ("stars",)},
    "position": {"left": ("left",), "centre": ("centre",), "right": ("right",)},
}
_LEADS = ("an illustration of ", "a postcard of ", "a picture of ", "a poster of ")


class _Writer:
    """One caption in the making: the scene, what to state, and the dice."""

    def __init__(self, scene: Scene, stated: frozenset[str], rng: np.random.Generator) -> None:
        self.scene = scene
        self.stated = stated
        self._rng = rng
        self._used: set[str] = set()

    def chance(self, share: float) -> bool:
        return bool(self._rng.random() < share)

    def pick(self, options: tuple[str, ...]) -> str:
        """The first option is twice as likely as each other: it is the plainest."""
        return options[max(0, int(self._rng.integers(-1, len(options))))]

    def shuffled(self, names: list[str]) -> list[str]:
        return [names[i] for i in self._rng.permutation(len(names))]

    def avoid(self, opening: str) -> None:
        """Let no later phrase open with this word where there is a choice."""
        self._used.add(opening)

    def tail(self, name: str) -> str:
        """The attribute's phrase, not opening with "under" or "with" a second time."""
        options = self._hidden() if name == "sky" else ()
        options = options or _TAILS[name][getattr(self.scene, name)]
        fresh = tuple(o for o in options if o.split()[0] not in self._used)
        phrase = self.pick(fresh or options)
        self._used |= {phrase.split()[0]} & {"under", "with"}
        return phrase

    def _hidden(self) -> tuple[str, ...]:
        """How to say that the sky is bare when there is weather in it."""
        if self.scene.sky != "none" or self.scene.weather == "clear":
            return ()
        orb = "moon" if self.scene.time == "night" else "sun"
        return (f"with no {orb} in sight",)

    def subject(self) -> str:
        """Count, colour and noun: "a pair of scarlet boats"."""
        scene = self.scene
        noun = self.pick(WORDS["subject"][scene.subject])
        noun = noun if scene.count == 1 else noun + "s"
        if "colour" in self.stated:
            noun = f"{self.pick(WORDS['colour'][scene.colour])} {noun}"
        if scene.count > 1:
            return f"{self.pick(WORDS['count'][scene.count])} {noun}"
        return f"one {noun}" if self.chance(0.1) else f"{_article(noun)} {noun}"

    def among(self, names: tuple[str, ...]) -> list[str]:
        return [name for name in names if name in self.stated]


def _article(phrase: str) -> str:
    return "an" if phrase[0] in "aeiou" else "a"


def _plain(w: _Writer) -> str:
    """E.g. "a red lighthouse on the left on a rocky coast at dusk in the rain"."""
    parts = [w.subject(), *map(w.tail, w.among(("position",)))]
    names = w.among(("place", "time", "weather", "sky"))
    if w.chance(0.35):
        names = w.shuffled(names)
    phrases = [w.tail(name) for name in names]
    if len(phrases) > 2 and w.chance(0.6):
        return " ".join([*parts, *phrases[:2]]) + ", " + " ".join(phrases[2:])
    return " ".join(parts + phrases)


def _fronted(w: _Writer) -> str:
    """E.g. "in the mountains at night, two blue castles on the right under a starry sky"."""
    front = w.among(("place", "time"))
    if not front:
        return _plain(w)
    lead = " ".join(w.tail(name) for name in w.shuffled(front))
    rest = [w.tail(name) for name in w.among(("position", "weather", "sky"))]
    return f"{lead}, " + " ".join([w.subject(), *rest])


def _scenic(w: _Writer) -> str:
    """E.g. "a misty forest at dawn with three green houses in the middle"."""
    if "place" not in w.stated:
        return _plain(w)
    noun = w.pick(_NOUNS[w.scene.place])
    names = ["time", "sky"]
    if w.scene.weather in _ADJECTIVES and "weather" in w.stated:
        noun = f"{w.pick(_ADJECTIVES[w.scene.weather])} {noun}"
    else:
        names.append("weather")
    w.avoid("with")
    setting = [f"{_article(noun)} {noun}", *map(w.tail, w.among(tuple(names)))]
    last = [w.subject(), *map(w.tail, w.among(("position",)))]
    return " ".join(setting) + " with " + " ".join(last)


def _shorthand(w: _Writer) -> str:
    """E.g. "two red boats, seashore, dusk, fog, left"."""
    names = w.shuffled(w.among(("place", "time", "weather", "sky", "position")))
    tags = [w.pick(_TAGS[name][getattr(w.scene, name)]) for name in names]
    return ", ".join([w.subject(), *tags])


_SHAPES: tuple[tuple[float, Callable[[_Writer], str]], ...] = (
    (0.50, _plain),
    (0.18, _fronted),
    (0.20, _scenic),
    (0.12, _shorthand),
)


def _pick_shape(rng: np.random.Generator) -> Callable[[_Writer], str]:
    dice = rng.random()
    for share, shape in _SHAPES:
        dice -= share
        if dice < 0:
            return shape
    return _plain


def _written(scene: Scene, stated: frozenset[str], rng: np.random.Generator) -> str:
    writer = _Writer(scene, stated, rng)
    shape = _pick_shape(rng)
    text = shape(writer)
    if shape in (_plain, _scenic) and writer.chance(0.15):
        text = writer.pick(_LEADS) + text
    if writer.chance(0.2):
        text = text[0].upper() + text[1:]
    return text + "." if writer.chance(0.12) else text


def caption_with_stated(scene: Scene, rng: np.random.Generator) -> tuple[str, frozenset[str]]:
    """A caption that leaves some details out, and the names of the attributes it states."""
    keep = dict(_KEEP)
    if scene.sky == "none":
        keep["sky"] = _KEEP_EMPTY_SKY
    kept = [name for name, share in keep.items() if rng.random() < share]
    stated = frozenset(("subject", "count", *kept))
    return _written(scene, stated, rng), stated


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption that leaves some details out."""
    return caption_with_stated(scene, rng)[0]


def full_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption that states every attribute."""
    return _written(scene, frozenset(ATTRIBUTES), rng)
