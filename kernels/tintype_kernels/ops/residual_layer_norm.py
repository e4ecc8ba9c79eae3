"""What joins a branch to its stream, and the norm that reads the stream next, in one pass.

`stream = x + gate * y` (without a gate, `x + y`), and of that `layer_norm(stream) * (unit + scale) + shift`: the stream
is written once and not read again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from tintype_kernels.ops import gate_residual as gating
from tintype_kernels.ops import layer_norm_modulate as norm
from tintype_kernels.ops.row_parts import row_parts
from tintype_kernels.torch_op import (
    TorchOp,
    check,
    check_floating,
    empty,
    per_sample,
    public,
    unit_stride,
)  # fmt: skip
from tintype_kernels.triton_support import await_earlier, ceil_div, entry, jit, tl, widen


def reference(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float = 1e-6, unit: float = 1.0
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The op in plain PyTorch."""
    stream = x + y if gate is None else gating.reference(x, y, gate)
    return stream, norm.reference(stream, shift, scale, eps, unit)


def baseline(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float = 1e-6, unit: float = 1.0
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What a benchmark compares with."""
    stream = x + y if gate is None else gating.baseline(x, y, gate)
    return stream, norm.baseline(stream, shift, scale, eps, unit)


def _reference_forward(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float, unit: float
) -> tuple[Tensor, Tensor]:
    stream, normed = reference(x, y, gate, shift, scale, eps, unit)
    return empty(x).copy_(stream), empty(x).copy_(normed)


@jit
def joined(
    x, y, gate, stream, rows, T, C: tl.constexpr, x_batch, x_row, y_batch, y_row, gate_batch,
    GATED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write `x + gate * y` of tokens `rows` of sample program_id(1), and give what was written, in parts."""
    parts = ()
    stems = norm.load_tokens(x, rows, T, C, x_batch, x_row, WIDTH)
    branches = norm.load_tokens(y, rows, T, C, y_batch, y_row, WIDTH)
    for part in tl.static_range(len(stems)):
        branch = branches[part]
        if GATED:
            branch *= norm.spread(gate, gate_batch, part, branch, C, WIDTH)
        parts += ((stems[part] + branch).to(stream.dtype.element_ty),)
    norm.store_tokens(parts, stream, rows, T, C, WIDTH)
    wide = ()
    for part in tl.static_range(len(parts)):
        wide += (widen(parts[part]),)
    return wide


@entry
def _forward_kernel(
    x, y, gate, shift, scale, stream, out, T, C: tl.constexpr, x_batch, x_row, y_batch, y_row, gate_batch,
    shift_batch, scale_batch, eps, unit, GATED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of a sample: grid (tokens, samples)."""
    await_earlier()
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    parts = joined(
        x, y, gate, stream, rows, T, C, x_batch, x_row, y_batch, y_row, gate_batch, GATED, WIDTH
    )
    parts = norm.modulated(parts, shift, scale, C, shift_batch, scale_batch, eps, unit, WIDTH)
    norm.store_tokens(parts, out, rows, T, C, WIDTH)


def launch(
    kernel: Any, x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, outputs: list[Tensor],
    eps: float, unit: float, **constants: Any,
) -> None:  # fmt: skip
    """Launch a kernel that joins and norms, whose outputs are contiguous."""
    b, t, c = x.shape
    tile = row_parts(c)
    x, y, shift, scale = unit_stride(x), unit_stride(y), unit_stride(shift), unit_stride(scale)
    opened = x if gate is None else unit_stride(gate)
    strides = (*x.stride()[:2], *y.stride()[:2], opened.stride(0))
    kernel[ceil_div(t, tile["ROWS"]), b](
        x, y, opened, shift, scale, *outputs, t, c, *strides, shift.stride(0), scale.stride(0), eps, unit,
        gate is not None, **constants, **tile,
    )  # fmt: skip


def _triton_forward(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float, unit: float
) -> tuple[Tensor, Tensor]:
    stream, out = empty(x), empty(x)
    launch(_forward_kernel, x, y, gate, shift, scale, [stream, out], eps, unit)
    return stream, out


def _fake_forward(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty(x), empty(x)


FORWARD = TorchOp(
    "residual_layer_norm", fake=_fake_forward, reference=_reference_forward, triton=_triton_forward,
    obstacles={"triton": norm.obstacle},
)  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, y, gate, _, scale, ctx.eps, ctx.unit = inputs
    ctx.save_for_backward(output[0], y, gate, scale)


def _backward(ctx: Any, of_stream: Tensor, of_normed: Tensor) -> tuple[Tensor | None, ...]:
    stream, y, gate, scale = ctx.saved_tensors
    dx, dshift, dscale = norm.BACKWARD(of_normed, stream, scale, ctx.eps, ctx.unit)
    dx = dx + of_stream
    dy, dgate = (dx, None) if gate is None else gating.BACKWARD(dx, y, gate)
    return dx, dy, dgate, dshift, dscale, None, None


FORWARD.differentiate(_setup_context, _backward)


@public(reference)
def residual_layer_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float = 1e-6, unit: float = 1.0
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return `x + gate * y` and its `layer_norm(...) * (unit + scale) + shift`, for x and y [b, t, c].

    gate (None: 1), shift and scale are [b, c] or [b, 1, c].
    """
    out: tuple[Tensor, Tensor] = FORWARD(*checked(x, y, gate, shift, scale), eps, unit)
    return out


def checked(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """The arguments, vectors as [b, c]; refuse what does not fit x."""
    check_floating("x", x, 3)
    check("y", y, tuple(x.shape), x)
    opened = None if gate is None else per_sample("gate", gate, x)
    return x, y, opened, per_sample("shift", shift, x), per_sample("scale", scale, x)


def cases(make: Callable[..., Tensor], batch: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Arguments at the sizes of real models; `make(*shape)` gives a tensor."""
    for label, arguments in norm.cases(make, batch):
        y = make(*arguments["x"].shape)
        gated = label.startswith(("SD3", "FLUX"))
        yield label, {**arguments, "y": y, "gate": make(batch, y.shape[-1]) if gated else None}
