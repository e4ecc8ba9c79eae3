"""CLIP's text and image encoders (Radford et al. 2021, arXiv 2103.00020): ViT-L/14, OpenCLIP ViT-H/14 and bigG/14."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tintype.errors import CheckpointError
from tintype.models.config import from_json, require_dividing
from tintype.models.layers import image_to_tokens, merge_heads, split_heads

_ACTIVATIONS = ("quick_gelu", "gelu")
# of the pictures in 0..1 that every published CLIP was trained on, by channel
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class CLIPTextConfig:
    """Fields as in the published ``text_encoder/config.json``."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 768
    eos_token_id: int = 2

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], component: str = "text_encoder") -> CLIPTextConfig:
        neutral = {
            "bos_token_id": (raw.get("bos_token_id"),),
            "pad_token_id": (raw.get("pad_token_id"),),
        }
        return _checked(from_json(cls, raw, component=component, neutral=neutral), component)


@dataclass(frozen=True)
class CLIPVisionConfig:
    """Fields as in the published ``image_encoder/config.json``."""

    image_size: int = 224
    patch_size: int = 14
    num_channels: int = 3
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 768

    @classmethod
    def from_json(
        cls, raw: Mapping[str, Any], component: str = "image_encoder"
    ) -> CLIPVisionConfig:
        return _checked(from_json(cls, raw, component=component, neutral={}), component)


_TowerConfig = TypeVar("_TowerConfig", CLIPTextConfig, CLIPVisionConfig)


def _checked(config: _TowerConfig, component: str) -> _TowerConfig:
    if config.hidden_act not in _ACTIVATIONS:
        raise CheckpointError(
            f"{component}/config.json asks for hidden_act={config.hidden_act!r}; possible here: "
            + ", ".join(_ACTIVATIONS)
        )
    require_dividing(config.num_attention_heads, config.hidden_size, component)
    return config


class TextEncoding(NamedTuple):
    """last_hidden_state [n, t, d] after the final norm; penultimate [n, t, d] before the last layer, not normed;
    pooled [n, d or p]: the end token's state, projected where the encoder has a projection."""

    last_hidden_state: Tensor
    penultimate: Tensor
    pooled: Tensor


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        q, k, v = (split_heads(p(x), self.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=causal)))


class _MLP(nn.Module):
    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return self.fc2(
            h * torch.sigmoid(1.702 * h) if self.activation == "quick_gelu" else F.gelu(h)
        )


class _Layer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig) -> None:
        super().__init__()
        self.self_attn = _Attention(config.hidden_size, config.num_attention_heads)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = _MLP(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), causal)
        return x + self.mlp(self.layer_norm2(x))


class _Layers(nn.Module):
    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))


class _TextEmbeddings(nn.Module):
    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        return (
            self.token_embedding(input_ids) + self.position_embedding.weight[: input_ids.shape[1]]
        )


class _TextTransformer(nn.Module):
    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.embeddings = _TextEmbeddings(config)
        self.encoder = _Layers(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class CLIPTextEncoder(nn.Module):
    """Token ids [n, t] -> TextEncoding. ``projection`` adds the text projection of contrastive CLIP."""

    def __init__(self, config: CLIPTextConfig, *, projection: bool = False) -> None:
        super().__init__()
        self.config = config
        self.text_model = _TextTransformer(config)
        if projection:
            self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, input_ids: Tensor) -> TextEncoding:
        x = self.text_model.embeddings(input_ids)
        penultimate = x
        for layer in self.text_model.encoder.layers:
            penultimate = x
            x = layer(x, causal=True)
        x = self.text_model.final_layer_norm(x)
        pooled = x.gather(1, self.end(input_ids)[:, None, None].expand(-1, 1, x.shape[-1])).squeeze(
            1
        )
        if hasattr(self, "text_projection"):
            pooled = self.text_projection(pooled)
        return TextEncoding(x, penultimate, pooled)

    def end(self, input_ids: Tensor) -> Tensor:
        """Index [n] of the first end token. Early published configs say 2 by mistake; there it is the largest id."""
        if self.config.eos_token_id == 2:
            return input_ids.to(torch.int32).argmax(dim=1)
        return (input_ids == self.config.eos_token_id).to(torch.int32).argmax(dim=1)


class _VisionEmbeddings(nn.Module):
    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        patches = (config.image_size // config.patch_size) ** 2
        self.class_embedding = nn.Parameter(
            torch.randn(config.hidden_size) * config.hidden_size**-0.5
        )
        self.patch_embedding = nn.Conv2d(
            config.num_channels,
            config.hidden_size,
            config.patch_size,
            stride=config.patch_size,
            bias=False,
        )
        self.position_embedding = nn.Embedding(patches + 1, config.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = image_to_tokens(self.patch_embedding(pixels))
        first = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class _VisionTransformer(nn.Module):
    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.embeddings = _VisionEmbeddings(config)
        # The published checkpoints misspell this name, and loading is by name.
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = _Layers(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class CLIPImageEncoder(nn.Module):
    """Normalised pixels [n, 3, h, w] -> image embedding [n, p] (not normalised)."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = _VisionTransformer(config)
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def hidden_states(self, pixels: Tensor) -> list[Tensor]:
        """The input of every layer and the last layer's output, each [n, 1 + patches, d], not normed."""
        states = [self.vision_model.pre_layrnorm(self.vision_model.embeddings(pixels))]
        for layer in self.vision_model.encoder.layers:
            states.append(layer(states[-1], causal=False))
        return states

    def forward(self, pixels: Tensor) -> Tensor:
        return self.visual_projection(
            self.vision_model.post_layernorm(self.hidden_states(pixels)[-1][:, 0])
        )
