"""A bundle's ONNX graphs as bytes, each checked to read no file but the bundle's own."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tintype.backends.onnx_weights import weight_files
from tintype.bundle import MANIFEST, Bundle
from tintype.errors import BundleError, ProfileError

if TYPE_CHECKING:
    from tintype.backends.updated_weights import UpdatedWeights


def graph_file(stages: Mapping[str, Mapping[str, str]], stage: str, profile: str) -> str:
    """The file of a stage at a profile, relative to the bundle."""
    profiles = stages[stage]
    if profile not in profiles:
        raise ProfileError(f"stage {stage} has no profile {profile}; it has {', '.join(profiles)}")
    return profiles[profile]


def read_graph(bundle: Bundle, relative: str) -> bytes:
    """A graph's bytes, once every file that it points into is known to be one of the bundle's."""
    try:
        graph = bundle.path(relative).read_bytes()
    except OSError as error:
        raise BundleError(
            f"{bundle.folder}: {relative} cannot be read any more ({error.strerror}); was the bundle moved?"
        ) from error
    try:
        locations = weight_files(graph)
    except BundleError as error:
        raise BundleError(f"{bundle.folder}: {relative} does not load: {error}") from error
    if strange := sorted(locations - bundle.files.keys()):
        raise BundleError(
            f"{bundle.folder}: {relative} points to {strange[0]!r}, which {MANIFEST} does not list"
        )
    return graph


# How a graph calls what a convolution gives, rounded to whole steps of each channel.
WHOLE_STEPS = ".output.steps"


class MappedWeights:
    """A bundle's weight files in memory: each mapped once, however many graphs read it, while this object lives.

    What was ``updated`` is placed where it is instead.
    """

    def __init__(self, bundle: Bundle, updated: UpdatedWeights | None = None) -> None:
        self._bundle = bundle
        self._updated = updated
        self._maps: dict[str, NDArray[np.uint8]] = {}
        self._lock = threading.Lock()

    def place(self, location: str, offset: int, length: int | None) -> tuple[int, int]:
        """The address of `length` bytes (None: the rest) of a file from `offset`, and how many they are."""
        data = self.find(location, offset, length)
        return int(data.ctypes.data), len(data)

    def find(self, location: str, offset: int, length: int | None) -> NDArray[np.uint8]:
        """`length` bytes (None: the rest) of a file from `offset`."""
        if self._updated is not None:
            new = self._updated.find(location, offset, length)
            if new is not None:
                return new
        data = self._map(location)
        size = len(data) - offset if length is None else length
        if min(offset, size) < 0 or offset + size > len(data):
            raise BundleError(
                f"{self._bundle.folder}: a graph reads bytes {offset} to {offset + size} of {location}, "
                f"which has {len(data)}"
            )
        return data[offset:][:size]

    def _map(self, location: str) -> NDArray[np.uint8]:
        with self._lock:
            if location not in self._maps:
                with self._bundle.path(location).open("rb") as stream:
                    mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
                self._maps[location] = np.frombuffer(mapped, np.uint8)
            return self._maps[location]
