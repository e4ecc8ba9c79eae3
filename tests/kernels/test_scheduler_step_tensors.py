"""The step on torch tensors: noise made in the kernel, rows kept on the device, what arrays give."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernel_checks import forced, norm_error
from tintype_kernels import KernelUnavailable, NoiseKey, Row, philox_uint32, scheduler_step
from tintype_kernels.philox import philox_normals
from tintype_kernels.triton_support import jit, tl
from tolerances import KERNEL_NORM, KERNEL_NORMALS

ROW = Row(u_x=1.2, u_m=-0.7, a=0.4, c=0.3, b=(0.9, -0.2), s=0.1, clip=0.8, guidance=7.5)
# Nothing but the noise is left of x.
NOISE_ALONE = Row(u_x=0, u_m=0, a=0, c=0, b=(0,), s=1)
SEEDS = [0, 7, 2**63 + 5, 2**64 - 1]


def latents(*shape):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for _ in range(5)]


@jit
def _words_kernel(out, seed, step, stream, BLOCK: tl.constexpr):  # noqa: N803
    block = tl.arange(0, BLOCK).to(tl.uint32)
    zero = block * 0
    seed = tl.load(seed)
    words = tl.philox(seed, block, zero, zero + step, zero + stream)
    for word in tl.static_range(4):
        tl.store(out + tl.arange(0, BLOCK) * 4 + word, words[word].to(tl.int64))


@pytest.mark.parametrize("seed", SEEDS)
def test_tritons_philox_gives_the_hosts_integers(seed):
    out = torch.empty(64, dtype=torch.int64)
    _words_kernel[1,](out, torch.tensor([seed - (seed >> 63 << 64)]), 3, 2, BLOCK=16)
    assert out.tolist() == philox_uint32(seed, 64, step=3, stream=2).tolist()


@pytest.mark.parametrize("implementation", ["triton", "native", "reference"])
@pytest.mark.parametrize("shape", [(3, 5, 7), (1,), (1030,)], ids=str)
def test_the_noise_of_a_key_is_the_hosts(shape, implementation):
    x = torch.zeros(len(SEEDS), *shape)
    with forced(implementation):
        made, _ = scheduler_step(x, x, None, [], NOISE_ALONE, NoiseKey(SEEDS, step=4, stream=2))
    for sample, seed in zip(made, SEEDS, strict=True):
        expected = philox_normals(seed, sample.numel(), step=4, stream=2)
        assert np.abs(sample.numpy().ravel() - expected).max() < KERNEL_NORMALS


def test_tensors_give_what_arrays_give():
    x, m, uncond, kept, noise = latents(2, 3, 8)
    arrays = [t.numpy() for t in (x, m, uncond, kept, noise)]
    expected = scheduler_step(*arrays[:3], [arrays[3]], ROW, arrays[4])
    for implementation in ("native", "reference"):
        with forced(implementation):
            found = scheduler_step(x, m, uncond, [kept], ROW, noise)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_max_ulp(a.numpy(), b, maxulp=1)


def test_arrays_take_a_key_too():
    x, m, uncond, kept, _ = (t.numpy() for t in latents(2, 3, 8))
    key = NoiseKey([5, 6], step=1)
    made = scheduler_step(x, m, uncond, [kept], ROW, key)
    given = scheduler_step(x, m, uncond, [kept], ROW, key.normals(x))
    for a, b in zip(made, given, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_row_and_keys_may_be_tensors_of_the_device():
    x, m, uncond, kept, _ = latents(2, 3, 8)
    row = torch.tensor(ROW.coefficients())
    keys = torch.tensor([[5, 1, 1], [6, 1, 1]])
    with forced("triton"):
        made = scheduler_step(x, m, uncond, [kept], row, keys)
        given = scheduler_step(x, m, uncond, [kept], ROW, NoiseKey([5, 6], step=1))
    for a, b in zip(made, given, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_samples_may_have_rows_of_their_own(implementation):
    x, m, uncond, kept, noise = latents(2, 3, 5, 8)
    rows = [ROW, ROW._replace(u_x=0.1, a=-1.0, s=0.5, guidance=2.0, clip=None)]
    largest = np.finfo(np.float32).max
    together = torch.tensor([row.coefficients() for row in rows]).clamp(-largest, largest)
    with forced(implementation):
        made = scheduler_step(x, m, uncond, [kept], together, noise)
        for i, row in enumerate(rows):
            one = slice(i, i + 1)
            alone = scheduler_step(x[one], m[one], uncond[one], [kept[one]], row, noise[one])
            for a, b in zip(made, alone, strict=True):
                np.testing.assert_array_max_ulp(a[one].numpy(), b.numpy(), maxulp=1)


def test_gradients_of_samples_with_rows_of_their_own():
    x, m, uncond, kept, noise = (t.double().requires_grad_() for t in latents(2, 3))
    rows = [ROW.coefficients(), ROW._replace(a=-1.0, guidance=2.0).coefficients()]
    coefficients = torch.tensor(rows, dtype=torch.float64)

    def step(*tensors):
        return scheduler_step(*tensors[:3], [tensors[3]], coefficients, tensors[4])

    assert torch.autograd.gradcheck(step, (x, m, uncond, kept, noise))


def test_a_sample_does_not_depend_on_its_neighbours():
    x, m, uncond, kept, _ = latents(4, 3, 700)
    with forced("triton"):
        batch, _ = scheduler_step(x, m, uncond, [kept], ROW, NoiseKey(SEEDS, step=1))
        alone, _ = scheduler_step(
            x[2:3], m[2:3], uncond[2:3], [kept[2:3]], ROW, NoiseKey(SEEDS[2:3], step=1)
        )
    assert torch.equal(batch[2:3], alone)


@pytest.mark.parametrize("implementation", ["triton", "native", "reference"])
def test_nan_is_passed_on(implementation):
    x, m, uncond, kept, noise = latents(1, 8)
    m[0, 3] = float("nan")
    with forced(implementation):
        new, h = scheduler_step(x, m, uncond, [kept], ROW, noise)
    assert new.isnan().tolist() == h.isnan().tolist() == [[i == 3 for i in range(8)]]


def test_a_threshold_sorts_which_only_the_reference_does():
    x, m, uncond, kept, noise = latents(2, 3, 8)
    row = ROW._replace(threshold=(0.7, 2.0), guidance=4.0)
    expected = scheduler_step(
        *(t.numpy() for t in (x, m, uncond)), [kept.numpy()], row, noise.numpy()
    )
    found = scheduler_step(x, m, uncond, [kept], row, noise)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.numpy(), b, rtol=KERNEL_NORMALS, atol=KERNEL_NORMALS)
    with forced("triton"), pytest.raises(KernelUnavailable, match="row.threshold sorts"):
        scheduler_step(x, m, uncond, [kept], row, noise)


# of the quantile at 0.9 of samples too large for `torch.quantile`
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 37), torch.float16), ((2, 37), torch.bfloat16), ((1, 2**24 + 9), torch.float32)],
    ids=str,
)
def test_a_threshold_takes_any_type_and_size(shape, dtype):
    m = (3 * torch.rand(shape, generator=torch.Generator().manual_seed(2))).to(dtype)
    row = Row(u_x=0, u_m=1, a=0, c=0, b=(1,), threshold=(0.9, 10.0))
    found, _ = scheduler_step(m, m, None, [], row)
    bound = np.quantile(m.double().numpy(), 0.9, axis=1, keepdims=True)
    expected = np.minimum(m.double().numpy(), bound) / bound
    assert found.dtype == dtype
    assert norm_error(found, torch.from_numpy(expected)) < KERNEL_NORM[str(dtype)[6:]]


def test_nan_makes_its_own_samples_threshold_nan():
    m = torch.ones(2, 8)
    m[1, 3] = float("nan")
    row = Row(u_x=0, u_m=1, a=0, c=0, b=(1,), threshold=(0.5, 2.0))
    for array in (m, m.numpy()):
        found, _ = scheduler_step(array, array, None, [], row)
        assert np.isnan(np.asarray(found)).all(1).tolist() == [False, True]


@pytest.mark.parametrize("implementation", ["triton", "native", "reference"])
def test_a_batch_of_none_needs_no_seeds(implementation):
    x, m, uncond, kept, _ = latents(0, 3, 8)
    with forced(implementation):
        made = scheduler_step(x, m, uncond, [kept], ROW, NoiseKey([], step=0))
    assert [tensor.shape for tensor in made] == [x.shape] * 2


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (NoiseKey([-1, 2], step=0), "seed=-1 is not an unsigned integer of 64 bits"),
        (NoiseKey([2**64, 2], step=0), f"seed={2**64} is not"),
        (NoiseKey([1, 2], step=2**32), f"step={2**32} is not an unsigned integer of 32 bits"),
    ],
)
def test_keys_are_checked_as_arrays_keys_are(key, message):
    x, m, uncond, kept, _ = latents(2, 3)
    for arrays in ((x, m, uncond, kept), [t.numpy() for t in (x, m, uncond, kept)]):
        with pytest.raises(ValueError, match=message):
            scheduler_step(*arrays[:3], [arrays[3]], ROW, key)


def test_arguments_are_checked_by_name():
    x, m, uncond, kept, _ = latents(2, 3)
    with pytest.raises(ValueError, match=r"row.b is \(\), expected .* at least"):
        scheduler_step(x, m, None, [], ROW._replace(b=(), s=0))
    with pytest.raises(ValueError, match=r"x is torch.int32\[2, 3\].*expected a floating tensor"):
        scheduler_step(x.int(), m.int(), None, [kept.int()], ROW._replace(s=0))
    with pytest.raises(ValueError, match=r"m is torch.float64\[2, 3\], expected torch.float32"):
        scheduler_step(x, m.double(), None, [kept], ROW._replace(s=0))
    with pytest.raises(ValueError, match="noise has 1 seeds, expected one for each of x's 2 rows"):
        scheduler_step(x, m, uncond, [kept], ROW, NoiseKey([1], step=0))
    with pytest.raises(ValueError, match=r"noise is torch.int64\[3\].*int64 keys \[2, 3\]"):
        scheduler_step(x, m, uncond, [kept], ROW, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"row is torch.float32\[10\].*\[7 \+ 1 .. 2\]"):
        scheduler_step(x, m, uncond, [kept], torch.zeros(10))
