"""What a denoiser's layers see while it draws: inputs of real prompts at real steps of the model's own sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tintype.backends.torch import TorchBackend
from tintype.checkpoints import Checkpoint
from tintype.loading import checkpoint_pipeline
from tintype.models.quantised import is_factor, quantisable
from tintype.models.stages import Stage

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


@dataclass(frozen=True)
class Calibration:
    """Pictures of ``prompts``, ``steps`` each; ``rows`` of each layer's inputs are kept, at random, of all it sees.

    ``shown`` inputs of the whole denoiser are kept, too, spread evenly over the run.
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
    """The inputs of every layer that was called, by name, and of the denoiser as a whole.

    ``factors``: the outputs of the layers whose outputs are multiplied with one another.
    """

    layers: Mapping[str, Sample]
    stage: list[tuple[Tensor, ...]]
    factors: Mapping[str, Sample] = field(default_factory=dict)


def calibrate(
    checkpoint: Checkpoint, config: Calibration, *, block_by_block: bool
) -> tuple[Stage, Seen]:
    """Draw with float32 torch and watch the denoiser; the stage that was watched, and what it saw.

    With ``block_by_block`` the stage's weights stay in their files, and only one block's are there at a time.
    """
    offload = "sequential" if block_by_block else None
    pipe = checkpoint_pipeline(checkpoint, device="cpu", dtype="float32", offload=offload)
    backend = pipe.family.backend
    assert isinstance(backend, TorchBackend)
    stage = backend.module("denoise")
    ((_, model),) = stage.named_children()
    calls = config.steps * len(config.prompts)
    layers = {name: Sample() for name in quantisable(model)}
    factors = {name: Sample() for name in layers if is_factor(name)}
    inputs: list[tuple[Tensor, ...]] = []
    with _watched(stage, layers, factors, inputs, max(1, config.rows // calls)):
        for seed, prompt in enumerate(config.prompts):
            pipe(prompt, seed=seed, num_inference_steps=config.steps, output_type="latent")
    every = max(1, len(inputs) // config.shown)
    called = {name: each for name, each in layers.items() if each.parts}
    return stage, Seen(called, inputs[every // 2 :: every][: config.shown], factors)


@contextmanager
def _watched(
    stage: Stage,
    layers: Mapping[str, Sample],
    factors: Mapping[str, Sample],
    inputs: list[tuple[Tensor, ...]],
    rows: int,
) -> Iterator[None]:
    """While the block runs, each call adds ``rows`` of every layer's inputs, of factors, and the stage's own."""

    def look(seen: Sample) -> Callable[..., None]:
        def hook(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
            # Layers that read one and the same input draw the same rows, and so find the same scale for it.
            generator = torch.Generator().manual_seed(len(seen.parts))
            seen.add(*_sample(layer, given[0], rows, generator))

        return hook

    def look_behind(seen: Sample) -> Callable[..., None]:
        def hook(layer: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
            seen.add(*_token_rows(output, rows, torch.Generator().manual_seed(len(seen.parts))))

        return hook

    ((_, model),) = stage.named_children()
    found = quantisable(model)
    hooks = [found[name].register_forward_pre_hook(look(seen)) for name, seen in layers.items()]
    hooks += [
        found[name].register_forward_hook(look_behind(seen)) for name, seen in factors.items()
    ]
    hooks.append(stage.register_forward_pre_hook(lambda _, given: inputs.append(given)))
    try:
        yield
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
