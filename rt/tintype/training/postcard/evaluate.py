"""Prompt accuracy: does the picture show what the prompt says? The judge reads, the scene knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tintype.pipeline import Pipeline

from .captions import full_caption
from .dataset import sample_scenes
from .judge import Judge, accuracy
from .scene import Scene


@dataclass(frozen=True)
class Prompts:
    """Scenes and a prompt for each that states every attribute."""

    scenes: list[Scene]
    texts: list[str]


def prompts(count: int, seed: int, *, held_out: bool) -> Prompts:
    """Scenes of held-out (subject, colour, place) combinations, or of those seen in training."""
    scenes = sample_scenes(count, seed, held_out=held_out)
    rng = np.random.default_rng(seed)
    return Prompts(scenes, [full_caption(scene, rng) for scene in scenes])


def prompt_accuracy(
    pipeline: Pipeline, judge: Judge, asked: Prompts, **arguments: Any
) -> dict[str, float]:
    """Share of right readings an attribute and overall; image i has seed i, ``arguments`` go to the pipeline."""
    output = pipeline(asked.texts, seed=range(len(asked.texts)), output_type="np", **arguments)
    return read_accuracy(judge, np.asarray(output.images), asked.scenes)


def read_accuracy(judge: Judge, images: np.ndarray, scenes: Sequence[Scene]) -> dict[str, float]:
    """The judge's readings of images float32 [n, h, w, 3] in 0..1 against the scenes."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1

    def rows(part: slice) -> Tensor:
        return pixels[part]

    return accuracy(judge, rows, scenes)
