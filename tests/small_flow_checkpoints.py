"""Small random-weight SD3 and FLUX checkpoints, made and saved by diffusers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

import small_checkpoints as small

PIPELINES = {
    "sd3": diffusers.StableDiffusion3Pipeline,
    "sd3 without T5": diffusers.StableDiffusion3Pipeline,
    "sd35": diffusers.StableDiffusion3Pipeline,
    "flux-dev": diffusers.FluxPipeline,
    "flux-schnell": diffusers.FluxPipeline,
}
_TEXTS = ["a red lighthouse on a rocky coast at dusk", "two blue boats, in the rain!", "the, The"]
_WIDTH = 48  # of T5's states


def t5_tokenizer() -> T5TokenizerFast:
    """Unigram pieces in T5's manner, learnt from a few words."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace("  ", " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    alphabet = [chr(code) for code in range(33, 127)]
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=special, unk_token="<unk>", initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0, model_max_length=512)


def t5() -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=_WIDTH,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


def vae() -> diffusers.AutoencoderKL:
    return small.vae(
        latent_channels=16,
        scaling_factor=0.4,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def parts(kind: str) -> dict[str, Any]:
    """The components of a small model of `kind`, as its diffusers pipeline takes them."""
    torch.manual_seed(0)
    return _flux_parts(kind) if kind.startswith("flux") else _sd3_parts(kind)


def _sd3_parts(kind: str) -> dict[str, Any]:
    newer = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)} if kind == "sd35" else {}
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=40,
        pos_embed_max_size=8,
        **newer,
    )
    whole = kind != "sd3 without T5"
    return {
        "text_encoder": small.text_encoder(16, projection=16),
        "text_encoder_2": small.text_encoder(24, projection=24, act="gelu"),
        "text_encoder_3": t5() if whole else None,
        "tokenizer": small.tokenizer(),
        "tokenizer_2": small.tokenizer("!"),
        "tokenizer_3": t5_tokenizer() if whole else None,
        "transformer": transformer,
        "vae": vae(),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def _flux_parts(kind: str) -> dict[str, Any]:
    dev = kind == "flux-dev"
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=_WIDTH,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=dev,
    )
    return {
        "text_encoder": small.text_encoder(16),
        "text_encoder_2": t5(),
        "tokenizer": small.tokenizer(),
        "tokenizer_2": t5_tokenizer(),
        "transformer": transformer,
        "vae": vae(),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0 if dev else 1.0, use_dynamic_shifting=dev
        ),
    }


def save(kind: str, folder: Path) -> Path:
    """A folder in diffusers layout."""
    PIPELINES[kind](**parts(kind)).save_pretrained(folder)
    return folder
