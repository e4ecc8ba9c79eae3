"""Component configurations read off the tensor shapes of a file in the original layout.

What shapes cannot tell is fixed by the published models: the number of heads (8 a level in Stable
Diffusion 1, 64 channels a head since), 32 groups in every normalisation, and activations.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tintype.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]
Config = dict[str, Any]

_HEAD_CHANNELS = 64
_SD1_HEADS = 8
_TIME_IDS = 6  # SDXL's sizes and crop


# What reading a configuration off a file meets whose tensors are not those that their names promise.
UNLIKE = (KeyError, IndexError, ValueError, ZeroDivisionError)


def unlike(path: Path, family: str, error: Exception) -> CheckpointError:
    """What is said of such a file."""
    why = (
        error
        if isinstance(error, KeyError)
        else "a tensor has not the shape that its name promises"
    )
    return CheckpointError(
        f"{path} looks like {family} in the original layout but is incomplete: {why}"
    )


def below(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    """The tensors whose names start with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in shapes.items() if k.startswith(prefix)}


def unet_config(shapes: Shapes, *, sample_size: int, pooled: int | None) -> Config:
    """`shapes` are those below `model.diffusion_model.`; `pooled` is SDXL's pooled text's width."""
    levels = _unet_levels(shapes)
    widths = [level[0][0] for level in levels]
    depths = [level[0][1] for level in levels]
    middle = _count(shapes, r"middle_block\.1\.transformer_blocks\.(\d+)\.")
    context = shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1]
    linear = len(shapes["middle_block.1.proj_in.weight"]) == 2
    kinds = ["CrossAttn" if depth else "" for depth in depths]
    config: Config = {
        "sample_size": sample_size,
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": len(levels[0]),
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        # A last level without attention leaves its entry to the middle block.
        "transformer_layers_per_block": [*(d or 1 for d in depths[:-1]), depths[-1] or middle],
        "cross_attention_dim": context,
        "attention_head_dim": [_heads(width) if linear else _SD1_HEADS for width in widths],
        "use_linear_projection": linear,
    }
    if "label_emb.0.0.weight" in shapes and pooled:
        added = shapes["label_emb.0.0.weight"][1]
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (added - pooled) // _TIME_IDS,
            "projection_class_embeddings_input_dim": added,
        }
    return config


def _unet_levels(shapes: Shapes) -> list[list[tuple[int, int]]]:
    """Of every level, of every residual block on the way down: its width and its transformers."""
    levels: list[list[tuple[int, int]]] = [[]]
    for i in range(1, _count(shapes, r"input_blocks\.(\d+)\.")):
        block = f"input_blocks.{i}"
        if f"{block}.0.op.weight" in shapes:
            levels.append([])
        else:
            depth = _count(shapes, rf"input_blocks\.{i}\.1\.transformer_blocks\.(\d+)\.")
            levels[-1].append((shapes[f"{block}.0.out_layers.3.weight"][0], depth))
    if not all(levels):
        raise KeyError("a residual block of every level of input_blocks")
    return levels


def vae_config(
    shapes: Shapes, *, sample_size: int, scaling_factor: float, shift_factor: float | None = None
) -> Config:
    """`shapes` are those below `first_stage_model.`."""
    levels = _count(shapes, r"encoder\.down\.(\d+)\.")
    return {
        "sample_size": sample_size,
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["encoder.conv_out.weight"][0] // 2,
        "block_out_channels": [
            shapes[f"encoder.down.{i}.block.0.conv2.weight"][0] for i in range(levels)
        ],
        "layers_per_block": _count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        "scaling_factor": scaling_factor,
        "shift_factor": shift_factor,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def sd3_config(shapes: Shapes) -> Config:
    """`shapes` are those of the transformer; a head has 64 channels where no norm of queries says otherwise."""
    width, text = shapes["context_embedder.weight"]
    _, channels, patch, _ = shapes["x_embedder.proj.weight"]
    norm = shapes.get("joint_blocks.0.x_block.attn.ln_q.weight")
    head = norm[0] if norm else _HEAD_CHANNELS
    layers = _count(shapes, r"joint_blocks\.(\d+)\.")
    return {
        "sample_size": 128,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shapes["final_layer.linear.weight"][0] // patch**2,
        "num_layers": layers,
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": text,
        "caption_projection_dim": width,
        "pooled_projection_dim": shapes["y_embedder.mlp.0.weight"][1],
        "pos_embed_max_size": math.isqrt(shapes["pos_embed"][1]),
        "dual_attention_layers": [
            i for i in range(layers) if f"joint_blocks.{i}.x_block.attn2.proj.weight" in shapes
        ],
        "qk_norm": "rms_norm" if norm else None,
    }


def flux_config(shapes: Shapes) -> Config:
    """`shapes` are those of the transformer."""
    width, channels = shapes["img_in.weight"]
    (head,) = shapes["double_blocks.0.img_attn.norm.query_norm.scale"]
    return {
        "in_channels": channels,
        "out_channels": shapes["final_layer.linear.weight"][0],
        "num_layers": _count(shapes, r"double_blocks\.(\d+)\."),
        "num_single_layers": _count(shapes, r"single_blocks\.(\d+)\."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
    }


def t5_config(shapes: Shapes) -> Config:
    """T5's encoder under transformers' names."""
    words, width = shapes["shared.weight"]
    attention = "encoder.block.0.layer.0.SelfAttention"
    buckets, heads = shapes[f"{attention}.relative_attention_bias.weight"]
    return {
        "vocab_size": words,
        "d_model": width,
        "d_kv": shapes[f"{attention}.q.weight"][0] // heads,
        "d_ff": shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        "num_layers": _count(shapes, r"encoder\.block\.(\d+)\."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }


def clip_config(shapes: Shapes) -> Config:
    """OpenAI's CLIP under transformers' names; `shapes` have lost the `text_model.` prefix."""
    tokens, positions = (
        shapes[f"embeddings.{kind}_embedding.weight"] for kind in ("token", "position")
    )
    return {
        **_text_config(tokens, positions, shapes["encoder.layers.0.mlp.fc1.weight"][0]),
        "num_hidden_layers": _count(shapes, r"encoder\.layers\.(\d+)\."),
        "hidden_act": "quick_gelu",
    }


def open_clip_config(shapes: Shapes, *, dropped_layers: int) -> Config:
    """OpenCLIP's text tower, of which the last `dropped_layers` layers are not used."""
    tokens, positions = shapes["token_embedding.weight"], shapes["positional_embedding"]
    layers = _count(shapes, r"transformer\.resblocks\.(\d+)\.")
    return {
        **_text_config(tokens, positions, shapes["transformer.resblocks.0.mlp.c_fc.weight"][0]),
        "num_hidden_layers": layers - dropped_layers,
        "hidden_act": "gelu",
        "projection_dim": shapes.get("text_projection", tokens)[1],
    }


def _text_config(tokens: tuple[int, ...], positions: tuple[int, ...], inner: int) -> Config:
    return {
        "vocab_size": tokens[0],
        "hidden_size": tokens[1],
        "max_position_embeddings": positions[0],
        "intermediate_size": inner,
        "num_attention_heads": _heads(tokens[1]),
        "projection_dim": tokens[1],
    }


def _heads(width: int) -> int:
    return max(width // _HEAD_CHANNELS, 1)


def _count(shapes: Shapes, pattern: str) -> int:
    """How many different numbers `pattern`'s group takes among the names."""
    matches = (re.match(pattern, name) for name in shapes)
    return len({match[1] for match in matches if match})
