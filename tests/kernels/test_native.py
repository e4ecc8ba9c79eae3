"""The C++ kernels on every instruction set of this processor, on numpy arrays and torch tensors."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kernel_checks import norm_error, normal
from tintype_kernels import Row, native, scheduler_step
from tintype_kernels.scheduler_step import reference as step_reference
from tolerances import KERNEL_NORM

SETS = native.module.instruction_sets()
FLOAT32 = KERNEL_NORM["float32"]


@pytest.fixture(params=SETS)
def instruction_set(request):
    """Each of them in turn."""
    native.module.use_instruction_set(request.param)
    yield request.param
    native.module.use_instruction_set(SETS[0])


@pytest.fixture(params=[1, 3])
def thread_count(request):
    """One thread, and more than there are pieces of some work."""
    before = native.threads()
    native.set_threads(request.param)
    yield request.param
    native.set_threads(before)


@pytest.fixture(params=[False, True], ids=["own threads", "OpenMP"])
def whose_threads(request):
    """Those of the extension, and those that torch brings."""
    assert native.share_openmp(request.param) == request.param
    yield
    native.share_openmp()


def normed(x, weight, bias, groups, residual=None, silu=True):
    x, weight, bias = x.double(), weight.double(), bias.double()
    h = x if residual is None else x + residual.double()
    out = F.group_norm(h, groups, weight, bias, 1e-5)
    return F.silu(out) if silu else out


# a rest after a register of any width; one pixel; several blocks of a row and several pieces; a channel a group
SHAPES = [(2, 6, 5, 7, 3), (3, 6, 1, 1, 2), (1, 4, 97, 61, 2), (2, 70, 29, 31, 70)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("kind", ["none", "channel", "full"])
def test_group_norm_silu(shape, last, kind, instruction_set, thread_count, whose_threads):
    *size, groups = shape
    x, weight, bias = (
        normal(*size, mean=0.3).float(),
        normal(size[1]).float(),
        normal(size[1]).float(),
    )
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    residual = {"none": None, "channel": normal(*size[:2], 1, 1), "full": normal(*size)}[kind]
    residual = None if residual is None else residual.float()
    out, stats = native.group_norm_silu(x, weight, bias, groups, 1e-5, True, residual)
    assert out.stride() == x.stride()
    assert norm_error(out, normed(x, weight, bias, groups, residual)) < FLOAT32
    h = (x if residual is None else x + residual).double().reshape(size[0], groups, -1)
    assert norm_error(stats[:, 0] + stats[:, 1], h.mean(-1)) < FLOAT32
    assert norm_error(stats[:, 2], (h.var(-1, correction=0) + 1e-5).rsqrt()) < FLOAT32


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize(("mean", "spread"), [(3e3, 1.0), (0.0, 1e-4), (0.0, 1e15)])
def test_group_norm_of_extremes(last, mean, spread, instruction_set):
    x = normal(2, 8, 33, 65, mean=mean, spread=spread).float()
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    ones = torch.ones(8)
    out, _ = native.group_norm_silu(x, ones, ones, 2, 1e-5, False)
    assert norm_error(out, normed(x, ones, ones, 2, silu=False)) < FLOAT32


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("kind", ["none", "channel", "full"])
@pytest.mark.parametrize("spread", [1e17, 1e19, 1e20, 1e37])
def test_group_norm_of_what_has_no_square_in_float32(last, kind, spread, instruction_set):
    how = torch.channels_last if last else torch.contiguous_format
    x, full = (normal(2, 8, 33, 65).clamp(-1, 1).mul(spread).float() for _ in "xf")
    x, full = (each.contiguous(memory_format=how) for each in (x, full))
    residual = {"none": None, "channel": normal(2, 8, 1, 1).mul(spread).float(), "full": full}[kind]
    weight, bias = normal(8).float(), normal(8).float()
    out, _ = native.group_norm_silu(x, weight, bias, 2, 1e-5, True, residual)
    assert norm_error(out, normed(x, weight, bias, 2, residual)) < FLOAT32


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])
def test_group_norm_by_more_than_has_an_inverse_is_nan(last, instruction_set):
    x = normal(2, 8, 33, 65).clamp(-1, 1).mul(3e38).float()
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    ones = torch.ones(8)
    assert native.group_norm_silu(x, ones, ones, 2, 1e-5, True)[0].isnan().all()


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])
def test_a_residual_of_channels_may_take_the_mean_away(last, instruction_set):
    x, residual = normal(2, 8, 9, 11, mean=1e4).float(), normal(2, 8, 1, 1, mean=-1e4).float()
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    ones = torch.ones(8)
    out, _ = native.group_norm_silu(x, ones, ones, 2, 1e-5, False, residual)
    assert norm_error(out, normed(x, ones, ones, 2, residual, silu=False)) < FLOAT32


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])
def test_group_norm_of_a_corner_far_from_all_others(last, instruction_set):
    """The sums' first centre is off by much of what it is taken from."""
    x = normal(2, 8, 33, 65).float()
    x[:, :, 0, 0] = 1e3
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    weight, bias = torch.ones(8), torch.zeros(8)
    out, _ = native.group_norm_silu(x, weight, bias, 2, 1e-5, False)
    expected = normed(x, weight, bias, 2, silu=False)
    assert norm_error(out, expected) < FLOAT32
    assert norm_error(out[..., 1:], expected[..., 1:]) < FLOAT32


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])
def test_a_sample_has_the_same_bits_in_any_batch_and_on_any_threads(last, whose_threads):
    x = normal(3, 64, 31, 33).float()
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    weight, bias = normal(64).float(), normal(64).float()
    before = native.threads()
    together = native.group_norm_silu(x, weight, bias, 32, 1e-5, True)[0]
    native.set_threads(1)
    alone = native.group_norm_silu(x[1:2], weight, bias, 32, 1e-5, True)[0]
    native.set_threads(before)
    assert torch.equal(together[1:2], alone)


@pytest.mark.parametrize("count", [1, 37, 3 << 16])
@pytest.mark.parametrize("row", [
    Row(1.2, -0.7, 0.4, 0.3, (0.9, -0.2, 0.1), s=0.1, clip=0.8, guidance=7.5), Row(1.0, -0.5, 1.0, 0.0, (0.3,)),
])  # fmt: skip
def test_the_step_has_numpys_bits(count, row, instruction_set, thread_count, monkeypatch):
    monkeypatch.setenv("TINTYPE_KERNELS", "native")
    rng = np.random.default_rng(5)
    x, m, u, a, b, z = (rng.standard_normal(count).astype(np.float32) for _ in range(6))
    m[::13] = np.nan
    inputs = (x, m, u if row.guidance != 1 else None, [a, b], row, z if row.s else None)
    for mine, plain in zip(scheduler_step(*inputs), step_reference(*inputs), strict=True):
        np.testing.assert_array_equal(mine, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_quantisers_agree_on_every_instruction_set(dtype, instruction_set):
    w = normal(9, 192, spread=3.0).to(dtype)
    w[0, :4] = torch.tensor([6e-8, 6e4, -1e-5, 0.0])
    w[1, 150], w[2, 150], w[3] = float("nan"), float("inf"), 1e-38
    plain = [native.quantize_int8(w), native.quantize_int4(w, 64)]
    native.module.use_instruction_set("baseline")
    baseline = [native.quantize_int8(w), native.quantize_int4(w, 64)]
    for (codes, scales), (other, other_scales) in zip(plain, baseline, strict=True):
        assert torch.equal(codes, other)
        assert torch.equal(scales.nan_to_num(-1.0), other_scales.nan_to_num(-1.0))


def test_numpy_arrays_give_numpy_arrays():
    w = normal(3, 64).float()
    for mine, tensor in zip(
        native.quantize_int4(w.numpy(), 32), native.quantize_int4(w, 32), strict=True
    ):
        np.testing.assert_array_equal(mine, tensor.numpy())
    x, ones = normal(1, 4, 3, 5).float(), np.ones(4, np.float32)
    out, _ = native.group_norm_silu(x.numpy(), ones, ones, 2, 1e-5, True)
    assert isinstance(out, np.ndarray)


def test_callers_in_several_threads_do_not_disturb_each_other(whose_threads):
    x, ones = normal(2, 32, 64, 65).float(), torch.ones(32)
    expected = native.group_norm_silu(x, ones, ones, 32, 1e-5, True)[0]
    found = []
    callers = [
        threading.Thread(target=lambda: found.append(native.group_norm_silu(x, ones, ones, 32, 1e-5, True)[0]))
        for _ in range(4)
    ]  # fmt: skip
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 4
    assert all(torch.equal(out, expected) for out in found)


def _norm_in_child(queue):
    x, ones = np.ones((2, 32, 64, 65), np.float32), np.ones(32, np.float32)
    queue.put(float(native.group_norm_silu(x, ones, ones, 32, 1e-5, False)[0].sum()))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_a_forked_child_works_without_the_parents_threads(whose_threads):
    x, ones = normal(2, 32, 64, 65).float(), torch.ones(32)
    native.group_norm_silu(x, ones, ones, 32, 1e-5, True)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_norm_in_child, args=(queue,))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    assert queue.get() == 2 * 32 * 64 * 65


WORK = """
import os, resource
import numpy as np
from tintype_kernels import native
x, ones = np.ones((64, 64, 32, 32), np.float32), np.ones(64, np.float32)
if {refused}:
    if os.getuid() == 0:
        os.setuid(65534)  # root has no such limit
    resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
for _ in range(2):
    assert (native.group_norm_silu(x, ones, ones, 64, 1e-5, False)[0] == 1).all()
print(native.threads())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limits")
@pytest.mark.parametrize(
    ("asked", "refused", "expected"),
    [("1000000", False, 256), ("99999999999999999999", False, 256), ("64", True, 64)],
)
def test_more_threads_than_there_can_be_do_no_harm(asked, refused, expected):
    environment = {**os.environ, "TINTYPE_NUM_THREADS": asked}
    command = [sys.executable, "-c", WORK.format(refused=refused)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(expected), done.stderr


@pytest.mark.parametrize("asked", ["abc", "3x", "0", "-1", "1.5"])
def test_what_is_no_number_of_threads_is_told(asked):
    script = "from tintype_kernels import native; print(native.threads())"
    command = [sys.executable, "-c", script]
    runs = [
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        for environment in (
            {**os.environ, "TINTYPE_NUM_THREADS": ""},
            {**os.environ, "TINTYPE_NUM_THREADS": asked},
        )
    ]
    assert runs[0].stderr == ""
    assert f"TINTYPE_NUM_THREADS={asked} is ignored; give a whole number of" in runs[1].stderr
    assert runs[1].stdout == runs[0].stdout


def test_an_instruction_set_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="does not run sve"):
        native.module.use_instruction_set("sve")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((2, 4, 3), np.float32)}, "x has 3 dimensions, expected 4"),
        ({"x": np.zeros((2, 4, 3, 3))}, "x is float64, expected float32"),
        ({"x": np.zeros((2, 4, 3, 6), np.float32)[..., ::2]}, "x has strides"),
        ({"groups": 3}, "groups is 3, expected a divisor of x's 4 channels"),
        ({"weight": np.zeros(5, np.float32)}, r"weight is \[5\], expected \[4\]"),
        ({"residual": np.zeros((2, 4), np.float32)}, r"residual is \[2, 4\], expected .* or \[2, 4, 1, 1\]"),
    ],
)  # fmt: skip
def test_arguments_are_checked_by_name(change, message):
    ones = np.ones(4, np.float32)
    arguments = {"x": np.zeros((2, 4, 3, 3), np.float32), "weight": ones, "bias": ones, "groups": 2}
    with pytest.raises(ValueError, match=message):
        native.group_norm_silu(**{**arguments, "eps": 1e-5, "silu": True, **change})
    with pytest.raises(TypeError, match="x is list, expected a numpy array or torch tensor"):
        native.group_norm_silu(**{**arguments, "x": [1], "eps": 1e-5, "silu": True})
    with pytest.raises(ValueError, match="count is 0"):
        native.set_threads(0)
