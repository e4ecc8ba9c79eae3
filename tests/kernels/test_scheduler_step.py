"""The step against its formula in float64, and the native form against the numpy one."""

from __future__ import annotations

import numpy as np
import pytest

from tintype_kernels import KernelUnavailable, NoiseKey, Row, scheduler_step
from tintype_kernels import native as extension
from tintype_kernels.scheduler_step import reference
from tolerances import KERNEL_STEP, relative_error

ROW = Row(u_x=1.2, u_m=-0.7, a=0.4, c=0.3, b=(0.9, -0.2), s=0.1, clip=0.8, guidance=7.5)
# one element, a picture's latents, one short of a cache block, one beyond it, many blocks and a rest
SHAPES = [(1,), (1, 4, 16, 16), (1023,), (1025,), (3, 5, 7, 101)]


def draw(shape, dtype=np.float32):
    rng = np.random.default_rng(11)
    return [rng.standard_normal(shape).astype(dtype) for _ in range(5)]


def largest_term(arrays, row):
    """What rounding errors are relative to: guidance magnifies the terms, and they may cancel."""
    return 2 * row.guidance * max(np.abs(array).max() for array in arrays)


def formula(x, m, uncond, kept, noise, row):
    x, m, uncond, kept, noise = (array.astype(np.float64) for array in (x, m, uncond, kept, noise))
    g = uncond + row.guidance * (m - uncond)
    h = row.u_x * x + row.u_m * g
    h = np.minimum(np.maximum(h, -row.clip), row.clip)
    return row.a * x + row.c * g + row.b[0] * h + row.b[1] * kept + row.s * noise, h


@pytest.mark.parametrize("implementation", ["native", "reference"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_formula_in_float64(implementation, shape, monkeypatch):
    monkeypatch.setenv("TINTYPE_KERNELS", implementation)
    x, m, uncond, kept, noise = draw(shape)
    new, h = scheduler_step(x, m, uncond, [kept], ROW, noise)
    expected_new, expected_h = formula(x, m, uncond, kept, noise, ROW)
    assert new.dtype == h.dtype == np.float32
    scale = largest_term((x, m, uncond, kept, noise), ROW)
    assert relative_error(new, expected_new, scale) < KERNEL_STEP
    assert relative_error(h, expected_h, scale) < KERNEL_STEP


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("noisy", [True, False])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_native_equals_reference(shape, guided, noisy, clip, monkeypatch):
    monkeypatch.setenv("TINTYPE_KERNELS", "native")
    x, m, uncond, kept, noise = draw(shape)
    row = ROW._replace(clip=clip, s=ROW.s if noisy else 0.0)
    arguments = (x, m, uncond if guided else None, [kept], row, noise if noisy else None)
    for native, plain in zip(scheduler_step(*arguments), reference(*arguments), strict=True):
        np.testing.assert_array_max_ulp(native, plain, maxulp=1)


def test_float64_and_strided_arrays_take_the_reference(monkeypatch):
    x, m, uncond, kept, noise = draw((4, 6), np.float64)
    wide, _ = scheduler_step(x, m, uncond, [kept], ROW, noise)
    np.testing.assert_array_equal(wide, reference(x, m, uncond, [kept], ROW, noise)[0])
    x, m, uncond, kept, noise = (array.T for array in draw((4, 6)))
    new, _ = scheduler_step(x, m, uncond, [kept], ROW, noise)
    scale = largest_term((x, m, uncond, kept, noise), ROW)
    assert relative_error(new, formula(x, m, uncond, kept, noise, ROW)[0], scale) < KERNEL_STEP
    monkeypatch.setenv("TINTYPE_KERNELS", "native")
    with pytest.raises(KernelUnavailable, match="x is not C-contiguous.*auto, reference"):
        scheduler_step(x, m, uncond, [kept], ROW, noise)


@pytest.mark.parametrize("implementation", ["native", "reference"])
def test_nan_is_passed_on(implementation, monkeypatch):
    monkeypatch.setenv("TINTYPE_KERNELS", implementation)
    x, m, uncond, kept, noise = draw((8,))
    m[3] = np.nan
    new, h = scheduler_step(x, m, uncond, [kept], ROW, noise)
    assert np.isnan(new).tolist() == np.isnan(h).tolist() == [i == 3 for i in range(8)]


def test_a_threshold_divides_each_sample_by_its_own_quantile(monkeypatch):
    x, m, uncond, kept, noise = draw((3, 4, 5))
    row = ROW._replace(threshold=(0.7, 2.0), c=0.0, a=0.0, b=(1.0,), s=0.0, guidance=4.0)
    new, h = scheduler_step(x, m, uncond, [kept], row, noise)
    free, _ = formula(x, m, uncond, kept, noise, row._replace(clip=np.inf, b=(1.0, 0.0)))
    for sample, clean in zip(h, free, strict=True):
        # linear interpolation between the two magnitudes that the quantile falls between
        ordered = np.sort(np.abs(clean).reshape(-1))
        below, share = divmod(0.7 * (len(ordered) - 1), 1)
        low, high = ordered[int(below) : int(below) + 2]
        bound = min(max(low + share * (high - low), 1.0), 2.0)
        assert 1 < bound <= 2
        expected = np.minimum(np.maximum(clean, -bound), bound) / bound
        assert relative_error(sample, expected, largest_term((x, m, uncond), row)) < KERNEL_STEP
    np.testing.assert_array_equal(new, h)
    monkeypatch.setenv("TINTYPE_KERNELS", "native")
    with pytest.raises(KernelUnavailable, match="row.threshold sorts"):
        scheduler_step(x, m, uncond, [kept], row, noise)


@pytest.mark.parametrize("implementation", ["native", "reference"])
def test_a_batch_of_none_gives_none(implementation, monkeypatch):
    monkeypatch.setenv("TINTYPE_KERNELS", implementation)
    x, m, uncond, kept, _ = draw((0, 3, 4))
    made = scheduler_step(x, m, uncond, [kept], ROW, NoiseKey([], step=0))
    assert [array.shape for array in made] == [x.shape] * 2


@pytest.mark.parametrize(
    ("weights", "history", "message"),
    [
        ((), 0, "b has 0 weights"),
        ((1.0, 0.5), 0, "b has 2 weights, expected 1 .. 1"),
        ((1.0,), 1, "has 4 elements, expected x's 6"),
    ],
)
def test_the_extension_reads_no_array_that_it_was_not_given(weights, history, message):
    x, short = np.ones((2, 3), np.float32), np.ones(4, np.float32)
    with pytest.raises(ValueError, match=message):
        extension.module.scheduler_step(x, x, None, [short] * history, None, (1.0,) * 7, weights)


def test_arguments_are_checked_by_name():
    x, m, uncond, kept, noise = draw((2, 3))
    with pytest.raises(ValueError, match=r"row.b is \(\), expected .* at least"):
        scheduler_step(x, m, None, [], ROW._replace(b=(), s=0))
    with pytest.raises(ValueError, match=r"x is int32\[2, 3\], expected a floating type"):
        scheduler_step(*[np.ones((2, 3), np.int32)] * 2, None, [kept], ROW._replace(s=0))
    with pytest.raises(ValueError, match="seed=-1 is not an unsigned integer of 64 bits"):
        scheduler_step(x, m, uncond, [kept], ROW, NoiseKey([-1, 2], step=0))
    with pytest.raises(ValueError, match=r"m is float32\[3, 2\], expected float32\[2, 3\]"):
        scheduler_step(x, m.T, None, [kept], ROW, noise)
    with pytest.raises(ValueError, match="noise is float64"):
        scheduler_step(x, m, None, [kept], ROW, noise.astype(np.float64))
    with pytest.raises(ValueError, match="history has 0 arrays, expected 1"):
        scheduler_step(x, m, uncond, [], ROW, noise)
    with pytest.raises(ValueError, match="noise is None"):
        scheduler_step(x, m, uncond, [kept], ROW)
