"""Starting values that let deep residual networks learn from the first step."""

from __future__ import annotations

import torch
from torch import nn

from tintype.models.autoencoder_kl import MidAttention
from tintype.models.joint import modulations
from tintype.models.layers import ResnetBlock
from tintype.models.pixel_unet import ContextAttention
from tintype.models.sd3 import SD3Transformer
from tintype.models.unet_blocks import SpatialTransformer


@torch.no_grad()
def silence_residual_branches(model: nn.Module) -> None:
    """Zero the last layer of every residual branch, so that the network starts as its skip path alone.

    Goyal et al. 2017 (arXiv 1706.02677, section 5.1); customary for diffusion UNets since Ho et al. 2020.
    """
    for module in model.modules():
        if isinstance(module, ResnetBlock):
            _zero(module.conv2)
        elif isinstance(module, SpatialTransformer):
            _zero(module.proj_out)
        elif isinstance(module, MidAttention | ContextAttention):
            _zero(module.to_out[0])


@torch.no_grad()
def silence_modulation(transformer: SD3Transformer) -> None:
    """Zero every gate, shift and scale, and the output: blocks start as the identity.

    "adaLN-Zero" of Peebles and Xie 2023 (arXiv 2212.09748, section 3.2).
    """
    for modulation in modulations(transformer):
        _zero(modulation.linear)
    _zero(transformer.proj_out)


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        parameter.zero_()
