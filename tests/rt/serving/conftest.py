"""The model in the box behind a server, and beside it."""

from __future__ import annotations

import pytest

import tintype
from served import served


@pytest.fixture(scope="session")
def postcard():
    """The same model without a server, whose pictures are what is expected."""
    return tintype.load("postcard", backend="onnxruntime")


@pytest.fixture(scope="session")
def server(postcard):
    with served(tintype.load("postcard", backend="onnxruntime")) as running:
        yield running


@pytest.fixture
def client(server):
    return server.client
