"""A linear layer in int8: weights with a scale a row, tokens too, each with a scale."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from tintype_kernels.ops import linear_epilogue as epilogue
from tintype_kernels.ops.quantise import Int8Weight, check_weight, dequantize, quantize_int8
from tintype_kernels.ops.quantised_rows import QuantizedRows, plain_rows
from tintype_kernels.ops.scaled_matmul import (
    linear_of_rows,
    plain_linear,
    triton_linear,
    width_obstacle,
)
from tintype_kernels.torch_op import TorchOp, public

SCHEME = "int8"


def reference(
    x: Tensor | QuantizedRows, qw: Int8Weight, bias: Tensor | None = None, activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The op in plain PyTorch, summed in float64."""
    return plain_linear(x, qw, bias, activation, residual)


def _reference_forward(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:  # fmt: skip
    return reference(x, Int8Weight(codes, scales), bias, activation, residual)


FORWARD = TorchOp(
    "int8_linear",
    fake=epilogue.empty_output,
    reference=_reference_forward,
    triton=triton_linear,
    obstacles={"triton": width_obstacle},
)
epilogue.differentiable(FORWARD, lambda codes, dtype: dequantize(Int8Weight(*codes), dtype))


@public(reference)
def int8_linear(
    x: Tensor | QuantizedRows, qw: Int8Weight, bias: Tensor | None = None, activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return `activation(x w^T + bias) + residual` for x [..., in] and `qw = quantize_int8(w)`.

    x is rounded to 127 steps either way, a scale a token, unless it comes as `QuantizedRows` of int8; gradients pass
    the rounding by. Activations: none, gelu, gelu_tanh, silu.
    """
    check_weight(qw, Int8Weight)
    if isinstance(x, QuantizedRows):
        return linear_of_rows(x, qw, bias, activation, residual)
    epilogue.check_linear(x, qw.codes.shape, bias, residual, activation)
    out: Tensor = FORWARD(x, qw.codes, qw.scales, bias, residual, activation)
    return out


LIBRARIES, flops = epilogue.LIBRARIES, epilogue.flops


def cases(make: Callable[..., Tensor], batch: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Arguments at the sizes of real models; `make(*shape)` gives a tensor."""
    for label, x, w, others in epilogue.linear_cases(make, batch):
        qw = quantize_int8(w)
        yield label, {"x": x, "qw": qw, **others}
        yield f"{label}, rows", {"x": plain_rows(x, SCHEME), "qw": qw, **others}
