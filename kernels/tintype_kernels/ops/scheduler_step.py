"""The sampler's step on torch tensors: one pass that reads each tensor once and may make its noise on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tintype_kernels import native as extension
from tintype_kernels.dispatch import select
from tintype_kernels.philox import philox_normals
from tintype_kernels.scheduler_step import NoiseKey, Row, by_age, check_like, reference
from tintype_kernels.torch_op import (
    TorchOp,
    describe,
    empty,
    is_floating,
    public,
    wide,
    wide_type,
)
from tintype_kernels.triton_support import await_earlier, ceil_div, entry, jit, tl, widen

SCALARS = 7  # coefficients before those of b
BLOCK = 1024


def _reference_forward(
    x: Tensor, m: Tensor, m_uncond: Tensor | None, history: list[Tensor], coefficients: Tensor,
    noise: Tensor | None, keys: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    guidance, u_x, u_m, clip, a, c, s, *b = _columns(coefficients, x)
    row: Any = Row(u_x, u_m, a, c, tuple(b), s, clip, guidance)  # type: ignore[arg-type]
    return _plain_step(x, m, m_uncond, history, row, noise, keys)


def _plain_step(
    x: Tensor, m: Tensor, m_uncond: Tensor | None, history: Sequence[Tensor], row: Row,
    noise: Tensor | None, keys: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The reference in the type that sums are made in, rounded once."""
    noise = noise if keys is None else _normals_of(keys, x)
    plain, noise = (None if t is None else wide(t) for t in (m_uncond, noise))
    new, h = reference(wide(x), wide(m), plain, [wide(kept) for kept in history], row, noise)
    return empty(x).copy_(new), empty(x).copy_(h)


def _columns(coefficients: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """Each coefficient, of all samples or of each, in a shape that goes with x."""
    shape = coefficients.shape[:-1] + (1,) * (x.ndim - 1 if coefficients.ndim == 2 else 0)
    return tuple(column.reshape(shape) for column in coefficients.unbind(-1))


def _normals_of(keys: Tensor, x: Tensor) -> Tensor:
    """The host's own normals for keys [n, (seed, step, stream)]."""
    count = x.shape[1:].numel()
    normals = x.new_empty(len(x), count)
    for row, (seed, step, stream) in zip(normals, keys.tolist(), strict=True):
        row.copy_(torch.from_numpy(philox_normals(seed % 2**64, count, step=step, stream=stream)))
    return normals.view(x.shape)


@jit
def _turn(bits):
    """Cosine and sine of bits / 2**32 turns, to 1e-8: a library's own take any angle, and spill for it."""
    quarter = (bits + 0x20000000) >> 30
    angle = (bits - (quarter << 30)).to(tl.int32, bitcast=True).to(
        tl.float64
    ) * 1.4629180792671596e-09
    y = angle * angle
    sine = angle * (1.0 - y / 6 * (1.0 - y / 20 * (1.0 - y / 42 * (1.0 - y / 72))))
    cosine = 1.0 - y / 2 * (1.0 - y / 12 * (1.0 - y / 30 * (1.0 - y / 56 * (1.0 - y / 90))))
    odd = (quarter & 1) == 1
    across = tl.where(odd, sine, cosine)
    up = tl.where(odd, cosine, sine)
    left, below = (quarter == 1) | (quarter == 2), quarter >= 2
    return tl.where(left, -across, across), tl.where(below, -up, up)


@jit
def _pair(first, second):
    """Two normals from two integers, by Box and Muller in float64 as the host makes them."""
    radius = tl.sqrt(-2.0 * tl.log((first.to(tl.float64) + 1.0) * 2.3283064365386963e-10))
    cosine, sine = _turn(second)
    return radius * cosine, radius * sine


@jit
def _normals(key, start, BLOCK: tl.constexpr):
    """Normals start .. start + BLOCK of a sample; its key is (seed, step, stream)."""
    seed, step, stream = (
        tl.load(key),
        tl.load(key + 1).to(tl.uint32),
        tl.load(key + 2).to(tl.uint32),
    )
    block = (start // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = block * 0
    w0, w1, w2, w3 = tl.philox(seed, block, zero, zero + step, zero + stream)
    n0, n1 = _pair(w0, w1)
    n2, n3 = _pair(w2, w3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@entry
def _kernel(
    x, m, m_uncond, history, coefficients, noise, keys, out, h_out, COUNT, ROW,
    ORDERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of a sample: grid (elements, samples). Samples' coefficients lie ROW apart, 0 where all share."""
    await_earlier()
    start, n = tl.program_id(0) * BLOCK, tl.program_id(1).to(tl.int64)
    i = start + tl.arange(0, BLOCK)
    mask, sample = i < COUNT, n * COUNT
    coefficients += n * ROW
    here = widen(tl.load(x + sample + i, mask, 0.0))
    guided = widen(tl.load(m + sample + i, mask, 0.0))
    if m_uncond is not None:
        plain = widen(tl.load(m_uncond + sample + i, mask, 0.0))
        guided = plain + tl.load(coefficients) * (guided - plain)
    h = tl.load(coefficients + 1) * here + tl.load(coefficients + 2) * guided
    # Comparisons rather than a minimum, so that NaN passes as it does in numpy's clip.
    bound = tl.load(coefficients + 3)
    h = tl.where(h < -bound, -bound, h)
    h = tl.where(h > bound, bound, h)
    new = tl.load(coefficients + 4) * here + tl.load(coefficients + 5) * guided
    new += tl.load(coefficients + 7) * h
    for age in tl.static_range(1, ORDERS):
        kept = widen(tl.load(history[age - 1] + sample + i, mask, 0.0))
        new += tl.load(coefficients + 7 + age) * kept
    if noise is not None:
        new += tl.load(coefficients + 6) * widen(tl.load(noise + sample + i, mask, 0.0))
    if keys is not None:
        new += tl.load(coefficients + 6) * _normals(keys + n * 3, start, BLOCK).to(tl.float32)
    tl.store(out + sample + i, new, mask)
    tl.store(h_out + sample + i, h, mask)


def _triton_forward(
    x: Tensor, m: Tensor, m_uncond: Tensor | None, history: list[Tensor], coefficients: Tensor,
    noise: Tensor | None, keys: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, h = empty(x), empty(x)
    latents = [None if t is None else t.contiguous() for t in (x, m, m_uncond)]
    noise = None if noise is None else noise.contiguous()
    coefficients = coefficients.contiguous()
    orders = coefficients.shape[-1] - SCALARS
    apart = coefficients.shape[-1] if coefficients.ndim == 2 else 0
    kept = tuple(tensor.contiguous() for tensor in history[: orders - 1])
    count = x.shape[1:].numel()
    _kernel[ceil_div(count, BLOCK), len(x)](
        *latents, kept, coefficients, noise, keys, out, h, count, apart, ORDERS=orders, BLOCK=BLOCK
    )
    return out, h


def _native_forward(
    x: Tensor, m: Tensor, m_uncond: Tensor | None, history: list[Tensor], coefficients: Tensor,
    noise: Tensor | None, keys: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The arrays' kernel on the tensors' own memory."""
    assert extension.module is not None
    noise = noise if keys is None else _normals_of(keys, x)
    tensors = [x, m, m_uncond, noise, *history]
    arrays = [None if t is None else t.detach().contiguous().numpy() for t in tensors]
    scalars = coefficients.tolist()
    new, h = extension.module.scheduler_step(
        *arrays[:3], arrays[4:], arrays[3], tuple(scalars[:SCALARS]), scalars[SCALARS:]
    )
    return torch.from_numpy(new), torch.from_numpy(h)


def _native_obstacle(
    x: Tensor, m: Tensor, m_uncond: Tensor | None, history: list[Tensor], coefficients: Tensor, *_: Any
) -> str:  # fmt: skip
    if coefficients.ndim == 2:
        return "each sample has a row of its own and the native kernel takes one for all"
    return "" if x.dtype == torch.float32 else f"x is {x.dtype} and the native kernel takes float32"


def _fake_forward(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty(x), empty(x)


FORWARD = TorchOp(
    "scheduler_step", fake=_fake_forward, reference=_reference_forward, triton=_triton_forward,
    native=_native_forward, obstacles={"native": _native_obstacle},
)  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, m, m_uncond, history, coefficients, noise, _ = inputs
    ctx.kept, ctx.noisy = len(history), noise is not None
    ctx.save_for_backward(x, m, m_uncond, coefficients)


def _backward(ctx: Any, new_grad: Tensor, h_grad: Tensor) -> tuple[Any, ...]:
    """All but the clip is linear, so sums of the two gradients suffice: torch.compile fuses them."""
    x, m, m_uncond, coefficients = ctx.saved_tensors
    guidance, u_x, u_m, clip, a, c, s, *b = _columns(coefficients, x)
    g = wide(new_grad)
    guided = wide(m) if m_uncond is None else wide(m_uncond) + guidance * (wide(m) - wide(m_uncond))
    free = (u_x * wide(x) + u_m * guided).abs() <= clip
    dh = torch.where(free, b[0] * g + wide(h_grad), 0)
    dx, dguided = a * g + u_x * dh, c * g + u_m * dh
    dm = dguided if m_uncond is None else guidance * dguided
    dm_uncond = None if m_uncond is None else ((1 - guidance) * dguided).to(x.dtype)
    weights = [*b[1:], *[torch.zeros_like(s)] * ctx.kept][: ctx.kept]
    dhistory = [(weight * g).to(x.dtype) for weight in weights]
    dnoise = (s * g).to(x.dtype) if ctx.noisy else None
    return dx.to(x.dtype), dm.to(x.dtype), dm_uncond, dhistory, None, dnoise, None


FORWARD.differentiate(_setup_context, _backward)


@public(reference)
def scheduler_step(
    x: Tensor, m: Tensor, m_uncond: Tensor | None, history: Sequence[Tensor], row: Row | Tensor,
    noise: Tensor | NoiseKey | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`scheduler_step` on torch tensors; see `tintype_kernels.scheduler_step`."""
    if not is_floating(x):
        raise ValueError(f"x is {describe(x)}, expected a floating tensor")
    keys = _keys(noise, x)
    drawn: Any = None if keys is not None else noise
    check_like(x, m=m, m_uncond=m_uncond, noise=drawn, **by_age(history))
    if isinstance(row, Row) and row.threshold is not None:
        obstacle = "row.threshold sorts, which only the reference does"
        select(triton=obstacle, native=obstacle)
        return _plain_step(x, m, m_uncond, history, row, drawn, keys)
    if isinstance(row, Row):
        row = torch.tensor(row.coefficients(), dtype=wide_type(x)).to(x.device)
    _check_coefficients(row, history, x)
    new, h = FORWARD(x, m, m_uncond, list(history), row, drawn, keys)
    return new, h


def _keys(noise: Tensor | NoiseKey | None, x: Tensor) -> Tensor | None:
    """Keys [n, (seed, step, stream)], where the step is to make its noise."""
    if isinstance(noise, NoiseKey):
        # int64 holds a seed of 64 bits as its two's complement
        rows = [[(s + 2**63) % 2**64 - 2**63, noise.step, noise.stream] for s in noise.seeds]
        return torch.tensor(rows, dtype=torch.int64).view(len(rows), 3).to(x.device)
    if noise is None or noise.dtype.is_floating_point:
        return None
    if noise.dtype != torch.int64 or tuple(noise.shape) != (x.shape[0], 3):
        raise ValueError(
            f"noise is {describe(noise)}, expected a tensor like x or int64 keys [{x.shape[0]}, 3]"
        )
    return noise.contiguous()


def _check_coefficients(row: Tensor, history: Sequence[Tensor], x: Tensor) -> None:
    orders = row.shape[-1] - SCALARS if row.ndim else 0
    if (
        row.shape[:-1] not in ((), x.shape[:1])
        or not 1 <= orders <= len(history) + 1
        or row.dtype != wide_type(x)
    ):
        raise ValueError(
            f"row is {describe(row)}, expected {wide_type(x)} [{SCALARS} + 1 .. {len(history) + 1}], "
            f"alone or for each of {len(x)} samples"
        )
    if row.requires_grad:
        raise ValueError("row requires a gradient, expected numbers of a scheduler's table")


def baseline(row: Tensor, noise: Tensor | None = None, **tensors: Any) -> tuple[Tensor, Tensor]:
    """What a benchmark compares with: plain PyTorch, whose own generator makes the noise where keys ask for it."""
    drawn = (
        noise if noise is None or noise.dtype.is_floating_point else torch.randn_like(tensors["x"])
    )
    out: tuple[Tensor, Tensor] = _reference_forward(
        **tensors, coefficients=row, noise=drawn, keys=None
    )
    return out


# Latents of each model, with the guidance that it takes.
_SIZES = {"SD1.5 512": (4, 64), "SDXL 1024": (4, 128), "SD3, FLUX 1024": (16, 128)}


def cases(make: Callable[..., Tensor], batch: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Arguments at the sizes of real models; `make(*shape)` gives a tensor."""
    for label, (c, side) in _SIZES.items():
        x, m, m_uncond, kept = (make(batch, c, side, side) for _ in range(4))
        row = torch.ones(SCALARS + 2, device=x.device)
        given = {"x": x, "m": m, "m_uncond": m_uncond, "history": [kept], "row": row}
        keys = torch.ones(batch, 3, dtype=torch.int64, device=x.device)
        yield label, given
        yield f"{label}, noise", {**given, "noise": keys}
