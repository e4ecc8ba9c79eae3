"""The rendered data set on disk: one array of pictures, memory-mapped, and the seed that made it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tintype.errors import TintypeError

from .dataset import render_scenes, sample_scenes
from .scene import Scene

_BLOCK = 2048


@dataclass(frozen=True)
class PostcardStore:
    """``pictures`` uint8 [count, size, size, 3], read from disk as needed; ``scenes`` say what each shows."""

    pictures: np.ndarray
    scenes: list[Scene]

    def first(self, count: int) -> PostcardStore:
        """The first pictures alone."""
        return PostcardStore(self.pictures[:count], self.scenes[:count])


def write_store(
    folder: Path, count: int, seed: int, *, size: int = 128, held_out: bool = False
) -> None:
    """Draw ``count`` scenes into ``folder``: pictures.npy and data.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.json").unlink(missing_ok=True)  # it says that the pictures are whole
    scenes = sample_scenes(count, seed, held_out=held_out)
    pictures = np.lib.format.open_memmap(
        folder / "pictures.npy", "w+", np.uint8, (count, size, size, 3)
    )
    for start in range(0, count, _BLOCK):
        pictures[start : start + _BLOCK] = render_scenes(scenes[start : start + _BLOCK], size)
    pictures.flush()
    recipe = {"count": count, "seed": seed, "size": size, "held_out": held_out}
    (folder / "data.json").write_text(json.dumps(recipe, indent=2) + "\n")


def open_store(folder: Path) -> PostcardStore:
    """The data set written by ``write_store``."""
    try:
        recipe = json.loads((folder / "data.json").read_text())
        pictures = np.lib.format.open_memmap(folder / "pictures.npy", "r")
        shape = [recipe["count"], recipe["size"], recipe["size"], 3]
        if pictures.dtype != np.uint8 or list(pictures.shape) != shape:
            found = f"{pictures.dtype} {list(pictures.shape)}"
            raise ValueError(f"pictures.npy is {found}, expected uint8 {shape}")
        scenes = sample_scenes(recipe["count"], recipe["seed"], held_out=recipe["held_out"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TintypeError(
            f"{folder} holds no whole data set ({error}); run: tintype train data --data {folder}"
        ) from error
    return PostcardStore(pictures, scenes)
