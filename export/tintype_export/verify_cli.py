"""`tintype verify BUNDLE [--against MODEL]`: repeat a bundle's verification on this machine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tintype.errors import BackendUnavailable, BundleError, RequestError

if TYPE_CHECKING:
    from tintype.bundle import Bundle
    from tintype.checkpoints import Checkpoint

    from .report import Budget, Report


def register(subparsers: Any) -> None:
    """Add the command."""
    from tintype.cli import add_common

    parser = subparsers.add_parser("verify", help="compare a bundle with float32 torch again")
    parser.add_argument("bundle", help="bundle folder, hub id or model in the box")
    parser.add_argument(
        "--against",
        metavar="MODEL",
        help="the checkpoint that it came from; by default the one in the bundle's own folder",
    )
    parser.add_argument(
        "--controlnet",
        type=Path,
        metavar="CN",
        help="what it was exported with beside that checkpoint",
    )
    parser.add_argument("--backend", default="auto", help="see `tintype inspect`")
    parser.add_argument(
        "--prompts",
        type=int,
        default=0,
        metavar="N",
        help="also draw N held-out prompts and let the judge beside the model read them",
    )
    add_common(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Hash every file, compare every stage and a picture, print the report; an error where it is over budget."""
    from tintype.bundle import open_bundle
    from tintype.loading import resolve

    bundle = open_bundle(resolve(options.bundle), remember=False)
    source = _checkpoint_folder(bundle.folder, options.against)
    controlnet = options.controlnet
    report, budget = _verify(bundle, source, controlnet, options.backend, options.prompts)
    faults = report.faults(budget)
    if options.json:
        print(json.dumps({"bundle": str(bundle.folder), **report.as_json(), "faults": faults}))
    else:
        print(f"{bundle.folder}: {len(bundle.files)} files have the hashes that the manifest says")
        print("\n".join([*report.lines(), *_sensitivity_lines(bundle)]))
    if faults:
        raise BundleError(f"{bundle.folder}: {'; '.join(faults[:2])}")


def _sensitivity_lines(bundle: Bundle) -> list[str]:
    """What export found of a quantised bundle's layers."""
    from .sensitivity import Sensitivity

    said = bundle.provenance.get("quantisation", {})
    return [
        line
        for name, each in said.items()
        for line in Sensitivity.from_json(each["sensitivity"]).lines(name)
    ]


def _checkpoint_folder(bundle: Path, against: str | None) -> Path:
    from tintype.loading import is_checkpoint, resolve

    if against is not None:
        return resolve(against)
    if not is_checkpoint(bundle):
        raise RequestError(
            f"{bundle} holds no checkpoint; name the one that it came from with --against"
        )
    return bundle


def _verify(
    bundle: Bundle, source: Path, controlnet: Path | None, backend: str, prompts: int
) -> tuple[Report, Budget]:
    try:
        from tintype.checkpoints import open_checkpoint

        from .verify import budget_of, verify
    except ImportError as error:
        raise BackendUnavailable(
            f'verify needs {error.name}, which is absent; install it with: pip install "tintype[export]"'
        ) from error
    checkpoint = open_checkpoint(source)
    if controlnet is not None:
        checkpoint = checkpoint.steered_by(controlnet)
    _check_source(bundle, checkpoint)
    return verify(bundle, checkpoint, backend, prompts), budget_of(bundle)


def _check_source(bundle: Bundle, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint of another family, or with other text encoders, than the bundle has."""
    from tintype.families.conditioning import STAGES
    from tintype.models.stages import stage_names

    stages = bundle.stages, stage_names(checkpoint.components)
    own, given = ([each for each in STAGES if each in some] for some in stages)
    if bundle.family != checkpoint.family or own != given:
        raise RequestError(
            f"{checkpoint.source} is not what {bundle.folder} was exported from: it is a {checkpoint.family} with "
            f"{', '.join(given)}, and the bundle a {bundle.family} with {', '.join(own)}"
        )
    if bool(bundle.defaults.get("steered")) != bool(checkpoint.defaults.get("steered")):
        has = "has" if bundle.defaults.get("steered") else "has not"
        raise RequestError(
            f"{bundle.folder} {has} a ControlNet in it, other than {checkpoint.source}; name with --controlnet the one "
            "that it was exported with, if any"
        )
