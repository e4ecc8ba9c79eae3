"""Attention in slices equals attention, and holds no more scores than a slice has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import small_checkpoints
import small_flow_checkpoints
import tintype
from tintype.backends import slicing
from tintype.errors import RequestError
from tolerances import KERNEL_NORM, MODULE_FP32, relative_error

SCORES = 300
ATTENTION = (
    torch.ops.aten.scaled_dot_product_attention.default,
    torch.ops.aten._scaled_dot_product_attention_math.default,
)
# rows, heads, queries, keys, width: whole heads in a slice; a head in several; fewer scores than one query has
SHAPES = [(2, 5, 9, 13, 8), (1, 3, 40, 24, 16), (2, 1, 3, 400, 4)]


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slicing, "SCORES", SCORES)


@pytest.fixture
def unfused() -> Iterator[None]:
    with sdpa_kernel(SDPBackend.MATH):
        yield


class Products(TorchDispatchMode):
    """How many numbers each batch of matrix products gave."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ATTENTION:
            with self:
                return func.decompose(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.matmul.default:
            self.sizes.append(result.numel())
        return result


def drawn(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values, and what is added to the scores."""
    rows, heads, queries, keys, width = shape
    generator = torch.Generator().manual_seed(0)
    sizes = [(rows, heads, tokens, width) for tokens in (queries, keys, keys)]
    sizes.append((1, heads, queries, keys))
    q, k, v, bias = (torch.randn(size, generator=generator) for size in sizes)
    return q, k, v, bias


def explicit(q: Tensor, k: Tensor, v: Tensor, added: Tensor, scale: float) -> Tensor:
    """In float64, by the formula."""
    scores = q.double() @ k.double().transpose(-1, -2) * scale + added.double()
    return scores.softmax(-1) @ v.double()


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.inference_mode()
def test_slices_are_attention(unfused: None, shape: tuple[int, ...]) -> None:
    q, k, v, bias = drawn(shape)
    whole = explicit(q, k, v, torch.zeros(()), shape[-1] ** -0.5)
    biased = explicit(q, k, v, bias, 1.0)
    with slicing.AttentionSlices():
        assert error(F.scaled_dot_product_attention(q, k, v), whole) < KERNEL_NORM["float32"]
        actual = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        assert error(actual, biased) < KERNEL_NORM["float32"]


@torch.inference_mode()
def test_causal_slices_are_causal_attention(unfused: None) -> None:
    q, k, v, _ = drawn((2, 5, 30, 30, 8))
    later = torch.full((30, 30), -torch.inf).triu(1)
    with slicing.AttentionSlices():
        actual = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert error(actual, explicit(q, k, v, later, 8**-0.5)) < KERNEL_NORM["float32"]


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
@torch.inference_mode()
def test_no_product_has_more_scores_than_a_slice(unfused: None, shape: tuple[int, ...]) -> None:
    q, k, v, _ = drawn(shape)
    with Products() as products, slicing.AttentionSlices():
        F.scaled_dot_product_attention(q, k, v)
    assert SCORES / 2 < max(products.sizes) <= SCORES


@torch.inference_mode()
def test_a_fused_kernel_is_left_alone() -> None:
    q, k, v, _ = drawn(SHAPES[1])
    with Products() as products, slicing.AttentionSlices():
        actual = F.scaled_dot_product_attention(q, k, v)
    assert products.sizes == []
    assert torch.equal(actual, F.scaled_dot_product_attention(q, k, v))


@torch.inference_mode()
def test_a_device_without_a_choice_has_no_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: Any, **__: Any) -> int:
        raise NotImplementedError

    monkeypatch.setattr(torch, "_fused_sdp_choice", absent)
    q, k, v, _ = drawn(SHAPES[0])
    assert not slicing._is_fused(q, k, v, None)


@pytest.mark.parametrize("kind", ["sd1", "sd35", "flux-dev"])
def test_slices_change_no_picture(unfused: None, tmp_path: Path, kind: str) -> None:
    made = small_checkpoints if kind == "sd1" else small_flow_checkpoints
    folder = made.save(kind, tmp_path / "model")
    request = {"num_inference_steps": 2, "width": 64, "height": 32, "seed": 1, "output_type": "np"}
    expected = tintype.load(folder)("red", **request).images
    actual = tintype.load(folder, attention_slicing=True)("red", **request).images
    assert relative_error(actual, expected) <= MODULE_FP32


def test_what_slices_do_not_go_with_is_named(tmp_path: Path) -> None:
    folder = small_flow_checkpoints.save("flux-dev", tmp_path / "model")
    with pytest.raises(RequestError, match="leave out attention_slicing"):
        tintype.load(folder, attention_slicing=True, execution="compiled")
    with pytest.raises(RequestError, match="attention_slicing=True is for checkpoints"):
        tintype.load("postcard", attention_slicing=True)
