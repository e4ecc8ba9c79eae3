"""Fixtures that many rooms share."""

from __future__ import annotations

import os

# Triton reads it once, when an op's file is first imported; "auto" never runs what is interpreted.
os.environ["TRITON_INTERPRET"] = "1"
# Processes that share the cores would only wait for each other's threads.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest

import tintype
from tiny_bundle import write_tiny_bundle


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("TINTYPE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory):
    """A bundle of random weights with the stages of a latent UNet; read-only."""
    return write_tiny_bundle(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tiny_copy(tmp_path):
    """A bundle of the test's own, to damage."""
    return write_tiny_bundle(tmp_path / "bundle")


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_bundle):
    return tintype.load(tiny_bundle)
