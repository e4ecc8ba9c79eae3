"""The arrays that a denoiser alone is called with: the same for every runner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tintype.checkpoints import open_checkpoint
from tintype.errors import RequestError
from tintype.profiles import Profile
from tintype_bench.work import Work
from tintype_export.profiles import example_inputs

_UNET_INPUTS = ("sample", "timestep", "encoder_hidden_states")
_ADDED_INPUTS = ("text_embeds", "time_ids")


def denoiser_inputs(work: Work) -> dict[str, NDArray[Any]]:
    """Unit noise, a time in the middle and random text, of a UNet."""
    if not work.checkpoint:
        raise RequestError(
            "a component case needs a checkpoint folder; a bundle does not say enough"
        )
    checkpoint = open_checkpoint(Path(work.checkpoint))
    if "unet" not in checkpoint.components:
        raise RequestError(
            f"a component case is a UNet's; {work.checkpoint} is a {checkpoint.family}: time whole pictures"
        )
    added = checkpoint.configs["unet"].get("addition_embed_type") == "text_time"
    names = _UNET_INPUTS + (_ADDED_INPUTS if added else ())
    profile = Profile(work.width, work.height, work.batch).name
    inputs = example_inputs(checkpoint, names, "denoise", profile, seed=work.seed)
    # As large as an encoder's states, whose last layer is a norm.
    return {name: np.ascontiguousarray(array) for name, array in inputs.items()}
