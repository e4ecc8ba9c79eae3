"""Opening a bundle and making its pipeline: `pytest bench/test_bundle_loading.py`.

A bundle is hashed when this machine first sees it and then known by sizes and times.
"""
# ruff: noqa: ANN001, ANN201, ANN202

from __future__ import annotations

import numpy as np
import pytest

import tintype
from tintype.bundle import open_bundle
from tintype.loading import BOX

POSTCARD = BOX / "postcard"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """What this machine has hashed is remembered for the test alone."""
    monkeypatch.setenv("TINTYPE_CACHE", str(tmp_path))


def test_open_remembered(benchmark):
    open_bundle(POSTCARD)
    benchmark(open_bundle, POSTCARD)


def test_open_and_hash(benchmark):
    benchmark(open_bundle, POSTCARD, remember=False)
    files = open_bundle(POSTCARD).files
    benchmark.extra_info["megabytes"] = sum(entry["size"] for entry in files.values()) / 1e6


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_load(benchmark, backend):
    """A pipeline that has opened no graph yet."""
    pytest.importorskip(backend)
    benchmark(tintype.load, POSTCARD, backend=backend)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_first_run_of_the_denoiser(benchmark, backend):
    """Its graph is made ready and run once."""
    pytest.importorskip(backend)
    rng = np.random.default_rng(0)
    inputs = {
        "sample": rng.standard_normal((2, 4, 16, 16), np.float32),
        "timestep": np.full(2, 500, np.float32),
        "encoder_hidden_states": rng.standard_normal((2, 77, 192), np.float32),
    }
    benchmark.pedantic(
        lambda pipe: pipe.family.backend.run("denoise", "128x128-b2", inputs),
        setup=lambda: ((tintype.load(POSTCARD, backend=backend),), {}),
        rounds=5,
    )
