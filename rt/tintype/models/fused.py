"""What models compute by `tintype_kernels`' fused ops where those serve, and by PyTorch's own operators elsewhere.

They serve on GPUs that Triton runs on; GroupNorm on CPUs, too, where no gradient is asked for. They do not while a
model is exported, unless told to be kept: a graph of plain operators is what engines fuse for themselves. Nor do they
while somebody differentiates forwards, as `torch.func.jvp` does.

Where all `readers` of what an op makes take it in the same 8-bit codes, the op itself writes those, once for all.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tintype.models.stacked import is_stack_of
from tintype_kernels import forward_mode
from tintype_kernels.scheduler_step import Row, reference

if TYPE_CHECKING:
    from tintype_kernels import QuantizedPictures, QuantizedRows

_EPS = 1e-6  # of the norms in flow transformers
# Elements of a norm on a CPU below which PyTorch's operators are done before our op, in Python, is reached.
_LARGE = 1 << 17
# The widest elements, sixteen bytes, that PyTorch copies one at a time.
_COPIED = torch.complex128
_KEPT: ContextVar[Collection[str]] = ContextVar("kept", default=())
Readers = Sequence[nn.Module]
# cosines and sines [tokens, dim] that turn each pair of neighbouring channels by its token's position
Rotation = tuple[Tensor, Tensor]


@contextmanager
def kept_whole(ops: Collection[str]) -> Iterator[None]:
    """Within it models call these ops, by their names, wherever tensors are: for an engine that takes them whole."""
    before = _KEPT.set(ops)
    try:
        yield
    finally:
        _KEPT.reset(before)


def group_norm(
    norm: nn.GroupNorm,
    x: Tensor,
    *,
    silu: bool = False,
    residual: Tensor | None = None,
    readers: Readers = (),
) -> Tensor | QuantizedPictures:
    """The norm of x + residual, x [n, c, h, w] and residual [n, c, 1, 1], and its SiLU where asked for."""
    given = (x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu, residual)
    if _take_pictures(x, readers):
        from tintype_kernels.ops.group_norm_silu_quantized import group_norm_silu_quantized

        return group_norm_silu_quantized(*given, readers[0].input_scale)
    if _serves(x, "group_norm_silu") or _on_cpu(x):
        from tintype_kernels.ops.group_norm_silu import group_norm_silu

        return group_norm_silu(*given)
    normed = norm(x if residual is None else x + residual)
    return F.silu(normed) if silu else normed


def convolved_apart(conv: nn.Module, x: Tensor | QuantizedPictures) -> tuple[Tensor, Tensor | None]:
    """The convolution of x, and the bias [c] that whoever reads it next still has to add, or None.

    On GPUs the library convolves without a bias, which PyTorch then adds in a pass of its own.
    """
    if _is_plain(conv, nn.Conv2d, x):
        return unbiased(conv, x), conv.bias
    return conv(x), None


def bias_apart(conv: nn.Module) -> Tensor | None:
    """The bias [c] that `unbiased` leaves to add; None of convolutions that add their own, or that somebody watches."""
    return conv.bias if type(conv) is nn.Conv2d and not _is_watched(conv) else None


def unbiased(conv: nn.Module, x: Tensor | QuantizedPictures) -> Tensor:
    """The convolution of x without its `bias_apart`."""
    if bias_apart(conv) is None:
        return conv(x)
    how = (conv.stride, conv.padding, conv.dilation, conv.groups)
    return F.conv2d(x, conv.weight, None, *how)


def convolved(conv: nn.Module, x: Tensor) -> Tensor:
    """The convolution of x [n, c, h, w], bias included."""
    return biased(*convolved_apart(conv, x))


def biased(x: Tensor, bias: Tensor | None, skip: Tensor | None = None) -> Tensor:
    """x [n, c, h, w] plus what `convolved_apart` left to add, and the skip where there is one, in one pass."""
    if bias is None:
        return x if skip is None else x + skip
    from tintype_kernels.ops.bias_residual import bias_residual

    return bias_residual(x, bias, skip)


def pointwise(conv: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 1x1 convolution of x [n, c, h, w], plus another bias where there is one.

    On GPUs, where x lies channels-last, it is the product of tokens that it is, whose library adds a bias on the way.
    """
    if not _is_plain(conv, nn.Conv2d, x):
        out = conv(x)
        return out if bias is None else out + bias[:, None, None]
    added = conv.bias if bias is None else conv.bias + bias
    tokens = F.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), added)
    return tokens.permute(0, 3, 1, 2)


def enlarged(x: Tensor, size: tuple[int, int]) -> Tensor:
    """[n, c, h, w] -> [n, c, *size], each pixel the nearest one's.

    On GPUs twofold means copies of pixels, channels side by side, in a fraction of what the library's kernel takes.
    """
    c, h, w = x.shape[1:]
    if not _serves(x) or size != (2 * h, 2 * w):
        return F.interpolate(x, size=size, mode="nearest")
    pixels = x.permute(0, 2, 3, 1)
    if not _inferring() or c * x.element_size() % _COPIED.itemsize:
        return _doubled(pixels).permute(0, 3, 1, 2)
    return _doubled(pixels.contiguous().view(_COPIED)).view(x.dtype).permute(0, 3, 1, 2)


def _doubled(pixels: Tensor) -> Tensor:
    """[n, h, w, c] -> [n, 2h, 2w, c]"""
    n, h, w, c = pixels.shape
    four = pixels[:, :, None, :, None].expand(n, h, 2, w, 2, c)
    return four.reshape(n, 2 * h, 2 * w, c)


def linears(
    layers: Sequence[nn.Module], x: Tensor | QuantizedRows, stacked: nn.Module | None
) -> Sequence[Tensor]:
    """What each of several layers makes of x [n, t, c]; on GPUs by the layer that stacks them, where there is one."""
    if stacked is not None and _may_stack(layers, x) and is_stack_of(stacked, layers):
        return stacked(x).chunk(len(layers), dim=-1)
    return [layer(x) for layer in layers]


def join_tokens(first: Tensor, second: Tensor) -> Tensor:
    """[n, heads, t, dim] and [n, heads, u, dim] -> [n, heads, t + u, dim].

    On GPUs tokens lie outside heads, as projections leave them: rows are copied whole, and heads merge without a copy.
    """
    if not _serves(first):
        return torch.cat([first, second], dim=2)
    return torch.cat([first.transpose(1, 2), second.transpose(1, 2)], dim=1).transpose(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention of [n, heads, tokens, dim]: the library's, unless ours was measured to be faster.

    A `bias`, of which the scores' [n, heads, queries, keys] are an expansion, is added to them, and is the library's to
    serve.
    """
    if (
        bias is None
        and _serves(q)
        and not (_differentiable(q, k, v) or torch.compiler.is_compiling())
    ):
        from tintype_kernels.ops import attention as op

        if op.is_preferred(q, k, v):
            return op.attention(q, k, v)
    if torch.compiler.is_exporting() or forward_mode.is_active():
        # of the library's kernels not all know their tangents
        return _plain_attention(q, k, v, bias)
    return F.scaled_dot_product_attention(q, k, v, bias)


def bias_of_unread(read: Tensor) -> Tensor:
    """What to add to scores [n, heads, queries, keys] so that only keys count whose `read` is 1 and not 0, [n, keys] or
    [n, queries, keys]."""
    by_query = read[:, None] if read.dim() == 2 else read
    return ((1 - by_query) * -1e4)[:, None]


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention as engines know it best: q alone is scaled, and k, split into heads, turned by one transposition.

    What PyTorch makes of it scales both, and turns k three times.
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    return scores.softmax(dim=-1) @ v


def prefers_int8_conv2d(x: Tensor, *arguments: Any, **geometry: Any) -> bool:
    """Whether the op that takes these arguments serves, asked for no gradient, and was measured to be the faster."""
    if not _serves(x) or not _inferring():
        return False
    from tintype_kernels.ops.int8_conv2d import is_preferred

    return is_preferred(x, *arguments, **geometry)


def geglu(x: Tensor, readers: Readers = ()) -> Tensor | QuantizedRows:
    """[..., 2*c] -> [..., c]: the first half times the GELU of the second."""
    if scheme := _codes_for(x, readers):
        from tintype_kernels.ops.geglu_quantized import geglu_quantized

        return geglu_quantized(x, scheme)
    if _serves(x, "geglu"):
        from tintype_kernels.ops.geglu import geglu as op

        return op(x)
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def linear_gelu_tanh(
    layer: nn.Module, x: Tensor | QuantizedRows, readers: Readers = ()
) -> Tensor | QuantizedRows:
    """The tanh-approximated GELU of what the layer makes of x [n, t, c]."""
    if _is_plain(layer, nn.Linear, x) and not _codes_for(x, readers):
        # On GPUs, where the library knows this GELU, it is part of the product.
        flat = torch._addmm_activation(layer.bias, x.flatten(0, 1), layer.weight.t(), use_gelu=True)
        return flat.unflatten(0, x.shape[:2])
    x = layer(x)
    if scheme := _codes_for(x, readers):
        from tintype_kernels.ops.activate_quantized import activate_quantized

        return activate_quantized(x, scheme, "gelu_tanh")
    return F.gelu(x, approximate="tanh")


def linear_of_both(
    out: nn.Module, first: Tensor, layer: nn.Module, x: Tensor | QuantizedRows
) -> Tensor:
    """What `out` makes of [n, t, a + c]: `first` [n, t, a], then the tanh-approximated GELU of the layer of x.

    On GPUs both have products of their own, the second of which the library adds to the first: no row is put together.
    """
    if scheme := _codes_for(first, [out]):
        from tintype_kernels.ops.activate_quantized import activate_quantized

        return out(activate_quantized(layer(x), scheme, "gelu_tanh", first))
    widened = linear_gelu_tanh(layer, x)
    if not _is_plain(out, nn.Linear, first):
        return out(torch.cat([first, widened], dim=-1))
    width = first.shape[-1]
    begun = F.linear(first, out.weight[:, :width], out.bias)
    return (
        begun.flatten(0, 1).addmm_(widened.flatten(0, 1), out.weight[:, width:].t()).view_as(begun)
    )


def layer_norm(norm: nn.LayerNorm, x: Tensor, readers: Readers = ()) -> Tensor | QuantizedRows:
    """The norm of x [n, t, c] with weights of its own [c]."""
    if scheme := _codes_for(x, readers):
        from tintype_kernels.ops.layer_norm_modulate_quantized import layer_norm_modulate_quantized

        return layer_norm_modulate_quantized(x, *_of_all(norm, x), scheme, norm.eps, unit=0.0)
    if _serves(x, "layer_norm_modulate"):
        from tintype_kernels.ops.layer_norm_modulate import layer_norm_modulate as op

        return op(x, *_of_all(norm, x), norm.eps, unit=0.0)
    return norm(x)


def _of_all(norm: nn.LayerNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """A norm's shift and scale, the same for every sample of x."""
    return norm.bias.expand(len(x), -1), norm.weight.expand(len(x), -1)


def layer_norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, readers: Readers = ()
) -> Tensor | QuantizedRows:
    """LayerNorm of x [n, t, c] without weights of its own, then scaled and shifted by [n, 1, c]."""
    if scheme := _codes_for(x, readers):
        from tintype_kernels.ops.layer_norm_modulate_quantized import layer_norm_modulate_quantized

        return layer_norm_modulate_quantized(x, shift, scale, scheme, _EPS)
    if _serves(x, "layer_norm_modulate"):
        from tintype_kernels.ops.layer_norm_modulate import layer_norm_modulate as op

        return op(x, shift, scale, _EPS)
    return F.layer_norm(x, x.shape[-1:], eps=_EPS) * (1 + scale) + shift


def add_layer_norm(
    norm: nn.LayerNorm, x: Tensor, y: Tensor, readers: Readers = ()
) -> tuple[Tensor, Tensor | QuantizedRows]:
    """x + y, and its norm with weights of its own [c], for x and y [n, t, c]."""
    if not _serves(x, "residual_layer_norm"):
        x = x + y
        return x, norm(x)
    return _joined(x, y, None, *_of_all(norm, x), readers, norm.eps, 0.0)


def gate_layer_norm_modulate(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, readers: Readers = ()
) -> tuple[Tensor, Tensor | QuantizedRows]:
    """`gate_residual` of x, y and the gate, and `layer_norm_modulate` of that."""
    if not _serves(x, "residual_layer_norm"):
        x = gate_residual(x, y, gate)
        return x, layer_norm_modulate(x, shift, scale)
    return _joined(x, y, gate, shift, scale, readers, _EPS, 1.0)


def _joined(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, readers: Readers, eps: float, unit: float
) -> tuple[Tensor, Tensor | QuantizedRows]:  # fmt: skip
    if scheme := _codes_for(x, readers):
        from tintype_kernels.ops.residual_layer_norm_quantized import residual_layer_norm_quantized

        return residual_layer_norm_quantized(x, y, gate, shift, scale, scheme, eps, unit)
    from tintype_kernels.ops.residual_layer_norm import residual_layer_norm

    return residual_layer_norm(x, y, gate, shift, scale, eps, unit)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y for x and y [n, t, c] and a gate [n, 1, c]."""
    if _serves(x, "gate_residual"):
        from tintype_kernels.ops.gate_residual import gate_residual as op

        return op(x, y, gate)
    return x + gate * y


def qk_norm_rope(
    q: Tensor, k: Tensor, q_norm: nn.RMSNorm, k_norm: nn.RMSNorm, rotation: Rotation
) -> tuple[Tensor, Tensor]:
    """q and k [n, heads, t, dim], normed, then turned pair by pair of channels by their tokens' angles [t, dim]."""
    if _serves(q, "qk_norm_rope"):
        from tintype_kernels.ops.qk_norm_rope import qk_norm_rope as op

        return op(q, k, q_norm.weight, k_norm.weight, *rotation, _EPS)
    return rotated(q_norm(q), rotation), rotated(k_norm(k), rotation)


def scheduler_step(
    x: Tensor,
    m: Tensor,
    m_uncond: Tensor | None,
    history: Sequence[Tensor],
    coefficients: Tensor,
    noise: Tensor,
) -> tuple[Tensor, Tensor]:
    """The next x and this step's h, of tensors [n, ...] and each sample's `Row.coefficients()`, [n, 7 + orders]."""
    if _serves(x):
        from tintype_kernels.ops.scheduler_step import scheduler_step as op

        return op(x, m, m_uncond, history, coefficients, noise)
    guidance, u_x, u_m, clip, a, c, s, *b = per_sample(coefficients, x).unbind(1)
    # A row holds numbers where it is the same for all samples; here they are tensors.
    row: Any = Row(u_x, u_m, a, c, tuple(b), s, clip, guidance)  # type: ignore[arg-type]
    return reference(x, m, m_uncond, history, row, noise)


def per_sample(numbers: Tensor, x: Tensor) -> Tensor:
    """Numbers [n] in a shape that goes with x [n, ...]; of numbers [n, k] each has it, [n, k, ...]."""
    return numbers[(..., *(None,) * (x.ndim - 1))]


def rotated(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn each pair of neighbouring channels of x [n, heads, tokens, dim] by its angle (arXiv 2104.09864)."""
    cos, sin = rotation
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return (x.float() * cos + turned * sin).to(x.dtype)


def _serves(x: Tensor, op: str = "") -> bool:
    on_gpu = x.is_cuda and _has_triton() and not torch.compiler.is_exporting()
    # PyTorch's own operators know their tangents.
    return (on_gpu and not forward_mode.is_active()) or op in _KEPT.get()


def _is_plain(layer: nn.Module, kind: type[nn.Module], x: Any) -> bool:
    """Whether a GPU's library may do what the layer, with its bias, does: nobody watches or asks for a gradient."""
    known = type(layer) is kind and layer.bias is not None and not _is_watched(layer)
    return known and _inferring() and isinstance(x, Tensor) and x.element_size() == 2 and _serves(x)


def _may_stack(layers: Sequence[nn.Module], x: Tensor | QuantizedRows) -> bool:
    """Whether a GPU may do what layers do in one of another's: nobody watches or asks for a gradient."""
    if any(map(_is_watched, layers)) or not _inferring():
        return False
    return _serves(x if isinstance(x, Tensor) else x.codes)


def _is_watched(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def _inferring() -> bool:
    """Whether nobody asks for a gradient or a tangent, or traces."""
    differentiating = torch.is_grad_enabled() or forward_mode.is_active()
    return not differentiating and not torch.compiler.is_compiling()


def _codes_for(x: Tensor, readers: Readers) -> str:
    """The codes that all readers take their input in, or nothing where they take numbers or gradients are asked for."""
    if not _serves(x) or torch.is_grad_enabled():
        return ""
    codes = {getattr(reader, "input_codes", "") for reader in readers}
    return codes.pop() if len(codes) == 1 else ""


def _take_pictures(x: Tensor, readers: Readers) -> bool:
    """Whether all readers take pictures like x in codes, on one scale for all or on each sample's own."""

    def takes(reader: nn.Module) -> bool:
        asked = getattr(reader, "takes_codes", None)
        return asked is not None and asked(x) and reader.input_scale is readers[0].input_scale

    return bool(readers) and all(map(takes, readers))


def _on_cpu(x: Tensor) -> bool:
    """Whether the native kernel takes x and is worth the call; tracers see PyTorch's own operators."""
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() >= _LARGE
    return plain and _inferring()


def _differentiable(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
