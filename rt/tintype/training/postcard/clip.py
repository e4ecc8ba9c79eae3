"""The postcard CLIP: a small text and image encoder trained contrastively, then frozen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tintype.models.clip import CLIPImageEncoder, CLIPTextConfig, CLIPTextEncoder, CLIPVisionConfig
from tintype.tokenizer import ClipTokenizer

from ..loop import FitConfig, fit, mixed_precision
from ..objectives import contrastive_loss
from ..tokenizer import train_tokenizer
from .batches import Sampler, caption_ids, pictures
from .captions import caption, full_caption
from .dataset import sample_scenes
from .store import PostcardStore

# CLIP's published pixel statistics; an image processor of any library normalises with them.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
# No caption is longer, and a causal encoder's states do not depend on the padding that follows.
_LONGEST_CAPTION = 48

VISION = CLIPVisionConfig(
    image_size=128,
    patch_size=16,
    hidden_size=192,
    intermediate_size=768,
    num_hidden_layers=3,
    num_attention_heads=6,
    projection_dim=192,
)


def text_config(vocabulary: int) -> CLIPTextConfig:
    """The last id of the vocabulary is the end token."""
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=3,
        num_attention_heads=6,
        projection_dim=192,
        eos_token_id=vocabulary - 1,
    )


def make_tokenizer(
    folder: Path, *, captions: int = 40_000, merges: int = 1024, seed: int = 0
) -> ClipTokenizer:
    """Learn the tokenizer from captions of scenes; write it to ``folder``."""
    rng = np.random.default_rng(seed)
    scenes = sample_scenes(captions, seed)
    train_tokenizer(
        (write(scene, rng) for scene in scenes for write in (caption, full_caption)), merges, folder
    )
    return ClipTokenizer(folder)


class ContrastivePair(nn.Module):
    """Both encoders and the learned temperature."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.text = CLIPTextEncoder(text_config(vocabulary), projection=True)
        self.image = CLIPImageEncoder(VISION)
        self.log_scale = nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32))
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)
        _initialise(self)

    def embed(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Images [n, 3, h, w] in -1..1 and token ids [n, 77] -> two embeddings [n, d]."""
        pixels = ((images + 1) / 2 - self.mean) / self.std
        return self.image(pixels), self.text(ids).pooled


def _initialise(pair: ContrastivePair) -> None:
    """Small embeddings and residual writers scaled down with depth, as transformers of this kind are started."""
    for module in pair.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for encoder in (pair.text.text_model.encoder, pair.image.vision_model.encoder):
        for layer in encoder.layers:
            for writer in (layer.self_attn.out_proj, layer.mlp.fc2):
                nn.init.normal_(writer.weight, std=0.02 / (2 * len(encoder.layers)) ** 0.5)
                nn.init.zeros_(writer.bias)


def train_clip(
    store: PostcardStore, tokenizer: ClipTokenizer, vocabulary: int, config: FitConfig, folder: Path
) -> ContrastivePair:
    """Train both encoders on pictures and fresh captions."""
    torch.manual_seed(config.seed)
    pair = ContrastivePair(vocabulary)
    sampler = Sampler(len(store.scenes), config.batch_size, config.seed)

    def batch_loss(step: int) -> dict[str, Tensor]:
        rows = sampler.rows(step)
        ids = caption_ids([store.scenes[r] for r in rows], tokenizer, config.seed, step)
        images = pictures(store, rows).to(config.device)
        with mixed_precision(config.device):
            images, texts = pair.embed(images, ids[:, :_LONGEST_CAPTION].to(config.device))
        loss = contrastive_loss(
            images.float(), texts.float(), pair.log_scale.clamp(max=np.log(100.0))
        )
        return {"loss": loss, "scale": pair.log_scale.exp()}

    fit(pair, batch_loss, config, folder)
    return pair


@torch.no_grad()
def retrieval_accuracy(
    pair: ContrastivePair, store: PostcardStore, tokenizer: ClipTokenizer, count: int
) -> float:
    """Share of ``count`` pictures whose full caption is the nearest of all ``count`` captions."""
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(
        np.concatenate([tokenizer(full_caption(s, rng)) for s in store.scenes[:count]])
    )
    images, texts = pair.embed(pictures(store, slice(0, count)), ids)
    nearest = (
        nn.functional.normalize(images, dim=-1) @ nn.functional.normalize(texts, dim=-1).T
    ).argmax(dim=1)
    return float((nearest == torch.arange(count)).double().mean())
