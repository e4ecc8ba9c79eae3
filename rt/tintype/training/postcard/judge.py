"""The judge: reads every attribute of a scene from a picture, so that prompt accuracy can be measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..loop import FitConfig, batches, fit, generator, mixed_precision
from ..save import save_component
from .batches import Sampler, pictures
from .dataset import labels
from .scene import ATTRIBUTES, Scene
from .store import PostcardStore

# The sky is free decoration; these are what prompt accuracy counts.
JUDGED = ("time", "place", "weather", "subject", "colour", "count", "position")
_WIDTHS = (32, 64, 96, 128)
FEATURES = 192  # width of the last hidden layer, which CLIP meets the judge at


class _Block(nn.Module):
    """Two convolutions around a skip, the first with a stride."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1)
        self.norm1 = nn.GroupNorm(8, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, c_out)
        self.skip = nn.Conv2d(c_in, c_out, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.skip(x) + self.norm2(self.conv2(h)))


class Judge(nn.Module):
    """Images [n, 3, 128, 128] in -1..1 -> logits of every attribute; where things stand is not pooled away."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, _WIDTHS[0], 5, stride=2, padding=2)
        widths = (_WIDTHS[0], *_WIDTHS)
        self.blocks = nn.ModuleList(_Block(i, o, stride=2) for i, o in pairwise(widths))
        self.narrow = nn.Conv2d(_WIDTHS[-1], 48, 1)
        self.hidden = nn.Linear(48 * 16 + _WIDTHS[-1], FEATURES)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(FEATURES, len(values)) for name, values in ATTRIBUTES.items()}
        )

    def features(self, images: Tensor) -> Tensor:
        """What all attributes are read from: [n, FEATURES]."""
        x = F.relu(self.stem(images))
        for block in self.blocks:
            x = block(x)
        h = torch.cat([F.relu(self.narrow(x)).flatten(1), x.mean(dim=(2, 3))], dim=1)
        return F.relu(self.hidden(h))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        h = self.features(images)
        return {name: head(h) for name, head in self.heads.items()}


def train_judge(store: PostcardStore, config: FitConfig, folder: Path) -> Judge:
    """Train on renders, roughened so that a decoder's softness is not what the judge looks at."""
    torch.manual_seed(config.seed)
    judge = Judge().to(memory_format=torch.channels_last)
    truth = {name: torch.from_numpy(index) for name, index in labels(store.scenes).items()}
    sampler = Sampler(len(store.scenes), config.batch_size, config.seed)

    def batch_loss(step: int) -> dict[str, Tensor]:
        rows = sampler.rows(step)
        images = _roughen(pictures(store, rows), generator(config.seed, step)).to(config.device)
        with mixed_precision(config.device):
            logits = judge(images)
        losses = [
            F.cross_entropy(logits[n].float(), t[rows].to(config.device)) for n, t in truth.items()
        ]
        return {"loss": torch.stack(losses).sum()}

    fit(judge, batch_loss, config, folder)
    return judge


def save_judge(judge: Judge, folder: Path) -> None:
    """Write the judge's weights, half precision, and the classes that its outputs stand for."""
    config = {
        "_class_name": "PostcardJudge",
        "attributes": {n: list(v) for n, v in ATTRIBUTES.items()},
    }
    save_component(judge, config, folder, "model.safetensors")


def load_judge(folder: Path) -> Judge:
    """The judge that ``save_judge`` wrote, float32."""
    from safetensors.torch import load_file

    judge = Judge()
    judge.load_state_dict(
        {n: t.float() for n, t in load_file(folder / "model.safetensors").items()}
    )
    return judge.eval()


def _roughen(images: Tensor, random: torch.Generator) -> Tensor:
    """Blur a part of the batch by halving its resolution; add a little noise to all of it."""
    soft = torch.rand(len(images), 1, 1, 1, generator=random) < 0.3
    blurred = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    noise = 0.04 * torch.randn(images.shape, generator=random)
    return torch.where(soft, blurred, images) + noise


@torch.no_grad()
def accuracy(
    judge: Judge,
    images: Callable[[slice], Tensor],
    scenes: Sequence[Scene],
    stated: Mapping[str, np.ndarray] | None = None,
) -> dict[str, float]:
    """Share of right readings an attribute, and ``overall``: their mean over the judged attributes.

    ``images(rows)`` gives pictures [n, 3, 128, 128] in -1..1. Where ``stated[name]`` is False the prompt said nothing
    of that attribute and the picture is not counted for it.
    """
    truth = labels(scenes)
    read: dict[str, list[np.ndarray]] = {name: [] for name in ATTRIBUTES}
    for rows in batches(len(scenes), 250):
        for name, logits in judge(images(rows)).items():
            read[name].append(logits.argmax(dim=1).numpy())
    right = {name: np.concatenate(parts) == truth[name] for name, parts in read.items()}
    shares = {n: float(r[stated[n]].mean() if stated else r.mean()) for n, r in right.items()}
    return shares | {"overall": float(np.mean([shares[name] for name in JUDGED]))}
