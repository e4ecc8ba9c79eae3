"""What is particular to attention; `test_ops.py` asks of it what it asks of every op."""

from __future__ import annotations

import pytest
import torch

from kernel_checks import (
    check_same_bits_in_any_batch,
    check_values,
    check_values_and_gradients,
    forced,
    norm_error,
    normal,
)
from matrix_samples import ATTENTION, WIDE, WITH_ROLES
from tintype_kernels import KernelUnavailable, attention
from tintype_kernels.ops import attention as op
from tolerances import KERNEL_FORMULA


def test_the_plain_formula_is_the_softmax_of_the_definition():
    q, k, v, k2, v2 = (normal(2, 3, tokens, 8) for tokens in (5, 7, 7, 2, 2))
    lengths = torch.tensor([7, 4], dtype=torch.int32)
    expected = torch.zeros_like(q)
    for b, h, i in ((b, h, i) for b in range(2) for h in range(3) for i in range(5)):
        for keys, values, count, weight in ((k, v, int(lengths[b]), 1.0), (k2, v2, 2, 0.4)):
            scores = (keys[b, h, :count] * q[b, h, i]).sum(-1) * 0.7
            shares = (scores - scores.max()).exp()
            expected[b, h, i] += weight * (shares / shares.sum()) @ values[b, h, :count]
    got = attention.reference(q, k, v, 0.7, k2, v2, 0.4, lengths)
    assert norm_error(got, expected) < KERNEL_FORMULA


def test_scores_beyond_halfs_range_choose_the_nearest_key():
    q = 200 * torch.eye(16, dtype=torch.float16)[None, None]
    v = normal(1, 1, 16, 16).half()
    with forced(
        "triton"
    ):  # scores of 40000 times 4 are no float16, and their exponentials no float32
        assert torch.equal(attention(q, q, v, scale=4.0), v)


def test_tokens_lie_where_they_lay_in_q():
    q = torch.randn(2, 6, 3, 16).transpose(1, 2)
    assert attention(q, q, q).transpose(1, 2).is_contiguous()
    assert attention(*[q.contiguous()] * 3).is_contiguous()


def test_no_logarithms_are_kept_where_no_gradient_can_be_asked_for(monkeypatch):
    kept = []
    run = op.FORWARD.implementations["reference"]
    monkeypatch.setitem(
        op.FORWARD.implementations, "reference", lambda *a: kept.append(a[-1]) or run(*a)
    )
    q = torch.randn(1, 1, 4, 16)
    attention(q, q, q)
    attention(q.requires_grad_(), q, q)
    assert kept == [False, True]


@pytest.mark.parametrize(
    "sample", [s for s in ATTENTION if s.label in WITH_ROLES],
    ids=lambda s: s.label,
)  # fmt: skip
@pytest.mark.parametrize(
    ("form", "check"), [("triton_roles", check_values), ("triton", check_values_and_gradients)]
)
def test_each_of_tritons_forms_equals_the_reference(sample, form, check, monkeypatch):
    ran = []
    run = op.FORWARD.implementations[form]
    monkeypatch.setitem(op.FORWARD.implementations, form, lambda *a: ran.append(form) or run(*a))
    with forced(form):
        check(sample, torch.float16, "cpu")
    assert ran == [form]


@pytest.mark.parametrize("slice_of_queries", [4096, 16])
@pytest.mark.parametrize("sample", WIDE, ids=lambda s: s.label)
def test_wide_heads_by_products_equal_the_reference(sample, slice_of_queries, monkeypatch):
    monkeypatch.setattr(op.attention_products, "_QUERIES", slice_of_queries)
    with forced("triton_products"), torch.no_grad():
        check_values(sample, torch.float16, "cpu")
        check_same_bits_in_any_batch(sample, torch.float16, "cpu")


@pytest.mark.parametrize(
    ("change", "obstacle"),
    [
        ({"key_lengths": torch.tensor([3, 4], dtype=torch.int32)}, "one set of keys, of which all count"),
        ({name: torch.zeros(2, 3, 7, 320) for name in "qkv"}, "q is torch.float32 with 320 a head"),
        ({name: torch.zeros(2, 3, 7, 256).half() for name in "qkv"}, "with 256 a head, and .* more than 256"),
        ({"q": torch.zeros(2, 3, 7, 320).half().requires_grad_()}, "keeps nothing for a gradient"),
        ({name: torch.zeros(2, 3, 16385, 320).half() for name in "kv"}, "a row of 16385 elements"),
    ],
)  # fmt: skip
def test_the_form_by_products_says_what_it_cannot_take(change, obstacle):
    arguments = {**{name: torch.zeros(2, 3, 7, 320).half() for name in "qkv"}, **change}
    with forced("triton_products"), pytest.raises(KernelUnavailable, match=obstacle):
        attention(**arguments)


@pytest.mark.parametrize(
    ("change", "obstacle"),
    [
        ({}, ""),
        ({"key_lengths": torch.tensor([3, 4], dtype=torch.int32)}, "one set of keys, of which all count"),
        ({"k_extra": torch.zeros(2, 3, 7, 64).half(), "v_extra": torch.zeros(2, 3, 7, 64).half()}, "one set of keys"),
        ({name: torch.zeros(2, 3, 7, 64) for name in "qkv"}, "q is torch.float32 with 64 a head"),
        ({name: torch.zeros(2, 3, 7, 80).half() for name in "qkv"}, "q is torch.float16 with 80 a head"),
        ({"q": torch.zeros(2, 3, 7, 64).half().requires_grad_()}, "keeps nothing for a gradient"),
        ({"k": torch.zeros(2 * 3 * 7 * 64 + 1).half()[1:].view(2, 3, 7, 64)}, "addresses that 16 divides"),
    ],
)  # fmt: skip
def test_the_form_with_roles_says_what_it_cannot_take(change, obstacle):
    arguments = {**{name: torch.zeros(2, 3, 7, 64).half() for name in "qkv"}, **change}
    with forced("triton_roles"):
        if not obstacle:
            assert not attention(**arguments).any()
            return
        with pytest.raises(KernelUnavailable, match=obstacle):
            attention(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 4)}, "q is .* expected a floating tensor of 4 dimensions"),
        ({"k": torch.zeros(2, 3, 4, 8)}, r"k is .*expected torch.float32\[2, 3, 4, 16\]"),
        ({"v": torch.zeros(2, 3, 5, 16)}, r"v is .*expected torch.float32\[2, 3, 7, 16\]"),
        ({"k": torch.zeros(2, 3, 7, 16, dtype=torch.float64)}, r"k is torch.float64"),
        ({"k_extra": torch.zeros(2, 3, 7, 16)}, "v_extra is None"),
        ({"v_extra": torch.zeros(2, 3, 7, 16)}, "k_extra is None"),
        ({"key_lengths": torch.zeros(3, dtype=torch.int32)}, r"key_lengths is torch.int32\[3\].*\[2\]"),
        ({"key_lengths": torch.zeros(2)}, r"key_lengths is torch.float32\[2\]"),
        ({"scale": -1.0}, "scale is -1.0, expected a positive number"),
    ],
)  # fmt: skip
def test_arguments_are_checked_by_name(change, message):
    arguments = {
        "q": torch.zeros(2, 3, 5, 16),
        "k": torch.zeros(2, 3, 7, 16),
        "v": torch.zeros(2, 3, 7, 16),
    }
    with pytest.raises(ValueError, match=message):
        attention(**{**arguments, **change})
