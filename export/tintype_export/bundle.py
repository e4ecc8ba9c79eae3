"""Checkpoint in, bundle out: the same weights, a graph a profile, a verified manifest."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import tintype
from tintype.bundle import write_manifest
from tintype.checkpoints import Checkpoint, open_checkpoint
from tintype.errors import CheckpointError
from tintype.models.stages import build_stage, stage_names

from .graphs import StoredTensor, point_to_weights, save, stored_tensors, trace
from .profiles import check_sizes, example_inputs, stage_profiles
from .verify import require, verify

# float32 against float32: what the order of summation may change.
_STAGE_ERROR = 1e-4
# What a stage's parameters are called in its graph, and the component that they belong to.
_COMPONENT_OF = {
    "encode": ("encoder.", "text_encoder"),
    "encode_2": ("encoder.", "text_encoder_2"),
    "denoise": ("unet.", "unet"),
    "decode": ("vae.", "vae"),
    "encode_image": ("vae.", "vae"),
}


@dataclass(frozen=True)
class ExportConfig:
    """Sizes as (width, height); ``defaults`` override the checkpoint's for requests that leave settings open."""

    sizes: tuple[tuple[int, int], ...]
    tolerance_db: float = 60.0
    defaults: Mapping[str, Any] | None = None


def export_bundle(
    source: Path, target: Path, config: ExportConfig, say: Callable[[str], None] = lambda line: None
) -> Path:
    """Export the checkpoint folder ``source`` (diffusers layout) to the bundle ``target``; nothing half is left."""
    checkpoint = open_checkpoint(source)
    if not source.is_dir():
        raise CheckpointError(
            f"{source} is a single file; export reads a folder in diffusers layout"
        )
    check_sizes(config.sizes, checkpoint.defaults["latent_factor"])
    work = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        shutil.copytree(source, work, ignore=shutil.ignore_patterns("bundle.json", "*.onnx", ".*"))
        stages = _write_graphs(open_checkpoint(work), work, config.sizes, say)
        _write_manifest(checkpoint, work, target.name, stages, config, {})
        say("verify: against float32 torch")
        report = verify(work, checkpoint)
        require(report, config.tolerance_db, _STAGE_ERROR)
        _write_manifest(checkpoint, work, target.name, stages, config, report.as_json())
        if target.exists():
            shutil.rmtree(target)
        work.replace(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _write_graphs(
    checkpoint: Checkpoint, root: Path, sizes: Sequence[tuple[int, int]], say: Callable[[str], None]
) -> dict[str, dict[str, str]]:
    """Export every stage at every profile; stage -> profile -> file."""
    files: dict[str, dict[str, str]] = {}
    for stage in stage_names(checkpoint.components):
        module = build_stage(stage, checkpoint.components, checkpoint.component).eval()
        weights = _stored_weights(checkpoint, root, stage)
        for profile in stage_profiles(stage, sizes):
            began = time.perf_counter()
            arrays = example_inputs(checkpoint, module.inputs, stage, profile)
            model = trace(module, {name: torch.from_numpy(array) for name, array in arrays.items()})
            point_to_weights(model, weights)
            relative = f"{stage}/{profile}.onnx"
            save(model, root / relative)
            files.setdefault(stage, {})[profile] = relative
            say(f"{relative}: {time.perf_counter() - began:.1f} s")
    return files


def _stored_weights(checkpoint: Checkpoint, root: Path, stage: str) -> dict[str, StoredTensor]:
    """The stage's parameters by their names in the graph."""
    prefix, component = _COMPONENT_OF[stage]
    stored = stored_tensors(root, checkpoint.components[component].weights)
    return {prefix + name: tensor for name, tensor in stored.items()}


def _write_manifest(
    checkpoint: Checkpoint,
    root: Path,
    name: str,
    stages: Mapping[str, Mapping[str, str]],
    config: ExportConfig,
    verification: Mapping[str, Any],
) -> None:
    kept = {key: value for key, value in checkpoint.defaults.items() if value is not None}
    write_manifest(
        root,
        name=name,
        family=checkpoint.family,
        stages=stages,
        scheduler=checkpoint.scheduler_config,
        tokenizers=[folder.name for folder in checkpoint.tokenizer_folders],
        defaults={**kept, **(config.defaults or {})},
        provenance={
            "tintype": tintype.__version__,
            "torch": torch.__version__,
            "target": "onnx",
            "verification": dict(verification),
        },
    )
