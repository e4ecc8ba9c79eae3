"""The autoencoder against diffusers' own, its tiling, and its float16 scaling."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import small_checkpoints
from tintype.errors import CheckpointError
from tintype.models.autoencoder_kl import (
    AutoencoderKL,
    AutoencoderKLConfig,
    decode_tiled,
    encode_tiled,
    scale_residual_stream,
)
from tolerances import MODULE_FP16, MODULE_FP32, relative_error


@pytest.fixture(scope="module")
def pair() -> tuple[Any, AutoencoderKL]:
    torch.manual_seed(0)
    theirs = small_checkpoints.vae().eval()
    ours = AutoencoderKL(AutoencoderKLConfig.from_json(theirs.config)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def image(height: int, width: int) -> torch.Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(1))


def latents(height: int, width: int) -> torch.Tensor:
    return torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_encoded_moments_equal_diffusers(pair: tuple[Any, AutoencoderKL]) -> None:
    theirs, ours = pair
    expected = theirs.encode(image(64, 48)).latent_dist
    mean, log_variance = ours.encode(image(64, 48))
    assert torch.equal(ours.means(image(64, 48)), mean)
    assert relative_error(mean, expected.mean) <= MODULE_FP32
    assert relative_error(log_variance, expected.logvar) <= MODULE_FP32


@torch.no_grad()
def test_decoded_image_equals_diffusers(pair: tuple[Any, AutoencoderKL]) -> None:
    theirs, ours = pair
    assert (
        relative_error(ours.decode(latents(8, 6)), theirs.decode(latents(8, 6)).sample)
        <= MODULE_FP32
    )


# One tile; a row of tiles; a grid whose last tiles are cut short.
@pytest.mark.parametrize("size", [(8, 8), (8, 20), (19, 13)], ids=str)
@torch.no_grad()
def test_tiles_equal_diffusers_tiles(
    pair: tuple[Any, AutoencoderKL], size: tuple[int, int]
) -> None:
    theirs, ours = copy.deepcopy(pair[0]), pair[1]
    theirs.enable_tiling()
    pixels = image(8 * size[0], 8 * size[1])
    decoded = decode_tiled(ours, latents(*size), tile=8)
    assert relative_error(decoded, theirs.decode(latents(*size)).sample) <= MODULE_FP32
    means = encode_tiled(ours, pixels, tile=64)
    assert relative_error(means, theirs.encode(pixels).latent_dist.mean) <= MODULE_FP32


@torch.no_grad()
def test_scaling_the_residual_stream_leaves_the_output(pair: tuple[Any, AutoencoderKL]) -> None:
    scaled = copy.deepcopy(pair[1])
    scale_residual_stream(scaled.decoder, 16.0)
    assert (
        relative_error(scaled.decode(latents(8, 8)), pair[1].decode(latents(8, 8))) <= MODULE_FP32
    )


@torch.no_grad()
def test_scaling_keeps_an_overflowing_decoder_finite_in_float16(
    pair: tuple[Any, AutoencoderKL],
) -> None:
    large = copy.deepcopy(pair[1])
    # Each branch begins with a GroupNorm, so a loud stream is harmless in float32 and infinite in float16.
    large.decoder.conv_in.weight.mul_(2.0**17)
    large.decoder.conv_in.bias.mul_(2.0**17)
    expected = large.decode(latents(3, 2))
    assert expected.isfinite().all()
    assert not copy.deepcopy(large).half().decode(latents(3, 2).half()).isfinite().all()

    scale_residual_stream(large.decoder, 32.0)
    actual = large.half().decode(latents(3, 2).half())
    assert relative_error(actual, expected) <= MODULE_FP16


def test_a_training_step_reaches_every_parameter(pair: tuple[Any, AutoencoderKL]) -> None:
    ours = copy.deepcopy(pair[1])
    mean, log_variance = ours.encode(image(16, 24))
    restored = ours.decode(mean + torch.randn_like(mean) * (log_variance / 2).exp())
    (restored.square().mean() + mean.square().mean() + log_variance.mean()).backward()
    # A constant shift of every key's score leaves the softmax as it is, so key biases have no gradient.
    idle = [n for n, p in ours.named_parameters() if p.grad is None]
    assert idle == []
    still = [n for n, p in ours.named_parameters() if p.grad is not None and not p.grad.any()]
    assert [n for n in still if not n.endswith("to_k.bias")] == []


def test_a_decoder_without_attention_is_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match="mid_block_add_attention=False.*possible here: True"):
        AutoencoderKLConfig.from_json({"mid_block_add_attention": False})
