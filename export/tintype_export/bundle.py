"""Checkpoint in, bundle out: the same weights, a graph a profile, a verified manifest."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import tintype
from tintype.backends.torch import load_component
from tintype.bundle import Bundle, describe, save_manifest
from tintype.checkpoints import Checkpoint, open_checkpoint
from tintype.errors import CheckpointError, RequestError
from tintype.models.stages import DecodeStage, Stage, build_stage, stage_names

from .graphs import point_to_weights, save, trace
from .profiles import check_sizes, example_inputs, stage_profiles
from .report import BUDGETS
from .storage import Store, precision, store_weights, stored_bytes
from .tensorrt import build_engines, check_gpus
from .verify import budget_of, require, verify
from .writing import gigabytes, require_room, written_whole

# What a stage's parameters are called in its graph, and the component that they belong to.
_COMPONENT_OF = {
    "encode": ("encoder.", "text_encoder"),
    "encode_2": ("encoder.", "text_encoder_2"),
    "denoise": ("unet.", "unet"),
    "decode": ("vae.", "vae"),
    "encode_image": ("vae.", "vae"),
}
_FAMILY = "latent_unet"
_GRAPH_BYTES = 4 << 20  # more than the graph of any UNet that we know

Say = Callable[[str], None]


@dataclass(frozen=True)
class ExportConfig:
    """Sizes as (width, height); ``defaults`` override the checkpoint's for requests that leave settings open.

    ``tolerance_db`` None is what the precision is held to. The target "tensorrt" adds engines for ``gpus``, such as
    sm_89, to the graphs.
    """

    sizes: tuple[tuple[int, int], ...]
    precision: str = "fp32"
    tolerance_db: float | None = None
    defaults: Mapping[str, Any] | None = None
    target: str = "onnx"
    gpus: tuple[str, ...] = ()

    def options(self) -> dict[str, Any]:
        """What the manifest says that was asked for."""
        usual = BUDGETS[self.precision].psnr_db
        return {
            "sizes": [f"{width}x{height}" for width, height in self.sizes],
            "precision": self.precision,
            "gpus": list(self.gpus),
            "tolerance_db": usual if self.tolerance_db is None else self.tolerance_db,
        }


def export_bundle(
    source: Path, target: Path, config: ExportConfig, say: Say = lambda line: None
) -> Path:
    """Export the checkpoint folder ``source`` (diffusers layout) to the bundle ``target``; nothing half is left."""
    checkpoint = open_checkpoint(source)
    if not source.is_dir():
        raise CheckpointError(
            f"{source} is a single file; export reads a folder in diffusers layout"
        )
    if checkpoint.family != _FAMILY:
        raise CheckpointError(
            f"{source} is a {checkpoint.family}; export writes {_FAMILY} so far; run it with backend='torch'"
        )
    check_sizes(config.sizes, checkpoint.defaults["latent_factor"])
    _check_target(config)
    _estimate(checkpoint, target, config, say)
    kept = precision(config.precision)
    with written_whole(target) as work:
        store = store_weights(checkpoint, work, kept)
        stages = _write_graphs(checkpoint, store, work, config, say)
        files = store.files | {
            name: describe(work / name) for graphs in stages.values() for name in graphs.values()
        }
        bundle = replace(
            _bundle(checkpoint, config, target.name), folder=work, stages=stages, files=files
        )
        say("verify: against float32 torch")
        report = verify(bundle, checkpoint, "onnxruntime")
        require(report, budget_of(bundle))
        provenance = {**bundle.provenance, "verification": report.as_json()}
        if config.target == "tensorrt":
            bundle = _with_engines(bundle, config.gpus, say)
        save_manifest(replace(bundle, provenance=provenance))
    return target


def _check_target(config: ExportConfig) -> None:
    if config.target != "tensorrt":
        return
    if precision(config.precision).stored not in (None, precision(config.precision).computed):
        raise RequestError(
            f"target tensorrt would compute {config.precision} graphs in float32; choose precision fp32 or fp16"
        )
    check_gpus(config.gpus)


def _with_engines(bundle: Bundle, gpus: Sequence[str], say: Say) -> Bundle:
    """The bundle with engines, which were built and, where this machine lacks those GPUs, have not run."""
    engines = build_engines(bundle.folder, bundle.stages, gpus, say)
    names = [
        name
        for entry in engines.values()
        for profiles in entry["stages"].values()
        for name in profiles.values()
    ]
    files = bundle.files | {name: describe(bundle.folder / name) for name in names}
    return replace(bundle, engines=engines, files=files)


def _estimate(checkpoint: Checkpoint, target: Path, config: ExportConfig, say: Say) -> None:
    """Say what the export will take; BundleError where the disk cannot hold it."""
    graphs = sum(
        len(stage_profiles(stage, config.sizes)) for stage in stage_names(checkpoint.components)
    )
    weights = {
        name: sum(path.stat().st_size for path in part.weights.files)
        for name, part in checkpoint.components.items()
    }
    # An engine holds its stage's weights once more.
    engines = sum(
        weights[_COMPONENT_OF[stage][1]] * len(stage_profiles(stage, config.sizes))
        for stage in stage_names(checkpoint.components)
    )
    needed = stored_bytes(checkpoint) + graphs * _GRAPH_BYTES + engines * len(config.gpus)
    free = require_room(target, needed)
    # A runtime holds a stage's weights twice while it packs them, and torch holds its own.
    memory = 3 * max(weights.values())
    say(
        f"{graphs} graphs: about {gigabytes(needed)} of disk ({gigabytes(free)} free), and "
        f"{gigabytes(memory)} of memory beside the pictures' own"
    )


def _bundle(checkpoint: Checkpoint, config: ExportConfig, name: str) -> Bundle:
    """The bundle as far as it can be told before there are any graphs."""
    kept = {key: value for key, value in checkpoint.defaults.items() if value is not None}
    return Bundle(
        folder=Path(),
        name=name,
        family=checkpoint.family,
        precision=config.precision,
        stages={},
        scheduler=checkpoint.scheduler_config,
        tokenizers=[folder.name for folder in checkpoint.tokenizer_folders],
        defaults={**kept, **(config.defaults or {})},
        provenance={
            "tintype": tintype.__version__,
            "torch": torch.__version__,
            "target": config.target,
            "options": config.options(),
        },
    )


def _write_graphs(
    checkpoint: Checkpoint, store: Store, root: Path, config: ExportConfig, say: Say
) -> dict[str, dict[str, str]]:
    """Export every stage at every profile; stage -> profile -> file."""
    files: dict[str, dict[str, str]] = {}
    for stage in stage_names(checkpoint.components):
        module = _stage(checkpoint, stage, precision(config.precision).computed)
        prefix, component = _COMPONENT_OF[stage]
        weights = {prefix + name: tensor for name, tensor in store.tensors[component].items()}
        for profile in stage_profiles(stage, config.sizes):
            began = time.perf_counter()
            arrays = example_inputs(checkpoint, module.inputs, stage, profile)
            model = trace(module, {name: torch.from_numpy(array) for name, array in arrays.items()})
            point_to_weights(model, weights)
            relative = f"{stage}/{profile}.onnx"
            save(model, root / relative)
            files.setdefault(stage, {})[profile] = relative
            say(f"{relative}: {time.perf_counter() - began:.1f} s")
    return files


def _stage(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> Stage:
    """The stage in ``dtype``; in 16 bits an overflown pixel is NaN, which is noticed, rather than black."""
    module = build_stage(
        name, checkpoint.components, lambda part: load_component(checkpoint, part, dtype)
    )
    if isinstance(module, DecodeStage):
        module.keep_overflow = dtype != torch.float32
    return module.eval()
