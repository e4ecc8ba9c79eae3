"""Postcard-flow: a joint text-image transformer in SD3's form, on the latents and the text encoder of postcard."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from tintype.models.clip import CLIPTextEncoder
from tintype.models.sd3 import SD3Config, SD3Transformer
from tintype.tokenizer import ClipTokenizer

from ..initialise import silence_modulation
from ..loop import FitConfig, fit, generator, mixed_precision
from ..objectives import noisy_and_flow
from .batches import EncodedCaptions
from .clip import LONGEST_CAPTION
from .denoiser import even_times
from .scene import Scene

_HEAD = 32
SCHEDULER_CONFIG = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
}


def flow_config(text_width: int, width: int, layers: int) -> SD3Config:
    """16x16 latents in patches of 2x2, so 64 image tokens beside the caption's; no T5 and no second CLIP."""
    return SD3Config(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=_HEAD,
        num_attention_heads=width // _HEAD,
        joint_attention_dim=text_width,
        caption_projection_dim=width,
        pooled_projection_dim=text_width,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )


def new_transformer(config: SD3Config, seed: int) -> SD3Transformer:
    """An untrained transformer whose blocks hand their input on."""
    torch.manual_seed(seed)
    transformer = SD3Transformer(config)
    silence_modulation(transformer)
    return transformer


@torch.no_grad()
def shortened(encoder: CLIPTextEncoder) -> CLIPTextEncoder:
    """The text encoder for captions alone: fewer positions, and its last state handed on as the pooled text.

    The transformer attends to every position, so that each one beyond the longest caption would cost at every step.
    The states of a causal encoder do not depend on what follows them.
    """
    config = replace(encoder.config, max_position_embeddings=LONGEST_CAPTION)
    short = CLIPTextEncoder(config, projection=True)
    table = "text_model.embeddings.position_embedding.weight"
    state = dict(encoder.state_dict())
    state[table] = state[table][:LONGEST_CAPTION]
    state["text_projection.weight"] = torch.eye(config.hidden_size)
    short.load_state_dict(state)
    return short.eval()


def train_flow(
    transformer: SD3Transformer,
    data: tuple[Tensor, list[Scene]],
    text_encoder: CLIPTextEncoder,
    tokenizer: ClipTokenizer,
    fitting: FitConfig,
    folder: Path,
) -> nn.Module:
    """Train on latents float32 [n, 4, 16, 16] of scenes and fresh captions, a tenth of them emptied for guidance."""
    latents, scenes = data
    captions = EncodedCaptions(scenes, text_encoder, tokenizer, fitting)

    def batch_loss(step: int) -> dict[str, Tensor]:
        rows, random = captions.rows(step), generator(fitting.seed, step)
        ids = captions.ids(rows, step, captions.dropped(rows, random))
        times, x0 = even_times(len(rows), random), latents[rows]
        noisy, velocity = noisy_and_flow(x0, torch.randn(x0.shape, generator=random), times)
        with mixed_precision(fitting.device):
            told = captions.encoded(ids)
            predicted = transformer(
                noisy.to(fitting.device),
                1000 * times.to(fitting.device),
                told.penultimate,
                told.pooled,
            )
        return {"loss": (predicted.float() - velocity.to(fitting.device)).square().mean()}

    return fit(transformer, batch_loss, fitting, folder)
