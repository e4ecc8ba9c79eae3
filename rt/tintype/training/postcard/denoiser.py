"""The postcard denoiser: a latent UNet guided by the frozen CLIP's text states."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tintype.models.clip import CLIPTextEncoder
from tintype.models.unet import UNet
from tintype.models.unet_config import UNetConfig
from tintype.tokenizer import ClipTokenizer

from ..initialise import silence_residual_branches
from ..loop import FitConfig, fit, generator, mixed_precision
from ..objectives import NoiseSchedule, noisy_and_velocity
from .batches import EncodedCaptions
from .scene import Scene


def unet_config(channels: tuple[int, ...], layers: int) -> UNetConfig:
    """A UNet on 16x16 latents and the postcard CLIP's states, heads 32 wide.

    The finest level has no attention: 256 tokens cost more there than they bring, an 8x8 grid places a subject well.
    """
    attending = len(channels) - 1
    return UNetConfig(
        sample_size=16,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * attending),
        up_block_types=(*["CrossAttnUpBlock2D"] * attending, "UpBlock2D"),
        block_out_channels=channels,
        layers_per_block=layers,
        norm_num_groups=16,
        cross_attention_dim=192,
        attention_head_dim=tuple(c // 32 for c in channels),
        use_linear_projection=True,
    )


SCHEDULE = NoiseSchedule()
SCHEDULER_CONFIG = {
    "_class_name": "DPMSolverMultistepScheduler",
    "num_train_timesteps": SCHEDULE.steps,
    "beta_start": SCHEDULE.beta_start,
    "beta_end": SCHEDULE.beta_end,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "lower_order_final": True,
    "final_sigmas_type": "zero",
    "timestep_spacing": "trailing",
    "use_karras_sigmas": False,
}


def new_denoiser(channels: tuple[int, ...], layers: int, seed: int) -> UNet:
    """An untrained UNet whose residual branches are silent."""
    torch.manual_seed(seed)
    unet = UNet(unet_config(channels, layers))
    silence_residual_branches(unet)
    return unet


def train_denoiser(
    unet: UNet,
    data: tuple[Tensor, list[Scene]],
    text_encoder: CLIPTextEncoder,
    tokenizer: ClipTokenizer,
    fitting: FitConfig,
    folder: Path,
) -> None:
    """Train on latents float32 [n, 4, 16, 16] of scenes and fresh captions, a tenth of them emptied for guidance."""
    unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    latents, scenes = data
    alphas = SCHEDULE.alphas_cumprod()
    captions = EncodedCaptions(scenes, text_encoder, tokenizer, fitting)

    def batch_loss(step: int) -> dict[str, Tensor]:
        rows, random = captions.rows(step), generator(fitting.seed, step)
        ids = captions.ids(rows, step, captions.dropped(rows, random))
        times = (even_times(len(rows), random) * SCHEDULE.steps).long()
        x0, alpha = latents[rows], alphas[times]
        noisy, velocity = noisy_and_velocity(x0, torch.randn(x0.shape, generator=random), alpha)
        with mixed_precision(fitting.device):
            text = captions.encoded(ids).last_hidden_state
            noisy = noisy.to(fitting.device, memory_format=torch.channels_last)
            predicted = unet(noisy, times.float().to(fitting.device), text).float()
        # Every time counts the same. Weights that follow the signal leave almost nothing for the noisiest times, and
        # those decide what stands where.
        return {"loss": (predicted - velocity.to(fitting.device)).square().mean()}

    fit(unet, batch_loss, fitting, folder)


def even_times(count: int, random: torch.Generator) -> Tensor:
    """One time in 0..1 from each of ``count`` equal slices, shuffled: an even spread steadies the gradient."""
    return (torch.randperm(count, generator=random) + torch.rand(count, generator=random)) / count
