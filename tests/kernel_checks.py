"""What is asked of every op on tensors, on any device: `tests/kernels` asks it interpreted, `tests/gpu` compiled.

A sample is an op with a function that draws its arguments in float64; shapes are small and fit no block.
`python -m kernel_checks cuda` asks all of it where there is no pytest.
"""

from __future__ import annotations

import itertools
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import tintype_kernels
from tintype_kernels import Row
from tolerances import FP8_SUMS, KERNEL_NORM

Arguments = dict[str, Any]
# The types that an op is checked in; the interpreter computes in any of them what no matrix product is part of.
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Sample(NamedTuple):
    """One way to call an op. `batched` names the arguments whose first dimension is the batch."""

    op: str
    label: str
    draw: Callable[[], Arguments]
    batched: tuple[str, ...]

    def arguments(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Arguments:
        """The same numbers each time, rounded to dtype."""
        torch.manual_seed(len(self.label))
        return {name: _placed(value, dtype, device) for name, value in self.draw().items()}

    def tensors(self) -> list[str]:
        """Names of the arguments that are tensors."""
        return [name for name, value in self.arguments().items() if is_floating(value)]

    def call(self, arguments: Arguments) -> tuple[Tensor, ...]:
        return _tuple(getattr(tintype_kernels, self.op)(**_folded(arguments)))

    def reference(self, arguments: Arguments) -> tuple[Tensor, ...]:
        return _tuple(getattr(tintype_kernels, self.op).reference(**_folded(arguments)))


def _placed(value: Any, dtype: torch.dtype, device: str) -> Any:
    """Tensors on the device, floating ones rounded; quantised weights and single numbers keep the types they have."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if is_floating(value) else value.dtype)
    if isinstance(value, tuple) and all(isinstance(part, Tensor) for part in value):
        return type(value)(*(part.to(device) for part in value))
    return value


def is_floating(value: Any) -> bool:
    """Whether it has the type that is checked, and a gradient; a number in a tensor, [], has neither."""
    return isinstance(value, Tensor) and value.dtype.is_floating_point and value.ndim > 0


def _folded(arguments: Arguments) -> Arguments:
    """`history[0]`, ... as the one list that the op takes, so that each tensor has a name here."""
    kept = [value for name, value in arguments.items() if name.startswith("history[")]
    rest = {n: value for n, value in arguments.items() if not n.startswith("history[")}
    return {**rest, "history": kept} if kept else rest


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def normal(*shape: int, mean: float = 0.0, spread: float = 1.0) -> Tensor:
    return mean + spread * torch.randn(*shape, dtype=torch.float64)


def _group_norm(
    n: int, c: int, h: int, w: int, groups: int, *, residual: str = "", channels_last: bool = False, **options: Any
) -> Callable[[], Arguments]:  # fmt: skip
    def draw() -> Arguments:
        x = normal(n, c, h, w, mean=options.get("mean", 0.3), spread=options.get("spread", 1.5))
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        beside = {"": None, "full": (n, c, h, w), "channel": (n, c, 1, 1)}[residual]
        added = None if beside is None else normal(*beside, mean=options.get("beside", 0.0))
        arguments = {"x": x, "weight": normal(c, mean=1), "bias": normal(c), "groups": groups}
        return {**arguments, "silu": options.get("silu", True), "residual": added}

    return draw


def _cancelled(channels_last: bool) -> Callable[[], Arguments]:
    """A residual of channels that takes the mean away."""
    how = {"mean": 3e3, "beside": -3e3, "channels_last": channels_last}
    return _group_norm(2, 8, 9, 11, 2, residual="channel", **how)


def _modulate(
    b: int, t: int, c: int, unit: float = 1.0, **options: float
) -> Callable[[], Arguments]:
    return lambda: {
        "x": normal(b, t, c, **options),
        "shift": normal(b, c),
        "scale": normal(b, 1, c),
        "unit": unit,
    }


def _biased(
    n: int, c: int, h: int, w: int, *, beside: bool = False, channels_last: bool = True
) -> Callable[[], Arguments]:
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def draw() -> Arguments:
        x, residual = (normal(n, c, h, w).contiguous(memory_format=layout) for _ in "xr")
        return {"x": x, "bias": normal(c), "residual": residual if beside else None}

    return draw


def _joined(b: int, t: int, c: int, *, gated: bool = True) -> Callable[[], Arguments]:
    return lambda: {
        **_gate(b, t, c)(),
        "shift": normal(b, c),
        "scale": normal(b, 1, c),
        **({} if gated else {"gate": None}),
    }


def _gate(
    b: int, t: int, c: int, *, x: float = 0.0, y: float = 0.0, gate: float = 0.0
) -> Callable[[], Arguments]:
    return lambda: {
        "x": normal(b, t, c, mean=x),
        "y": normal(b, t, c, mean=y),
        "gate": normal(b, c, mean=gate, spread=0.1 if gate else 1.0),
    }


def _rope(
    b: int, heads: int, t: int, d: int, *, weights: bool = True, tokens_inside: bool = False
) -> Callable[[], Arguments]:
    def draw() -> Arguments:
        q, k = (normal(b, t, heads, d).transpose(1, 2) for _ in "qk")
        if tokens_inside:
            q, k = (x.mT.contiguous().mT for x in (q, k))
        q_weight, k_weight = (normal(d, mean=1) if weights else None for _ in "qk")
        angle = normal(t, d)
        tables = {"cos": angle.cos(), "sin": angle.sin()}
        return {"q": q, "k": k, "q_weight": q_weight, "k_weight": k_weight, **tables}

    return draw


def _step(n: int, *shape: int, **options: Any) -> Callable[[], Arguments]:
    row = Row(1.2, -0.7, 0.4, 0.3, (0.9, -0.2), s=0.1, clip=0.8, guidance=7.5)

    def draw() -> Arguments:
        x, m, m_uncond, noise = (normal(n, *shape) for _ in range(4))
        latents = {"x": x, "m": m, "m_uncond": m_uncond, "history[0]": normal(n, *shape)}
        return {**latents, "row": row, "noise": noise, **options}

    return draw


_NORM = ("x", "residual")
_LATENTS = ("x", "m", "m_uncond", "history[0]", "noise")
_ROWS = ("x", "y", "shift", "scale", "gate")
SAMPLES = [
    # a group on chip; split over blocks with a rest of pixels, of channels and of pieces; one pixel
    Sample("group_norm_silu", "on chip", _group_norm(2, 6, 5, 7, 3), _NORM),
    Sample("group_norm_silu", "on chip NHWC", _group_norm(2, 6, 5, 7, 3, channels_last=True), _NORM),
    Sample("group_norm_silu", "split", _group_norm(2, 2, 130, 131, 1, residual="channel"), _NORM),
    Sample("group_norm_silu", "split NHWC", _group_norm(2, 70, 15, 21, 2, residual="full", channels_last=True), _NORM),
    Sample("group_norm_silu", "one pixel", _group_norm(3, 6, 1, 1, 2, silu=False), _NORM),
    Sample("group_norm_silu", "large mean", _group_norm(1, 2, 97, 190, 1, mean=3e3, silu=False), _NORM),
    Sample("group_norm_silu", "large mean NHWC", _group_norm(1, 4, 33, 35, 2, mean=3e3, channels_last=True), _NORM),
    Sample("group_norm_silu", "cancelled", _cancelled(channels_last=False), _NORM),
    Sample("group_norm_silu", "cancelled NHWC", _cancelled(channels_last=True), _NORM),
    Sample("group_norm_silu", "tiny spread", _group_norm(1, 4, 9, 9, 2, mean=0, spread=1e-3), _NORM),
    Sample("group_norm_silu", "near overflow", _group_norm(1, 4, 9, 9, 2, spread=1.2e4), _NORM),
    Sample("layer_norm_modulate", "rest", _modulate(2, 11, 150), _ROWS),
    Sample("layer_norm_modulate", "plain norm", _modulate(2, 11, 150, unit=0.0), _ROWS),
    Sample("layer_norm_modulate", "wide", _modulate(2, 3, 4100), _ROWS),
    Sample("layer_norm_modulate", "large mean", _modulate(1, 4, 70, mean=3e3), _ROWS),
    Sample("layer_norm_modulate", "tiny spread", _modulate(1, 4, 70, spread=1e-3), _ROWS),
    Sample("layer_norm_modulate", "near overflow", _modulate(1, 4, 70, spread=1.2e4), _ROWS),
    Sample("gate_residual", "rest", _gate(2, 37, 300), _ROWS),
    Sample("gate_residual", "near overflow", _gate(2, 5, 7, x=-6e4, y=3.5e4, gate=2.0), _ROWS),
    Sample("gate_residual", "one", _gate(1, 1, 1), _ROWS),
    Sample("residual_layer_norm", "rest", _joined(2, 11, 150), _ROWS),
    Sample("residual_layer_norm", "no gate", _joined(2, 5, 300, gated=False), _ROWS),
    Sample("residual_layer_norm", "wide", _joined(2, 3, 4100), _ROWS),
    Sample("bias_residual", "NHWC", _biased(2, 300, 5, 7), _NORM),
    Sample("bias_residual", "NHWC, skip", _biased(2, 3, 9, 11, beside=True), _NORM),
    Sample("bias_residual", "NCHW, skip", _biased(3, 5, 17, 19, beside=True, channels_last=False), _NORM),
    Sample("bias_residual", "one", _biased(1, 1, 1, 1, channels_last=False), _NORM),
    Sample("geglu", "rest", lambda: {"x": normal(2, 3, 2 * 1030, spread=2)}, _ROWS),
    Sample("geglu", "odd", lambda: {"x": normal(7, 2 * 1031, spread=2)}, _ROWS),
    Sample("geglu", "one row", lambda: {"x": normal(2 * 5)}, ()),
    Sample("qk_norm_rope", "rest", _rope(2, 5, 9, 40), ("q", "k")),
    Sample("qk_norm_rope", "tokens inside", _rope(2, 2, 9, 8, tokens_inside=True), ("q", "k")),
    Sample("qk_norm_rope", "no weights", _rope(2, 1, 7, 16, weights=False), ("q", "k")),
    Sample("scheduler_step", "rest", _step(2, 3, 19, 23), _LATENTS),
    Sample("scheduler_step", "free", _step(2, 3, 5, row=Row(1.2, -0.7, 0.4, 0.3, (0.9, -0.2)), noise=None), _LATENTS),
]  # fmt: skip
IDS = [f"{sample.op}: {sample.label}" for sample in SAMPLES]


def norm_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm, in float64."""
    expected = expected.detach().double().cpu()
    difference = actual.detach().double().cpu() - expected
    return (difference.norm() / expected.norm().clamp_min(1e-300)).item()


def check_values_and_gradients(sample: Sample, dtype: torch.dtype, device: str) -> None:
    """Compare with the reference in float64 on the same, already rounded numbers."""
    arguments = sample.arguments(dtype, device)
    actual = _with_gradients(sample.call, arguments, dtype)
    exact = {n: v.double() if is_floating(v) else v for n, v in arguments.items()}
    expected = _with_gradients(sample.reference, exact, dtype)
    assert actual.keys() == expected.keys()
    close = KERNEL_NORM[str(dtype).removeprefix("torch.")]
    if sample.op == "fp8_linear" and device == "cuda":
        close = max(close, FP8_SUMS)
    for name, value in actual.items():
        assert value.dtype == dtype
        error = norm_error(value, expected[name])
        assert error < close, f"{name} is off by {error:.1e}"


def check_values(sample: Sample, dtype: torch.dtype, device: str) -> None:
    """The same without gradients, where some forms go another way."""
    arguments = sample.arguments(dtype, device)
    exact = {n: v.double() if is_floating(v) else v for n, v in arguments.items()}
    with torch.no_grad():
        pairs = zip(sample.call(arguments), sample.reference(exact), strict=True)
    for actual, expected in pairs:
        assert norm_error(actual, expected) < KERNEL_NORM[str(dtype).removeprefix("torch.")]


def _with_gradients(
    call: Callable[[Arguments], tuple[Tensor, ...]], arguments: Arguments, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Outputs by number, and the gradients of every tensor by its name, all from gradients rounded to dtype."""
    leaves = {
        name: value.detach().clone().requires_grad_()
        for name, value in arguments.items()
        if is_floating(value)
    }
    outputs = call({**arguments, **leaves})
    generator = torch.Generator().manual_seed(3)
    grads = [
        torch.randn(o.shape, generator=generator).to(dtype).to(o.dtype, copy=True).to(o.device)
        for o in outputs
    ]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), grads)
    found = {f"out[{i}]": output for i, output in enumerate(outputs)}
    return found | dict(zip(leaves, gradients, strict=True))


def check_strided(sample: Sample, dtype: torch.dtype, device: str) -> None:
    """A tensor that is a view with gaps gives what its copy gives; a compiler may load, and so sum, it otherwise."""
    arguments = sample.arguments(dtype, device)
    gaps = {n: _with_gaps(v) if isinstance(v, Tensor) else v for n, v in arguments.items()}
    plain = {n: v.contiguous() if isinstance(v, Tensor) else v for n, v in arguments.items()}
    for a, b in zip(sample.call(gaps), sample.call(plain), strict=True):
        assert norm_error(a, b) <= (KERNEL_NORM["float32"] if device == "cuda" else 0)


def _with_gaps(tensor: Tensor) -> Tensor:
    roomy = tensor.new_zeros([2 * size for size in tensor.shape])
    view = roomy[tuple(slice(size) for size in tensor.shape)]
    return view.copy_(tensor)


def check_same_bits_in_any_batch(sample: Sample, dtype: torch.dtype, device: str) -> None:
    """A row alone, first or last in a batch gives the same bits."""
    one = sample.arguments(dtype, device)
    names = [n for n in sample.batched if isinstance(one.get(n), Tensor)]
    last = {**one, **{n: one[n][-1:] for n in names}}
    first = {**one, **{n: torch.cat([one[n][-1:], *[one[n]] * 2]) for n in names}}
    for alone, batch, moved in zip(*map(sample.call, (last, one, first)), strict=True):
        assert torch.equal(alone[0], batch[-1])
        assert torch.equal(alone[0], moved[0])
        assert torch.equal(alone[0], moved[-1])


def forced(implementation: str) -> AbstractContextManager[Any]:
    return mock.patch.dict(os.environ, TINTYPE_KERNELS=implementation)


def every_check(device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """All of the above, by name."""
    for (sample, name), dtype in itertools.product(zip(SAMPLES, IDS, strict=True), DTYPES):
        yield f"{name} {dtype}", partial(check_values_and_gradients, sample, dtype, device)
    for sample, name in zip(SAMPLES, IDS, strict=True):
        yield f"{name} strided", partial(check_strided, sample, torch.float32, device)
        if sample.batched:
            yield (
                f"{name} batch",
                partial(check_same_bits_in_any_batch, sample, torch.float16, device),
            )


def main(device: str) -> int:
    failures = 0
    for name, check in every_check(device):
        try:
            with forced("triton" if device == "cuda" else "reference"):
                check()
        except Exception:
            failures += 1
            print(f"FAILED {name}\n{traceback.format_exc()}")
    print(f"{failures} of {sum(1 for _ in every_check(device))} checks failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
