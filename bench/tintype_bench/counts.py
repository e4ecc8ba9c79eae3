"""FLOPs and bytes of a stage, counted from its module on the meta device: no weights, no arithmetic.

Products (matrix products, convolutions) and attention are counted one by one; whatever lies between them is taken to
cost nothing, as if it were fused into them. So the floor that follows is one that no implementation of the same
arithmetic can pass: each product at the larger of its arithmetic and of one pass over what it reads and writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tintype.checkpoints import Checkpoint
from tintype.models.stage import Remembering
from tintype.models.stages import build_stage, stage_names
from tintype.profiles import Profile
from tintype.steps import STEPS
from tintype_export.profiles import example_inputs

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1}
# The types that a product of each may be made in.
_SERVING = {
    "fp32": ("fp32",),
    "fp16": ("fp16", "bf16", "fp32"),
    "bf16": ("bf16", "fp32"),
    "int8": ("int8", "bf16", "fp32"),
    "fp8": ("fp8", "bf16", "fp32"),
}
_ATTENTION = ("bmm", "baddbmm", "attention")
_GUIDED = ("denoise", "prior")


@dataclass(frozen=True)
class Product:
    """One counted operation: its FLOPs, and how many values it reads and writes."""

    name: str
    flops: int
    values: int
    attention: bool


@dataclass(frozen=True)
class Ceilings:
    """What the machine was measured to do at best: FLOP/s by precision, and bytes/s of a copy."""

    flops: Mapping[str, float]
    bandwidth: float

    def rate(self, precision: str, *, attention: bool) -> float:
        """FLOP/s of a product; attention stays in 16 bits (fp32: 32) where products have 8.

        A product may be made in wider types than it is asked in, where the machine is faster in those.
        """
        serving = _SERVING[precision]
        if attention:
            serving = tuple(each for each in serving if BYTES[each] > 1)
        return max(self.flops[each] for each in serving if each in self.flops)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every product that runs under it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: list[Product] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            name = func._overloadpacket.__name__
            flops = formula(*args, **(kwargs or {}), out_val=result)
            sizes = [tensor.numel() for tensor in _tensors((args, result))]
            attends = any(word in name for word in _ATTENTION)
            # Attention need not write its scores, nor read them again; they are the largest of the three.
            values = sum(sizes) - (max(sizes) if attends else 0)
            self.products.append(Product(name, int(flops), values, attends))
        return result


def _tensors(nest: Any) -> Iterator[Tensor]:
    if isinstance(nest, Tensor):
        yield nest
    elif isinstance(nest, (list, tuple)):
        for each in nest:
            yield from _tensors(each)


def count(module: Any, *inputs: Tensor) -> list[Product]:
    """The products of one call of a module whose weights and inputs are on the meta device."""
    counter = _Counter()
    with torch.no_grad(), counter:
        module(*inputs)
    return counter.products


def floor_seconds(products: list[Product], ceilings: Ceilings, precision: str) -> float:
    """The least time of these products, one after the other."""
    width = BYTES[precision]
    return sum(
        max(
            each.flops / ceilings.rate(precision, attention=each.attention),
            each.values * width / ceilings.bandwidth,
        )
        for each in products
    )


class Counted(NamedTuple):
    """The products of one call of a stage, and those among them that give the same at every step of a picture."""

    call: list[Product]
    remembered: list[Product]


def stage_products(
    checkpoint: Checkpoint, width: int, height: int, rows: int
) -> dict[str, Counted]:
    """The products of every stage that a picture of this size runs: of `rows` where they guide, the others' of one."""
    names = [name for name in stage_names(checkpoint.components) if _draws(name)]
    return {
        name: _count_stage(checkpoint, name, Profile(width, height, rows if name in _GUIDED else 1))
        for name in names
    }


def _draws(stage: str) -> bool:
    """Whether a picture from text alone needs the stage; a whole step is its model once more."""
    return stage not in (*STEPS, "encode_image")


def _count_stage(checkpoint: Checkpoint, name: str, profile: Profile) -> Counted:
    with torch.device("meta"):
        stage = build_stage(
            name, checkpoint.components, lambda part: checkpoint.skeleton(part, torch.float32)
        )
    arrays = example_inputs(checkpoint, stage.inputs, name, profile.name)
    inputs = [torch.from_numpy(arrays[each]).to("meta") for each in stage.inputs]
    call = count(stage.eval(), *inputs)
    if not isinstance(stage, Remembering):
        return Counted(call, [])
    return Counted(call, count(stage.remember, *inputs[stage.changing :]))
