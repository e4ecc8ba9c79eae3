"""Kernels that begin while the ones before end give the bits of those that begin behind them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tintype_kernels import (
    bias_residual,
    geglu,
    group_norm_silu,
    residual_layer_norm,
    triton_support,
)

LINKS = 30


@pytest.fixture(autouse=True)
def early_where_a_chip_can(monkeypatch):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("launches begin early from Hopper on")
    monkeypatch.setenv("TINTYPE_EARLY_LAUNCHES", "1")
    triton_support._begins_early.cache_clear()
    yield
    monkeypatch.undo()
    triton_support._begins_early.cache_clear()


def chain(x: Tensor, side: int) -> Tensor:
    """Kernels one behind the other, each of what the one before wrote, in pictures of side x side."""
    n, c = x.shape[:2]
    bias = torch.linspace(-1, 1, c, device=x.device, dtype=x.dtype)
    scale = bias.expand(n, -1)[:, None]
    start = x
    for _ in range(LINKS):
        x = group_norm_silu(x, bias, bias, 32)
        tokens = x.flatten(2).transpose(1, 2)
        stream, normed = residual_layer_norm(tokens, tokens, scale, scale, scale)
        widened = geglu(torch.cat([stream, normed], dim=-1))
        x = widened.transpose(1, 2).unflatten(2, (side, side))
        x = bias_residual(x.contiguous(memory_format=torch.channels_last), bias, start)
    return x


@pytest.mark.parametrize("side", [8, 64, 128])
def test_a_chain_in_a_graph_has_the_same_bits(side, monkeypatch):
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(2, 320, side, side, generator=generator, device="cuda", dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last)
    found = {}
    with torch.no_grad():
        for early in (True, False):
            if not early:
                monkeypatch.setattr(triton_support, "_begins_early", lambda _: False)
            chain(x, side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = chain(x, side)
            for _ in range(20):
                out.zero_()
                graph.replay()
            found[early] = out.clone()
    assert found[True].isfinite().all()
    assert torch.equal(found[True], found[False])
