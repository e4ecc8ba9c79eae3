"""Many postcards at once: pictures, labels, contact sheets."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import partial
from multiprocessing import get_context

import numpy as np
from PIL import Image, ImageDraw

from .captions import full_caption
from .render import render
from .scene import ATTRIBUTES, Scene, sample_scene

_CHUNK = 32


def sample_scenes(count: int, seed: int, *, held_out: bool = False, first: int = 0) -> list[Scene]:
    """Scenes first, first+1, ... of an endless list; scene i depends on (seed, i) only."""
    return [
        sample_scene(np.random.default_rng((seed, i)), held_out=held_out)
        for i in range(first, first + count)
    ]


def _render_chunk(scenes: Sequence[Scene], size: int) -> np.ndarray:
    return np.stack([render(scene, size) for scene in scenes])


def render_many(
    count: int,
    seed: int,
    *,
    held_out: bool = False,
    size: int = 128,
    workers: int | None = None,
) -> tuple[np.ndarray, list[Scene]]:
    """Draw `count` scenes: uint8 [count, size, size, 3], and what they show."""
    scenes = sample_scenes(count, seed, held_out=held_out)
    return render_scenes(scenes, size, workers=workers), scenes


def render_scenes(
    scenes: Sequence[Scene], size: int = 128, *, workers: int | None = None
) -> np.ndarray:
    """Draw the scenes: uint8 [len(scenes), size, size, 3], the same for any number of workers."""
    pictures = np.empty((len(scenes), size, size, 3), np.uint8)
    chunks = [scenes[i : i + _CHUNK] for i in range(0, len(scenes), _CHUNK)]
    draw = partial(_render_chunk, size=size)
    workers = min(workers or os.cpu_count() or 1, len(chunks))
    if workers <= 1:
        _fill(pictures, map(draw, chunks))
    else:
        with get_context().Pool(workers) as pool:
            _fill(pictures, pool.imap(draw, chunks))
    return pictures


def _fill(pictures: np.ndarray, drawn: Iterable[np.ndarray]) -> None:
    start = 0
    for block in drawn:
        pictures[start : start + len(block)] = block
        start += len(block)


def labels(scenes: Sequence[Scene]) -> dict[str, np.ndarray]:
    """Class indices (int64) of every attribute, in the order of `ATTRIBUTES`."""
    return {
        name: np.array([values.index(getattr(s, name)) for s in scenes], dtype=np.int64)
        for name, values in ATTRIBUTES.items()
    }


def contact_sheet(
    scenes: Sequence[Scene], columns: int, *, size: int = 128, captions: bool = False
) -> Image.Image:
    """The scenes in a grid, each with its full caption beneath where asked for."""
    gap, text = 4, 44 if captions else 0
    rows = -(-len(scenes) // columns)
    cell = (size + gap, size + text + gap)
    sheet = Image.new("RGB", (columns * cell[0] + gap, rows * cell[1] + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for i, scene in enumerate(scenes):
        at = (gap + i % columns * cell[0], gap + i // columns * cell[1])
        sheet.paste(Image.fromarray(render(scene, size)), at)
        if captions:
            words = full_caption(scene, np.random.default_rng(scene.seed))
            pen.text((at[0], at[1] + size), _wrapped(words, size // 6), fill="black", font_size=9)
    return sheet


def _wrapped(words: str, width: int) -> str:
    lines = [""]
    for word in words.split():
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += word + " "
    return "\n".join(lines)
