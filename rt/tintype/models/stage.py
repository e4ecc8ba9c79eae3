"""What a backend runs and an engine is exported from: a module with named arrays on both sides.

Faces are the same at every precision: float32 arrays (int64 token ids) in and out, cast to the weights' type inside.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Stage(nn.Module):
    """A pure function of named arrays; ``inputs`` and ``outputs`` are the names in the order of ``forward``."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return next(self.parameters()).dtype


class Remembering(Stage, ABC):
    """A stage that also goes in three: `remember`, of what it is told behind its first ``changing`` inputs and is the
    same at every step of a picture; `at`, of what that gives and of times, which are known before; and `recall`, of
    both and of the changing inputs."""

    changing: int

    @property
    def remembers(self) -> bool:
        """Whether it may go so as it is set up."""
        return True

    @abstractmethod
    def remember(self, *told: Tensor) -> tuple[Tensor, ...]:
        """What is the same at every step."""

    @abstractmethod
    def time(self, *changing: Tensor) -> Tensor:
        """Of changing inputs the times [n] at which they stand."""

    @abstractmethod
    def at(self, remembered: tuple[Tensor, ...], times: Tensor) -> tuple[Tensor, ...]:
        """What each of the times [s, n] tells n rows, [s, n, c] for each layer that reads times."""

    @abstractmethod
    def recall(
        self, remembered: tuple[Tensor, ...], told: Sequence[Tensor], *changing: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        """The outputs; ``told`` is what `at` gives for the time of the changing inputs, [n, c] for each layer."""


class Denoising(Remembering):
    """A stage that predicts something of a noisy sample at a time; behind these two it is told what a picture is of."""

    outputs = ("model_output",)
    changing = 2

    def time(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return timestep
