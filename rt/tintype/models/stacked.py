"""Linear layers of one input as one layer: a GPU multiplies one large product in less time than several small ones.

The layers stay what they were, under their own names: their weights become views of the stack's, so that nothing is
held twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn


def stack(layers: Sequence[nn.Module]) -> nn.Module | None:
    """One layer that gives the outputs of all, one behind the other; None where they do not go together.

    They do where they are plain, or in codes of one kind whose inputs have no scale of the layer's own.
    """
    parts = [_tensors(layer) for layer in layers]
    if not _go_together(layers, parts):
        return None
    stacked = deepcopy(layers[0])
    for name, tensor in _tensors(stacked).items():
        joined = torch.cat([part[name].data for part in parts])
        tensor.data = joined
        for part, piece in zip(parts, joined.split([len(p[name]) for p in parts]), strict=True):
            part[name].data = piece
    return stacked


def _tensors(layer: nn.Module) -> dict[str, Tensor]:
    return {**dict(layer.named_parameters()), **dict(layer.named_buffers())}


def _go_together(layers: Sequence[nn.Module], parts: Sequence[dict[str, Tensor]]) -> bool:
    kinds = {(type(layer), getattr(layer, "scheme", None)) for layer in layers}
    known = all(type(layer) is nn.Linear or getattr(layer, "input_codes", "") for layer in layers)
    shapes = {tuple((name, t.shape[1:], t.dtype) for name, t in part.items()) for part in parts}
    return known and len(kinds) == len(shapes) == 1


def is_stack_of(stacked: nn.Module, layers: Sequence[nn.Module]) -> bool:
    """Whether the layers' weights are still the stack's: one that was moved or converted since has its own."""
    own, firsts = _tensors(stacked), _tensors(layers[0])
    return all(tensor.data_ptr() == firsts[name].data_ptr() for name, tensor in own.items())
