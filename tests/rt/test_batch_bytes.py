"""A seed's picture is the same bytes alone and anywhere in any batch, on the model in the box and every CPU backend.

`TINTYPE_DRAWS=1000 pytest tests/rt/test_batch_bytes.py` draws as many as docs/measurements.md reports.
"""

from __future__ import annotations

import os

import numpy as np
import pytest

import tintype

DRAWS = int(os.environ.get("TINTYPE_DRAWS", "12"))
PROMPTS = (
    "a red lighthouse on a rocky coast at dusk",
    "two white pines in the snow",
    "",
    "three blue boats, misty morning, sea, on the left",
    "an orange castle at night under the moon",
)
SETTINGS = {"num_inference_steps": 2, "output_type": "np"}


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "torch"])
def test_bytes_do_not_depend_on_the_batch(backend):
    pipeline = tintype.load("postcard", backend=backend)
    rng, drawn = np.random.default_rng(7), 0
    while drawn < DRAWS:
        size = int(rng.integers(1, 9))
        texts = [PROMPTS[i] for i in rng.integers(len(PROMPTS), size=size)]
        seeds = [int(seed) for seed in rng.integers(2**63, size=size)]
        together = pipeline(texts, seed=seeds, **SETTINGS).images
        for text, seed, image in zip(texts, seeds, together, strict=True):
            alone = pipeline(text, seed=seed, **SETTINGS).images[0]
            assert alone.tobytes() == image.tobytes(), (size, text, seed)
        drawn += size
