"""What a backend adds to its engine's own call, or saves of it: `pytest bench/test_backend_overhead.py`.

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
_DRAW = np.random.default_rng(0).standard_normal
STEP = {
    "sample": _DRAW((1, 4, 16, 16), np.float32),
    "history": np.zeros((1, 3, 4, 16, 16), np.float32),
    "row": np.array([[500, 1, 4, 0, 1, 9, 1, -0.1, 0, 0, 0, 0, 0]], np.float32),
    "noise": np.zeros((1, 4, 16, 16), np.float32),
    "encoder_hidden_states": _DRAW((1, 2, 77, 192), np.float32),
}


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("who", ["tintype", "engine"])
@pytest.mark.parametrize(
    ("stage", "profile", "inputs"),
    [("encode", "b1", IDS), ("guided_step", "128x128-b1", STEP)],
    ids=["encode", "guided_step"],
)
def test_a_call(benchmark, engine, who, stage, profile, inputs):
    """The text encoder, the smallest graph, where what is added weighs most; and a step, whose text ours makes once."""
    pytest.importorskip(engine)
    benchmark.group = f"{stage} on {engine}"
    if who == "tintype":
        backend = tintype.load(BUNDLE.folder, backend=engine).family.backend
        benchmark(backend.run, stage, profile, inputs)
    else:
        benchmark(session(BUNDLE, stage, profile, Runner(engine)), inputs)
