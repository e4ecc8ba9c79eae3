"""Names and shapes of the original latent-diffusion and OpenCLIP layouts, from their own modules' structure."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file

import small_checkpoints

Shape = tuple[int, ...]
Named = Iterator[tuple[str, Shape]]


@dataclass(frozen=True)
class UNetSpec:
    """The original `unet_config`: transformers a level, 0 where the level does not attend."""

    channels: int
    multipliers: tuple[int, ...]
    depths: tuple[int, ...]
    middle_depth: int
    context: int
    blocks: int = 2
    linear: bool = False
    channels_in: int = 4
    added: int | None = None


@dataclass(frozen=True)
class TextSpec:
    """A text tower."""

    width: int
    layers: int
    words: int
    projection: int | None = None


def weight_and_bias(name: str, *weight: int) -> Named:
    yield f"{name}.weight", weight
    yield f"{name}.bias", weight[:1]


def _resnet(name: str, c_in: int, c_out: int, time: int) -> Named:
    yield from weight_and_bias(f"{name}.in_layers.0", c_in)
    yield from weight_and_bias(f"{name}.in_layers.2", c_out, c_in, 3, 3)
    yield from weight_and_bias(f"{name}.emb_layers.1", c_out, time)
    yield from weight_and_bias(f"{name}.out_layers.0", c_out)
    yield from weight_and_bias(f"{name}.out_layers.3", c_out, c_out, 3, 3)
    if c_in != c_out:
        yield from weight_and_bias(f"{name}.skip_connection", c_out, c_in, 1, 1)


def _attention(name: str, channels: int, context: int) -> Named:
    yield f"{name}.to_q.weight", (channels, channels)
    yield f"{name}.to_k.weight", (channels, context)
    yield f"{name}.to_v.weight", (channels, context)
    yield from weight_and_bias(f"{name}.to_out.0", channels, channels)


def _transformer(name: str, channels: int, depth: int, spec: UNetSpec) -> Named:
    projection = (channels, channels) if spec.linear else (channels, channels, 1, 1)
    yield from weight_and_bias(f"{name}.norm", channels)
    yield from weight_and_bias(f"{name}.proj_in", *projection)
    for i in range(depth):
        block = f"{name}.transformer_blocks.{i}"
        yield from _attention(f"{block}.attn1", channels, channels)
        yield from _attention(f"{block}.attn2", channels, spec.context)
        yield from weight_and_bias(f"{block}.ff.net.0.proj", 8 * channels, channels)
        yield from weight_and_bias(f"{block}.ff.net.2", channels, 4 * channels)
        for norm in ("norm1", "norm2", "norm3"):
            yield from weight_and_bias(f"{block}.{norm}", channels)
    yield from weight_and_bias(f"{name}.proj_out", *projection)


def unet(spec: UNetSpec) -> Named:
    """The UNet's tensors, numbered through as the original builds them."""
    widths = yield from _encoder(spec)
    yield from _decoder(spec, widths)


def controlnet(spec: UNetSpec, hints: tuple[int, ...]) -> Named:
    """A ControlNet's: a UNet's first half, what reads the picture in ``hints`` widths, and what is born zero."""
    skips = yield from _encoder(spec)
    widths = [3, *chain.from_iterable(zip(hints, hints, strict=True))][:-1]
    for number, (before, after) in enumerate(pairwise(widths)):
        yield from weight_and_bias(f"input_hint_block.{2 * number}", after, before, 3, 3)
    last = 4 * len(hints) - 2
    yield from weight_and_bias(f"input_hint_block.{last}", spec.channels, hints[-1], 3, 3)
    for number, width in enumerate(skips):
        yield from weight_and_bias(f"zero_convs.{number}.0", width, width, 1, 1)
    yield from weight_and_bias("middle_block_out.0", skips[-1], skips[-1], 1, 1)


def _encoder(spec: UNetSpec) -> Generator[tuple[str, Shape], None, list[int]]:
    """The way down and the middle; returns the widths on the way."""
    first, time = spec.channels, 4 * spec.channels
    yield from weight_and_bias("time_embed.0", time, first)
    yield from weight_and_bias("time_embed.2", time, time)
    if spec.added is not None:
        yield from weight_and_bias("label_emb.0.0", time, spec.added)
        yield from weight_and_bias("label_emb.0.2", time, time)
    yield from weight_and_bias("input_blocks.0.0", first, spec.channels_in, 3, 3)
    skips, width, number = [first], first, 1
    levels = list(zip(spec.multipliers, spec.depths, strict=True))
    for level, (multiplier, depth) in enumerate(levels):
        for _ in range(spec.blocks):
            yield from _resnet(f"input_blocks.{number}.0", width, first * multiplier, time)
            width = first * multiplier
            if depth:
                yield from _transformer(f"input_blocks.{number}.1", width, depth, spec)
            skips.append(width)
            number += 1
        if level < len(levels) - 1:
            yield from weight_and_bias(f"input_blocks.{number}.0.op", width, width, 3, 3)
            skips.append(width)
            number += 1
    yield from _resnet("middle_block.0", width, width, time)
    yield from _transformer("middle_block.1", width, spec.middle_depth, spec)
    yield from _resnet("middle_block.2", width, width, time)
    return skips


def _decoder(spec: UNetSpec, skips: list[int]) -> Named:
    first, time, width, number = spec.channels, 4 * spec.channels, skips[-1], 0
    levels = list(zip(spec.multipliers, spec.depths, strict=True))
    for level, (multiplier, depth) in reversed(list(enumerate(levels))):
        for block in range(spec.blocks + 1):
            c_in, parts = width + skips.pop(), 1
            width = first * multiplier
            yield from _resnet(f"output_blocks.{number}.0", c_in, width, time)
            if depth:
                yield from _transformer(f"output_blocks.{number}.1", width, depth, spec)
                parts = 2
            if level and block == spec.blocks:
                yield from weight_and_bias(
                    f"output_blocks.{number}.{parts}.conv", width, width, 3, 3
                )
            number += 1
    yield from weight_and_bias("out.0", first)
    yield from weight_and_bias("out.2", 4, first, 3, 3)


def _vae_resnet(name: str, c_in: int, c_out: int) -> Named:
    yield from weight_and_bias(f"{name}.norm1", c_in)
    yield from weight_and_bias(f"{name}.conv1", c_out, c_in, 3, 3)
    yield from weight_and_bias(f"{name}.norm2", c_out)
    yield from weight_and_bias(f"{name}.conv2", c_out, c_out, 3, 3)
    if c_in != c_out:
        yield from weight_and_bias(f"{name}.nin_shortcut", c_out, c_in, 1, 1)


def _vae_middle(name: str, width: int) -> Named:
    yield from _vae_resnet(f"{name}.block_1", width, width)
    yield from weight_and_bias(f"{name}.attn_1.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        yield from weight_and_bias(f"{name}.attn_1.{part}", width, width, 1, 1)
    yield from _vae_resnet(f"{name}.block_2", width, width)


def vae(widths: tuple[int, ...], blocks: int, latent: int = 4, *, quant: bool = True) -> Named:
    """The autoencoder's tensors; both halves count their levels from the picture."""
    yield from weight_and_bias("encoder.conv_in", widths[0], 3, 3, 3)
    for level, (before, width) in enumerate(pairwise((widths[0], *widths))):
        for block in range(blocks):
            c_in = before if block == 0 else width
            yield from _vae_resnet(f"encoder.down.{level}.block.{block}", c_in, width)
        if level < len(widths) - 1:
            yield from weight_and_bias(f"encoder.down.{level}.downsample.conv", width, width, 3, 3)
    yield from _vae_middle("encoder.mid", widths[-1])
    yield from weight_and_bias("encoder.norm_out", widths[-1])
    yield from weight_and_bias("encoder.conv_out", 2 * latent, widths[-1], 3, 3)
    if quant:
        yield from weight_and_bias("quant_conv", 2 * latent, 2 * latent, 1, 1)
        yield from weight_and_bias("post_quant_conv", latent, latent, 1, 1)
    yield from weight_and_bias("decoder.conv_in", widths[-1], latent, 3, 3)
    yield from _vae_middle("decoder.mid", widths[-1])
    for level, width in reversed(list(enumerate(widths))):
        above = widths[min(level + 1, len(widths) - 1)]
        for block in range(blocks + 1):
            c_in = above if block == 0 else width
            yield from _vae_resnet(f"decoder.up.{level}.block.{block}", c_in, width)
        if level:
            yield from weight_and_bias(f"decoder.up.{level}.upsample.conv", width, width, 3, 3)
    yield from weight_and_bias("decoder.norm_out", widths[0])
    yield from weight_and_bias("decoder.conv_out", 3, widths[0], 3, 3)


def clip(spec: TextSpec) -> Named:
    """OpenAI's text tower as transformers 4 names it, with its buffer of positions."""
    yield "text_model.embeddings.position_ids", (1, 77)
    yield "text_model.embeddings.token_embedding.weight", (spec.words, spec.width)
    yield "text_model.embeddings.position_embedding.weight", (77, spec.width)
    for i in range(spec.layers):
        layer = f"text_model.encoder.layers.{i}"
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from weight_and_bias(f"{layer}.self_attn.{part}", spec.width, spec.width)
        yield from weight_and_bias(f"{layer}.layer_norm1", spec.width)
        yield from weight_and_bias(f"{layer}.mlp.fc1", 4 * spec.width, spec.width)
        yield from weight_and_bias(f"{layer}.mlp.fc2", spec.width, 4 * spec.width)
        yield from weight_and_bias(f"{layer}.layer_norm2", spec.width)
    yield from weight_and_bias("text_model.final_layer_norm", spec.width)


def open_clip(spec: TextSpec) -> Named:
    """OpenCLIP's text tower, whose attention projections are one matrix."""
    width = spec.width
    yield "positional_embedding", (77, width)
    yield "text_projection", (width, spec.projection or width)
    yield "logit_scale", ()
    yield "token_embedding.weight", (spec.words, width)
    for i in range(spec.layers):
        layer = f"transformer.resblocks.{i}"
        yield f"{layer}.attn.in_proj_weight", (3 * width, width)
        yield f"{layer}.attn.in_proj_bias", (3 * width,)
        yield from weight_and_bias(f"{layer}.attn.out_proj", width, width)
        yield from weight_and_bias(f"{layer}.ln_1", width)
        yield from weight_and_bias(f"{layer}.mlp.c_fc", 4 * width, width)
        yield from weight_and_bias(f"{layer}.mlp.c_proj", width, 4 * width)
        yield from weight_and_bias(f"{layer}.ln_2", width)
    yield from weight_and_bias("ln_final", width)


@dataclass(frozen=True)
class FileSpec:
    """A whole model file: (prefix, tower) for each text encoder."""

    unet: UNetSpec
    vae: tuple[int, ...]
    texts: tuple[tuple[str, TextSpec], ...]
    vae_blocks: int = 2

    def shapes(self) -> dict[str, Shape]:
        """Every tensor of the file, with the schedule that training leaves in it."""
        towers = (
            below(prefix, (open_clip if prefix.endswith(".model.") else clip)(tower))
            for prefix, tower in self.texts
        )
        return {
            **dict(below("model.diffusion_model.", unet(self.unet))),
            **dict(below("first_stage_model.", vae(self.vae, self.vae_blocks))),
            **dict(chain.from_iterable(towers)),
            "alphas_cumprod": (1000,),
            "betas": (1000,),
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """Random values for all of them."""
        torch.manual_seed(0)
        return {
            name: torch.zeros(shape, dtype=torch.int64)
            if name.endswith("_ids")
            else 0.1 * torch.randn(shape)
            for name, shape in self.shapes().items()
        }


def below(prefix: str, named: Named) -> Named:
    return ((prefix + name, shape) for name, shape in named)


_VAE = (128, 256, 512, 512)
_CLIP, _OPEN = "cond_stage_model.transformer.", "cond_stage_model.model."
_XL = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")

PUBLISHED = {
    "sd15": FileSpec(
        UNetSpec(320, (1, 2, 4, 4), (1, 1, 1, 0), 1, 768),
        _VAE,
        ((_CLIP, TextSpec(768, 12, 49408)),),
    ),
    "sd21": FileSpec(
        UNetSpec(320, (1, 2, 4, 4), (1, 1, 1, 0), 1, 1024, linear=True),
        _VAE,
        ((_OPEN, TextSpec(1024, 24, 49408)),),
    ),
    "sdxl": FileSpec(
        UNetSpec(320, (1, 2, 4), (0, 2, 10), 10, 2048, linear=True, added=2816),
        _VAE,
        ((_XL[0], TextSpec(768, 12, 49408)), (_XL[1], TextSpec(1280, 32, 49408, 1280))),
    ),
}
_SMALL_VAE = (32, 32, 64, 64)
SMALL = {
    "sd1": FileSpec(
        UNetSpec(32, (1, 2, 2), (1, 1, 0), 1, 64), _SMALL_VAE, ((_CLIP, TextSpec(64, 3, 518)),)
    ),
    "sd2": FileSpec(
        UNetSpec(64, (1, 1, 2), (1, 1, 0), 1, 64, linear=True),
        _SMALL_VAE,
        ((_OPEN, TextSpec(64, 3, 518)),),
    ),
    "sdxl": FileSpec(
        UNetSpec(64, (1, 1, 2), (0, 1, 2), 2, 192, linear=True, added=96 + 6 * 16),
        _SMALL_VAE,
        ((_XL[0], TextSpec(64, 3, 518)), (_XL[1], TextSpec(128, 3, 518, 96))),
    ),
    "sd_inpainting": FileSpec(
        UNetSpec(32, (1, 2, 2), (1, 1, 0), 1, 64, channels_in=9),
        _SMALL_VAE,
        ((_CLIP, TextSpec(64, 3, 518)),),
    ),
}


def save(kind: str, folder: Path, changes: Mapping[str, torch.Tensor] | None = None) -> Path:
    """A small single file, with ``changes`` to its tensors, and its tokenizers beside it."""
    tensors = SMALL[kind].tensors() | dict(changes or {})
    small_checkpoints.tokenizer().save_pretrained(folder / "tokenizer")
    if kind == "sdxl":
        small_checkpoints.tokenizer("!").save_pretrained(folder / "tokenizer_2")
    path = folder / f"{kind}.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return path
