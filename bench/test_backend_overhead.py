"""What a backend adds to its engine's own call: `pytest bench/test_backend_overhead.py`.

Each group holds one engine: our backend, and a session of its own on the same graph of the model in the box.
"""
# ruff: noqa: ANN001, ANN201

from __future__ import annotations

import numpy as np
import pytest

import tintype
from tintype.bundle import open_bundle
from tintype.loading import BOX
from tintype_bench.runners.plain_graphs import session
from tintype_bench.work import Runner

BUNDLE = open_bundle(BOX / "postcard")
IDS = {"input_ids": np.full((1, 77), 5, np.int64)}


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("who", ["tintype", "engine"])
def test_encode(benchmark, engine, who):
    """The text encoder, the smallest graph, where what is added weighs most."""
    pytest.importorskip(engine)
    benchmark.group = f"encode on {engine}"
    if who == "tintype":
        backend = tintype.load(BUNDLE.folder, backend=engine).family.backend
        benchmark(backend.run, "encode", "b1", IDS)
    else:
        benchmark(session(BUNDLE, "encode", "b1", Runner(engine)), IDS)
