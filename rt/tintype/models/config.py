"""Reads a checkpoint component's ``config.json`` into the frozen dataclass of its architecture."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from tintype.errors import CheckpointError

Config = TypeVar("Config")

# Fields that describe where a file came from or how it was trained, never what the module computes.
_PROVENANCE = frozenset(
    {
        "architectures",
        "model_type",
        "torch_dtype",
        "dtype",
        "transformers_version",
        "dropout",
        "dropout_rate",
        "attention_dropout",
        "classifier_dropout",
    }
    | {
        "initializer_factor",
        "initializer_range",
        "name_or_path",
        "use_cache",
        "output_past",
        "gradient_checkpointing",
    }
)


def from_json(
    cls: type[Config],
    raw: Mapping[str, Any],
    *,
    component: str,
    neutral: Mapping[str, Collection[Any]],
) -> Config:
    """Build ``cls`` from ``raw``; a field that would change the computation and is not modelled is an error.

    ``neutral`` lists, for fields that the dataclass leaves out, the values (or the elements of a list) that mean
    "what we compute anyway".
    Unknown fields are accepted only when they are off (None, False, 0, empty).
    """
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    for name, value in raw.items():
        if name in known or name.startswith("_") or name in _PROVENANCE:
            continue
        if _is_off(value, neutral.get(name, ())):
            continue
        elements = value if isinstance(value, (list, tuple)) else (value,)
        if any(element not in neutral.get(name, ()) for element in elements):
            raise CheckpointError(
                f"{component}/config.json asks for {name}={value!r}, which this architecture does not have; "
                f"possible here: {', '.join(map(repr, neutral.get(name, ()))) or 'leave it out'}"
            )
    missing = [n for n, f in known.items() if n not in raw and f.default is MISSING]
    if missing:
        raise CheckpointError(f"{component}/config.json lacks the field(s) {', '.join(missing)}")
    return cls(**{n: _frozen(raw[n]) for n in known if n in raw})


def _is_off(value: Any, neutral: Collection[Any]) -> bool:
    """Whether this asks for nothing: zero does not where it stands for another number that we compute with."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return not value and not (number and neutral)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, (list, tuple)) else value


def per_level(value: Any, levels: int) -> tuple[Any, ...]:
    """One value a resolution level: a sequence is taken as it is, a single value is repeated."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,) * levels
