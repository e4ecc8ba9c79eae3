"""What the models minimise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tintype.models.fused import per_sample


@dataclass(frozen=True)
class NoiseSchedule:
    """The forward process x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise, betas linear in their square root.

    Defaults are Stable Diffusion's. Ho et al. 2020 (arXiv 2006.11239), Rombach et al. 2022 (arXiv 2112.10752).
    """

    steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012

    def alphas_cumprod(self) -> Tensor:
        """a_t, float64 [steps]."""
        betas = (
            torch.linspace(
                self.beta_start**0.5, self.beta_end**0.5, self.steps, dtype=torch.float64
            )
            ** 2
        )
        return torch.cumprod(1.0 - betas, dim=0)


def noisy_and_velocity(x0: Tensor, noise: Tensor, alpha_cumprod: Tensor) -> tuple[Tensor, Tensor]:
    """x_t and the velocity sqrt(a) noise - sqrt(1-a) x0 (Salimans & Ho 2022, arXiv 2202.00512, appendix D)."""
    signal, sigma = (
        per_sample(t, x0).to(x0.dtype) for t in (alpha_cumprod.sqrt(), (1 - alpha_cumprod).sqrt())
    )
    return signal * x0 + sigma * noise, signal * noise - sigma * x0


def noisy_and_flow(x0: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """x_t on the straight path from x0 to noise, times [n] in 0..1, and its velocity.

    Liu et al. 2022 (arXiv 2209.03003).
    """
    t = time[:, None, None, None]
    return x0 + t * (noise - x0), noise - x0


def learned_variance_loss(
    predicted: tuple[Tensor, Tensor, Tensor], now: Tensor, then: Tensor
) -> Tensor:
    """Mean over elements, in bits, of KL(q || p) of a step from one share of the signal's variance to a larger one.

    `predicted` is the clean x0, the model's x0 and, from -1 to 1, how much variance it wants between the least that
    theory gives and the most; `now`, `then` are float64 [n]. Steps that end in a picture, where `then` is 1, add no
    noise and count as nothing. Nichol and Dhariwal, ICML 2021 (arXiv 2102.09672), section 3.1.
    """
    x0, clean, wanted = predicted
    counted = then < 1
    then = then.where(
        counted, (1 + now) / 2
    )  # of what does not count, so that logarithms are finite
    beta = 1 - now / then
    least = beta * (1 - then) / (1 - now)
    log_least, log_most, weight = (
        per_sample(each, x0).float().to(x0.device)
        for each in (least.log(), beta.log(), then.sqrt() * beta / (1 - now))
    )
    share = (wanted + 1) / 2
    log_variance = share * log_most + (1 - share) * log_least
    apart = (weight * (x0 - clean)).square() * (-log_variance).exp()
    kl = 0.5 * (log_variance - log_least + (log_least - log_variance).exp() + apart - 1)
    return (per_sample(counted, x0).float().to(x0.device) * kl).mean() / math.log(2)


def contrastive_loss(images: Tensor, texts: Tensor, log_scale: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy over the batch; images and texts [n, d], paired by row."""
    logits = log_scale.exp() * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def kl_to_standard_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Mean over elements of KL(N(mean, exp(log_variance)) || N(0, 1))."""
    return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()


def edge_loss(image: Tensor, target: Tensor) -> Tensor:
    """L1 between finite differences at three scales: what keeps outlines and small marks sharp."""
    total = image.new_zeros(())
    for _ in range(3):
        difference = image - target
        total = total + difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
        image, target = F.avg_pool2d(image, 2), F.avg_pool2d(target, 2)
    return total / 6
