"""Published checkpoints, in whatever layout, as configurations, tokenizers and our modules.

Opening imports no torch; building a component does.
"""

from __future__ import annotations

from pathlib import Path

from tintype.checkpoints import diffusers, single_file
from tintype.checkpoints.checkpoint import Checkpoint, Component
from tintype.checkpoints.files import PICKLES
from tintype.errors import CheckpointError

__all__ = ["Checkpoint", "Component", "open_checkpoint"]


def open_checkpoint(path: str | Path, *, allow_pickle: bool = False) -> Checkpoint:
    """Open a diffusers folder or a single file in the original layout.

    Pickled weights (.bin, .ckpt, .pt) are refused unless `allow_pickle`, and then read without
    running code.
    """
    path = Path(path)
    if (path / diffusers.INDEX).is_file():
        return diffusers.open_folder(path, allow_pickle=allow_pickle)
    if path.is_file() and path.suffix in {".safetensors", *PICKLES}:
        return single_file.open_file(path, allow_pickle=allow_pickle)
    found = "a folder without it" if path.is_dir() else "a file of another kind"
    raise CheckpointError(
        f"{path} is {found if path.exists() else 'missing'}; expected a folder with "
        f"{diffusers.INDEX} (diffusers layout) or a single .safetensors file"
    )
