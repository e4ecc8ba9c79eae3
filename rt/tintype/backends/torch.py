"""Runs a checkpoint's stages eagerly in PyTorch: any size, any batch, no export needed."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tintype.backends import Arrays
from tintype.checkpoints import Checkpoint
from tintype.errors import BackendUnavailable, CheckpointError, RequestError, TintypeError
from tintype.models.autoencoder_kl import AutoencoderKL, scale_residual_stream
from tintype.models.stages import DecodeStage, Stage, TextEncodeStage, build_stage, stage_names

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}
# SDXL's decoder reaches a few times float16's limit; a power of two keeps normal weights exact.
_RESIDUAL_SCALE = 16.0


class TorchBackend:
    """Stages are loaded at first use and shared by all threads.

    With `batch_invariant` (None: on CPU) every row runs by itself, so that a picture's bytes do not depend on
    what else is in its batch.
    """

    name = "torch"

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str = "auto",
        dtype: str = "auto",
        batch_invariant: bool | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.device = _device(device)
        self.dtype = _dtype(dtype, self.device)
        self.batch_invariant = (
            self.device.type == "cpu" if batch_invariant is None else batch_invariant
        )
        self._fitting: dict[str, int] = {}  # most rows of a stage that fitted where more did not
        self._stages: dict[tuple[str, torch.dtype], Stage] = {}
        self._components: dict[tuple[str, torch.dtype], nn.Module] = {}
        self._lock = threading.RLock()

    @property
    def stages(self) -> tuple[str, ...]:
        return stage_names(self.checkpoint.components)

    def profiles(self, stage: str) -> None:
        """Every shape runs."""

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
        tensors = [torch.tensor(inputs[name]) for name in module.inputs]
        rows = len(tensors[0])
        size = 1 if self.batch_invariant else min(rows, self._fitting.get(stage, rows))
        try:
            parts = self._run_parts(stage, tensors, size)
        except torch.OutOfMemoryError as error:
            size = self._halved(stage, size, error)
            parts = self._run_parts(stage, tensors, size)
        outputs = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
        return dict(zip(module.outputs, outputs, strict=True))

    def _run_parts(self, stage: str, tensors: list[Tensor], size: int) -> list[tuple[Tensor, ...]]:
        rows = len(tensors[0])
        return [
            self._run_rows(stage, [t[i : i + size] for t in tensors]) for i in range(0, rows, size)
        ]

    def _halved(self, stage: str, size: int, error: Exception) -> int:
        """Half as many rows at a time, from now on; an error where there is no half."""
        if size == 1:
            raise TintypeError(
                f"stage {stage} does not fit into memory; ask for a smaller picture or a 16-bit dtype"
            ) from error
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._fitting[stage] = size // 2
        warnings.warn(
            f"stage {stage} ran out of memory with a batch of {size} and goes on with {size // 2}",
            RuntimeWarning,
            stacklevel=3,
        )
        return size // 2

    def _run_rows(self, stage: str, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """Run rows together; those that overflow 16 bits run again in float32."""
        outputs = self._call(stage, self.dtype, inputs)
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

    def _call(self, stage: str, dtype: torch.dtype, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        with torch.inference_mode():
            outputs = self._stage(stage, dtype)(*(tensor.to(self.device) for tensor in inputs))
            return tuple(o.cpu() for o in (outputs if isinstance(outputs, tuple) else (outputs,)))

    def _stage(self, name: str, dtype: torch.dtype) -> Stage:
        if name not in self.stages:
            raise RequestError(
                f"{self.checkpoint.source} has no stage {name!r}; it has {', '.join(self.stages)}"
            )
        with self._lock:
            if (name, dtype) not in self._stages:
                stage = build_stage(
                    name, self.checkpoint.components, lambda part: self._component(part, dtype)
                )
                if isinstance(stage, DecodeStage):
                    stage.keep_overflow = dtype != torch.float32
                self._stages[name, dtype] = stage.eval()
            return self._stages[name, dtype]

    def _component(self, name: str, dtype: torch.dtype) -> nn.Module:
        if (name, dtype) not in self._components:
            self._components[name, dtype] = load_component(
                self.checkpoint, name, dtype, self.device
            )
        return self._components[name, dtype]


def load_component(
    checkpoint: Checkpoint, name: str, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> nn.Module:
    """A checkpoint's module, made safe for float16 where it says that it overflows."""
    module = checkpoint.component(name, dtype, device)
    upcast = checkpoint.configs[name].get("force_upcast", False)
    if isinstance(module, AutoencoderKL) and upcast and dtype == torch.float16:
        scale_residual_stream(module.decoder, _RESIDUAL_SCALE)
    return module


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
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RequestError(
            f"device={name!r} is unknown; choose auto, cpu, cuda or cuda:N"
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable(
            f"device={name!r} needs a CUDA build of torch and an NVIDIA GPU; found neither"
        )
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if name not in _DTYPES:
        raise RequestError(f"dtype={name!r} is unknown; choose auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]
