"""Latents to a picture by bundles in one precision and another: `pytest bench/test_decoding.py`.

Of the model in the box, or of the bundles that TINTYPE_BUNDLES names, as PATH does: one group a backend, three rounds.
"""
# ruff: noqa: ANN001, ANN201

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tintype.bundle import open_bundle
from tintype.loading import BOX, bundle_pipeline
from tintype.profiles import Profile

FOLDERS = os.environ.get("TINTYPE_BUNDLES", str(BOX / "postcard")).split(os.pathsep)
BUNDLES = {Path(folder).name: folder for folder in FOLDERS}
ROUNDS = 3


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", BUNDLES)
def test_decode(benchmark, name, backend):
    pytest.importorskip(backend)
    bundle = open_bundle(BUNDLES[name], check_hashes=False)
    (profile, *_) = bundle.stages["decode"]
    size, family = Profile.parse(profile), bundle_pipeline(bundle, backend).family
    shape = (1, *family.latent_shape(size.width, size.height))
    latents = np.random.default_rng(0).standard_normal(shape, np.float32)
    engine = family.backend
    benchmark.group = f"decode {profile} on {engine.name}"
    benchmark.extra_info |= {"precision": bundle.precision, "computes": engine.dtype}
    benchmark.pedantic(
        engine.run, ("decode", profile, {"latents": latents}), rounds=ROUNDS, warmup_rounds=1
    )
