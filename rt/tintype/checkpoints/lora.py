"""Low-rank updates merged into a checkpoint's modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tintype.checkpoints.files import Target
from tintype.checkpoints.lora_files import Lora, Updatable, Updates, fitted, layer_of
from tintype.checkpoints.weights import cut

if TYPE_CHECKING:
    from tintype.checkpoints.checkpoint import Checkpoint


def fit(checkpoint: Checkpoint, loras: Iterable[Lora]) -> tuple[Updates, ...]:
    """The files as updates of the checkpoint; CheckpointError where one does not fit."""

    @cache
    def shapes(component: str) -> dict[str, tuple[int, ...]]:
        with torch.device("meta"):
            module = checkpoint.skeleton(component, torch.float32)
        return {
            name: tuple(each.weight.shape)
            for name, each in module.named_modules()
            if isinstance(each, (nn.Linear, nn.Conv2d))
        }

    components = tuple(checkpoint.components)
    model = Updatable(checkpoint.source, checkpoint.family, components, shapes)
    return tuple(fitted(model, lora) for lora in loras)


def merge(updates: Iterable[Updates], component: str, module: nn.Module) -> None:
    """Add the updates to the component's weights, each computed in float32 and rounded once."""
    from safetensors import safe_open

    for each in updates:
        with safe_open(each.lora.path, framework="pt", device="cpu") as file:
            for target, keys in each.layers.get(component, {}).items():
                tensors = {part: file.get_tensor(key) for part, key in keys.items()}
                layer: Any = module.get_submodule(layer_of(target))
                alpha = float(tensors["alpha"]) if "alpha" in tensors else None
                strength = each.strength(component, target, len(tensors["down"]), alpha)
                update = strength * _product(tensors, target, layer.weight)
                layer.weight = nn.Parameter((layer.weight.float() + update).to(layer.weight.dtype))


def _product(tensors: Mapping[str, Tensor], target: Target, weight: Tensor) -> Tensor:
    """up @ down, of the weight's shape."""
    down = tensors["down"].to(weight.device, torch.float32)
    up = cut(tensors["up"], target, torch.float32, weight.device)
    return (up.flatten(1) @ down.flatten(1)).view(weight.shape)
