"""Utilities for embeddings, on numpy arrays or anything that becomes one."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float32]


def l2_normalise(embeddings: ArrayLike, axis: int = -1) -> Floats:
    """Each vector along `axis` over its length, float32; a vector of zeros stays as it is."""
    vectors = np.asarray(embeddings, np.float32)
    length = np.linalg.norm(vectors.astype(np.float64), axis=axis, keepdims=True)
    return (vectors / np.where(length == 0, 1.0, length)).astype(np.float32)


def centred(embeddings: ArrayLike, mean: ArrayLike | None = None) -> Floats:
    """Vectors [n, d] less `mean` [d], by default their own, float32."""
    vectors = np.asarray(embeddings, np.float32)
    middle = (
        vectors.mean(axis=0, dtype=np.float64) if mean is None else np.asarray(mean, np.float64)
    )
    return (vectors - middle).astype(np.float32)
