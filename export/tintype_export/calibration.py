"""What the layers of a stage see while a model draws: real prompts, real steps of its own sampler, real latents."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tintype.backends.torch import TorchBackend
from tintype.checkpoints import Checkpoint
from tintype.loading import checkpoint_pipeline
from tintype.models.quantised import may_round_output, quantisable
from tintype.models.stage import Stage

from .pictures import shown

# Short sentences of what pictures are asked for most: places, animals, people, things, weather, styles.
PROMPTS = (
    "a red lighthouse on a rocky coast at dusk",
    "two small boats on a calm lake in the morning fog",
    "a portrait of an old man with a grey beard, oil painting",
    "a bowl of fruit on a wooden table by a window",
    "a city street at night in the rain, neon signs",
    "three blue tents in a green meadow under a clear sky",
    "a sleeping cat on a sofa, photograph",
    "a snowy mountain village in winter, watercolour",
)

# Strong guidance and edits give latents up to twice as large as those of a usual picture, and no norm stands between
# them and the layers that read what blocks add up to.
_STRETCHES = (1.0, 2.0)


@dataclass(frozen=True)
class Calibration:
    """Pictures of ``prompts``, ``steps`` each; ``rows`` of each layer's inputs are kept, at random, of all it sees.

    ``shown`` inputs of a whole stage are kept, too, spread evenly over the run.
    """

    prompts: tuple[str, ...] = PROMPTS
    steps: int = 8
    rows: int = 1024
    shown: int = 8

    def as_json(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {"prompts": list(self.prompts), "steps": self.steps, "rows": self.rows}


@dataclass
class Sample:
    """What went into a layer: ``rows`` float32 [n, in * kernel], of which one output is made; ``largest`` [in] of all.

    Or what came out of one: rows [n, out], largest [out].
    """

    parts: list[Tensor] = field(default_factory=list)
    largest: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        """The sample, [n, in * kernel height * width]."""
        return torch.cat(self.parts)

    def add(self, rows: Tensor, largest: Tensor) -> None:
        """Take in a call's sample and its largest magnitudes."""
        self.parts.append(rows.float())
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)


@dataclass(frozen=True)
class Seen:
    """The inputs of every layer of a stage that was called, by name, and of the stage as a whole.

    ``outputs``: of the layers whose outputs may be rounded, too.
    """

    layers: Mapping[str, Sample]
    stage: list[tuple[Tensor, ...]]
    outputs: Mapping[str, Sample] = field(default_factory=dict)


def calibrate(
    checkpoint: Checkpoint, config: Calibration, stages: Collection[str], *, block_by_block: bool
) -> dict[str, tuple[Stage, Seen]]:
    """Draw with float32 torch and watch ``stages``, such as "denoise"; each of them, and what it saw.

    With ``block_by_block`` weights stay in their files, and only one block's are there at a time.
    """
    offload = "sequential" if block_by_block else None
    pipe = checkpoint_pipeline(checkpoint, device="cpu", dtype="float32", offload=offload)
    backend = pipe.family.backend
    assert isinstance(backend, TorchBackend)
    width, height = checkpoint.defaults["width"], checkpoint.defaults["height"]
    calls = {"denoise": config.steps, "decode": len(_STRETCHES), "enlarge_last": 1}
    if checkpoint.family == "unclip":
        settings = checkpoint.defaults
        calls["prior"] = settings["prior_num_inference_steps"]
        calls["enlarge"] = settings["super_res_num_inference_steps"] - 1
    found: dict[str, tuple[Stage, Seen]] = {}
    with ExitStack() as watches:
        for name in stages:
            stage = backend.module(name)
            rows = max(1, config.rows // (calls[name] * len(config.prompts)))
            found[name] = stage, watches.enter_context(_watched(stage, rows))
        for seed, prompt in enumerate(config.prompts):
            pictures = shown(pipe.family, width, height, seed)
            made = pipe(
                prompt,
                seed=seed,
                num_inference_steps=config.steps,
                output_type="latent",
                control_image=pictures.get("control_image"),
            )
            give_back_memory()
            for stretch in _STRETCHES if "decode" in stages else ():
                backend.run("decode", "", {"latents": stretch * np.asarray(made.images)})
                give_back_memory()
    return {name: (stage, _called(seen, config.shown)) for name, (stage, seen) in found.items()}


def give_back_memory() -> None:
    """Have glibc return what is free: what is kept of a run lies between what is not, and gigabytes would stay."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # other C libraries return it by themselves
        trim(0)


def _called(seen: Seen, shown: int) -> Seen:
    """What was called at all, and ``shown`` of the stage's inputs."""
    every = max(1, len(seen.stage) // shown)
    called = {name: each for name, each in seen.layers.items() if each.parts}
    return Seen(called, seen.stage[every // 2 :: every][:shown], seen.outputs)


@contextmanager
def _watched(stage: Stage, rows: int) -> Iterator[Seen]:
    """While the block runs, each call adds ``rows`` of every layer's inputs, of some's outputs, and the stage's own."""

    def look(seen: Sample) -> Callable[..., None]:
        def hook(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
            # Layers that read one and the same input draw the same rows, and so find the same scale for it.
            generator = torch.Generator().manual_seed(len(seen.parts))
            seen.add(*_sample(layer, given[0], rows, generator))

        return hook

    def look_behind(seen: Sample) -> Callable[..., None]:
        def hook(layer: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
            tokens = output.movedim(1, -1) if isinstance(layer, nn.Conv2d) else output
            seen.add(*_token_rows(tokens, rows, torch.Generator().manual_seed(len(seen.parts))))

        return hook

    ((_, model),) = stage.named_children()
    found = quantisable(model)
    rounded = [name for name, layer in found.items() if may_round_output(name, layer)]
    seen = Seen({name: Sample() for name in found}, [], {name: Sample() for name in rounded})
    hooks = [found[n].register_forward_pre_hook(look(each)) for n, each in seen.layers.items()]
    hooks += [found[n].register_forward_hook(look_behind(each)) for n, each in seen.outputs.items()]
    hooks.append(stage.register_forward_pre_hook(lambda _, given: seen.stage.append(given)))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _sample(
    layer: nn.Module, x: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random rows [count, in * kernel] of a layer's input, and the largest magnitude of each input channel [in]."""
    if isinstance(layer, nn.Conv2d):
        windows = input_windows(layer, x)
        sizes = (windows.shape[0], *windows.shape[2:4])
        places = [torch.randint(size, (count,), generator=generator) for size in sizes]
        rows = windows[places[0], :, places[1], places[2]]
        return rows.flatten(1), x.float().abs().amax((0, 2, 3))
    return _token_rows(x, count, generator)


def _token_rows(x: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random rows [count, channels] of tokens [..., channels], and the largest magnitude of each channel."""
    flat = x.reshape(-1, x.shape[-1])
    rows = flat[torch.randint(len(flat), (count,), generator=generator)]
    return rows, flat.float().abs().amax(0)


def input_windows(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A view [n, in, h', w', kernel height, width] of what each output value of a convolution is made of."""
    assert not isinstance(layer.padding, str)
    down, across = layer.padding
    padded = F.pad(x, (across, across, down, down))
    windows = padded.unfold(2, layer.kernel_size[0], layer.stride[0])
    return windows.unfold(3, layer.kernel_size[1], layer.stride[1])
