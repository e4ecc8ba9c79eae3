"""Writes trained modules as a checkpoint folder in diffusers layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn


def save_component(
    module: nn.Module, config: Mapping[str, Any], folder: Path, filename: str
) -> None:
    """Write ``folder/filename`` (safetensors, in half precision) and ``folder/config.json``."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: t.detach().cpu().to(torch.float16).contiguous()
        for name, t in module.state_dict().items()
    }
    save_file(tensors, folder / filename, metadata={"format": "pt"})
    write_json(folder / "config.json", config)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Indented, keys in the order given, with a newline at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def published_config(config: Any, class_name: str, **extra: Any) -> dict[str, Any]:
    """A config dataclass as the ``config.json`` that other libraries read."""
    assert is_dataclass(config)
    return {"_class_name": class_name, **asdict(config), **extra}  # type: ignore[call-overload]
