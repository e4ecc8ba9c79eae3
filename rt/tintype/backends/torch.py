"""Runs a checkpoint's stages in PyTorch: any size, any batch, no export needed."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tintype.backends import Arrays, offloading
from tintype.backends.execution import Call, check_execution, prepared
from tintype.backends.slicing import AttentionSlices
from tintype.checkpoints import Checkpoint
from tintype.checkpoints.weights import stored_type
from tintype.errors import BackendUnavailable, CheckpointError, RequestError, TintypeError
from tintype.models.autoencoder_kl import AutoencoderKL, scale_residual_stream
from tintype.models.joint import JointAttention
from tintype.models.stage import Stage
from tintype.models.stages import (
    DecodeStage,
    EncodeImageStage,
    StepStage,
    TextEncodeStage,
    build_stage,
    stage_component,
    stage_names,
    step_stage,
)
from tintype.models.unet_blocks import TransformerBlock
from tintype.models.vq_model import VQModel
from tintype.steps import STEPS

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}
# What the denoiser's linear layers are kept in where these are asked for; the rest is float32, on CUDA bfloat16.
_CODES: dict[str, dict[str, Any]] = {
    "int8": {"activations": "dynamic"},
    "fp8": {"activations": "dynamic"},
    "int4": {"group": 64},
}
# Inputs of a stage, of the same rows, to its outputs.
RunRows = Callable[..., tuple[Tensor, ...]]
# Beside a step's inputs, the times of all steps of its picture (see `TorchBackend.foretold`).
_TIMES = "times"
# SDXL's decoder reaches a few times float16's limit; a power of two keeps normal weights exact.
_RESIDUAL_SCALE = 16.0


class TorchBackend:
    """Stages are loaded at first use and shared by all threads.

    With `batch_invariant` (None: on CPU) every row runs by itself, so that a picture's bytes do not depend on
    what else is in its batch. `offload` is where weights wait that are not in use (see `backends.offloading`);
    with `vae_tiling` pictures are encoded and decoded in overlapping tiles, with `attention_slicing` attention without
    a fused kernel runs in slices (see `backends.slicing`). `execution` is eager, compiled or graph (see
    `backends.execution`).
    """

    name = "torch"

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str = "auto",
        dtype: str = "auto",
        batch_invariant: bool | None = None,
        offload: str | None = None,
        vae_tiling: bool = False,
        attention_slicing: bool = False,
        execution: str = "eager",
    ) -> None:
        self.checkpoint = checkpoint
        self.device = _device(device)
        self._offload = offloading.offload(offload, self.device)
        self._tiled = vae_tiling
        self._attention = AttentionSlices if attention_slicing else nullcontext
        self._execution = check_execution(
            execution, self.device, offloaded=offload is not None, sliced=attention_slicing
        )
        self._codes = dtype if dtype in _CODES else None
        self.dtype = _dtype(dtype, self.device)
        self.batch_invariant = (
            self.device.type == "cpu" if batch_invariant is None else batch_invariant
        )
        self._waits = self.device.type != "cuda"  # whether a call ends with its result
        self._watched: set[str] = set()
        self._fitting: dict[str, int] = {}  # most rows of a stage that fitted where more did not
        self._stages: dict[tuple[str, torch.dtype], Stage] = {}
        self._components: dict[tuple[str, torch.dtype], nn.Module] = {}
        self._calls: dict[tuple[str, torch.dtype], Call] = {}
        self._lock = threading.RLock()

    @property
    def stages(self) -> tuple[str, ...]:
        return stage_names(self.checkpoint.components)

    def profiles(self, stage: str) -> None:
        """Every shape runs."""

    def module(self, stage: str) -> Stage:
        """The module that runs a stage; what is hooked to it sees every run."""
        return self._stage(stage, self.dtype)

    def inputs(self, stage: str) -> tuple[str, ...]:
        """The names of what a stage takes."""
        return self._stage(stage, self.dtype).inputs

    def compile(self, stage: str, profile: str) -> None:
        """Load the stage's weights."""
        self._stage(stage, self.dtype)

    def run(self, stage: str, profile: str, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        module = self._stage(stage, self.dtype)
        if isinstance(module, TextEncodeStage):
            _check_ids(stage, inputs["input_ids"], module.encoder.config.vocab_size)
        placed = {name: self.place(inputs[name]) for name in module.inputs}
        outputs = self._run(stage, placed, self._run_watched)
        return {name: self.fetch(tensor) for name, tensor in outputs.items()}

    def place(self, array: NDArray[Any]) -> Tensor:
        """A copy; a GPU takes it from pinned memory, for which nobody waits."""
        copy = torch.tensor(array)
        return copy if self._waits else copy.pin_memory().to(self.device, non_blocking=True)

    def foretold(
        self, told: Mapping[str, Tensor], times: NDArray[np.float32]
    ) -> Mapping[str, Tensor]:
        """With the times, of which graphs look up what they tell."""
        return {**told, _TIMES: self.place(times)} if self._execution == "graph" else told

    def run_placed(
        self, stage: str, profile: str, inputs: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Of a GPU's results none is waited for to see whether it is finite, unless the stage is watched."""
        watched = self._waits or stage in self._watched
        return self._run(stage, inputs, self._run_watched if watched else self._run_unseen)

    def watch(self, stage: str) -> bool:
        known = self._waits or stage in self._watched
        self._watched.add(stage)
        return not known

    def _run(
        self, stage: str, inputs: Mapping[str, Tensor], run_rows: RunRows
    ) -> dict[str, Tensor]:
        module = self._stage(stage, self.dtype)
        tensors = [inputs[name] for name in module.inputs]
        rows = len(tensors[0])
        size = 1 if self.batch_invariant else min(rows, self._fitting.get(stage, rows))
        together = run_rows
        if _TIMES in inputs and size >= rows:
            together = partial(run_rows, times=inputs[_TIMES])
        try:
            parts = _in_parts(together, stage, tensors, size)
        except torch.OutOfMemoryError as error:
            size = self._halved(stage, size, error)
            parts = _in_parts(run_rows, stage, tensors, size)
        outputs = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
        return dict(zip(module.outputs, outputs, strict=True))

    def fetch(self, placed: Tensor) -> NDArray[np.float32]:
        """On the host; of a GPU in pinned memory, which it writes faster and which is used again."""
        if self._waits:
            return placed.cpu().numpy()
        host = torch.empty(placed.shape, dtype=placed.dtype, pin_memory=True)
        host.copy_(placed, non_blocking=True)
        torch.cuda.current_stream(self.device).synchronize()
        return host.numpy()

    def _halved(self, stage: str, size: int, error: Exception) -> int:
        """Half as many rows at a time, from now on; an error where there is no half."""
        module = self._stage(stage, self.dtype)
        if size == 1 and isinstance(module, StepStage) and module.guided and not module.apart:
            module.apart = True
        elif size == 1:
            raise TintypeError(
                f"stage {stage} does not fit into memory; ask for a smaller picture or a 16-bit dtype"
            ) from error
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._fitting[stage] = smaller = max(1, size // 2)
        warnings.warn(
            f"stage {stage} ran out of memory with a batch of {size} and goes on with "
            f"{'one row of its pair' if size == 1 else smaller}",
            RuntimeWarning,
            stacklevel=3,
        )
        return smaller

    def _run_unseen(
        self, stage: str, inputs: list[Tensor], times: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Run rows together."""
        return self._call(stage, self.dtype, inputs, times)

    def _run_watched(
        self, stage: str, inputs: list[Tensor], times: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Run rows together; those that overflow 16 bits run again in float32."""
        outputs = self._call(stage, self.dtype, inputs, times)
        bad = ~_finite_rows(outputs)
        if not bad.any():
            return outputs
        if self.dtype != torch.float32:
            warnings.warn(
                f"stage {stage} met NaN or infinity in {_short(self.dtype)} and was run again in float32",
                RuntimeWarning,
                stacklevel=2,
            )
            again = self._call(stage, torch.float32, [tensor[bad] for tensor in inputs])
            if _finite_rows(again).all():
                return tuple(o.index_put((bad,), a) for o, a in zip(outputs, again, strict=True))
        raise TintypeError(
            f"stage {stage} met NaN or infinity in float32; its inputs or weights are broken"
        )

    def _call(
        self, stage: str, dtype: torch.dtype, inputs: list[Tensor], times: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        known = {} if times is None else {"times": times}
        with torch.inference_mode(), self._attention():
            outputs = self._prepared(stage, dtype)(*inputs, **known)
            return outputs if isinstance(outputs, tuple) else (outputs,)

    def _prepared(self, name: str, dtype: torch.dtype) -> Call:
        with self._lock:
            if (name, dtype) not in self._calls:
                stage = self._stage(name, dtype)
                self._calls[name, dtype] = prepared(stage, self._execution, self.device)
            return self._calls[name, dtype]

    def _stage(self, name: str, dtype: torch.dtype) -> Stage:
        if name not in self.stages:
            raise RequestError(
                f"{self.checkpoint.source} has no stage {name!r}; it has {', '.join(self.stages)}"
            )
        with self._lock:
            if (name, dtype) not in self._stages:
                stage = self._built(name, dtype)
                if self._offload is not None and not isinstance(stage, StepStage):
                    part = stage_component(name, self.checkpoint.components)
                    self._offload.attach(stage, self._component(part, dtype), dtype)
                if isinstance(stage, (DecodeStage, EncodeImageStage)):
                    stage.tiled = self._tiled
                if isinstance(stage, DecodeStage):
                    stage.keep_overflow = dtype != torch.float32
                self._stages[name, dtype] = stage.eval()
            return self._stages[name, dtype]

    def _built(self, name: str, dtype: torch.dtype) -> Stage:
        if name in STEPS:
            model: Any = self._stage(STEPS[name].model, dtype)
            return step_stage(name, model)
        return build_stage(
            name, self.checkpoint.components, lambda part: self._component(part, dtype)
        )

    def _component(self, name: str, dtype: torch.dtype) -> nn.Module:
        if (name, dtype) not in self._components:
            if self._offload is None:
                loaded = load_component(self.checkpoint, name, dtype, self.device)
            else:
                loaded = load_component(self.checkpoint, name, self._waiting_type(name, dtype))
            if (
                self.device.type == "cuda"
            ):  # tensor cores convolve channels-last; the weights' layout spreads
                loaded = loaded.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self._components[name, dtype] = self._stacked(self._rounded(name, loaded))
        return self._components[name, dtype]

    def _stacked(self, component: nn.Module) -> nn.Module:
        """The component, in which a GPU finds what it multiplies at once in one place, unless weights move."""
        if self.device.type == "cuda" and self._offload is None:
            for module in component.modules():
                if isinstance(module, TransformerBlock):
                    module.attn1.stack()
                if isinstance(module, JointAttention):
                    module.stack()
        return component

    def _waiting_type(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """What a component's weights wait in: as they are stored, unless they change or would be wider than needed."""
        stored = stored_type(self.checkpoint.components[name].weights)
        as_stored = self._codes is None and not self.checkpoint.updates
        return stored if as_stored and stored.itemsize < dtype.itemsize else dtype

    def _rounded(self, name: str, component: nn.Module) -> nn.Module:
        """The component, its linear layers in codes where that was asked for and it is the denoiser."""
        denoiser = stage_component("denoise", self.checkpoint.components)
        if self._codes is None or name != denoiser:
            return component
        from tintype.models.quantised import Scheme, round_linears  # imports every kernel

        return round_linears(component, Scheme(self._codes, **_CODES[self._codes]))


def _in_parts(
    run_rows: RunRows, stage: str, tensors: list[Tensor], size: int
) -> list[tuple[Tensor, ...]]:
    rows = len(tensors[0])
    if size >= rows:  # the very tensors, by which a graph knows what it was told
        return [run_rows(stage, tensors)]
    return [run_rows(stage, [t[i : i + size] for t in tensors]) for i in range(0, rows, size)]


def load_component(
    checkpoint: Checkpoint, name: str, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> nn.Module:
    """A checkpoint's module, made safe for float16 where it says that it overflows."""
    return made_safe(checkpoint.component(name, dtype, device), checkpoint.configs[name], dtype)


def made_safe(module: nn.Module, config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """The module, its residual stream scaled down where its configuration says that float16 overflows."""
    if isinstance(module, AutoencoderKL | VQModel) and overflows(config, dtype):
        scale_residual_stream(module.decoder, _RESIDUAL_SCALE)
    return module


def overflows(config: Mapping[str, Any], dtype: torch.dtype) -> bool:
    """Whether a component's configuration says that it overflows in this type."""
    return bool(config.get("force_upcast", False)) and dtype == torch.float16


def _check_ids(stage: str, ids: NDArray[Any], words: int) -> None:
    """An id past the table would read beside it on CPU and take the whole process's GPU context down."""
    if ids.min() < 0 or ids.max() >= words:
        raise CheckpointError(
            f"stage {stage}: the tokenizer gives id {ids.max()}, the text encoder knows {words}; "
            "the tokenizer folder belongs to another model"
        )


def _finite_rows(outputs: tuple[Tensor, ...]) -> Tensor:
    """Which rows are finite in every output, [n]."""
    return torch.stack([output.isfinite().flatten(1).all(dim=1) for output in outputs]).all(dim=0)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    unknown = RequestError(f"device={name!r} is unknown; choose auto, cpu, cuda or cuda:N")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise unknown from error
    if device.type not in ("cpu", "cuda"):
        raise unknown
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable(
            f"device={name!r} needs a CUDA build of torch and an NVIDIA GPU; found neither"
        )
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if name in _CODES:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in _DTYPES:
        possible = ", ".join((*_DTYPES, *_CODES))
        raise RequestError(f"dtype={name!r} is unknown; choose auto, {possible}")
    return _DTYPES[name]
