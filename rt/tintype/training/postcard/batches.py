"""Batches of postcards as tensors, drawn from (seed, step) alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tintype.tokenizer import ClipTokenizer

from .captions import caption
from .scene import Scene
from .store import PostcardStore


@dataclass(frozen=True)
class Sampler:
    """Draws ``size`` rows of a data set of ``count`` rows for every step."""

    count: int
    size: int
    seed: int

    def rows(self, step: int) -> np.ndarray:
        """Sorted row numbers [size], without repetition."""
        rng = np.random.default_rng((self.seed, step))
        return np.sort(rng.choice(self.count, self.size, replace=False))


def pictures(store: PostcardStore, rows: np.ndarray | slice) -> Tensor:
    """float32 [n, 3, h, w] in -1..1, channels last in memory."""
    return (
        torch.from_numpy(np.array(store.pictures[rows])).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    )


def caption_ids(scenes: list[Scene], tokenizer: ClipTokenizer, seed: int, step: int) -> Tensor:
    """A fresh caption a scene, as token ids int64 [n, 77]."""
    rng = np.random.default_rng((seed, step, 1))
    return torch.from_numpy(np.concatenate([tokenizer(caption(scene, rng)) for scene in scenes]))
