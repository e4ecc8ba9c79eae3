"""diffusers, eager or compiled with the settings that its own documentation publishes as the fastest."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tintype.checkpoints import open_checkpoint
from tintype.errors import BackendUnavailable, RequestError
from tintype.noise import Walk, initial_noise, step_noise
from tintype.request import CASCADE
from tintype_bench.runners import Pictures, Running
from tintype_bench.runners.component import denoiser_inputs
from tintype_bench.runners.diffusers_compiled import inductor_flags, prepare
from tintype_bench.work import Runner, Work

_SCHEDULERS = {"euler": "EulerDiscreteScheduler"}
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load(work: Work, runner: Runner) -> Running:
    """The pipeline that the checkpoint's `model_index.json` names."""
    if runner.precision not in _DTYPES:
        raise RequestError(
            f"diffusers runs {', '.join(_DTYPES)} by itself; asked was {runner.precision}"
        )
    pipe = _pipeline(work, _DTYPES[runner.precision]).to(runner.device)
    denoiser = _denoiser_name(pipe)
    if runner.kind == "diffusers-compiled":
        _compile(pipe, denoiser, runner)
    if work.component:
        return DiffusersComponent(getattr(pipe, denoiser), work, runner.device)
    return DiffusersPictures(pipe, work, denoiser, runner.device)


def imported() -> Any:
    """The package, or an error that says how to get it."""
    try:
        import diffusers
    except ImportError as error:
        raise BackendUnavailable(
            f"the peer diffusers cannot be imported ({str(error).splitlines()[0]}); install it with: "
            'pip install "tintype[bench]"'
        ) from error
    return diffusers


def _pipeline(work: Work, dtype: torch.dtype) -> Any:
    diffusers = imported()
    if not work.checkpoint:
        raise RequestError("diffusers reads a checkpoint folder, and this model is a bundle alone")
    diffusers.utils.logging.set_verbosity_error()
    kind: Any = diffusers.DiffusionPipeline
    if Path(work.checkpoint, "text_proj").is_dir():
        _find_unclip()
    pipe = kind.from_pretrained(work.checkpoint, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    if work.scheduler:
        kind = getattr(diffusers, _SCHEDULERS[work.scheduler])
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
    return pipe


def _find_unclip() -> None:
    """Published unCLIPs have a part of the library "unclip", which is diffusers' own and which it no longer finds."""
    from diffusers.pipelines.deprecated.unclip import text_proj

    sys.modules.setdefault("unclip", text_proj)


def _denoiser_name(pipe: Any) -> str:
    names = ("unet", "decoder", "transformer")
    return next(name for name in names if getattr(pipe, name, None) is not None)


def _compile(pipe: Any, denoiser: str, runner: Runner) -> None:
    """The denoiser and what is behind it, whole; of unCLIP the prior, too."""
    # Weights are packed once for oneDNN, as PyTorch's guide for CPUs says.
    flags = inductor_flags(runner.mode, freezing=runner.device == "cpu")
    for flag, value in flags.items():
        setattr(torch._inductor.config, flag, value)
    for owner, name, _ in _models(pipe, denoiser):
        prepare(owner)
        compiled = torch.compile(getattr(owner, name), mode=runner.mode, fullgraph=True)
        setattr(owner, name, compiled)


class DiffusersPictures:
    """Whole pictures."""

    def __init__(self, pipe: Any, work: Work, denoiser: str, device: str) -> None:
        self._pipe, self._work, self._denoiser, self._device = pipe, work, denoiser, device
        self._arguments = _arguments(pipe, work, device)
        self._noise = _unclip_noise(pipe, work, device) if denoiser == "decoder" else []

    def run(self) -> Pictures:
        with torch.inference_mode(), _given_noise(self._pipe, self._noise):
            return np.asarray(self._pipe(**self._arguments).images, np.float32)

    def stages(self) -> dict[str, float]:
        encoders = [n for n in vars(self._pipe) if n.startswith("text_encoder")]
        watched = [(getattr(self._pipe, name), "forward", "encode") for name in encoders]
        watched += _models(self._pipe, self._denoiser)
        timings: dict[str, float] = {}
        plain = [(owner, name, getattr(owner, name)) for owner, name, _ in watched if owner]
        for owner, name, stage in watched:
            if owner is not None:
                setattr(owner, name, _timed(getattr(owner, name), stage, timings, self._device))
        try:
            self.run()
        finally:
            for owner, name, function in plain:
                setattr(owner, name, function)
        return timings


def _models(pipe: Any, denoiser: str) -> list[tuple[Any, str, str]]:
    """The modules that count behind the text's, the function of each that is called, and our name of its stage."""
    if denoiser == "decoder":
        stages = {"prior": "prior", "decoder": "denoise"}
        stages |= {"super_res_first": "enlarge", "super_res_last": "enlarge"}
        return [(getattr(pipe, name), "forward", stage) for name, stage in stages.items()]
    return [(getattr(pipe, denoiser), "forward", "denoise"), (pipe.vae, "decode", "decode")]


def _timed(
    call: Callable[..., Any], stage: str, timings: dict[str, float], device: str
) -> Callable[..., Any]:
    """`call`, adding its seconds to `timings`; the device finishes before and after."""

    def finish() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    def timed(*args: Any, **options: Any) -> Any:
        finish()
        begin = time.perf_counter()
        result = call(*args, **options)
        finish()
        timings[stage] = timings.get(stage, 0.0) + time.perf_counter() - begin
        return result

    return timed


def _arguments(pipe: Any, work: Work, device: str) -> dict[str, Any]:
    """What the pipeline is called with; latents in the form that it takes them in."""
    defaults = open_checkpoint(work.checkpoint).defaults
    first = next(getattr(pipe, _denoiser_name(pipe)).parameters())
    if _denoiser_name(pipe) == "decoder":
        return _unclip_arguments(work, defaults, first)
    channels, factor = defaults["latent_channels"], defaults["latent_factor"]
    latents = torch.from_numpy(work.latents(channels, factor)).to(device)
    if type(pipe).__name__.startswith("Flux"):
        n, c, h, w = latents.shape
        latents = pipe._pack_latents(latents, n, c, h, w)
    told = {"max_sequence_length": defaults["text_tokens"]} if "text_tokens" in defaults else {}
    return {
        "prompt": [work.prompt] * work.batch,
        "latents": latents.to(first.dtype),
        "num_inference_steps": work.steps,
        "guidance_scale": work.guidance,
        "height": work.height,
        "width": work.width,
        "output_type": "np",
        **told,
    }


def _unclip_arguments(work: Work, defaults: dict[str, Any], like: Tensor) -> dict[str, Any]:
    begun = {
        f"{name}_latents": np.stack([initial_noise(seed, shape, walk) for seed in work.seeds])
        for name, (walk, shape) in _walks(work, defaults).items()
    }
    return {
        "prompt": [work.prompt] * work.batch,
        "decoder_num_inference_steps": work.steps,
        "decoder_guidance_scale": work.guidance,
        **{name: defaults[name] for name in CASCADE},
        **{name: torch.from_numpy(array).to(like) for name, array in begun.items()},
        "output_type": "np",
    }


def _walks(work: Work, defaults: dict[str, Any]) -> dict[str, tuple[Walk, tuple[int, ...]]]:
    """unCLIP's three walks by diffusers' names: ours, and the shape of what is walked."""
    pixels, factor = defaults["latent_channels"], defaults["latent_factor"]
    return {
        "prior": ("prior", (defaults["embedding_width"],)),
        "decoder": ("picture", (pixels, work.height // factor, work.width // factor)),
        "super_res": ("enlarged", (pixels, work.height, work.width)),
    }


def _unclip_noise(pipe: Any, work: Work, device: str) -> list[Tensor]:
    """What ours add at the steps of all three walks, one after the other; no last step adds any."""
    defaults = open_checkpoint(work.checkpoint).defaults
    steps = (defaults[CASCADE[0]], work.steps, defaults[CASCADE[2]])
    draws = (
        np.stack([step_noise(seed, step, shape, walk) for seed in work.seeds])
        for count, (walk, shape) in zip(steps, _walks(work, defaults).values(), strict=True)
        for step in range(count - 1)
    )
    return [torch.from_numpy(each).to(device, pipe.decoder.dtype) for each in draws]


@contextmanager
def _given_noise(pipe: Any, noise: Sequence[Tensor]) -> Iterator[None]:
    """Within it unCLIP's steps add these; pipelines of other kinds are timed without any."""
    if not noise:
        yield
        return
    draws = iter(noise)
    module: Any = sys.modules[type(pipe.decoder_scheduler).__module__]
    own, module.randn_tensor = module.randn_tensor, lambda *_, **__: next(draws)
    try:
        yield
    finally:
        module.randn_tensor = own


class DiffusersComponent:
    """One call of the UNet."""

    def __init__(self, unet: nn.Module, work: Work, device: str) -> None:
        self._unet = unet
        dtype = next(unet.parameters()).dtype
        inputs = {n: torch.from_numpy(a).to(device) for n, a in denoiser_inputs(work).items()}
        cast = {
            name: t if name in ("timestep", "time_ids") else t.to(dtype)
            for name, t in inputs.items()
        }
        self._sample, self._time = cast.pop("sample"), cast.pop("timestep")
        self._text: Tensor = cast.pop("encoder_hidden_states")
        self._added = cast or None
        self._layout: dict[str, Any] = {}
        if unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last):  # type: ignore[union-attr, operator]
            self._layout = {"memory_format": torch.channels_last}

    def run(self) -> Pictures:
        with torch.inference_mode():
            sample = self._sample.contiguous(**self._layout)
            output = self._unet(
                sample, self._time, self._text, added_cond_kwargs=self._added, return_dict=False
            )[0]
            return np.asarray(output.float().cpu().numpy())

    def stages(self) -> dict[str, float]:
        return {}
