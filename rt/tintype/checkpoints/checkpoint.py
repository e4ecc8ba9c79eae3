"""What every layout of checkpoint is read into."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tintype.checkpoints.files import Weights
from tintype.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from tintype.checkpoints.lora_files import Lora, Updates

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
    `size_multiple` (pixels), `text_width`, `pooled_width`, `text_tokens` (of T5), `guidance_embeds` and
    `left_out`, the encoders' stages that zeros stand in for; for unCLIP what `unclip_settings` says; `steered` where a
    ControlNet asks for a picture. `updates`, of low rank, are added to weights as they are read.
    """

    family: str
    source: Path
    components: Mapping[str, Component]
    scheduler_config: dict[str, Any]
    tokenizer_folders: tuple[Path, ...]
    defaults: dict[str, Any] = field(default_factory=dict)
    updates: tuple[Updates, ...] = ()

    @property
    def configs(self) -> dict[str, Mapping[str, Any]]:
        """The `config.json` of every component."""
        return {name: component.config for name, component in self.components.items()}

    def without(self, encoders: Collection[str]) -> Checkpoint:
        """The checkpoint without these text encoders, which are then never read.

        Raises CheckpointError for what the model does not run without.
        """
        possible = [name for name in self.components if name.startswith("text_encoder")]
        refused = [name for name in encoders if name not in possible or self.family != "sd3"]
        if refused or len(set(encoders)) == len(possible):
            told = "SD3 alone runs without some of its encoders"
            if self.family == "sd3":
                told = f"SD3 runs without {', '.join(possible)}{', but not all of them' * (not refused)}"
            named = ", ".join(refused or encoders)
            raise CheckpointError(f"{self.source} cannot be loaded without {named}; {told}")
        kept = [name for name in possible if name not in encoders]
        folders = dict(zip(possible, self.tokenizer_folders, strict=True))
        stages = [encoder_stage(name) for name in possible if name in encoders]
        return replace(
            self,
            components={n: part for n, part in self.components.items() if n not in encoders},
            tokenizer_folders=tuple(folders[name] for name in kept),
            defaults={**self.defaults, "left_out": [*self.defaults.get("left_out", ()), *stages]},
        )

    def with_loras(self, loras: Iterable[Lora]) -> Checkpoint:
        """The checkpoint with these low-rank updates; CheckpointError where one does not fit."""
        from tintype.checkpoints.lora import fit

        return replace(self, updates=(*self.updates, *fit(self, loras)))

    def steered_by(self, controlnet: Path, *, allow_pickle: bool = False) -> Checkpoint:
        """The checkpoint with the ControlNet in this folder or file; CheckpointError where it does not fit."""
        from tintype.checkpoints.controlnet import steered

        return steered(self, controlnet, allow_pickle)

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
        module = load_module(name, build, part.weights, dtype=dtype or torch.float32, device=device)
        if self.updates:
            from tintype.checkpoints.lora import merge

            merge(self.updates, name, module)
        return module

    def skeleton(self, name: str, dtype: torch.dtype) -> nn.Module:
        """A component whose weights are never read: names, shapes and types on torch's default device."""
        from tintype.checkpoints.architectures import builder

        part = self.components[name]
        module = builder(name, part.architecture, part.config)()
        state = {name: value.to(dtype) for name, value in module.state_dict().items()}
        module.load_state_dict(state, assign=True)
        return module.eval()


def _number_in(
    config: Mapping[str, Any], component: str, field: str, default: int | None = None
) -> int:
    """A field of a component's configuration that must be a whole number of at least 1."""
    value = config.get(field, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(
            f"{component}/config.json: {field}={value!r} is not a whole number of at least 1"
        )
    return value


def _latent_factor(vae: Mapping[str, Any]) -> int:
    """Pixels a latent, along each axis."""
    widths = vae.get("block_out_channels", (0,) * 4)
    if not isinstance(widths, list | tuple) or not widths:
        raise CheckpointError(
            f"vae/config.json: block_out_channels={widths!r} is not a list of one number a level"
        )
    return int(2 ** (len(widths) - 1))


def channels_field(vae: Mapping[str, Any]) -> str:
    """The field of a VAE's configuration that says how many channels a denoiser sees: a codebook's entries may be
    of other widths than what is around it."""
    return "latent_channels" if vae.get("vq_embed_dim") is None else "vq_embed_dim"


def encoder_stage(component: str) -> str:
    """The stage that a text encoder is: text_encoder_2 is encode_2."""
    return component.replace("text_encoder", "encode")


def default_settings(
    unet: Mapping[str, Any], vae: Mapping[str, Any], *, force_zeros: bool
) -> dict[str, Any]:
    """The settings of a request that leaves them open, as published for the model."""
    factor = _latent_factor(vae)
    height, width = _sides(unet)
    kind = "sdxl" if unet.get("addition_embed_type") == "text_time" else "sd"
    return {
        "height": height * factor,
        "width": width * factor,
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE[kind],
        "force_zeros_for_empty_prompt": force_zeros,
        "latent_channels": _number_in(vae, "vae", channels_field(vae), 4),
        "latent_factor": factor,
        "denoiser_channels": _number_in(unet, "unet", "in_channels", 4),
    }


def _sides(unet: Mapping[str, Any]) -> tuple[int, int]:
    """The latents' height and width that a UNet was trained on; many published ones leave them open."""
    side = unet.get("sample_size") or 64
    sides = side if isinstance(side, list | tuple) and len(side) == 2 else (side, side)
    height, width = (_number_in({"sample_size": each}, "unet", "sample_size") for each in sides)
    return height, width


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
    own = partial(_number_in, transformer, "transformer")
    factor = _latent_factor(vae)
    patch = 2  # SD3's patches and FLUX's packed squares alike
    channels = own("in_channels") // (1 if family == "sd3" else patch**2)
    embeds = bool(transformer.get("guidance_embeds", False))
    kind = "flux-schnell" if family == "flux" and not embeds else family
    side = own("sample_size", 128) * factor
    return {
        "height": side,
        "width": side,
        **_FLOWS[kind],
        "latent_channels": _number_in(vae, "vae", "latent_channels", 16),
        "latent_factor": factor,
        "denoiser_channels": channels,
        "size_multiple": factor * patch,
        "text_width": own("joint_attention_dim"),
        "pooled_width": own("pooled_projection_dim"),
        "guidance_embeds": embeds,
    }


# Steps and guidance that Karlo is published with.
_UNCLIP: Mapping[str, Any] = {
    "num_inference_steps": 25,
    "guidance_scale": 8.0,
    "prior_num_inference_steps": 25,
    "prior_guidance_scale": 4.0,
    "super_res_num_inference_steps": 7,
}


def unclip_settings(
    configs: Mapping[str, Mapping[str, Any]], schedulers: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The settings of a request to unCLIP that leaves them open: those of its stages, `embedding_width`, the
    `context_tokens` that an image embedding becomes, `image_side`, the pixels of what is varied where pictures are,
    `learned_variance`, whether the decoder says how much noise it wants, `prior_scheduler`, `super_res_scheduler`, and
    what all have."""
    small, large = (
        _number_in(configs[name], name, "sample_size") for name in ("decoder", "super_res_first")
    )
    if large % small:
        raise CheckpointError(
            f"super_res_first/config.json: sample_size={large} is no multiple of the decoder's {small}"
        )
    pixels = _number_in(configs["decoder"], "decoder", "in_channels")
    parts = {"decoder": "decoder_scheduler", "prior": "prior_scheduler"}
    parts |= dict.fromkeys(("super_res_first", "super_res_last"), "super_res_scheduler")
    for part, scheduler in parts.items():
        learned = schedulers.get(scheduler, {}).get("variance_type") == "learned_range"
        if learned and configs[part].get("out_channels") != 2 * pixels:
            raise CheckpointError(
                f"{scheduler}/scheduler_config.json: variance_type='learned_range' is for models that predict it, with "
                f"twice their pixels' {pixels} channels; the {part} does not"
            )
    seen = {}
    if "image_encoder" in configs:
        own = configs["image_encoder"]
        seen["image_side"] = _number_in(own, "image_encoder", "image_size", 224)
    return {
        "height": large,
        "width": large,
        **_UNCLIP,
        "latent_channels": pixels,
        "latent_factor": large // small,
        "denoiser_channels": pixels,
        "learned_variance": configs["decoder"].get("out_channels") == 2 * pixels,
        "embedding_width": _number_in(
            configs["text_proj"], "text_proj", "clip_embeddings_dim", 768
        ),
        "context_tokens": _number_in(
            configs["text_proj"], "text_proj", "clip_extra_context_tokens", 4
        ),
        **{name: config for name, config in schedulers.items() if name != "decoder_scheduler"},
        **seen,
    }
