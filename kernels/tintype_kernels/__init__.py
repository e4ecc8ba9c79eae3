"""Tintype's kernels: each op has a plain reference and faster forms that must agree with it.

Imports without torch and without Triton: an op on tensors is fetched when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tintype_kernels.dispatch import KernelUnavailable, implementation
from tintype_kernels.philox import philox_uint32
from tintype_kernels.scheduler_step import NoiseKey, Row, scheduler_step

if TYPE_CHECKING:
    from tintype_kernels.ops.activate_quantized import activate_quantized
    from tintype_kernels.ops.attention import attention
    from tintype_kernels.ops.bias_residual import bias_residual
    from tintype_kernels.ops.fp8_linear import fp8_linear
    from tintype_kernels.ops.gate_residual import gate_residual
    from tintype_kernels.ops.geglu import geglu
    from tintype_kernels.ops.geglu_quantized import geglu_quantized
    from tintype_kernels.ops.group_norm_silu import group_norm_silu
    from tintype_kernels.ops.group_norm_silu_quantized import group_norm_silu_quantized
    from tintype_kernels.ops.int4_linear import int4_linear
    from tintype_kernels.ops.int8_conv2d import int8_conv2d
    from tintype_kernels.ops.int8_linear import int8_linear
    from tintype_kernels.ops.layer_norm_modulate import layer_norm_modulate
    from tintype_kernels.ops.layer_norm_modulate_quantized import layer_norm_modulate_quantized
    from tintype_kernels.ops.qk_norm_rope import qk_norm_rope
    from tintype_kernels.ops.quantise import quantize_fp8, quantize_int4, quantize_int8
    from tintype_kernels.ops.quantised_pictures import QuantizedPictures
    from tintype_kernels.ops.quantised_rows import QuantizedRows
    from tintype_kernels.ops.residual_layer_norm import residual_layer_norm
    from tintype_kernels.ops.residual_layer_norm_quantized import residual_layer_norm_quantized

# Each op on tensors, with the module of `tintype_kernels.ops` that holds it.
_TENSOR_OPS = {
    "QuantizedPictures": "quantised_pictures",
    "QuantizedRows": "quantised_rows",
    "activate_quantized": "activate_quantized",
    "attention": "attention",
    "bias_residual": "bias_residual",
    "fp8_linear": "fp8_linear",
    "gate_residual": "gate_residual",
    "geglu": "geglu",
    "geglu_quantized": "geglu_quantized",
    "group_norm_silu": "group_norm_silu",
    "group_norm_silu_quantized": "group_norm_silu_quantized",
    "int4_linear": "int4_linear",
    "int8_conv2d": "int8_conv2d",
    "int8_linear": "int8_linear",
    "layer_norm_modulate": "layer_norm_modulate",
    "layer_norm_modulate_quantized": "layer_norm_modulate_quantized",
    "qk_norm_rope": "qk_norm_rope",
    "quantize_fp8": "quantise",
    "quantize_int4": "quantise",
    "quantize_int8": "quantise",
    "residual_layer_norm": "residual_layer_norm",
    "residual_layer_norm_quantized": "residual_layer_norm_quantized",
}

__all__ = [
    "KernelUnavailable",
    "NoiseKey",
    "QuantizedPictures",
    "QuantizedRows",
    "Row",
    "activate_quantized",
    "attention",
    "bias_residual",
    "fp8_linear",
    "gate_residual",
    "geglu",
    "geglu_quantized",
    "group_norm_silu",
    "group_norm_silu_quantized",
    "implementation",
    "int4_linear",
    "int8_conv2d",
    "int8_linear",
    "layer_norm_modulate",
    "layer_norm_modulate_quantized",
    "philox_uint32",
    "qk_norm_rope",
    "quantize_fp8",
    "quantize_int4",
    "quantize_int8",
    "residual_layer_norm",
    "residual_layer_norm_quantized",
    "scheduler_step",
]


def __getattr__(name: str) -> Any:
    if name not in _TENSOR_OPS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f"{__name__}.ops.{_TENSOR_OPS[name]}")
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] != "torch":
            raise
        raise ImportError(f"{name} works on torch tensors; pip install 'tintype[torch]'") from error
    globals()[name] = getattr(module, name)
    return globals()[name]
