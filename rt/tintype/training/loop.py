"""One training loop for every model: warm-up and cool-down, weight averaging, resumable to the step."""

from __future__ import annotations

import json
import math
import os
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tintype.errors import TintypeError
from tintype_kernels.cache import replace_text

from .muon import Muon

# What reading a state meets that is cut off, or that other models and settings left there.
_UNLIKE = (RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError)
# What may change where a run is resumed: where it runs, what it notes, and its length, which has a rule of its own.
_FREE = {"device", "log_every", "checkpoint_every", "steps"}
_MEND = "remove it to begin anew, or name another folder with --out"
# The loss of a step, made from the step's number alone: a resumed run sees the batches that it would have seen.
BatchLoss = Callable[[int], dict[str, Tensor]]


@dataclass(frozen=True)
class FitConfig:
    """``steps`` optimiser steps; over the last ``cooldown`` of them the rates fall to zero.

    ``learning_rate`` is AdamW's. Where ``matrix_rate`` is given, Muon takes the matrices and filters at that rate.
    """

    steps: int
    batch_size: int
    learning_rate: float
    matrix_rate: float | None = None
    weight_decay: float = 0.01
    warmup: int = 100
    cooldown: float = 0.4
    ema_decay: float = 0.998
    clip_norm: float = 1.0
    seed: int = 0
    checkpoint_every: int = 500
    log_every: int = 50
    device: str = "cpu"

    def pace(self, step: int) -> float:
        """Share of the full rates at ``step``: linear warm-up, constant, linear cool-down."""
        remaining = (self.steps - step) / max(1.0, self.cooldown * self.steps)
        return min(1.0, (step + 1) / self.warmup, remaining)


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
    with _alone(folder):
        model.to(config.device).train()
        run = _Run(model, _optimisers(model, config), [p.detach().clone() for p in _trained(model)])
        run.resume(folder / "state.pt", config)
        _forget_rows(folder / "log.jsonl", run.step)
        while run.step < config.steps:
            started = time.perf_counter()
            losses = batch_loss(run.step)
            losses["loss"].backward()
            norm = nn.utils.clip_grad_norm_(_trained(model), config.clip_norm)
            run.update(config)
            run.seconds += time.perf_counter() - started
            last = run.step == config.steps
            if last or run.step % config.log_every == 0:
                _log(folder, run.step, run.seconds, norm, losses)
            if last or run.step % config.checkpoint_every == 0:
                run.save(folder / "state.pt", config)
    with torch.no_grad():
        for p, mean in zip(_trained(model), run.average, strict=True):
            p.copy_(mean)
    return model.eval()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Refuse a second training that would write the same state and log."""
    with (folder / "lock").open("w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows has no such locks
            pass
        except BlockingIOError as error:
            raise TintypeError(
                f"another training writes to {folder}; wait for it, or name another folder with --out"
            ) from error
        yield


@dataclass
class _Run:
    """What a training run carries from step to step, and through an interruption."""

    model: nn.Module
    optimisers: list[torch.optim.Optimizer]
    average: list[Tensor]
    step: int = 0
    seconds: float = 0.0

    def update(self, config: FitConfig) -> None:
        """Apply the gradients, clear them, and move the average."""
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["full_rate"] * config.pace(self.step)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        # A young average follows closely, or it would remember the initialisation for thousands of steps.
        decay = min(config.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average, _trained(self.model), 1.0 - decay)
        self.step += 1

    def save(self, path: Path, config: FitConfig) -> None:
        """Write everything to ``path``, whole or not at all."""
        state = {
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "average": self.average,
            "step": self.step,
            "seconds": self.seconds,
            "config": asdict(config),
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def resume(self, path: Path, config: FitConfig) -> None:
        """Take up what ``save`` wrote, where it did, for a run of the same settings."""
        if not path.exists():
            return
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
            _check_resumed(path, state, config)
            self._take_up(state)
        except _UNLIKE as error:
            raise TintypeError(
                f"{path} is damaged, or the state of another training; {_MEND}"
            ) from error

    def _take_up(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        for mean, saved in zip(self.average, state["average"], strict=True):
            mean.copy_(saved)
        self.step, self.seconds = state["step"], state["seconds"]


def _check_resumed(path: Path, state: dict[str, Any], config: FitConfig) -> None:
    """Refuse other settings, of which optimisers would take some from the state, and a run that ends before it."""
    asked, begun = asdict(config), dict(state["config"])
    # A state from before a setting was there says nothing of it.
    changed = [n for n in asked.keys() & begun.keys() - _FREE if asked[n] != begun[n]]
    if changed:
        before, now = (_settings(each, changed) for each in (begun, asked))
        raise TintypeError(
            f"{path} was begun with {before}, and this run asks for {now}; ask for the same, {_MEND}"
        )
    if config.steps < state["step"]:
        raise TintypeError(
            f"{path} has already gone {state['step']} steps, and this run asks for {config.steps}; ask for as many "
            f"or more, {_MEND}"
        )


def _settings(values: dict[str, Any], names: list[str]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items() if name in names)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _optimisers(model: nn.Module, config: FitConfig) -> list[torch.optim.Optimizer]:
    """AdamW, without decay of gains and biases; and Muon for what it is made for, where the configuration has it."""
    by_muon = [p for p in _trained(model) if config.matrix_rate is not None and _is_wide(p)]
    taken = {id(p) for p in by_muon}
    rest = [p for p in _trained(model) if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.99), fused=True)
    optimisers: list[torch.optim.Optimizer] = [adamw]
    if config.matrix_rate is not None:
        optimisers.append(Muon(by_muon, config.matrix_rate, 0.95, config.weight_decay))
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["full_rate"] = group["lr"]
    return optimisers


def _is_wide(p: nn.Parameter) -> bool:
    """Hidden layers' matrices; those that read pixels or write few channels are too narrow to be orthogonalised."""
    return p.ndim > 1 and min(p.shape[0], p[0].numel()) >= 32


def _log(folder: Path, step: int, seconds: float, norm: Tensor, losses: dict[str, Tensor]) -> None:
    row = {"step": step, "seconds": round(seconds, 1), "grad_norm": round(float(norm), 4)}
    row |= {name: round(float(value.detach()), 5) for name, value in losses.items()}
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def _forget_rows(path: Path, step: int) -> None:
    """Drop what a killed run logged behind its state, which is gone over again."""
    if not path.exists():
        return
    text = path.read_text()
    kept = "".join(f"{line}\n" for line in text.splitlines() if _step_of(line) <= step)
    if kept != text:
        replace_text(path, kept)


def _step_of(line: str) -> float:
    """The step of a logged row; past every step where the row was cut as it was written."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def batches(count: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` that cover range(count)."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
