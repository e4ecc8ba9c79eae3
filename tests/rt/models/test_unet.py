"""The UNet against diffusers' own, in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import small_checkpoints
from tintype.errors import CheckpointError
from tintype.models.unet import UNet
from tintype.models.unet_config import UNetConfig
from tolerances import MODULE_FP32, relative_error


def pair(kind: str) -> tuple[Any, UNet]:
    theirs = small_checkpoints.parts(kind)["unet"].eval()
    ours = UNet(UNetConfig.from_json(theirs.config)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def inputs(config: UNetConfig, height: int, width: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    sample = torch.randn(2, config.in_channels, height, width)
    context = torch.randn(2, 77, config.cross_attention_dim)
    return sample, torch.tensor([3.0, 741.0]), context


def added(config: UNetConfig) -> dict[str, torch.Tensor]:
    """SDXL's pooled text and sizes; nothing for the others."""
    if config.addition_embed_type is None:
        return {}
    torch.manual_seed(2)
    return {
        "text_embeds": torch.randn(2, 96),
        "time_ids": torch.tensor([[1024.0, 768, 0, 64, 1024, 768]] * 2),
    }


# 6x10 is odd after one halving: the decoder must enlarge to the encoder's sizes, not just double.
@pytest.mark.parametrize("size", [(8, 8), (6, 10)], ids=str)
@pytest.mark.parametrize("kind", small_checkpoints.KINDS)
def test_output_equals_diffusers(kind: str, size: tuple[int, int]) -> None:
    theirs, ours = pair(kind)
    sample, time, context = inputs(ours.config, *size)
    extra = added(ours.config)
    with torch.no_grad():
        expected = theirs(sample, time, context, added_cond_kwargs=extra or None).sample
        actual = ours(sample, time, context, **extra)
    assert relative_error(actual, expected) <= MODULE_FP32


@pytest.mark.parametrize("kind", small_checkpoints.KINDS)
def test_a_training_step_reaches_every_parameter(kind: str) -> None:
    _, ours = pair(kind)
    loss = ours(*inputs(ours.config, 8, 8), **added(ours.config)).square().mean()
    loss.backward()
    idle = [n for n, p in ours.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("downsample_padding", 0),
        ("cross_attention_dim", [32, 64]),
        ("class_embed_type", "timestep"),
        ("dual_cross_attention", True),
        ("act_fn", "gelu"),
        ("conv_in_kernel", 5),
        ("num_class_embeds", 1000),
        ("a_field_from_the_future", 1),
    ],
)
def test_a_config_that_asks_for_more_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=field):
        UNetConfig.from_json({field: value})
