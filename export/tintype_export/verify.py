"""An engine is not trusted until it is compared: bundle against float32 torch, stage by stage and whole."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tintype.backends import Backend
from tintype.backends.torch import TorchBackend
from tintype.checkpoints import Checkpoint
from tintype.errors import BundleError
from tintype.loading import load

from .profiles import example_inputs

_PROMPT, _SEED, _STEPS = "a red lighthouse on a rocky coast at dusk", 7, 8


@dataclass(frozen=True)
class StageReport:
    """``relative_error``: norm of the difference over norm of the reference; ``worst``: largest absolute difference."""

    stage: str
    profile: str
    relative_error: float
    worst: float


@dataclass(frozen=True)
class Report:
    """Every stage at every profile, and the PSNR in dB of a whole picture (``other_seed_db``: the scale of chance)."""

    precision: str
    stages: list[StageReport]
    psnr_db: float
    other_seed_db: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def verify(folder: Path, checkpoint: Checkpoint, precision: str = "fp32") -> Report:
    """Compare the bundle in ``folder`` with ``checkpoint`` on float32 torch."""
    reference = TorchBackend(checkpoint, device="cpu", dtype="float32")
    engine = load(folder, device="cpu")
    backend = engine.family.backend
    stages = [
        _compare(backend, reference, checkpoint, stage, profile)
        for stage in backend.stages
        for profile in backend.profiles(stage) or ()
    ]
    settings: dict[str, Any] = {"num_inference_steps": _STEPS, "output_type": "np"}
    settings |= {
        "width": engine.family.defaults["width"],
        "height": engine.family.defaults["height"],
    }
    pictures = np.asarray(
        engine(_PROMPT, seed=[_SEED, _SEED + 1], num_images_per_prompt=2, **settings).images
    )
    whole = load(checkpoint.source, backend="torch", device="cpu", dtype="float32")
    guidance = engine.family.defaults["guidance_scale"]
    expected = np.asarray(whole(_PROMPT, seed=_SEED, guidance_scale=guidance, **settings).images)
    return Report(precision, stages, psnr(pictures[:1], expected), psnr(pictures[1:], expected))


def require(report: Report, tolerance_db: float, stage_error: float) -> None:
    """Raises BundleError, naming the stage at fault, where the report is over budget."""
    worst = max(report.stages, key=lambda s: s.relative_error)
    if not worst.relative_error <= stage_error:
        raise BundleError(
            f"stage {worst.stage} at {worst.profile} differs from the reference by {worst.relative_error:.1e}, "
            f"allowed is {stage_error:.0e}; no bundle was written"
        )
    if not report.psnr_db >= tolerance_db:
        raise BundleError(
            f"the picture is at {report.psnr_db:.1f} dB of the reference, asked was {tolerance_db:.1f} dB "
            f"(worst stage: {worst.stage}, {worst.relative_error:.1e}); no bundle was written"
        )


def psnr(image: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of arrays in 0..1; 100 where they are equal."""
    error = float(np.mean((np.asarray(image, np.float64) - reference) ** 2))
    return 100.0 if error == 0 else float(-10 * np.log10(error))


def _compare(
    backend: Backend, reference: TorchBackend, checkpoint: Checkpoint, stage: str, profile: str
) -> StageReport:
    names = reference.inputs(stage)
    inputs = example_inputs(checkpoint, names, stage, profile, seed=1)
    expected = reference.run(stage, profile, inputs)
    actual = backend.run(stage, profile, inputs)
    difference = np.concatenate([(actual[n] - expected[n]).ravel() for n in expected]).astype(
        np.float64
    )
    scale = np.concatenate([expected[n].ravel() for n in expected]).astype(np.float64)
    error = float(np.linalg.norm(difference) / np.linalg.norm(scale))
    return StageReport(stage, profile, error, float(np.abs(difference).max()))
