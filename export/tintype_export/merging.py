"""Low-rank updates merged into a checkpoint's weights before anything is exported of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tintype.checkpoints import Checkpoint
from tintype.checkpoints.checkpoint import Component
from tintype.checkpoints.files import Weights
from tintype.checkpoints.lora_files import Lora
from tintype.checkpoints.weights import stored_type

from .writing import save_tensors


def merged(checkpoint: Checkpoint, loras: Sequence[Lora], folder: Path) -> Checkpoint:
    """The checkpoint with the components that the updates change written anew below ``folder``, in their stored type.

    Raises CheckpointError where an update does not fit.
    """
    updated = checkpoint.with_loras(loras)
    components = dict(checkpoint.components)
    for name in {name for each in updated.updates for name in each.layers}:
        components[name] = _written(updated, name, folder / name)
    return replace(checkpoint, components=components)


def _written(updated: Checkpoint, name: str, folder: Path) -> Component:
    part = updated.components[name]
    module = updated.component(name, stored_type(part.weights))
    stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
    path = folder / f"{stem}.safetensors"
    save_tensors(module.state_dict(), path)
    return replace(part, weights=Weights((path,)))
