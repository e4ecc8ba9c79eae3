"""What unCLIP tells its decoder of an image embedding and a text.

Ramesh et al. 2022 (arXiv 2204.06125), section 2.1: the embedding is added to the time's, and becomes tokens before the
text's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tintype.models.config import from_json


@dataclass(frozen=True)
class UnclipProjectionConfig:
    """Fields as in the published ``text_proj/config.json``."""

    clip_extra_context_tokens: int = 4
    clip_embeddings_dim: int = 768
    time_embed_dim: int = 1280
    cross_attention_dim: int = 1536

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> UnclipProjectionConfig:
        return from_json(cls, raw, component="text_proj", neutral={})


class UnclipProjection(nn.Module):
    """Image embedding and text -> a context of tokens, and what is added to the embedded time."""

    def __init__(self, config: UnclipProjectionConfig) -> None:
        super().__init__()
        self.config = config
        wide, context = config.clip_embeddings_dim, config.cross_attention_dim
        # in the place of an image embedding where there is none, for guidance
        self.learned_classifier_free_guidance_embeddings = nn.Parameter(torch.zeros(wide))
        self.embedding_proj = nn.Linear(wide, config.time_embed_dim)
        self.clip_image_embeddings_project_to_time_embeddings = nn.Linear(
            wide, config.time_embed_dim
        )
        self.clip_extra_context_tokens_proj = nn.Linear(
            wide, config.clip_extra_context_tokens * context
        )
        self.encoder_hidden_states_proj = nn.Linear(wide, context)
        self.text_encoder_hidden_states_norm = nn.LayerNorm(context)

    def forward(
        self,
        image_embeds: Tensor,
        shown: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """image_embeds [n, e], of which rows count whose shown [n] is 1, encoder_hidden_states [n, t, e], text_embeds
        [n, e] -> context [n, tokens + t, d], added to the time [n, m]."""
        shown = shown.to(image_embeds.dtype)[:, None]
        absent = self.learned_classifier_free_guidance_embeddings
        image = shown * image_embeds + (1 - shown) * absent
        added = self.clip_image_embeddings_project_to_time_embeddings(image) + self.embedding_proj(
            text_embeds
        )
        # As published, neighbours of one channel lie side by side.
        tokens = self.clip_extra_context_tokens_proj(image)
        tokens = tokens.unflatten(-1, (-1, self.config.clip_extra_context_tokens)).transpose(1, 2)
        text = self.text_encoder_hidden_states_norm(
            self.encoder_hidden_states_proj(encoder_hidden_states)
        )
        return torch.cat([tokens, text], dim=1), added
