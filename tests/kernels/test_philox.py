"""Philox against its authors' published vectors, and the native form against the numpy one, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tintype_kernels import philox_uint32
from tintype_kernels.philox import reference

ONES32, ONES64 = 2**32 - 1, 2**64 - 1
# Known answers of philox4x32-10 from the authors' Random123 distribution: counter words, key words, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES32,) * 4, (ONES32,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("implementation", ["native", "reference"])
@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(implementation, counter, key, expected, monkeypatch):
    monkeypatch.setenv("TINTYPE_KERNELS", implementation)
    numbers = philox_uint32(
        key[0] | key[1] << 32,
        4,
        step=counter[2],
        stream=counter[3],
        first_block=counter[0] | counter[1] << 32,
    )
    assert numbers.dtype == np.uint32
    assert tuple(numbers) == expected


@given(
    seed=st.integers(0, ONES64),
    count=st.integers(0, 70),
    step=st.integers(0, ONES32),
    stream=st.integers(0, ONES32),
    first_block=st.integers(0, ONES64),
)
@settings(deadline=None)
def test_native_equals_reference(seed, count, step, stream, first_block):
    counter = {"step": step, "stream": stream, "first_block": first_block}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINTYPE_KERNELS", "native")
        native = philox_uint32(seed, count, **counter)
    np.testing.assert_array_equal(native, reference(seed, count, **counter))


def test_an_element_does_not_depend_on_how_many_are_drawn():
    np.testing.assert_array_equal(philox_uint32(5, 1000)[:37], philox_uint32(5, 37))
    np.testing.assert_array_equal(
        philox_uint32(5, 1000)[40:], philox_uint32(5, 960, first_block=10)
    )


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"seed": -1, "count": 1}, "seed"),
        ({"seed": 2**64, "count": 1}, "seed"),
        ({"seed": 0, "count": -1}, "count"),
        ({"seed": 0, "count": 1, "step": 2**32}, "step"),
        ({"seed": 0, "count": 1, "stream": -1}, "stream"),
        ({"seed": 0, "count": 1, "first_block": 2**64}, "first_block"),
    ],
)
def test_out_of_range_is_named(arguments, name):
    with pytest.raises(ValueError, match=name):
        philox_uint32(**arguments)
