"""Checkpoint in, bundle out: the same weights, a graph a profile, a verified manifest."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import tintype
from tintype.backends.torch import made_safe, overflows
from tintype.bundle import FAMILIES, Bundle, describe, save_manifest
from tintype.checkpoints import Checkpoint, open_checkpoint
from tintype.checkpoints.lora_files import Lora
from tintype.errors import CheckpointError
from tintype.models.stage import Stage
from tintype.models.stages import DecodeStage, build_stage, stage_component
from tintype.steps import STEPS

from .calibration import Calibration
from .checks import check_steps, check_target
from .durations import in_words, last_seconds, remember
from .gates import part_gates
from .graphs import StoredTensor, point_to_weights, save, trace
from .merging import merged
from .plugins import Plugins, kept_in_graphs
from .profiles import check_sizes, example_inputs, profiles_of
from .qdq import OUTPUT_SCALE, quantise_graph
from .quantisation import Quantised, plan
from .report import BUDGETS
from .sensitivity import suspects
from .storage import (
    Precision,
    Store,
    precision,
    store_weights,
    stored_bytes,
    weight_bytes,
    weight_files,
)
from .tensorrt import build_engines
from .verify import budget_of, require, verify
from .writing import gigabytes, require_room, written_whole

# Of which nothing is left once there are engines that hold their weights.
_ENGINE_GRAPHS = "engine-graphs"
_GRAPH_BYTES = 16 << 20  # more than any model's graph; FLUX's holds its rotation at every token

Say = Callable[[str], None]


@dataclass(frozen=True)
class ExportConfig:
    """Sizes as (width, height); ``defaults`` override the checkpoint's for requests that leave settings open.

    ``tolerance_db`` None is what the precision is held to. The target "tensorrt" adds engines for ``gpus``, such as
    sm_89, to the graphs; ``plain`` builds one of the plain denoiser, too, beside those with the sampler's step, and
    ``weightless`` ones are filled with the bundle's weights when they are loaded; ``kernels`` are ops that engines take
    from us.
    ``batches`` are the pictures of a call; ``controlnet`` is where what steers them lies. In codes, ``calibration``
    None rounds weights alone; ``group`` is int4's.
    """

    sizes: tuple[tuple[int, int], ...]
    precision: str = "fp32"
    tolerance_db: float | None = None
    defaults: Mapping[str, Any] | None = None
    target: str = "onnx"
    gpus: tuple[str, ...] = ()
    plain: bool = False
    weightless: bool = False
    kernels: tuple[str, ...] = ()
    batches: tuple[int, ...] = (1,)
    controlnet: Path | None = None
    loras: tuple[Lora, ...] = ()
    calibration: Calibration | None = field(default_factory=Calibration)
    group: int = 64

    @property
    def kept(self) -> Precision:
        """What is stored and computed."""
        return precision(self.precision, self.target)

    def options(self) -> dict[str, Any]:
        """What the manifest says that was asked for."""
        usual = BUDGETS[self.precision].psnr_db
        return {
            "sizes": [f"{width}x{height}" for width, height in self.sizes],
            "precision": self.precision,
            "gpus": list(self.gpus),
            "kernels": list(self.kernels),
            "batches": list(self.batches),
            "loras": [
                {
                    "file": each.path.name,
                    "scale": each.scale,
                    "sha256": describe(each.path)["sha256"],
                }
                for each in self.loras
            ],
            "tolerance_db": usual if self.tolerance_db is None else self.tolerance_db,
            "computed": str(self.kept.computed).removeprefix("torch."),
        }


def export_bundle(
    source: Path, target: Path, config: ExportConfig, say: Say = lambda line: None
) -> Path:
    """Export the checkpoint ``source``, a folder or a single file, to the bundle ``target``; nothing half is left."""
    checkpoint = open_checkpoint(source)
    if config.controlnet is not None:
        checkpoint = checkpoint.steered_by(config.controlnet)
    if checkpoint.family not in FAMILIES:
        raise CheckpointError(
            f"{source} is a {checkpoint.family}; export writes {', '.join(FAMILIES)}; run it with backend='torch'"
        )
    check_sizes(checkpoint, config.sizes)
    check_target(config)
    check_steps(checkpoint, config)
    kind = _kind(checkpoint, config)
    _estimate(checkpoint, target, config, last_seconds(kind), say)
    began = time.perf_counter()
    with written_whole(target) as work, _merged(checkpoint, config, target) as checkpoint:
        quantised = quantisation(checkpoint, config, say)
        store, bundle = write_bundle(checkpoint, work, config, quantised, say)
        bundle = replace(bundle, name=target.name)
        say("verify: against float32 torch")
        report = verify(bundle, checkpoint, "onnxruntime")
        require(
            report,
            budget_of(bundle),
            suspects({name: each.sensitivity for name, each in quantised.items()}),
        )
        provenance = {**bundle.provenance, "verification": report.as_json()}
        if config.target == "tensorrt":
            with kept_in_graphs(config.kernels, config.gpus[0]) as plugins:
                graphs = engine_graphs(checkpoint, store, bundle, config, say)
            bundle = _with_engines(bundle, graphs, plugins, config, say)
            if not config.weightless:
                shutil.rmtree(work / _ENGINE_GRAPHS, ignore_errors=True)
        save_manifest(replace(bundle, provenance=provenance))
    remember(kind, time.perf_counter() - began)
    return target


def _kind(checkpoint: Checkpoint, config: ExportConfig) -> str:
    """What an export's time depends on."""
    size = sum(weight_bytes(part.weights) for part in checkpoint.components.values())
    calibration = config.calibration if config.kept.quantised else None
    evaluations = 0 if calibration is None else len(calibration.prompts) * calibration.steps
    asked = (config.precision, config.target, config.gpus, config.sizes, config.batches)
    return " ".join(str(part) for part in (checkpoint.family, size, *asked, evaluations))


def write_bundle(
    checkpoint: Checkpoint,
    folder: Path,
    config: ExportConfig,
    quantised: Mapping[str, Quantised],
    say: Say,
) -> tuple[Store, Bundle]:
    """Weights and graphs in ``folder``, compared with nothing yet, and what the manifest will say of them."""
    quantised = _computable(quantised, checkpoint, config)
    store = store_weights(checkpoint, folder, config.kept, quantised)
    stages = _write_graphs(checkpoint, store, folder, config, say)
    files = store.files | {
        name: describe(folder / name) for graphs in stages.values() for name in graphs.values()
    }
    bundle = _bundle(checkpoint, config, folder.name)
    provenance = {**bundle.provenance, "source": _source(checkpoint, store)}
    if quantised:
        provenance["quantisation"] = {name: each.as_json() for name, each in quantised.items()}
    return store, replace(bundle, folder=folder, stages=stages, files=files, provenance=provenance)


def _source(checkpoint: Checkpoint, store: Store) -> dict[str, Any]:
    """What the bundle was made of: the weights' files by component, each with its size and hash."""
    weights = dict(chain.from_iterable(weight_files(checkpoint, n) for n in checkpoint.components))
    if not checkpoint.source.is_dir():
        beside = {name: path for name, path in weights.items() if path != checkpoint.source}
        weights = {checkpoint.source.name: checkpoint.source, **beside}
    # What was copied has been hashed on the way.
    files = {name: store.files.get(name) or describe(path) for name, path in weights.items()}
    return {"name": checkpoint.source.name, "files": files}


@contextmanager
def _merged(checkpoint: Checkpoint, config: ExportConfig, target: Path) -> Iterator[Checkpoint]:
    """The checkpoint with its low-rank updates merged, whose files lie beside the target as long as this lasts."""
    if not config.loras:
        yield checkpoint
        return
    with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.merged-") as folder:
        yield merged(checkpoint, config.loras, Path(folder))


def quantisation(checkpoint: Checkpoint, config: ExportConfig, say: Say) -> dict[str, Quantised]:
    """How the components that are kept in codes are, by name."""
    if not config.kept.quantised:
        return {}
    found = plan(checkpoint, config.precision, config.group, config.calibration, say)
    for name, each in found.items():
        for line in each.sensitivity.lines(name):
            say(line)
    return found


def _computable(
    quantised: Mapping[str, Quantised], checkpoint: Checkpoint, config: ExportConfig
) -> dict[str, Quantised]:
    """All but decoders that float16 needs scaled down: their codes are of what float32 saw."""
    dtype = config.kept.computed
    return {
        name: each
        for name, each in quantised.items()
        if not overflows(checkpoint.configs[name], dtype)
    }


def engine_graphs(
    checkpoint: Checkpoint, store: Store, bundle: Bundle, config: ExportConfig, say: Say
) -> dict[str, dict[str, str]]:
    """What engines are built from: the bundle's graphs, where those are written in what engines compute in and no
    kernel of ours was asked for."""
    dtype = config.kept.in_engines
    if dtype == config.kept.computed and not config.kernels:
        return bundle.stages
    return _write_graphs(
        checkpoint, store, bundle.folder, config, say, dtype=dtype, under=f"{_ENGINE_GRAPHS}/"
    )


def _with_engines(
    bundle: Bundle,
    graphs: dict[str, dict[str, str]],
    plugins: Plugins,
    config: ExportConfig,
    say: Say,
) -> Bundle:
    """The bundle with engines, which were built and, where this machine lacks those GPUs, have not run."""
    wanted = wanted_engines(graphs, config)
    engines = build_engines(
        bundle.folder, wanted, config.gpus, say, weightless=config.weightless, plugins=plugins
    )
    kept = [
        profiles
        for entry in engines.values()
        for files in (entry["stages"], entry.get("graphs", {}))
        for profiles in files.values()
    ]
    names = {name for profiles in kept for name in profiles.values()} - bundle.files.keys()
    files = bundle.files | {name: describe(bundle.folder / name) for name in sorted(names)}
    return replace(bundle, engines=engines, files=files)


def wanted_engines(
    graphs: Mapping[str, dict[str, str]], config: ExportConfig
) -> dict[str, dict[str, str]]:
    """The graphs, by stage, that engines are built from."""
    return {name: each for name, each in graphs.items() if _has_engine(name, graphs, config)}


def _has_engine(stage: str, stages: Collection[str], config: ExportConfig) -> bool:
    """Every engine holds its weights once more, and what steps have inside serves masks and a few schedulers alone."""
    return config.plain or all(STEPS[each].model != stage for each in STEPS.keys() & stages)


def _estimate(
    checkpoint: Checkpoint, target: Path, config: ExportConfig, seconds: float | None, say: Say
) -> None:
    """Say what the export will take; BundleError where the disk cannot hold it."""
    profiles = profiles_of(checkpoint, config.sizes, config.batches)
    graphs = sum(len(each) for each in profiles.values())
    weights = {name: weight_bytes(part.weights) for name, part in checkpoint.components.items()}
    # An engine holds its stage's weights once more, unless it is weightless.
    engines = (not config.weightless) * sum(
        weights[stage_component(stage, checkpoint.components)] * len(each)
        for stage, each in profiles.items()
        if _has_engine(stage, profiles, config)
    )
    needed = stored_bytes(checkpoint) + graphs * _GRAPH_BYTES + engines * len(config.gpus)
    free = require_room(target, needed)
    # A runtime holds a stage's weights twice while it packs them, and torch holds its own.
    memory = 3 * max(weights.values())
    say(
        f"{graphs} graphs: about {gigabytes(needed)} of disk ({gigabytes(free)} free), and "
        f"{gigabytes(memory)} of memory beside the pictures' own"
        + ("" if seconds is None else f"; the last one like it took {in_words(seconds)}")
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
    checkpoint: Checkpoint,
    store: Store,
    root: Path,
    config: ExportConfig,
    say: Say,
    *,
    dtype: torch.dtype | None = None,
    under: str = "",
) -> dict[str, dict[str, str]]:
    """Export every stage at every profile, in ``dtype`` or what is computed; stage -> profile -> file."""
    files: dict[str, dict[str, str]] = {}
    for stage, profiles in profiles_of(checkpoint, config.sizes, config.batches).items():
        module = _stage(checkpoint, stage, dtype or config.kept.computed)
        stored = store.tensors[stage_component(stage, checkpoint.components)]
        weights = {_prefix(module) + name: tensor for name, tensor in stored.items()}
        for profile in profiles:
            began = time.perf_counter()
            arrays = example_inputs(checkpoint, module.inputs, stage, profile)
            model = trace(module, {name: torch.from_numpy(array) for name, array in arrays.items()})
            fitted = _fit_target(model, weights, config.target)
            quantise_graph(model, fitted)
            point_to_weights(model, fitted)
            relative = f"{under}{stage}/{profile}.onnx"
            save(model, root / relative)
            files.setdefault(stage, {})[profile] = relative
            say(f"{relative}: {time.perf_counter() - began:.1f} s")
    return files


def _fit_target(
    model: ir.Model, weights: Mapping[str, StoredTensor], target: str
) -> dict[str, StoredTensor]:
    """The weights that the graph reads on a target. TensorRT fuses a gate and an attention, which it is given whole."""
    if target == "tensorrt":
        return {name: each for name, each in weights.items() if not name.endswith(OUTPUT_SCALE)}
    return part_gates(model, weights)


def _prefix(stage: Stage) -> str:
    """What stands before a parameter's own name in the stage's graph."""
    ((name, child),) = stage.named_children()
    return f"{name}." + (_prefix(child) if isinstance(child, Stage) else "")


def _stage(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> Stage:
    """The stage in ``dtype``, whose weights are not read: a graph points to them where they are stored.

    In 16 bits an overflown pixel is NaN, which is noticed, rather than black.
    """

    def hollow(part: str) -> nn.Module:
        return made_safe(checkpoint.skeleton(part, dtype), checkpoint.configs[part], dtype)

    with FakeTensorMode():
        module = build_stage(name, checkpoint.components, hollow)
    if isinstance(module, DecodeStage):
        module.keep_overflow = dtype != torch.float32
    return module.eval()
