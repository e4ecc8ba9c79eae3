"""The static shapes that a checkpoint's stages are exported for, and arrays of those shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tintype.checkpoints import Checkpoint
from tintype.errors import ProfileError
from tintype.profiles import Profile
from tintype.tokenizer import ClipTokenizer

Arrays = dict[str, NDArray[Any]]

# Guidance doubles the batch of the denoiser; without guidance one row is enough.
_DENOISE_ROWS = (1, 2)


def stage_profiles(stage: str, sizes: Sequence[tuple[int, int]]) -> list[str]:
    """The profile names of ``stage`` for pictures of ``sizes`` (width, height)."""
    if stage.startswith("encode") and stage != "encode_image":
        return ["b1"]
    rows = _DENOISE_ROWS if stage == "denoise" else (1,)
    return [Profile(width, height, n).name for width, height in sizes for n in rows]


def check_sizes(sizes: Sequence[tuple[int, int]], factor: int) -> None:
    """Raises ProfileError where a side is not a multiple of the model's factor."""
    for width, height in sizes:
        if width % factor or height % factor or min(width, height) < factor:
            raise ProfileError(
                f"size {width}x{height}: width and height must be multiples of {factor}"
            )


def example_inputs(
    checkpoint: Checkpoint, names: Sequence[str], stage: str, profile: str, seed: int = 0
) -> Arrays:
    """Arrays that ``stage`` takes at ``profile``: real token ids, unit noise, a time in the middle."""
    rng = np.random.default_rng(seed)
    defaults = checkpoint.defaults
    found = Profile.parse(profile) or Profile(defaults["width"], defaults["height"], 1)
    rows, factor = found.batch, defaults["latent_factor"]
    cells = (found.height // factor, found.width // factor)
    widths = _widths(checkpoint)

    def normal(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape, np.float32)

    makers: Mapping[str, Any] = {
        "input_ids": lambda: _tokens(checkpoint, stage),
        "sample": lambda: normal(rows, defaults["denoiser_channels"], *cells),
        "timestep": lambda: np.full(rows, 500.0, np.float32),
        "encoder_hidden_states": lambda: normal(rows, 77, widths["hidden"]),
        "text_embeds": lambda: normal(rows, widths["pooled"]),
        "time_ids": lambda: np.full((rows, 6), float(found.height), np.float32),
        "latents": lambda: normal(rows, defaults["latent_channels"], *cells),
        "image": lambda: rng.random((rows, found.height, found.width, 3), np.float32),
    }
    return {name: makers[name]() for name in names}


def _tokens(checkpoint: Checkpoint, stage: str) -> NDArray[np.int64]:
    folder = checkpoint.tokenizer_folders[1 if stage == "encode_2" else 0]
    return ClipTokenizer(folder)("a red lighthouse on a rocky coast at dusk")


def _widths(checkpoint: Checkpoint) -> dict[str, int]:
    second = checkpoint.configs.get("text_encoder_2", {})
    return {
        "hidden": int(checkpoint.configs["unet"]["cross_attention_dim"]),
        "pooled": int(second.get("projection_dim", 0)),
    }
