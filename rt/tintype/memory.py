"""How much memory a picture takes, told without weights: the true pipeline over tensors that have shapes alone.

What is counted is what torch's allocator is asked for at the fullest moment, weights included; the runtime's own
context, its libraries' workspaces and what the allocator keeps back come on top.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tintype.backends.offloading import OFFLOADS
from tintype.backends.torch import RunRows, TorchBackend, made_safe
from tintype.checkpoints import Checkpoint
from tintype.loading import torch_pipeline
from tintype.pipeline import Pipeline

# By a kernel that holds no scores; by none, whole; by none, in slices.
Attention = Literal["fused", "whole", "sliced"]
_aten = torch.ops.aten
_ATTENTION = (
    _aten.scaled_dot_product_attention.default,
    _aten._scaled_dot_product_attention_math.default,
)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that were made within and still live; `peak` is the most there ever were.

    Attention counts as what PyTorch makes of it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _ATTENTION:
            with self:
                return func.decompose(*args, **(kwargs or {}))
        given = {
            id(each.untyped_storage()) for each in _tensors((args, kwargs)) if _has_storage(each)
        }
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            if _has_storage(tensor) and id(tensor.untyped_storage()) not in given:
                self._add(tensor.untyped_storage())
        if func is _aten._safe_softmax.default:  # notes in a byte a score which are -inf
            self.peak = max(self.peak, self.now + result.numel())
        return result

    def _add(self, storage: Any) -> None:
        key = id(storage)
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class _Hollow(TorchBackend):
    """A torch backend whose weights were never read and whose results are zeros."""

    def __init__(self, checkpoint: Checkpoint, mode: FakeTensorMode, **options: Any) -> None:
        super().__init__(checkpoint, **options)
        self.peaks: dict[str, int] = {}
        self._mode = mode
        self._live = LiveBytes()

    def _run(self, stage: str, inputs: Mapping[str, Tensor], _: RunRows) -> dict[str, Tensor]:
        module = self.module(stage)
        with torch.inference_mode(), self._mode, self._live, self._attention():
            faces = [inputs[name] for name in module.inputs]
            told = [torch.empty(face.shape, dtype=face.dtype) for face in faces]
            self._live.peak = 0  # what the stage before left goes before anything comes
            outputs = module(*told)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            shapes = [(tuple(each.shape), each.dtype) for each in outputs]
            del outputs, told
        self.peaks[stage] = max(self.peaks.get(stage, 0), self._live.peak)
        zeros = (torch.zeros(shape, dtype=dtype) for shape, dtype in shapes)
        return dict(zip(module.outputs, zeros, strict=True))

    def _component(self, name: str, dtype: torch.dtype) -> nn.Module:
        if (name, dtype) not in self._components:
            with self._mode:
                module = self.checkpoint.skeleton(name, dtype).requires_grad_(False)
                made_safe(module, self.checkpoint.configs[name], dtype)
                module = self._rounded(name, module)
            self._components[name, dtype] = module
        return self._components[name, dtype]


def settings(*, fused_attention: bool = True) -> list[dict[str, Any]]:
    """What `predict` can be asked, for a device that has a fused kernel for attention or for one that has none."""
    attentions = ("fused",) if fused_attention else ("whole", "sliced")
    return [
        {"offload": offload, "vae_tiling": tiling, "attention": attention}
        for attention, offload, tiling in product(attentions, (None, *OFFLOADS), (False, True))
    ]


def predict(
    checkpoint: Checkpoint,
    *,
    width: int | None = None,
    height: int | None = None,
    dtype: str = "auto",
    offload: str | None = None,
    vae_tiling: bool = False,
    attention: Attention = "fused",
) -> dict[str, int]:
    """Bytes at the fullest moment of each stage of one picture, and of all of them as "peak".

    The size is the model's own by default. A guided step's pair runs as one batch. `attention` "whole" is a device's
    without a fused kernel, "sliced" the same one's with `attention_slicing`.
    """
    options = {"dtype": dtype, "offload": offload, "vae_tiling": vae_tiling}
    options |= {"attention_slicing": attention == "sliced"}
    backend = _Hollow(checkpoint, FakeTensorMode(), device="cpu", batch_invariant=False, **options)
    pipeline = torch_pipeline(checkpoint, backend, "it runs on shapes")
    asked = {"width": width, "height": height, **_blank(pipeline, width, height)}
    with nullcontext() if attention == "fused" else sdpa_kernel(SDPBackend.MATH):
        pipeline("", num_inference_steps=1, seed=0, output_type="np", **asked)
    # Without offloading every component that a picture needs stays on the device.
    resident = 0 if offload else sum(_bytes(module) for module in backend._components.values())
    stages = {stage: resident + peak for stage, peak in backend.peaks.items()}
    return {**stages, "peak": max(stages.values())}


def _blank(pipeline: Pipeline, width: int | None, height: int | None) -> dict[str, Any]:
    """The picture, and the mask, that a model does not go without."""
    if not pipeline.family.needs:
        return {}
    own, asked = pipeline.settings(), pipeline.settings(width=width, height=height)
    # Of any size they would be made before it is checked: have it checked for a request that has small ones.
    call = pipeline.prepare("", num_inference_steps=1, **_pictures(pipeline, own))
    sides = {side: asked[side] for side in ("width", "height")}
    pipeline.family.check(replace(call.requests[0], **sides))
    return _pictures(pipeline, asked)


def _pictures(pipeline: Pipeline, size: Mapping[str, Any]) -> dict[str, Any]:
    channels = {"image": (3,), "mask_image": (), "control_image": (3,)}
    shape = size["height"], size["width"]
    return {name: np.ones((*shape, *channels[name])) for name in pipeline.family.needs}


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _has_storage(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided
