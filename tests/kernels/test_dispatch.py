"""Which implementation runs, and what is said where one cannot."""

from __future__ import annotations

import pytest

from tintype_kernels import KernelUnavailable, implementation, native, philox_uint32


def test_auto_picks_native_where_it_is_built():
    assert implementation() == {"selected": "native", "requested": "auto", "note": ""}


def test_without_the_extension_auto_is_numpy_and_native_an_error(monkeypatch):
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "reason", "not built")
    assert implementation()["selected"] == "reference"
    assert len(philox_uint32(1, 3)) == 3
    monkeypatch.setenv("TINTYPE_KERNELS", "native")
    with pytest.raises(KernelUnavailable, match="not built; choose one of auto, reference"):
        philox_uint32(1, 3)


def test_the_variable_is_read_at_each_call(monkeypatch):
    monkeypatch.setenv("TINTYPE_KERNELS", "reference")
    assert implementation()["selected"] == "reference"
    monkeypatch.setenv("TINTYPE_KERNELS", "native")
    assert implementation()["selected"] == "native"
    monkeypatch.setenv("TINTYPE_KERNELS", "warp")
    with pytest.raises(KernelUnavailable, match="warp.*auto, native, reference"):
        philox_uint32(1, 3)
