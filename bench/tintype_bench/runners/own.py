"""Tintype itself, through what a user calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

import tintype
from tintype.bundle import DTYPES
from tintype.pipeline import Output, Pipeline
from tintype.profiles import Profile
from tintype_bench.runners import Pictures, Running
from tintype_bench.runners.component import denoiser_inputs
from tintype_bench.work import Runner, Work


def load(work: Work, runner: Runner) -> Running:
    """A pipeline on the runner's backend, or its backend alone for a component."""
    # What a bundle of graphs is computed in is its own matter but on OpenVINO, which takes fewer bits where asked.
    chooses = runner.backend in ("torch", "openvino")
    dtype = DTYPES.get(runner.precision, runner.precision) if chooses else "auto"
    if runner.backend == "openvino" and runner.precision not in DTYPES:
        dtype = "auto"
    pipe = tintype.load(
        runner.bundle or work.checkpoint,
        backend=runner.backend,
        device=runner.device,
        dtype=dtype,
        batch_invariant=runner.invariant,
        execution=runner.execution,
    )
    return OwnComponent(pipe, work) if work.component else OwnPictures(pipe, work)


@dataclass(frozen=True)
class OwnPictures:
    """Whole pictures."""

    pipe: Pipeline
    work: Work

    def run(self) -> Pictures:
        return np.asarray(self._call().images, np.float32)

    def stages(self) -> dict[str, float]:
        return self._call().timings

    def _call(self) -> Output:
        work, family = self.work, self.pipe.family
        channels, _, _ = family.latent_shape(work.width, work.height)
        return self.pipe(
            [work.prompt] * work.batch,
            height=work.height,
            width=work.width,
            num_inference_steps=work.steps,
            guidance_scale=work.guidance,
            seed=work.seed,
            scheduler=work.scheduler or None,
            latents=work.latents(channels, family.factor),
            output_type="np",
        )


class OwnComponent:
    """One call of the denoiser."""

    def __init__(self, pipe: Pipeline, work: Work) -> None:
        self._backend = pipe.family.backend
        self._profile = Profile(work.width, work.height, work.batch).name
        self._inputs: dict[str, Any] = denoiser_inputs(work)

    def run(self) -> Pictures:
        return self._backend.run("denoise", self._profile, self._inputs)["model_output"]

    def stages(self) -> dict[str, float]:
        return {}
