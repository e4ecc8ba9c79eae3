"""Tangents of every op: those of the reference, whoever differentiates forwards, and never zeros for want of a rule."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

import tintype_kernels
from kernel_checks import SAMPLES, norm_error, normal
from matrix_samples import ATTENTION, CONVOLUTION, LINEAR
from tintype_kernels import geglu, group_norm_silu, group_norm_silu_quantized
from tolerances import KERNEL_NORM

# One sample of each op, and one more of each optional tensor.
_TELLING = {
    "on chip NHWC", "split", "rest", "NHWC, skip", "no weights", "no gate", "64, image prompt", "72, lengths",
    "static NHWC",
}  # fmt: skip
TELLING = [s for s in [*SAMPLES, *ATTENTION, *LINEAR, *CONVOLUTION] if s.label in _TELLING]
each = pytest.mark.parametrize("sample", TELLING, ids=[f"{s.op}: {s.label}" for s in TELLING])


class Differentiated:
    """A sample's call and its reference, float32 arguments and tangents of those that are `named`."""

    def __init__(self, sample, *named):
        self.sample, self.named = sample, named or tuple(sample.tensors())
        self.arguments = sample.arguments(torch.float32)
        generator = torch.Generator().manual_seed(5)
        self.primals = tuple(self.arguments[name] for name in self.named)
        self.tangents = tuple(
            torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
            for x in self.primals
        )

    def call(self, *primals):
        return self.sample.call({**self.arguments, **dict(zip(self.named, primals, strict=True))})

    def expected(self):
        """In float64 by two gradients, and so by no operator's own tangent."""
        wide = {
            n: v.double() if n in self.sample.tensors() else v for n, v in self.arguments.items()
        }

        def reference(*primals):
            return self.sample.reference({**wide, **dict(zip(self.named, primals, strict=True))})

        primals, tangents = ([x.double() for x in xs] for xs in (self.primals, self.tangents))
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            return torch.autograd.functional.jvp(reference, tuple(primals), tuple(tangents))[1]

    def check(self, tangents):
        for actual, expected in zip(tangents, self.expected(), strict=True):
            assert norm_error(actual, expected) < KERNEL_NORM["float32"]


@each
@pytest.mark.parametrize("grad", [True, False])
def test_jvp_is_the_references(sample, grad):
    asked = Differentiated(sample)
    with torch.set_grad_enabled(grad):
        _, tangents = torch.func.jvp(asked.call, asked.primals, asked.tangents)
    asked.check(tangents)


@each
@pytest.mark.parametrize("grad", [True, False])
def test_dual_tensors_carry_their_tangents_through(sample, grad):
    asked = Differentiated(sample)
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        duals = map(forward_ad.make_dual, asked.primals, asked.tangents)
        asked.check([forward_ad.unpack_dual(out).tangent for out in asked.call(*duals)])


ONE_BY_ONE = [(sample, name) for sample in TELLING for name in sample.tensors()]


@pytest.mark.parametrize(
    ("sample", "name"), ONE_BY_ONE, ids=[f"{s.op}: {s.label}, {name}" for s, name in ONE_BY_ONE]
)
def test_each_argument_by_itself_may_be_differentiated(sample, name):
    asked = Differentiated(sample, name)
    _, tangents = torch.func.jvp(asked.call, asked.primals, asked.tangents)
    asked.check(tangents)


@each
def test_a_batch_of_tangents(sample):
    """As `torch.func.jacfwd` maps over them."""
    asked = Differentiated(sample)
    batch = tuple(torch.stack([tangent, -2 * tangent]) for tangent in asked.tangents)

    def tangents_of(*tangents):
        return torch.func.jvp(asked.call, asked.primals, tangents)[1]

    first, second = zip(*torch.func.vmap(tangents_of)(*batch), strict=True)
    asked.check(first)
    asked.check([tangent / -2 for tangent in second])


def test_a_compiled_function_has_them_too():
    x, tangent = normal(3, 8).float(), normal(3, 8).float()
    torch.compiler.reset()

    def tangent_of(x, tangent):
        return torch.func.jvp(geglu, (x,), (tangent,))[1]

    compiled = torch.compile(tangent_of, fullgraph=True, backend="aot_eager")
    assert norm_error(compiled(x, tangent), tangent_of(x, tangent)) < KERNEL_NORM["float32"]


def test_what_was_compiled_before_lets_tangents_through():
    x, tangent = normal(3, 8).float(), normal(3, 8).float()
    torch.compiler.reset()
    compiled = torch.compile(geglu, fullgraph=True, backend="aot_eager")
    compiled(x)
    _, expected = torch.func.jvp(geglu, (x,), (tangent,))
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(compiled(forward_ad.make_dual(x, tangent))).tangent
    assert norm_error(found, expected) < KERNEL_NORM["float32"]


def test_a_hessian_times_a_vector():
    x, tangent = normal(2, 4, 3, 3), normal(2, 4, 3, 3)
    weight, bias, seen = normal(4, mean=1), normal(4), normal(2, 4, 3, 3)

    def loss(x, op=group_norm_silu):
        return (op(x, weight, bias, 2) * seen).sum()

    _, found = torch.func.jvp(torch.func.grad(loss), (x,), (tangent,))
    _, expected = torch.autograd.functional.hvp(
        lambda x: loss(x, group_norm_silu.reference), x, tangent
    )
    assert norm_error(found, expected) < KERNEL_NORM["float64"]


X, V = normal(2, 3, 64).float(), normal(2, 64).float()
CODES = {
    "geglu_quantized": lambda op, x: op(x, "int8"),
    "activate_quantized": lambda op, x: op(x, "int8"),
    "layer_norm_modulate_quantized": lambda op, x: op(x, V, V, "int8"),
    "residual_layer_norm_quantized": lambda op, x: op(x, x, None, V, V, "int8"),
}


@pytest.mark.parametrize("name", CODES)
def test_codes_have_no_tangent_and_say_so(name):
    op = getattr(tintype_kernels, name)
    with pytest.raises(RuntimeError, match=f"{name} rounds to codes"):
        torch.func.jvp(lambda x: CODES[name](op, x)[-1], (X,), (X,))


def test_pictures_in_codes_have_no_tangent_and_say_so():
    x = normal(1, 4, 3, 3).float()
    ones = torch.ones(4)
    with pytest.raises(RuntimeError, match="group_norm_silu_quantized rounds to codes"):
        torch.func.jvp(lambda x: group_norm_silu_quantized(x, ones, ones, 2).scales, (x,), (x,))
