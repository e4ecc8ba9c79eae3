"""One training loop for every model: AdamW, warm-up and cool-down, weight averaging, resumable to the step."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# The loss of a step, made from the step's number alone: a resumed run sees the batches that it would have seen.
BatchLoss = Callable[[int], dict[str, Tensor]]


@dataclass(frozen=True)
class FitConfig:
    """``steps`` optimiser steps; ``cooldown`` is the last part of them, over which the rate falls to zero."""

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.01
    warmup: int = 100
    cooldown: float = 0.3
    ema_decay: float = 0.999
    clip_norm: float = 1.0
    seed: int = 0
    checkpoint_every: int = 500
    log_every: int = 50
    device: str = "cpu"

    def rate(self, step: int) -> float:
        """Learning rate at ``step``: linear warm-up, constant, linear cool-down."""
        remaining = (self.steps - step) / max(1.0, self.cooldown * self.steps)
        return self.learning_rate * min(1.0, (step + 1) / self.warmup, remaining)


def generator(seed: int, step: int) -> torch.Generator:
    """Randomness on the host that depends on (seed, step) alone, whatever the device."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


@contextmanager
def mixed_precision(device: str) -> Iterator[None]:
    """bfloat16 products and convolutions over float32 weights; on a CPU, attention as plain products.

    The fused attention's backward pass is slower than plain products there at the sizes of the models in the box.
    """
    kind = torch.device(device).type
    attention = sdpa_kernel(SDPBackend.MATH) if kind == "cpu" else nullcontext()
    with torch.autocast(kind, torch.bfloat16), attention:
        yield


def fit(model: nn.Module, batch_loss: BatchLoss, config: FitConfig, folder: Path) -> nn.Module:
    """Train ``model`` in place until ``config.steps`` and load it with its averaged weights.

    ``batch_loss(step)`` returns named scalars; ``loss`` among them is minimised, the others are logged to
    ``folder/log.jsonl``. ``folder/state.pt`` holds everything needed to go on after an interruption.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.to(config.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        _groups(model, config.weight_decay), lr=0.0, betas=(0.9, 0.99), fused=True
    )
    average = [p.detach().clone() for p in parameters]
    first, seconds = _resume(folder, model, optimiser, average)
    model.train()
    for step in range(first, config.steps):
        started = time.perf_counter()
        for group in optimiser.param_groups:
            group["lr"] = config.rate(step)
        losses = batch_loss(step)
        losses["loss"].backward()
        norm = nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        # A young average follows closely, or it would remember the initialisation for thousands of steps.
        torch._foreach_lerp_(
            average, parameters, 1.0 - min(config.ema_decay, (1 + step) / (10 + step))
        )
        seconds += time.perf_counter() - started
        last = step + 1 == config.steps
        if last or (step + 1) % config.log_every == 0:
            _log(folder, step + 1, seconds, norm, losses)
        if last or (step + 1) % config.checkpoint_every == 0:
            _save(folder, model, optimiser, average, step + 1, seconds, config)
    with torch.no_grad():
        for p, mean in zip(parameters, average, strict=True):
            p.copy_(mean)
    return model.eval()


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices and filters decay; gains, biases and embeddings of one dimension do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _resume(
    folder: Path, model: nn.Module, optimiser: torch.optim.Optimizer, average: list[Tensor]
) -> tuple[int, float]:
    path = folder / "state.pt"
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True, map_location="cpu")
    model.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    for mean, saved in zip(average, state["average"], strict=True):
        mean.copy_(saved)
    return state["step"], state["seconds"]


def _save(
    folder: Path,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    average: list[Tensor],
    step: int,
    seconds: float,
    config: FitConfig,
) -> None:
    state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "average": average}
    partial = folder / "state.pt.partial"
    torch.save({**state, "step": step, "seconds": seconds, "config": asdict(config)}, partial)
    os.replace(partial, folder / "state.pt")


def _log(folder: Path, step: int, seconds: float, norm: Tensor, losses: dict[str, Tensor]) -> None:
    row = {"step": step, "seconds": round(seconds, 1), "grad_norm": round(float(norm), 4)}
    row |= {name: round(float(value.detach()), 5) for name, value in losses.items()}
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def batches(count: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` that cover range(count)."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
