"""unCLIP's diffusion prior: from a text to how CLIP would embed a picture of it.

Ramesh et al. 2022 (arXiv 2204.06125), section 2.2: a causal transformer over the text's tokens, its embedding, the
time, the noisy image embedding, and a last token whose output is the prediction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tintype.errors import CheckpointError
from tintype.models.config import from_json
from tintype.models.fused import attention, bias_of_unread
from tintype.models.layers import (
    TimestepEmbedding,
    merge_heads,
    sinusoidal_embedding,
    split_heads,
)

# Behind the text's tokens: its embedding, the time, the noisy image embedding, the token that is read.
_ADDED = 4
_CHANGING = 3  # the last of them, which no token of the text sees
KeysAndValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class PriorConfig:
    """Fields as in the published ``prior/config.json``."""

    num_attention_heads: int = 32
    attention_head_dim: int = 64
    num_layers: int = 20
    embedding_dim: int = 768
    num_embeddings: int = 77

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> PriorConfig:
        wide = raw.get("embedding_dim", cls.embedding_dim)
        heads = raw.get("num_attention_heads", cls.num_attention_heads)
        neutral = {
            "additional_embeddings": (_ADDED,),
            "time_embed_act_fn": ("silu",),
            "encoder_hid_proj_type": ("linear",),
            "added_emb_type": ("prd",),
            "embedding_proj_dim": (wide,),
            "clip_embed_dim": (wide,),
            "time_embed_dim": (heads * raw.get("attention_head_dim", cls.attention_head_dim),),
        }
        for field in ("encoder_hid_proj_type", "added_emb_type"):
            if raw.get(field, neutral[field][0]) is None:
                raise CheckpointError(
                    f"prior/config.json asks for {field}=None; possible here: {neutral[field][0]!r}"
                )
        return from_json(cls, raw, component="prior", neutral=neutral)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(
        self, x: Tensor, bias: Tensor, before: KeysAndValues | None
    ) -> tuple[Tensor, KeysAndValues]:
        q, *own = (split_heads(p(x), self.heads) for p in (self.to_q, self.to_k, self.to_v))
        if before is not None:
            own = [torch.cat(pair, dim=2) for pair in zip(before, own, strict=True)]
        k, v = own
        return self.to_out[0](merge_heads(attention(q, k, v, bias))), (k, v)


class _Widen(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x))


class _FeedForward(nn.Module):
    """To four times the width and back; the empty slot keeps the published parameter names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([_Widen(width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class _Block(nn.Module):
    """Pre-norm transformer block, of tokens alone or behind those whose keys and values there are."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = _Attention(width, heads)
        self.norm3 = nn.LayerNorm(width)
        self.ff = _FeedForward(width)

    def forward(
        self, x: Tensor, bias: Tensor, before: KeysAndValues | None = None
    ) -> tuple[Tensor, KeysAndValues]:
        attended, known = self.attn1(self.norm1(x), bias, before)
        x = x + attended
        return x + self.ff(self.norm3(x)), known


class Prior(nn.Module):
    """Predicts the clean image embedding from a noisy one, a time and a text."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        wide = config.embedding_dim
        width = config.num_attention_heads * config.attention_head_dim
        self.time_embedding = TimestepEmbedding(width, width)
        self.proj_in = nn.Linear(wide, width)
        self.embedding_proj = nn.Linear(wide, width)
        self.encoder_hidden_states_proj = nn.Linear(wide, width)
        self.positional_embedding = nn.Parameter(
            torch.zeros(1, config.num_embeddings + _ADDED, width)
        )
        self.prd_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.transformer_blocks = nn.ModuleList(
            _Block(width, config.num_attention_heads) for _ in range(config.num_layers)
        )
        self.norm_out = nn.LayerNorm(width)
        self.proj_to_clip_embeddings = nn.Linear(width, wide)
        # of the embeddings that it was trained on
        self.clip_mean = nn.Parameter(torch.zeros(1, wide))
        self.clip_std = nn.Parameter(torch.ones(1, wide))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
        text_mask: Tensor,
    ) -> Tensor:
        """sample [n, e], timestep [n], encoder_hidden_states [n, t, e], text_embeds [n, e] and text_mask [n, t], 1
        where a token is the text's own -> the clean embedding [n, e], without mean and deviation."""
        remembered = self.remember(encoder_hidden_states, text_embeds, text_mask)
        return self.recall(remembered, self.at(remembered, timestep), sample)

    def remember(
        self, encoder_hidden_states: Tensor, text_embeds: Tensor, text_mask: Tensor
    ) -> tuple[Tensor, ...]:
        """What is the same at every step, as no token sees a later one: which tokens those behind the text see, and
        each block's keys and values of the text."""
        tokens = [
            self.encoder_hidden_states_proj(encoder_hidden_states),
            self.embedding_proj(text_embeds)[:, None],
        ]
        x = torch.cat(tokens, dim=1) + self.positional_embedding[:, :-_CHANGING]
        count = x.shape[1] + _CHANGING
        read = F.pad(text_mask.to(x.dtype), (0, _ADDED), value=1.0)[:, None]
        earlier = torch.ones(count, count, dtype=x.dtype, device=x.device).tril()
        bias = bias_of_unread(read * earlier)
        text, behind = bias.split((x.shape[1], _CHANGING), dim=2)
        kept = [behind]
        for block in self.transformer_blocks:
            x, known = block(x, text[..., :-_CHANGING])
            kept += known
        return tuple(kept)

    def at(self, remembered: tuple[Tensor, ...], times: Tensor) -> tuple[Tensor, ...]:
        """The token of each of the times [.., n], [.., n, c]."""
        waves = sinusoidal_embedding(times, self.positional_embedding.shape[-1])
        return (self.time_embedding(waves.to(remembered[0].dtype)),)

    def recall(
        self, remembered: tuple[Tensor, ...], told: Sequence[Tensor], sample: Tensor
    ) -> Tensor:
        """`forward` of the sample with what was remembered and the token of its time, of `at` [n, c]."""
        bias, *kept = remembered
        tokens = (told[0], self.proj_in(sample), self.prd_embedding[0].expand(len(sample), -1))
        x = torch.stack(tokens, dim=1) + self.positional_embedding[:, -_CHANGING:]
        pairs = zip(kept[::2], kept[1::2], strict=True)
        for block, known in zip(self.transformer_blocks, pairs, strict=True):
            x, _ = block(x, bias, known)
        return self.proj_to_clip_embeddings(self.norm_out(x)[:, -1])

    def embedded(self, sample: Tensor) -> Tensor:
        """A clean sample [n, e] as CLIP embeds pictures, [n, e]."""
        return sample * self.clip_std + self.clip_mean
