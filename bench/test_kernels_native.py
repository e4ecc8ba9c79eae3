"""The C++ kernels beside PyTorch on the same threads: `pytest bench/test_kernels_native.py`.

TINTYPE_NUM_THREADS says how many threads both have; by default as many as there are cores. Each group holds one shape.
"""
# ruff: noqa: ANN001, ANN201, ANN202

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tintype_kernels import Row, native, scheduler_step

torch.set_num_threads(native.threads())

NORMS = {
    "SD1.5 512, 320 x 64, batch 2": (2, 320, 64),
    "SD1.5 512, 1280 x 16, batch 2": (2, 1280, 16),
    "SDXL 1024, 640 x 64, batch 2": (2, 640, 64),
    "decoder 512, 256 x 256": (1, 256, 256),
}
LATENTS = {"SD1.5 512, batch 1": (1, 4, 64, 64), "SDXL 1024, batch 8": (8, 4, 128, 128)}
WEIGHT = (4096, 4096)


@pytest.mark.parametrize("label", NORMS)
@pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"]
)
@pytest.mark.parametrize("who", ["tintype", "torch"])
def test_group_norm_silu(benchmark, label, layout, who):
    n, c, side = NORMS[label]
    x = torch.randn(n, c, side, side).contiguous(memory_format=layout)
    weight, bias = torch.randn(c), torch.randn(c)
    benchmark.group = f"group_norm_silu, {label}, {str(layout).removeprefix('torch.')}"
    if who == "tintype":
        benchmark(native.group_norm_silu, x, weight, bias, 32, 1e-5, True)
    else:
        benchmark(lambda: F.silu(F.group_norm(x, 32, weight, bias)))


@pytest.mark.parametrize("label", LATENTS)
@pytest.mark.parametrize("who", ["tintype", "torch"])
def test_scheduler_step(benchmark, label, who, monkeypatch):
    row = Row(1.2, -0.7, 0.4, 0.3, (0.9, -0.2), s=0.1, clip=0.8, guidance=7.5)
    x, m, uncond, kept, noise = (torch.randn(LATENTS[label]) for _ in range(5))
    benchmark.group = f"scheduler_step, {label}"
    if who == "tintype":
        monkeypatch.setenv("TINTYPE_KERNELS", "native")
        arrays = [tensor.numpy() for tensor in (x, m, uncond)]
        benchmark(scheduler_step, *arrays, [kept.numpy()], row, noise.numpy())
    else:
        benchmark(_eager_step, x, m, uncond, kept, noise, row)


def _eager_step(x, m, uncond, kept, noise, row):
    g = uncond + row.guidance * (m - uncond)
    h = (row.u_x * x + row.u_m * g).clamp(-row.clip, row.clip)
    return row.a * x + row.c * g + row.b[0] * h + row.b[1] * kept + row.s * noise, h


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantise(benchmark, dtype, scheme):
    w = torch.randn(WEIGHT).to(dtype)
    benchmark.group = f"{scheme}, {w.nbytes / 1e6:.0f} MB of {str(dtype).removeprefix('torch.')}"
    if scheme == "int8":
        benchmark(native.quantize_int8, w)
    else:
        benchmark(native.quantize_int4, w, 64)
    benchmark.extra_info["GB/s"] = w.nbytes / benchmark.stats.stats.median / 1e9
