"""What needs a CUDA GPU. Run by itself: `tests/kernels` has Triton interpret, in the whole process."""

from __future__ import annotations

import os

import pytest
import torch


def pytest_runtest_setup():
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA GPU")
    if os.environ.get("TRITON_INTERPRET"):
        pytest.skip("Triton interprets in this process; run tests/gpu by itself")
