"""Names and shapes of SD3's and FLUX's original layouts, from their own modules' structure."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from original_layout import Named, Shape, TextSpec, below, clip, vae, weight_and_bias

CLIP_L, CLIP_G, T5 = (
    f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl")
)
_FREQUENCIES, _LATENT, _PATCH = 256, 16, 2


@dataclass(frozen=True)
class Flow:
    """A transformer: its heads and their width, its blocks, and the widths of what it is told."""

    heads: int
    head: int
    blocks: int
    text: int
    pooled: int
    single: int = 0  # FLUX
    guidance: bool = False
    side: int = 0  # SD3: of the table of positions
    normed: bool = False
    dual: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        return self.heads * self.head


def _embedder(name: str, first: str, second: str, c_in: int, width: int) -> Named:
    yield from weight_and_bias(f"{name}.{first}", width, c_in)
    yield from weight_and_bias(f"{name}.{second}", width, width)


def _attention(name: str, spec: Flow, *, output: bool) -> Named:
    yield from weight_and_bias(f"{name}.qkv", 3 * spec.width, spec.width)
    if spec.normed:
        yield f"{name}.ln_q.weight", (spec.head,)
        yield f"{name}.ln_k.weight", (spec.head,)
    if output:
        yield from weight_and_bias(f"{name}.proj", spec.width, spec.width)


def sd3(spec: Flow) -> Named:
    """SD3's transformer; the last block keeps of its text what attention reads."""
    width = spec.width
    yield "pos_embed", (1, spec.side**2, width)
    yield from weight_and_bias("x_embedder.proj", width, _LATENT, _PATCH, _PATCH)
    yield from weight_and_bias("context_embedder", width, spec.text)
    yield from _embedder("t_embedder", "mlp.0", "mlp.2", _FREQUENCIES, width)
    yield from _embedder("y_embedder", "mlp.0", "mlp.2", spec.pooled, width)
    for i in range(spec.blocks):
        last = i == spec.blocks - 1
        for half in ("context_block", "x_block"):
            block, whole = f"joint_blocks.{i}.{half}", half == "x_block" or not last
            dual = half == "x_block" and i in spec.dual
            yield from _attention(f"{block}.attn", spec, output=whole)
            if dual:
                yield from _attention(f"{block}.attn2", spec, output=True)
            parts = 9 if dual else 6 if whole else 2
            yield from weight_and_bias(f"{block}.adaLN_modulation.1", parts * width, width)
            if whole:
                yield from weight_and_bias(f"{block}.mlp.fc1", 4 * width, width)
                yield from weight_and_bias(f"{block}.mlp.fc2", width, 4 * width)
    yield from weight_and_bias("final_layer.linear", _LATENT * _PATCH**2, width)
    yield from weight_and_bias("final_layer.adaLN_modulation.1", 2 * width, width)


def flux(spec: Flow) -> Named:
    """FLUX's transformer."""
    width, channels = spec.width, _LATENT * _PATCH**2
    yield from weight_and_bias("img_in", width, channels)
    yield from weight_and_bias("txt_in", width, spec.text)
    told = {"time_in": _FREQUENCIES, "vector_in": spec.pooled}
    told |= {"guidance_in": _FREQUENCIES} if spec.guidance else {}
    for name, c_in in told.items():
        yield from _embedder(name, "in_layer", "out_layer", c_in, width)
    for i in range(spec.blocks):
        for stream in ("img", "txt"):
            name = f"double_blocks.{i}.{stream}"
            yield from weight_and_bias(f"{name}_mod.lin", 6 * width, width)
            yield from weight_and_bias(f"{name}_attn.qkv", 3 * width, width)
            yield f"{name}_attn.norm.query_norm.scale", (spec.head,)
            yield f"{name}_attn.norm.key_norm.scale", (spec.head,)
            yield from weight_and_bias(f"{name}_attn.proj", width, width)
            yield from weight_and_bias(f"{name}_mlp.0", 4 * width, width)
            yield from weight_and_bias(f"{name}_mlp.2", width, 4 * width)
    for i in range(spec.single):
        name = f"single_blocks.{i}"
        yield from weight_and_bias(f"{name}.modulation.lin", 3 * width, width)
        yield from weight_and_bias(f"{name}.linear1", 7 * width, width)
        yield from weight_and_bias(f"{name}.linear2", width, 5 * width)
        yield f"{name}.norm.query_norm.scale", (spec.head,)
        yield f"{name}.norm.key_norm.scale", (spec.head,)
    yield from weight_and_bias("final_layer.linear", channels, width)
    yield from weight_and_bias("final_layer.adaLN_modulation.1", 2 * width, width)


def t5(width: int, words: int, layers: int = 1, heads: int = 4) -> Named:
    """T5's encoder, as transformers names it."""
    yield "shared.weight", (words, width)
    yield "encoder.embed_tokens.weight", (words, width)
    for i in range(layers):
        attention, forward = (f"encoder.block.{i}.layer.{j}" for j in (0, 1))
        for part in "qkv":
            yield f"{attention}.SelfAttention.{part}.weight", (heads * 8, width)
        yield f"{attention}.SelfAttention.o.weight", (width, heads * 8)
        if i == 0:
            yield f"{attention}.SelfAttention.relative_attention_bias.weight", (32, heads)
        yield f"{attention}.layer_norm.weight", (width,)
        for part in ("wi_0", "wi_1"):
            yield f"{forward}.DenseReluDense.{part}.weight", (2 * width, width)
        yield f"{forward}.DenseReluDense.wo.weight", (width, 2 * width)
        yield f"{forward}.layer_norm.weight", (width,)
    yield "encoder.final_layer_norm.weight", (width,)


def clip_g(spec: TextSpec) -> Named:
    """The second CLIP of SD3, which transformers names as well."""
    yield from clip(spec)
    yield "text_projection.weight", (spec.projection or spec.width, spec.width)


def tensors(named: dict[str, Shape]) -> dict[str, torch.Tensor]:
    """Random values for all of them."""
    torch.manual_seed(0)
    return {
        name: torch.arange(shape[-1])[None] if name.endswith("_ids") else 0.1 * torch.randn(shape)
        for name, shape in named.items()
    }


_SD3 = {"head": 64, "text": 4096, "pooled": 2048}
_FLUX = Flow(24, 128, 19, 4096, 768, single=38)
PUBLISHED = {
    "sd3-medium": Flow(24, blocks=24, side=192, **_SD3),
    "sd35-medium": Flow(24, blocks=24, side=384, normed=True, dual=tuple(range(13)), **_SD3),
    "sd35-large": Flow(38, blocks=38, side=192, normed=True, **_SD3),
    "flux1-dev": Flow(24, 128, 19, 4096, 768, single=38, guidance=True),
    "flux1-schnell": _FLUX,
}
# The text widths of tests/small_flow_checkpoints.py: two CLIPs of 16 and 24, a T5 of 48.
SMALL = {
    "sd3": Flow(2, 64, 2, 48, 40, side=8),
    "sd35": Flow(2, 64, 3, 48, 40, side=8, normed=True, dual=(0, 1)),
    "flux-dev": Flow(1, 128, 2, 48, 16, single=2, guidance=True),
    "flux-schnell": Flow(1, 128, 1, 48, 16, single=1),
}


def transformer(kind: str, spec: Flow) -> Named:
    """The transformer of a kind's name."""
    return (flux if kind.startswith("flux") else sd3)(spec)


def whole_file(kind: str, words: int, pieces: int) -> dict[str, Shape]:
    """A small model with its encoders, of vocabularies so large, and its autoencoder, as it is passed around."""
    parts = {
        "model.diffusion_model.": transformer(kind, SMALL[kind]),
        "vae." if kind.startswith("flux") else "first_stage_model.": vae(
            (32, 32, 64, 64), 1, _LATENT, quant=False
        ),
        CLIP_L: clip(TextSpec(16, 3, words)),
        T5: t5(48, pieces),
    }
    if not kind.startswith("flux"):
        parts[CLIP_G] = clip_g(TextSpec(24, 3, words))
    return dict(pair for prefix, named in parts.items() for pair in below(prefix, named))
