"""Batches of postcards as tensors, drawn from (seed, step) alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tintype.models.clip import CLIPTextEncoder, TextEncoding
from tintype.tokenizer import ClipTokenizer

from ..loop import FitConfig
from .captions import caption
from .dataset import labels
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


_AGREEING, _GROUP = 4, 24


class LookAlikes:
    """Draws rows in groups of scenes that agree in some attributes, so that the others must tell them apart.

    Each group has an anchor drawn at random and takes scenes that share its values of four attributes, drawn anew.
    """

    def __init__(self, scenes: list[Scene], size: int, seed: int) -> None:
        self._labels = np.stack(list(labels(scenes).values()), axis=1)
        self._size, self._seed = size, seed

    def rows(self, step: int) -> np.ndarray:
        """Row numbers [size]; groups that come out small are followed by more groups."""
        rng = np.random.default_rng((self._seed, step))
        drawn: list[int] = []
        while len(drawn) < self._size:
            anchor = self._labels[rng.integers(len(self._labels))]
            shared = rng.choice(len(anchor), _AGREEING, replace=False)
            alike = np.flatnonzero((self._labels[:, shared] == anchor[shared]).all(axis=1))
            drawn += rng.permutation(alike)[:_GROUP].tolist()
        return np.array(drawn[: self._size])


def pictures(store: PostcardStore, rows: np.ndarray | slice) -> Tensor:
    """float32 [n, 3, h, w] in -1..1, channels last in memory."""
    return (
        torch.from_numpy(np.array(store.pictures[rows])).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    )


def caption_ids(scenes: list[Scene], tokenizer: ClipTokenizer, seed: int, step: int) -> Tensor:
    """A fresh caption a scene, as token ids int64 [n, 77]."""
    rng = np.random.default_rng((seed, step, 1))
    return torch.from_numpy(np.concatenate([tokenizer(caption(scene, rng)) for scene in scenes]))


_DROPOUT = 0.1


class EncodedCaptions:
    """Fresh captions of scenes for every step, a tenth of them emptied for guidance, as a frozen text encoder gives
    them."""

    def __init__(
        self,
        scenes: list[Scene],
        text_encoder: CLIPTextEncoder,
        tokenizer: ClipTokenizer,
        fitting: FitConfig,
    ) -> None:
        self._scenes, self._tokenizer, self._fitting = scenes, tokenizer, fitting
        self._encoder = text_encoder.to(fitting.device)
        self._sampler = Sampler(len(scenes), fitting.batch_size, fitting.seed)
        self._empty = torch.from_numpy(tokenizer(""))

    def rows(self, step: int) -> np.ndarray:
        """The rows of a step."""
        return self._sampler.rows(step)

    def dropped(self, rows: np.ndarray, random: torch.Generator) -> Tensor:
        """Which of the rows are told nothing, [n, 1]."""
        return torch.rand(len(rows), 1, generator=random) < _DROPOUT

    def ids(self, rows: np.ndarray, step: int, dropped: Tensor) -> Tensor:
        """Token ids of the rows' captions, on the host, [n, t]."""
        scenes = [self._scenes[row] for row in rows]
        ids = caption_ids(scenes, self._tokenizer, self._fitting.seed, step)
        return torch.where(dropped, self._empty, ids)

    def end(self, ids: Tensor) -> Tensor:
        """Where each caption ends, [n]."""
        return self._encoder.end(ids)

    @torch.no_grad()
    def encoded(self, ids: Tensor) -> TextEncoding:
        """What the encoder makes of token ids."""
        encoding: TextEncoding = self._encoder(ids.to(self._fitting.device))
        return encoding
