"""stable-diffusion.cpp, kept loaded through its Python binding, with 16-bit weights or its 8-bit ones (q8_0)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from tintype.checkpoints import open_checkpoint
from tintype.errors import BackendUnavailable, RequestError
from tintype.schedulers import make_table
from tintype_bench.runners import Pictures, Running
from tintype_bench.work import Runner, Work

_WEIGHTS = {"fp32": "f32", "fp16": "f16", "int8": "q8_0"}


def load(work: Work, runner: Runner) -> Running:
    """The checkpoint folder, read as it is; on the device that the binding was built for."""
    if work.component:
        raise RequestError(f"{runner.kind} makes pictures; its denoiser alone cannot be called")
    if runner.precision not in _WEIGHTS:
        raise RequestError(
            f"{runner.kind} keeps weights in {', '.join(_WEIGHTS)}; asked was {runner.precision}"
        )
    if (work.scheduler, work.noise) != ("euler", "torch"):
        raise RequestError(
            f"{runner.kind} has neither our noise nor every scheduler; ask for it with --peer {runner.kind}"
        )
    checkpoint = open_checkpoint(work.checkpoint)
    if checkpoint.family != "latent_unet":
        raise RequestError(f"{runner.kind} is timed on Stable Diffusion 1, 2 and XL")
    model = _imported().StableDiffusion(
        model_path=work.checkpoint,
        wtype=_WEIGHTS[runner.precision],
        n_threads=len(os.sched_getaffinity(0)),
        rng_type="cpu",
        sampler_rng_type="cpu",
        vae_decode_only=True,
        diffusion_flash_attn=runner.device != "cpu",
        verbose=False,
    )
    levels = make_table("euler", checkpoint.scheduler_config, work.steps).noise
    return StableDiffusionCpp(model, work, ",".join(map(str, levels)))


def _imported() -> Any:
    try:
        import stable_diffusion_cpp
    except ImportError as error:
        raise BackendUnavailable(
            f"the peer stable-diffusion.cpp cannot be imported ({str(error).splitlines()[0]}); build it with: "
            "pip install stable-diffusion-cpp-python"
        ) from error
    return stable_diffusion_cpp


@dataclass(frozen=True)
class StableDiffusionCpp:
    """Whole pictures, one after the other, at the levels of noise that everybody walks down."""

    model: Any
    work: Work
    levels: str

    def run(self) -> Pictures:
        work = self.work
        made = self.model.generate_image(
            prompt=work.prompt,
            width=work.width,
            height=work.height,
            cfg_scale=work.guidance,
            sample_method="euler",
            sample_steps=work.steps,
            sigmas=self.levels,
            seed=work.seed,
            batch_count=work.batch,
        )
        pixels = [np.asarray(image.convert("RGB"), np.float32) for image in made]
        return np.asarray(np.stack(pixels) / 255, np.float32)

    def stages(self) -> dict[str, float]:
        return {}
