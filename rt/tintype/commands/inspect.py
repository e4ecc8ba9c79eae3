"""`tintype inspect`: what a model is, who would run it and why, and which kernels are in use."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tintype.commands.output import picture_size
from tintype.errors import BackendUnavailable, RequestError

_SETTING = ("offload", "vae_tiling", "attention")  # of a row about memory, before its stages


def register(subparsers: Any) -> None:
    """Add the command."""
    from tintype.cli import add_common

    parser = subparsers.add_parser("inspect", help="show a model, the backends and the kernels")
    parser.add_argument(
        "model", nargs="?", default="postcard", help="what `tintype generate -m` takes"
    )
    parser.add_argument(
        "--memory", action="store_true", help="what a picture takes on torch, at every setting"
    )
    parser.add_argument(
        "--size", type=picture_size, metavar="WxH", help="of that picture; the model's own"
    )
    parser.add_argument("--dtype", default="auto", help="of that picture's weights")
    parser.add_argument(
        "--unfused",
        action="store_true",
        help="as on a device without a fused kernel for attention, whole and in slices",
    )
    add_common(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print the report."""
    report = inspect(options.model)
    if options.memory:
        report["memory"] = memory(
            options.model, options.size, options.dtype, fused_attention=not options.unfused
        )
    print(json.dumps(report) if options.json else "\n".join(_lines(report)))


def inspect(model: str) -> dict[str, Any]:
    """Everything that can be told without loading weights or a backend."""
    import tintype
    from tintype.backends import report
    from tintype.bundle import is_bundle
    from tintype.loading import resolve
    from tintype_kernels import implementation

    path = resolve(model)
    kind = "bundle" if is_bundle(path) else "checkpoint"
    return {
        "tintype": tintype.__version__,
        "model": _bundle(path) if kind == "bundle" else _checkpoint(path),
        "backends": report(),
        "auto": _choice(kind),
        "kernels": implementation(),
    }


def memory(
    model: str,
    size: tuple[int, int] | None = None,
    dtype: str = "auto",
    *,
    fused_attention: bool = True,
) -> list[dict[str, Any]]:
    """Bytes at the fullest moment of every stage, one row a setting of `load`."""
    from tintype.loading import is_checkpoint, open_source, resolve

    path = resolve(model)
    if path.is_dir() and not is_checkpoint(path):
        raise RequestError(f"--memory is for checkpoints, which run on torch; {path} is a bundle")
    try:
        from tintype.memory import predict, settings
    except ImportError as error:
        raise BackendUnavailable(
            f'--memory needs {error.name}, which is absent; install it with: pip install "tintype[torch]"'
        ) from error
    checkpoint, (width, height) = open_source(path), size or (None, None)
    return [
        setting | predict(checkpoint, width=width, height=height, dtype=dtype, **setting)
        for setting in settings(fused_attention=fused_attention)
    ]


def _bundle(path: Path) -> dict[str, Any]:
    from tintype.bundle import open_bundle

    bundle = open_bundle(path)
    size = sum(entry["size"] for entry in bundle.files.values())
    return {
        "kind": "bundle",
        "path": str(path),
        "name": bundle.name,
        "family": bundle.family,
        "precision": bundle.precision,
        "megabytes": round(size / 1e6, 1),
        "stages": {stage: list(profiles) for stage, profiles in bundle.stages.items()},
        "engines": {
            gpu: f"{entry['package']} {entry['version']}" for gpu, entry in bundle.engines.items()
        },
        "defaults": _settings(bundle.defaults),
        "scheduler": bundle.scheduler.get("_class_name"),
    }


def _checkpoint(path: Path) -> dict[str, Any]:
    from tintype.loading import open_source

    checkpoint = open_source(path)
    return {
        "kind": "checkpoint",
        "path": str(path),
        "family": checkpoint.family,
        "components": {name: part.architecture for name, part in checkpoint.components.items()},
        "defaults": _settings(checkpoint.defaults),
        "scheduler": checkpoint.scheduler_config.get("_class_name"),
    }


def _settings(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What is no configuration of its own, as those of unCLIP's further schedulers are."""
    return {name: value for name, value in defaults.items() if not isinstance(value, dict)}


def _choice(kind: str) -> dict[str, str | None]:
    from tintype.backends import choose

    try:
        name, reason = choose("auto", kind)
    except BackendUnavailable as error:
        return {"backend": None, "reason": str(error)}
    return {"backend": name, "reason": reason}


def _lines(report: dict[str, Any]) -> list[str]:
    kernels, auto = report["kernels"], report["auto"]
    lines = [f"tintype {report['tintype']}", "model"]
    lines += [f"  {name}: {_plain(value)}" for name, value in report["model"].items()]
    lines += ["backends", *(f"  {name}: {state}" for name, state in report["backends"].items())]
    lines += [f"  auto picks {auto['backend'] or 'none'}: {auto['reason']}"]
    lines += [line for row in report.get("memory", []) for line in _memory_lines(row)]
    note = f" ({kernels['note']})" if kernels["note"] else ""
    return [*lines, f"kernels: {kernels['selected']}, TINTYPE_KERNELS={kernels['requested']}{note}"]


def _memory_lines(row: dict[str, Any]) -> list[str]:
    stages = ", ".join(
        f"{name} {size / 1e9:.2f}" for name, size in row.items() if name not in (*_SETTING, "peak")
    )
    setting = " ".join(f"{name}={row[name]}" for name in _SETTING)
    return [f"memory {setting}: {row['peak'] / 1e9:.2f} GB ({stages})"]


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(each)}" for name, each in value.items())
    return " ".join(value) if isinstance(value, list) else str(value)
