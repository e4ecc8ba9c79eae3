"""What is timed and by whom: the two descriptions that travel to a worker process as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tintype.noise import initial_noise

PROMPT = "a red lighthouse on a rocky coast at dusk"
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")


@dataclass(frozen=True)
class Work:
    """One piece of work, the same for everybody.

    ``checkpoint`` is a folder in diffusers layout, "" where there is none; ``component`` "denoise" asks for one call of
    the denoiser with ``batch`` rows, "" for ``batch`` whole pictures. ``scheduler`` is a name of ours, "" the
    checkpoint's own; ``noise`` says whose generator makes the initial latents of ``seed`` and on, ours or torch's.
    """

    checkpoint: str
    width: int
    height: int
    batch: int = 1
    steps: int = 20
    guidance: float = 5.0
    component: str = ""
    prompt: str = PROMPT
    seed: int = 0
    scheduler: str = ""
    noise: str = "tintype"

    @property
    def seeds(self) -> range:
        """Of every picture."""
        return range(self.seed, self.seed + self.batch)

    def latents(self, channels: int, factor: int) -> NDArray[np.float32]:
        """Unit noise [n, c, h/f, w/f]: the same bits for every runner."""
        shape = (channels, self.height // factor, self.width // factor)
        drawn = _torch_noise if self.noise == "torch" else initial_noise
        return np.stack([drawn(seed, shape) for seed in self.seeds])


def _torch_noise(seed: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """What torch's generator on a CPU draws, which other programs imitate."""
    import torch

    drawn = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))
    return np.asarray(drawn.numpy())


@dataclass(frozen=True)
class Runner:
    """Who does it: a ``kind`` of `runners.KINDS`, for ours on which ``backend``, in which precision.

    ``bundle`` is the folder that graph runners read; ``command`` is a command line of the user's own. ``invariant``
    asks ours for the same bytes in any batch, which no peer promises; ``execution`` is how our torch backend runs,
    ``mode`` which of `torch.compile`'s diffusers is compiled in.
    """

    kind: str
    precision: str = "fp32"
    backend: str = ""
    device: str = "cpu"
    bundle: str = ""
    command: str = ""
    invariant: bool = False
    execution: str = "eager"
    mode: str = "max-autotune"

    @property
    def label(self) -> str:
        """The name in tables, such as "tintype openvino bf16"."""
        if self.kind == "command":
            return f"command {self.command.split()[0]}"
        promise = "batch-invariant" if self.invariant else ""
        way = "" if self.execution == "eager" else self.execution
        mode = "" if self.mode == "max-autotune" else self.mode
        words = (
            self.kind.replace("diffusers-", "diffusers "),
            self.backend,
            way,
            mode,
            self.precision,
            promise,
        )
        return " ".join(filter(None, words))

    @property
    def ours(self) -> bool:
        """Whether Tintype does it."""
        return self.kind == "tintype"


def as_json(work: Work, runner: Runner) -> dict[str, Any]:
    """Both as a worker reads them."""
    return {"work": asdict(work), "runner": asdict(runner)}
