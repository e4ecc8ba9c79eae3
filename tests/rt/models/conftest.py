"""Small denoisers of each kind, whose every weight counts."""

from __future__ import annotations

import pytest
import torch

from tintype.models.flux import FluxConfig, FluxTransformer
from tintype.models.sd3 import SD3Config, SD3Transformer
from tintype.models.unet import UNet
from tintype.models.unet_config import UNetConfig

_TEXT = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))
_POOLED = torch.randn(2, 20, generator=torch.Generator().manual_seed(2))
_TIMES = torch.tensor([10.0, 900.0])


def _latents(channels):
    return torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(3))


def _unet():
    unet = UNet(
        UNetConfig(
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=24,
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
        )
    )
    return unet, (_latents(4), _TIMES, _TEXT)


def _sd3():
    config = SD3Config(
        sample_size=8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=20,
        pos_embed_max_size=4,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return SD3Transformer(config), (_latents(16), _TIMES, _TEXT, _POOLED)


def _flux():
    config = FluxConfig(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        axes_dims_rope=(4, 6, 6),
        in_channels=16,
    )
    return FluxTransformer(config), (_latents(4), _TIMES, _TEXT, _POOLED)


@pytest.fixture(params=[_unet, _sd3, _flux], ids=lambda make: make.__name__[1:])
def model(request):
    torch.manual_seed(0)
    module, inputs = request.param()
    with torch.no_grad():  # gates and weights of norms must count
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return module.eval(), inputs
