"""A linear layer in e4m3: weights with a scale a row, tokens too, each with a scale."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from tintype_kernels.ops import linear_epilogue as epilogue
from tintype_kernels.ops.quantise import Fp8Weight, check_weight, dequantize, quantize_fp8
from tintype_kernels.ops.quantised_rows import (
    QuantizedRows,
    arch_obstacle,
    as_bytes,
    from_bytes,
    plain_rows,
)
from tintype_kernels.ops.scaled_matmul import (
    linear_of_rows,
    plain_linear,
    triton_linear,
    width_obstacle,
)
from tintype_kernels.torch_op import TorchOp, public

SCHEME = "fp8"


def reference(
    x: Tensor | QuantizedRows, qw: Fp8Weight, bias: Tensor | None = None, activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The op in plain PyTorch, summed in float64."""
    return plain_linear(x, qw, bias, activation, residual)


def _weight(codes: Tensor, scales: Tensor) -> Fp8Weight:
    return Fp8Weight(from_bytes(codes), scales)


def _reference_forward(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:  # fmt: skip
    return reference(x, _weight(codes, scales), bias, activation, residual)


def _triton_forward(x: Tensor, codes: Tensor, *others: Any) -> Tensor:
    return triton_linear(x, from_bytes(codes), *others)


def _triton_obstacle(x: Tensor, *_: Any) -> str:
    return width_obstacle(x) or arch_obstacle(SCHEME, x)


FORWARD = TorchOp(
    "fp8_linear", fake=epilogue.empty_output, reference=_reference_forward, triton=_triton_forward,
    obstacles={"triton": _triton_obstacle},
)  # fmt: skip
epilogue.differentiable(FORWARD, lambda codes, dtype: dequantize(_weight(*codes), dtype))


@public(reference)
def fp8_linear(
    x: Tensor | QuantizedRows, qw: Fp8Weight, bias: Tensor | None = None, activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return `activation(x w^T + bias) + residual` for x [..., in] and `qw = quantize_fp8(w)`.

    x is rounded to e4m3 with a scale a token, unless it comes as `QuantizedRows` of e4m3; gradients pass the rounding
    by. Activations: none, gelu, gelu_tanh, silu.
    """
    check_weight(qw, Fp8Weight)
    if isinstance(x, QuantizedRows):
        return linear_of_rows(x, qw, bias, activation, residual)
    epilogue.check_linear(x, qw.codes.shape, bias, residual, activation)
    out: Tensor = FORWARD(x, as_bytes(qw.codes), qw.scales, bias, residual, activation)
    return out


LIBRARIES, flops = epilogue.LIBRARIES, epilogue.flops


def cases(make: Callable[..., Tensor], batch: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Arguments at the sizes of real models; `make(*shape)` gives a tensor."""
    for label, x, w, others in epilogue.linear_cases(make, batch):
        qw = quantize_fp8(w)
        yield label, {"x": x, "qw": qw, **others}
        yield f"{label}, rows", {"x": plain_rows(x, SCHEME), "qw": qw, **others}
