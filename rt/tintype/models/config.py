"""Reads a checkpoint component's ``config.json`` into the frozen dataclass of its architecture."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

from tintype.errors import CheckpointError

Config = TypeVar("Config")

# What a request's size is where it is left open, which is checked where that is read.
_SIDES = "sample_size"
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
    given = {n: _frozen(raw[n]) for n in known if n in raw}
    hints = get_type_hints(cls)
    for name, value in given.items():
        if name != _SIDES and not _is_a(hints[name], value):
            raise CheckpointError(
                f"{component}/config.json: {name}={raw[name]!r} is not {_described(hints[name])}"
            )
    return cls(**given)


def _is_off(value: Any, neutral: Collection[Any]) -> bool:
    """Whether this asks for nothing: zero and false do not where they stand for another value that we compute with."""
    return not value and not (isinstance(value, bool | int | float) and neutral)


_KINDS = {
    int: "a whole number of at least 0",
    float: "a finite number",
    bool: "true or false",
    str: "a string",
}


def _is_a(hint: Any, value: Any) -> bool:
    """Whether a value is what a field's annotation says, numbers being such as sizes and scales are."""
    if hint is bool:
        return isinstance(value, bool | int | NoneType)  # null is published for false
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if hint is float:
        return (
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        )
    if hint in (str, NoneType):
        return isinstance(value, hint)
    if Ellipsis in get_args(hint):
        return isinstance(value, tuple) and all(_is_a(get_args(hint)[0], each) for each in value)
    return any(_is_a(each, value) for each in get_args(hint))


def _described(hint: Any) -> str:
    """The same in words."""
    if hint in _KINDS:
        return _KINDS[hint]
    if Ellipsis in get_args(hint):
        return f"a list, each {_KINDS[get_args(hint)[0]]}"
    return " or ".join(_described(each) for each in get_args(hint) if each is not NoneType)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, (list, tuple)) else value


def require_dividing(heads: int, width: int, component: str) -> None:
    """Refuse heads that do not share a layer's width out evenly."""
    if heads < 1 or width % heads:
        raise CheckpointError(
            f"{component}/config.json asks for {heads} attention heads over {width} channels, which they do not divide"
        )


def per_level(value: Any, levels: int) -> tuple[Any, ...]:
    """One value a resolution level: a sequence is taken as it is, a single value is repeated."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,) * levels
