"""Which of a stage's layers are quantised, and what each of them by itself does to its output."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tintype.models.quantised import LayerCodes, Scheme, is_inner, quantisable, quantised_layer
from tintype.models.stage import Stage

from .calibration import Seen

MOST_MEASURED = 200_000_000  # parameters; in a larger denoiser the rule alone decides
_MOST_KEPT = 0.1  # of the layers
_SUSPECTS = 3

Rounder = Callable[[str, Tensor], LayerCodes]


@dataclass(frozen=True)
class LayerReport:
    """``error``: of the stage's output with this layer alone quantised, by norm; None where it was not measured."""

    name: str
    stored: str
    error: float | None = None


@dataclass(frozen=True)
class Sensitivity:
    """Every layer that could be quantised. ``decided``: "measured", or "by rule"."""

    decided: str
    layers: list[LayerReport]

    def chosen(self, weights: str) -> set[str]:
        """The names of the layers whose weights are kept in ``weights``."""
        return {layer.name for layer in self.layers if layer.stored == weights}

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Sensitivity:
        """The report that a manifest holds."""
        return cls(said["decided"], [LayerReport(**layer) for layer in said["layers"]])

    def ranked(self) -> list[LayerReport]:
        """The layers that were measured, the most sensitive first."""
        measured = (layer for layer in self.layers if layer.error is not None)
        return sorted(measured, key=lambda layer: -(layer.error or 0.0))

    def lines(self, name: str, most: int = 8) -> Iterator[str]:
        """The most sensitive layers of the component ``name``, for people."""
        measured = self.ranked()
        high = sum(layer.stored == "high" for layer in self.layers)
        yield f"{name}: {len(self.layers)} layers, {high} kept high, {self.decided}"
        yield from (
            f"  {layer.name:60}{layer.error:10.1e}  {layer.stored}" for layer in measured[:most]
        )


def suspects(found: Mapping[str, Sensitivity]) -> str:
    """The layers in codes that do most to their stages' outputs, as an error names them; empty where none was measured.

    ``found`` has a component's report by its name.
    """
    kept = [
        (layer.error or 0.0, f"{component}.{layer.name}")
        for component, report in found.items()
        for layer in report.ranked()
        if layer.stored != "high"
    ]
    return ", ".join(
        f"{name} ({error:.1e})" for error, name in sorted(kept, reverse=True)[:_SUSPECTS]
    )


def quantisable_by_rule(
    model: nn.Module, scheme: Scheme, seen: Collection[str] | None = None
) -> list[str]:
    """The layers that are quantised where nothing is measured: all but the gates and what groups do not divide.

    With ``seen`` only those: a layer whose weight the model uses without calling it has no inputs to find a scale by.
    """
    layers = quantisable(model).items()
    fitting = [name for name, layer in layers if scheme.divides(layer.weight.shape)]
    return [name for name in fitting if is_inner(name, scheme) and (seen is None or name in seen)]


def by_rule(model: nn.Module, scheme: Scheme, seen: Collection[str] | None = None) -> Sensitivity:
    """The report of a component in which nothing is measured."""
    chosen = set(quantisable_by_rule(model, scheme, seen))
    return Sensitivity(
        "by rule",
        [
            LayerReport(name, scheme.weights if name in chosen else "high")
            for name in quantisable(model)
        ],
    )


def measured(
    stage: Stage, seen: Seen, scheme: Scheme, rounder: Rounder, allowed: float
) -> Sensitivity:
    """Quantise one layer at a time, and keep the worst ones high until the others' errors add up to ``allowed``."""
    ((_, model),) = stage.named_children()
    layers = quantisable(model)
    names = quantisable_by_rule(model, scheme, seen.layers)
    errors = layer_errors(stage, seen, names, rounder)
    kept = worst(errors, allowed)
    return Sensitivity(
        "measured",
        [
            LayerReport(
                name,
                scheme.weights if name in errors and name not in kept else "high",
                errors.get(name),
            )
            for name in layers
        ],
    )


def layer_errors(stage: Stage, seen: Seen, names: list[str], rounder: Rounder) -> dict[str, float]:
    """The relative error of the stage's output, over its inputs in ``seen``, with each layer alone quantised."""
    ((_, model),) = stage.named_children()
    with torch.inference_mode():
        expected = _outputs(stage, seen)
        errors = {}
        for name in names:
            layer = model.get_submodule(name)
            assert isinstance(layer, (nn.Linear, nn.Conv2d))
            model.set_submodule(name, quantised_layer(layer, rounder(name, layer.weight)))
            errors[name] = float((_outputs(stage, seen) - expected).norm() / expected.norm())
            model.set_submodule(name, layer)
    return errors


def _outputs(stage: Stage, seen: Seen) -> Tensor:
    return torch.cat([stage(*inputs).flatten() for inputs in seen.stage])


def worst(errors: Mapping[str, float], allowed: float) -> set[str]:
    """The layers that are kept high: the errors of different layers add up as their root of squares."""
    ranked = sorted(errors, key=lambda name: -errors[name])
    kept: set[str] = set()
    for name in ranked[: math.floor(_MOST_KEPT * len(ranked))]:
        if math.sqrt(sum(errors[each] ** 2 for each in errors if each not in kept)) <= allowed:
            break
        kept.add(name)
    return kept
