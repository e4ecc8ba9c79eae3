"""What every layout of checkpoint is read into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tintype.checkpoints.files import Weights
from tintype.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import nn

STEPS = 50
GUIDANCE = {"sd": 7.5, "sdxl": 5.0}


@dataclass(frozen=True)
class Component:
    """One module: its published class name, its `config.json`, and where its weights are."""

    architecture: str
    config: Mapping[str, Any]
    weights: Weights


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Opening reads configurations; weights are read by `component`.

    `tokenizer_folders` has one folder a text encoder. `defaults` holds `height`, `width`,
    `num_inference_steps`, `guidance_scale`, `force_zeros_for_empty_prompt`, `latent_channels`,
    `latent_factor`, `denoiser_channels` (9 where the model inpaints), and for flow transformers
    `size_multiple` (pixels), `text_width`, `text_tokens` (of T5) and `guidance_embeds`.
    """

    family: str
    source: Path
    components: Mapping[str, Component]
    scheduler_config: dict[str, Any]
    tokenizer_folders: tuple[Path, ...]
    defaults: dict[str, Any] = field(default_factory=dict)

    @property
    def configs(self) -> dict[str, Mapping[str, Any]]:
        """The `config.json` of every component."""
        return {name: component.config for name, component in self.components.items()}

    def component(
        self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> nn.Module:
        """Build a component (`text_encoder`, `unet`, `vae`, ...) and load its weights.

        `dtype` None is float32.
        """
        if name not in self.components:
            raise CheckpointError(
                f"{self.source} has no {name}; it has {', '.join(self.components)}"
            )
        import torch

        from tintype.checkpoints.architectures import builder
        from tintype.checkpoints.weights import load_module

        part = self.components[name]
        build = builder(name, part.architecture, part.config)
        return load_module(name, build, part.weights, dtype=dtype or torch.float32, device=device)


def default_settings(
    unet: Mapping[str, Any], vae: Mapping[str, Any], *, force_zeros: bool
) -> dict[str, Any]:
    """The settings of a request that leaves them open, as published for the model."""
    factor = 2 ** (len(vae.get("block_out_channels", (0,) * 4)) - 1)
    side = unet.get("sample_size") or 64
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    kind = "sdxl" if unet.get("addition_embed_type") == "text_time" else "sd"
    return {
        "height": height * factor,
        "width": width * factor,
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE[kind],
        "force_zeros_for_empty_prompt": force_zeros,
        "latent_channels": vae.get("latent_channels", 4),
        "latent_factor": factor,
        "denoiser_channels": unet.get("in_channels", 4),
    }


# Steps and guidance that the models' authors publish pictures with; tokens that T5 reads.
_FLOWS: Mapping[str, Mapping[str, Any]] = {
    "sd3": {"num_inference_steps": 28, "guidance_scale": 7.0, "text_tokens": 256},
    "flux": {"num_inference_steps": 28, "guidance_scale": 3.5, "text_tokens": 512},
    # FLUX schnell, which was distilled to few steps and is told no guidance
    "flux-schnell": {"num_inference_steps": 4, "guidance_scale": 0.0, "text_tokens": 256},
}


def flow_settings(
    family: str, transformer: Mapping[str, Any], vae: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings of a request to a flow transformer that leaves them open, as published for the model."""
    factor = 2 ** (len(vae.get("block_out_channels", (0,) * 4)) - 1)
    patch = 2  # SD3's patches and FLUX's packed squares alike
    channels = transformer["in_channels"] // (1 if family == "sd3" else patch**2)
    embeds = bool(transformer.get("guidance_embeds", False))
    kind = "flux-schnell" if family == "flux" and not embeds else family
    side = transformer.get("sample_size", 128) * factor
    return {
        "height": side,
        "width": side,
        **_FLOWS[kind],
        "latent_channels": vae.get("latent_channels", 16),
        "latent_factor": factor,
        "denoiser_channels": channels,
        "size_multiple": factor * patch,
        "text_width": transformer["joint_attention_dim"],
        "guidance_embeds": embeds,
    }
