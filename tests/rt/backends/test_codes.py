"""Sums of products of int8 codes are right on every CPU, whatever it adds them up in."""

from __future__ import annotations

from importlib import import_module

import pytest

from tintype.backends.codes import LARGEST_CODE, LARGEST_IN_16_BITS

BACKENDS = {"onnxruntime": "OnnxRuntimeBackend", "openvino": "OpenVinoBackend"}


@pytest.mark.parametrize("name", BACKENDS)
def test_products_of_codes_that_weights_are_held_to_are_right_on_every_cpu(name):
    pytest.importorskip(name)
    module = import_module(f"tintype.backends.{name}")
    assert module.adds_codes(LARGEST_IN_16_BITS)
    fewer = None if module.adds_codes(LARGEST_CODE) else LARGEST_IN_16_BITS
    for device in ("auto", "cpu"):
        assert getattr(module, BACKENDS[name]).largest_code(device) == fewer


def test_openvino_multiplies_all_codes_on_other_devices():
    backend = pytest.importorskip("tintype.backends.openvino").OpenVinoBackend
    assert backend.largest_code("CPU") == backend.largest_code("cpu")
    assert backend.largest_code("gpu") is None
