"""What every drawing function is handed."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from .canvas import Canvas
from .light import Light
from .scene import Scene


@dataclass(frozen=True)
class View:
    """A scene being drawn. `orb` is where the sun or the moon stands, if one does.

    Drawing uses `random.Random`, whose stream is the same on every Python version.
    """

    scene: Scene
    canvas: Canvas
    light: Light
    rng: Random
    orb: tuple[float, float] | None

    @property
    def water(self) -> bool:
        """Whether the subject needs water to float on."""
        return self.scene.subject == "sailing boat"
