"""Tintype: a compiled-kernel inference runtime for text-to-image generators."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tintype._version import __version__

if TYPE_CHECKING:
    from tintype import embeddings, guidance, images
    from tintype.errors import (
        BackendUnavailable,
        BundleError,
        Cancelled,
        CheckpointError,
        ProfileError,
        RequestError,
        TintypeError,
    )
    from tintype.loading import load
    from tintype.pipeline import Output, Pipeline

    def schedulers() -> list[str]:
        """The names that a request's `scheduler` may take."""


# Where each public name lives. Importing tintype must stay cheap, so they are fetched when first asked for.
_HOMES = {
    "BackendUnavailable": "tintype.errors",
    "BundleError": "tintype.errors",
    "Cancelled": "tintype.errors",
    "CheckpointError": "tintype.errors",
    "ProfileError": "tintype.errors",
    "RequestError": "tintype.errors",
    "TintypeError": "tintype.errors",
    "Output": "tintype.pipeline",
    "Pipeline": "tintype.pipeline",
    "load": "tintype.loading",
}

# The package of schedulers can itself be called, so `tintype.schedulers()` works however it was imported.
_MODULES = ("embeddings", "guidance", "images", "schedulers")

__all__ = [
    "BackendUnavailable",
    "BundleError",
    "Cancelled",
    "CheckpointError",
    "Output",
    "Pipeline",
    "ProfileError",
    "RequestError",
    "TintypeError",
    "__version__",
    "embeddings",
    "guidance",
    "images",
    "load",
    "schedulers",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"tintype.{name}")
    raise AttributeError(f"module 'tintype' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
