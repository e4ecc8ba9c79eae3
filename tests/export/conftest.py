"""Fixtures of the export tests."""

from __future__ import annotations

import pytest

from remembered_traces import remembered_trace
from tintype_export import bundle as exporting


@pytest.fixture
def traced_once(monkeypatch):
    """Stages of the smallest checkpoint are traced once for all tests."""
    monkeypatch.setattr(exporting, "trace", remembered_trace)
