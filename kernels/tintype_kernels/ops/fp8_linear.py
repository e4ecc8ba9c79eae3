"""A linear layer in e4m3: weights with a scale a row, tokens quantised as they come with a scale each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tintype_kernels.ops import linear_epilogue as epilogue
from tintype_kernels.ops.quantise import Fp8Weight, dequantize, quantize_fp8
from tintype_kernels.ops.scaled_matmul import plain_linear, triton_linear
from tintype_kernels.torch_op import TorchOp, public


def reference(
    x: Tensor, qw: Fp8Weight, bias: Tensor | None = None, activation: str = "none", residual: Tensor | None = None
) -> Tensor:  # fmt: skip
    """The op in plain PyTorch, summed in float64."""
    return plain_linear(x, qw, bias, activation, residual)


def _weight(codes: Tensor, scales: Tensor) -> Fp8Weight:
    """The op itself is handed bytes: torch's checks of an op can compare those."""
    return Fp8Weight(codes.view(torch.float8_e4m3fn), scales)


def _reference_forward(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:  # fmt: skip
    return reference(x, _weight(codes, scales), bias, activation, residual)


def _triton_forward(x: Tensor, codes: Tensor, *others: Any) -> Tensor:
    return triton_linear(x, codes.view(torch.float8_e4m3fn), *others)


OLDEST_ARCH = 89  # the first whose tensor cores know e4m3


def _triton_obstacle(x: Tensor, *_: Any) -> str:
    if not x.is_cuda or torch.cuda.get_device_capability(x.device) >= divmod(OLDEST_ARCH, 10):
        return ""
    return f"e4m3 products need sm_{OLDEST_ARCH} or newer"


FORWARD = TorchOp(
    "fp8_linear", fake=epilogue.empty_output, reference=_reference_forward, triton=_triton_forward,
    obstacles={"triton": _triton_obstacle},
)  # fmt: skip
epilogue.differentiable(FORWARD, lambda codes, dtype: dequantize(_weight(*codes), dtype))


@public(reference)
def fp8_linear(
    x: Tensor, qw: Fp8Weight, bias: Tensor | None = None, activation: str = "none", residual: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Return `activation(x w^T + bias) + residual` for x [..., in] and `qw = quantize_fp8(w)`.

    x is rounded to e4m3 with a scale a token; gradients pass the rounding by. Activations: none, gelu, gelu_tanh, silu.
    """
    epilogue.check_linear(x, qw.codes.shape, bias, residual, activation)
    out: Tensor = FORWARD(x, qw.codes.view(torch.uint8), qw.scales, bias, residual, activation)
    return out


def cases(make: Callable[..., Tensor], batch: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Arguments at the sizes of real models; `make(*shape)` gives a tensor."""
    for label, x, w, others in epilogue.linear_cases(make, batch):
        yield label, {"x": x, "qw": quantize_fp8(w), **others}
