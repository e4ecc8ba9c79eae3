"""Checkpoints that diffusers saves, made once a session and never written to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch

import small_checkpoints
import small_flow_checkpoints
import small_unclip_checkpoint

SMALL = (small_checkpoints, small_flow_checkpoints, small_unclip_checkpoint)

torch.set_num_threads(
    1
)  # these tensors are too small to share, and threads only wait for each other
diffusers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """kind -> the folder of a small checkpoint of that kind."""
    root = tmp_path_factory.mktemp("checkpoints")

    def folder(kind: str) -> Path:
        path = root / kind
        small = next(each for each in SMALL if kind in each.PIPELINES)
        return path if path.exists() else small.save(kind, path)

    return folder
