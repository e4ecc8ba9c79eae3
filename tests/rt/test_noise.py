"""Noise by its definition: Box and Muller over Philox's integers, in the mathematics of the standard library."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tintype.noise import initial_noise, step_noise
from tintype_kernels import philox_uint32
from tolerances import NORMAL_MOMENT


def test_equals_box_muller_element_by_element():
    noise = initial_noise(99, (1, 4, 2, 3)).reshape(-1)
    bits = [int(word) for word in philox_uint32(99, 24)]
    for pair in range(12):
        radius = math.sqrt(-2 * math.log((bits[2 * pair] + 1) / 2**32))
        angle = 2 * math.pi * bits[2 * pair + 1] / 2**32
        expected = [radius * math.cos(angle), radius * math.sin(angle)]
        np.testing.assert_array_max_ulp(
            noise[2 * pair : 2 * pair + 2], np.float32(expected), maxulp=1
        )


@pytest.mark.parametrize("draw", [initial_noise, lambda seed, shape: step_noise(seed, 7, shape)])
def test_moments_are_those_of_a_standard_normal(draw):
    noise = draw(2**64 - 1, (2**16,)).astype(np.float64)
    assert noise.mean() == pytest.approx(0, abs=NORMAL_MOMENT)
    assert noise.var() == pytest.approx(1, abs=NORMAL_MOMENT * math.sqrt(2))
    assert np.mean(noise**3) == pytest.approx(0, abs=NORMAL_MOMENT * math.sqrt(15))
    assert np.mean(noise**4) == pytest.approx(3, abs=NORMAL_MOMENT * math.sqrt(96))


def test_an_element_depends_on_seed_step_and_position_alone():
    np.testing.assert_array_equal(initial_noise(3, (100,))[:33], initial_noise(3, (33,)))
    np.testing.assert_array_equal(initial_noise(3, (4, 5)).reshape(-1), initial_noise(3, (20,)))
    draws = [
        initial_noise(3, (8,)),
        initial_noise(4, (8,)),
        step_noise(3, 0, (8,)),
        step_noise(3, 1, (8,)),
    ]
    assert len({draw.tobytes() for draw in draws}) == len(draws)


def test_both_implementations_give_the_same_bits(monkeypatch):
    monkeypatch.setenv("TINTYPE_KERNELS", "native")
    native = initial_noise(12, (1, 4, 16, 16))
    monkeypatch.setenv("TINTYPE_KERNELS", "reference")
    np.testing.assert_array_equal(initial_noise(12, (1, 4, 16, 16)), native)
