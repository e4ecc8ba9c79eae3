"""T5's encoder, version 1.1 (Raffel et al. 2020, arXiv 1910.10683; gated feed-forward: arXiv 2002.05202)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from tintype.models.config import from_json
from tintype.models.layers import merge_heads, split_heads

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "feed_forward_proj": ("gated-gelu",),
    "dense_act_fn": ("gelu_new",),
    "is_gated_act": (True,),
    "is_encoder_decoder": (True, False),
    "tie_word_embeddings": (True, False),  # the decoder's head, which is not here
}
# What the decoder does, and which tokens mean what, changes nothing in the encoder.
_DECODERS = (
    "num_decoder_layers",
    "scale_decoder_outputs",
    "decoder_start_token_id",
    "eos_token_id",
    "pad_token_id",
)
_LARGEST_GATED = 256.0


@dataclass(frozen=True)
class T5Config:
    """Fields as in the published ``text_encoder/config.json``; the defaults are XXL's."""

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], component: str = "text_encoder") -> T5Config:
        neutral = {**_NEUTRAL, **{name: (raw.get(name),) for name in _DECODERS}}
        return from_json(cls, raw, component=component, neutral=neutral)


class _Norm(nn.Module):
    """RMS norm whose result has the weights' type; the residual stream that it reads is float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps).to(self.weight.dtype) * self.weight


class _SelfAttention(nn.Module):
    def __init__(self, config: T5Config, *, has_bias: bool) -> None:
        super().__init__()
        self.config = config
        inner = config.num_heads * config.d_kv
        self.q, self.k, self.v = (nn.Linear(config.d_model, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if has_bias:
            self.relative_attention_bias = nn.Embedding(
                config.relative_attention_num_buckets, config.num_heads
            )

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (split_heads(p(x), self.config.num_heads) for p in (self.q, self.k, self.v))
        # T5 leaves the scale to the initialisation of its weights.
        return self.o(
            merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0))
        )

    def position_bias(self, tokens: int) -> Tensor:
        """[1, heads, tokens, tokens] by the bucket of each distance."""
        buckets = torch.from_numpy(position_buckets(tokens, self.config))
        bias = self.relative_attention_bias(buckets.to(self.relative_attention_bias.weight.device))
        return bias.permute(2, 0, 1)[None]


def position_buckets(tokens: int, config: T5Config) -> NDArray[np.int64]:
    """[tokens, tokens], half of the buckets for each direction: exact for near tokens, then wider by powers.

    Section 2.1, in float32 as it was trained. NumPy makes them, so that a traced graph holds them as a constant.
    """
    places = np.arange(tokens)
    distance = places[None, :] - places[:, None]
    half = config.relative_attention_num_buckets // 2
    exact = half // 2
    far = np.abs(distance)
    ratio = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(exact))
    share = ratio / np.float32(math.log(config.relative_attention_max_distance / exact))
    wide = np.minimum(exact + (share * np.float32(half - exact)).astype(np.int64), half - 1)
    return half * (distance > 0) + np.where(far < exact, far, wide)


class _FeedForward(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.wi_0, self.wi_1 = (
            nn.Linear(config.d_model, config.d_ff, bias=False) for _ in range(2)
        )
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gated = F.gelu(self.wi_0(x), approximate="tanh").float() * self.wi_1(x).float()
        # XXL's gated values outgrow float16. Halved until they fit and doubled again behind, they lose no bit.
        largest = gated.abs().amax(dim=-1, keepdim=True)
        scale = torch.exp2((largest / _LARGEST_GATED).clamp(min=1.0).log2().ceil())
        return self.wo((gated / scale).to(x.dtype)).float() * scale


class _AttentionLayer(nn.Module):
    def __init__(self, config: T5Config, *, has_bias: bool) -> None:
        super().__init__()
        self.SelfAttention = _SelfAttention(config, has_bias=has_bias)
        self.layer_norm = _Norm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x + self.SelfAttention(self.layer_norm(x), bias).float()


class _FeedForwardLayer(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.DenseReluDense = _FeedForward(config)
        self.layer_norm = _Norm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x))


class _Block(nn.Module):
    def __init__(self, config: T5Config, *, has_bias: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            [_AttentionLayer(config, has_bias=has_bias), _FeedForwardLayer(config)]
        )

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.layer[1](self.layer[0](x, bias))


class _Stack(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            _Block(config, has_bias=i == 0) for i in range(config.num_layers)
        )
        self.final_layer_norm = _Norm(config.d_model, config.layer_norm_epsilon)


class T5Encoder(nn.Module):
    """Token ids [n, t] -> hidden states [n, t, d]. Padding is attended to, as the image models were trained with it."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = _Stack(config)

    def forward(self, input_ids: Tensor) -> Tensor:
        blocks = self.encoder.block
        x = self.shared(input_ids).float()
        bias = blocks[0].layer[0].SelfAttention.position_bias(input_ids.shape[1])
        bias = bias.to(self.shared.weight)  # the first block may wait elsewhere, in another type
        for block in blocks:
            x = block(x, bias)
        return self.encoder.final_layer_norm(x)
