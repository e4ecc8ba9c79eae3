"""Muon: momentum whose matrix updates are orthogonalised (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

torch.optim.Muon takes matrices alone; here a convolution's filters count as the rows of one. On these models it needs
a fraction of AdamW's steps, which is what a training run on two CPU cores can afford.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Coefficients of the quintic iteration of the source, tuned for speed rather than exact convergence.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay, for parameters of two or more dimensions."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group["lr"], group["momentum"], group["weight_decay"])

    def _update(self, p: nn.Parameter, rate: float, momentum: float, weight_decay: float) -> None:
        state = self.state[p]
        if not state:
            state["mean"] = torch.zeros_like(p)
        assert p.grad is not None
        mean = state["mean"].lerp_(p.grad, 1 - momentum)
        # The iteration settles between 0.7 and 1.2 in any case: eight bits of mantissa cost nothing.
        direction = orthogonalise(p.grad.lerp(mean, momentum).flatten(1).bfloat16())
        rows, columns = direction.shape
        scale = max(1.0, rows / columns) ** 0.5
        p.mul_(1 - rate * weight_decay).add_(
            direction.to(p.dtype).view(p.shape), alpha=-rate * scale
        )


def orthogonalise(matrix: Tensor) -> Tensor:
    """Push the singular values of ``matrix`` [r, c] to about 1 (0.7 to 1.2), keeping its singular vectors."""
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / (x.norm() + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x if wide else x.T
