"""The postcard CLIP: a text encoder trained contrastively against the judge's locked view of a picture, then frozen.

Locked-image tuning (Zhai et al. 2022, arXiv 2111.07991): a trained image tower is kept as it is and text learns to
meet it. Random batches alone would not teach subject, count and position: among 192 pictures, place, time, weather
and colour tell nearly all apart, and the encoder drops what it does not need. So batches are made of look-alikes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tintype.models.clip import CLIPTextConfig, CLIPTextEncoder
from tintype.tokenizer import ClipTokenizer

from ..loop import FitConfig, batches, fit, mixed_precision
from ..objectives import contrastive_loss
from ..tokenizer import train_tokenizer
from .batches import LookAlikes, caption_ids, pictures
from .captions import caption, full_caption
from .dataset import sample_scenes
from .judge import FEATURES, Judge
from .scene import Scene
from .store import PostcardStore

# No caption is longer, and a causal encoder's states do not depend on the padding that follows.
LONGEST_CAPTION = 48
_WIDTH = 192


def text_config(vocabulary: int) -> CLIPTextConfig:
    """The last id of the vocabulary is the end token."""
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=_WIDTH,
        intermediate_size=4 * _WIDTH,
        num_hidden_layers=3,
        num_attention_heads=6,
        projection_dim=_WIDTH,
        eos_token_id=vocabulary - 1,
    )


def make_tokenizer(
    folder: Path, *, captions: int = 40_000, merges: int = 1024, seed: int = 0
) -> tuple[ClipTokenizer, int]:
    """Learn the tokenizer from captions of scenes and write it to ``folder``; also its vocabulary's size."""
    rng = np.random.default_rng(seed)
    scenes = sample_scenes(captions, seed)
    vocabulary = train_tokenizer(
        (write(scene, rng) for scene in scenes for write in (caption, full_caption)), merges, folder
    )
    return ClipTokenizer(folder), vocabulary


class ContrastivePair(nn.Module):
    """The text encoder, what carries the judge's features into its space, and the learned temperature."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.text = CLIPTextEncoder(text_config(vocabulary), projection=True)
        self.image = nn.Sequential(nn.LayerNorm(FEATURES), nn.Linear(FEATURES, _WIDTH, bias=False))
        self.log_scale = nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32))
        _initialise(self.text)

    def embed(self, features: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The judge's features [n, f] and token ids [n, 77] -> two embeddings [n, d]."""
        return self.image(features), self.text(ids).pooled


def _initialise(text: CLIPTextEncoder) -> None:
    """Small embeddings and residual writers scaled down with depth, as transformers of this kind are started."""
    for module in text.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    layers = text.text_model.encoder.layers
    for layer in layers:
        for writer in (layer.self_attn.out_proj, layer.mlp.fc2):
            nn.init.normal_(writer.weight, std=0.02 / (2 * len(layers)) ** 0.5)
            nn.init.zeros_(writer.bias)


@torch.no_grad()
def judged_features(judge: Judge, store: PostcardStore) -> Tensor:
    """What the judge sees in every picture: float32 [n, f]."""
    parts = [judge.features(pictures(store, rows)) for rows in batches(len(store.scenes), 250)]
    return torch.cat(parts)


def train_clip(
    data: tuple[Tensor, list[Scene]],
    tokenizer: ClipTokenizer,
    vocabulary: int,
    config: FitConfig,
    folder: Path,
) -> ContrastivePair:
    """Train on the judge's features [n, f] of scenes and fresh captions."""
    torch.manual_seed(config.seed)
    features, scenes = data
    pair = ContrastivePair(vocabulary)
    sampler = LookAlikes(scenes, config.batch_size, config.seed)

    def batch_loss(step: int) -> dict[str, Tensor]:
        rows = sampler.rows(step)
        ids = caption_ids([scenes[r] for r in rows], tokenizer, config.seed, step)
        with mixed_precision(config.device):
            seen, told = pair.embed(
                features[rows].to(config.device), ids[:, :LONGEST_CAPTION].to(config.device)
            )
        loss = contrastive_loss(seen.float(), told.float(), pair.log_scale.clamp(max=np.log(100.0)))
        return {"loss": loss, "scale": pair.log_scale.exp()}

    fit(pair, batch_loss, config, folder)
    return pair


@torch.no_grad()
def retrieval_accuracy(
    pair: ContrastivePair, features: Tensor, scenes: list[Scene], tokenizer: ClipTokenizer
) -> float:
    """Share of pictures, given as features [n, f], whose full caption is the nearest of all n captions."""
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(np.concatenate([tokenizer(full_caption(s, rng)) for s in scenes]))
    seen, told = (nn.functional.normalize(e, dim=-1) for e in pair.embed(features, ids))
    nearest = (seen @ told.T).argmax(dim=1)
    return float((nearest == torch.arange(len(scenes))).double().mean())
