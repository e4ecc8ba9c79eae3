"""What a verification found, what it is allowed to find, and how it is told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from tintype.bundle import DTYPES


@dataclass(frozen=True)
class Budget:
    """The least PSNR of a picture in dB, and the largest relative error of a stage."""

    psnr_db: float
    stage_error: float


# float32 against float32 is what the order of summation may change. In 16 bits every layer rounds by 2**-11 (fp16)
# or 2**-8 (bf16); a stage is some dozens of layers, whose errors add up as their root. In codes a step is 2**-8 of the
# range for int8, 2**-4 of the value for e4m3 and 2**-4 of the range for int4, where a random weight is off by a tenth.
BUDGETS = {
    "fp32": Budget(60.0, 1e-4),
    "fp16": Budget(40.0, 2e-2),
    "bf16": Budget(40.0, 6e-2),
    "int8": Budget(30.0, 1e-1),
    "int4": Budget(27.0, 3e-1),
    "fp8": Budget(30.0, 1e-1),
}


@dataclass(frozen=True)
class StageReport:
    """A stage at a profile against float32 torch.

    ``computes``: the element types of its products, as its graph says. ``relative_error``: norm of the difference over
    norm of the reference. ``worst``: the largest absolute difference, at ``worst_at``.
    """

    stage: str
    profile: str
    computes: list[str]
    relative_error: float
    cosine: float
    worst: float
    worst_at: str
    finite: bool


@dataclass(frozen=True)
class PictureReport:
    """A whole picture, beside what merely another seed gives; ``latents_error`` is relative, one a step."""

    size: str
    steps: int
    seed: int
    psnr_db: float
    ssim: float
    other_seed_db: float
    other_seed_ssim: float
    latents_error: list[float]


@dataclass(frozen=True)
class Report:
    """Every stage at every profile, and a picture unless a stage gave NaN. Both sides say what they compute in.

    ``written``: what the manifest says that the graphs are written in. ``accuracy``: shares of right readings of
    pictures by the judge beside the model, an attribute each and overall, where it was asked for.
    """

    backend: str
    precision: str
    computed_in: str
    reference: str
    stages: list[StageReport]
    picture: PictureReport | None
    written: str = "float32"
    accuracy: dict[str, float] | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain JSON, in which what is not finite is null."""
        plain: dict[str, Any] = json.loads(
            json.dumps(asdict(self)), parse_constant=lambda name: None
        )
        return plain

    def faults(self, budget: Budget) -> list[str]:
        """What is over budget, the worst stage first."""
        ranked = sorted(self.stages, key=lambda stage: -stage.relative_error)
        found = [fault for stage in ranked for fault in self._stage_faults(stage, budget)]
        if self.picture is not None and not self.picture.psnr_db >= budget.psnr_db:
            found.append(
                f"the picture is at {self.picture.psnr_db:.1f} dB of the reference, asked was "
                f"{budget.psnr_db:.1f} dB (worst stage: {ranked[0].stage}, {ranked[0].relative_error:.1e})"
            )
        return found

    def _stage_faults(self, stage: StageReport, budget: Budget) -> Iterator[str]:
        where = f"stage {stage.stage} at {stage.profile}"
        if not stage.finite:
            yield f"{where} gave NaN or infinity"
        elif not stage.relative_error <= budget.stage_error:
            yield (
                f"{where} differs from the reference by {stage.relative_error:.1e}, allowed is "
                f"{budget.stage_error:.0e} (worst element: {stage.worst_at}, by {stage.worst:.1e})"
            )
        declared = {"float32", self.written, DTYPES.get(self.precision, self.precision)}
        if undeclared := sorted(set(stage.computes) - declared):
            yield f"{where} computes in {undeclared[0]}, and the bundle declares {self.precision}"

    def lines(self) -> Iterator[str]:
        """The report for people."""
        yield f"{self.backend}, {self.precision} computed in {self.computed_in}, against {self.reference}"
        yield f"{'stage':14}{'profile':16}{'relative':>10}{'cosine':>12}{'worst':>10}  at"
        for s in self.stages:
            figures = f"{s.relative_error:10.1e}{s.cosine:12.8f}{s.worst:10.1e}"
            yield f"{s.stage:14}{s.profile:16}{figures}  {s.worst_at}"
        if (p := self.picture) is not None:
            yield (
                f"picture {p.size}, {p.steps} steps: {p.psnr_db:.1f} dB, SSIM {p.ssim:.4f} "
                f"(another seed: {p.other_seed_db:.1f} dB, {p.other_seed_ssim:.4f})"
            )
            steps = " ".join(f"{error:.1e}" for error in p.latents_error)
            yield f"latents' relative error by step: {steps}"
        if self.accuracy is not None:
            read = ", ".join(f"{name} {share:.1%}" for name, share in self.accuracy.items())
            yield f"prompt accuracy: {read}"
