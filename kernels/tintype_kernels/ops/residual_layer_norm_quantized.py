"""What joins a branch to its stream, and the norm that reads the stream next, whose tokens leave in 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from tintype_kernels.ops import layer_norm_modulate as norm
from tintype_kernels.ops import residual_layer_norm as plain
from tintype_kernels.ops.quantise import LARGEST
from tintype_kernels.ops.quantised_rows import (
    SCHEMES,
    QuantizedRows,
    arch_obstacle,
    as_bytes,
    check_scheme,
    empty_rows,
    from_bytes,
    plain_rows,
    store_quantized,
)
from tintype_kernels.torch_op import TorchOp, empty, public
from tintype_kernels.triton_support import await_earlier, entry, tl, too_wide


def reference(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, scheme: str = "int8",
    eps: float = 1e-6, unit: float = 1.0,
) -> tuple[Tensor, QuantizedRows]:  # fmt: skip
    """The op in plain PyTorch."""
    stream, normed = plain.reference(x, y, gate, shift, scale, eps, unit)
    return stream, plain_rows(normed, scheme)


def baseline(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, scheme: str = "int8",
    eps: float = 1e-6, unit: float = 1.0,
) -> tuple[Tensor, QuantizedRows]:  # fmt: skip
    """What a benchmark compares with."""
    stream, normed = plain.baseline(x, y, gate, shift, scale, eps, unit)
    return stream, plain_rows(normed, scheme)


def _reference_forward(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, scheme: str, eps: float, unit: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    stream, rows = reference(x, y, gate, shift, scale, scheme, eps, unit)
    return empty(x).copy_(stream), as_bytes(rows.codes), rows.scales


@entry
def _kernel(
    x, y, gate, shift, scale, stream, codes, scales, T, C: tl.constexpr, x_batch, x_row, y_batch, y_row, gate_batch,
    shift_batch, scale_batch, eps, unit, GATED: tl.constexpr, LIMIT: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of a sample: grid (tokens, samples)."""
    await_earlier()
    rows, b = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1).to(tl.int64)
    parts = plain.joined(
        x, y, gate, stream, rows, T, C, x_batch, x_row, y_batch, y_row, gate_batch, GATED, WIDTH
    )
    parts = norm.modulated(parts, shift, scale, C, shift_batch, scale_batch, eps, unit, WIDTH)
    codes, scales = codes + b * T * C, scales + b * T
    store_quantized(parts, codes, scales, rows, T, C, x.dtype.element_ty, LIMIT, WIDTH)


def _triton_forward(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, scheme: str, eps: float, unit: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    stream, codes, scales = _empty(x, y, gate, shift, scale, scheme)
    outputs = [stream, from_bytes(codes), scales]
    limit = LARGEST[outputs[1].dtype]
    plain.launch(_kernel, x, y, gate, shift, scale, outputs, eps, unit, LIMIT=limit)
    return stream, codes, scales


def _empty(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, scheme: str, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty(x), *empty_rows(x, tuple(x.shape), scheme)


def _obstacle(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, scheme: str, *_: Any
) -> str:
    return too_wide(x.shape[-1]) or arch_obstacle(scheme, x)


OP = TorchOp(
    "residual_layer_norm_quantized", fake=_empty, reference=_reference_forward, triton=_triton_forward,
    obstacles={"triton": _obstacle},
)  # fmt: skip


@public(reference)
def residual_layer_norm_quantized(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, scheme: str = "int8",
    eps: float = 1e-6, unit: float = 1.0,
) -> tuple[Tensor, QuantizedRows]:  # fmt: skip
    """Return `x + gate * y` and, in codes of `scheme`, int8 or fp8, its `layer_norm(...) * (unit + scale) + shift`.

    x and y are [b, t, c]; gate (None: 1), shift and scale are [b, c] or [b, 1, c]. Each token has a scale.
    """
    check_scheme(scheme)
    arguments = plain.checked(x, y, gate, shift, scale)
    stream, codes, scales = OP(*arguments, scheme, eps, unit)
    return stream, QuantizedRows(from_bytes(codes), scales, x.dtype)


def cases(make: Callable[..., Tensor], batch: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Arguments at the sizes of real models; `make(*shape)` gives a tensor."""
    for label, arguments in plain.cases(make, batch):
        for scheme in SCHEMES:
            yield f"{label}, {scheme}", {**arguments, "scheme": scheme}
