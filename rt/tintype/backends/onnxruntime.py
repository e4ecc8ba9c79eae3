"""Runs a bundle's ONNX graphs with onnxruntime; weights stay in the safetensors files that the graphs point into."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from tintype.backends import Arrays
from tintype.backends.onnx_weights import weight_files
from tintype.bundle import MANIFEST, Bundle
from tintype.errors import BackendUnavailable, BundleError, ProfileError, RequestError

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxRuntimeBackend:
    """One session a (stage, profile), made once, at its first use, shared by all threads.

    With `batch_invariant` (None: on CPU) every picture goes through the same profile by itself.
    """

    name = "onnxruntime"

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str = "auto",
        dtype: str = "auto",
        batch_invariant: bool | None = None,
    ) -> None:
        if dtype not in ("auto", bundle.precision, {"fp32": "float32"}.get(bundle.precision)):
            raise RequestError(f"dtype={dtype!r}: this bundle was exported in {bundle.precision}")
        self.bundle = bundle
        self._provider = _provider(device)
        on_cpu = self._provider == _PROVIDERS["cpu"]
        self.batch_invariant = on_cpu if batch_invariant is None else batch_invariant
        self._sessions: dict[tuple[str, str], Future[ort.InferenceSession]] = {}
        self._lock = threading.Lock()

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(self.bundle.stages)

    def profiles(self, stage: str) -> list[str]:
        return list(self.bundle.stages[stage])

    def compile(self, stage: str, profile: str) -> None:
        """Begin making the session in a thread of its own: graph optimisation is serial and holds no GIL."""
        self._session(
            stage, profile, lambda work: threading.Thread(target=work, daemon=True).start()
        )

    def run(self, stage: str, profile: str, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        session = self._session(stage, profile, lambda work: work()).result()
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))

    def _session(
        self, stage: str, profile: str, begin: Callable[[Callable[[], None]], None]
    ) -> Future[Any]:
        with self._lock:
            future = self._sessions.get((stage, profile))
            if future is not None and not (future.done() and future.exception()):
                return future
            future = self._sessions[stage, profile] = Future()
        begin(lambda: self._fulfil(future, stage, profile))
        return future

    def _fulfil(self, future: Future[ort.InferenceSession], stage: str, profile: str) -> None:
        try:
            future.set_result(self._open(stage, profile))
        except Exception as error:  # whoever waits for the session gets it
            future.set_exception(error)

    def _open(self, stage: str, profile: str) -> ort.InferenceSession:
        relative = self.bundle.stages[stage].get(profile)
        if relative is None:
            raise ProfileError(
                f"stage {stage} has no profile {profile}; it has {', '.join(self.profiles(stage))}"
            )
        options = ort.SessionOptions()
        options.intra_op_num_threads = _cores()
        # Waiting threads that spin take the cores from the other stages' sessions, and from other processes.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Graphs name their weights relative to the bundle's root. onnxruntime refuses paths that leave the
        # graph's own folder, and its older versions heed this entry only for a graph given as bytes.
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self.bundle.folder)
        )
        graph = self._graph(relative)
        try:
            return ort.InferenceSession(graph, options, providers=[self._provider])
        except Exception as error:  # onnxruntime's own classes share no public base
            raise BundleError(f"{self.bundle.folder}: {relative} does not load: {error}") from error

    def _graph(self, relative: str) -> bytes:
        """A graph's bytes, once every file that it points into is known to be one of the bundle's."""
        graph = self.bundle.path(relative).read_bytes()
        try:
            locations = weight_files(graph)
        except BundleError as error:
            raise BundleError(f"{self.bundle.folder}: {relative} does not load: {error}") from error
        if strange := sorted(locations - self.bundle.files.keys()):
            raise BundleError(
                f"{self.bundle.folder}: {relative} points to {strange[0]!r}, which {MANIFEST} does not list"
            )
        return graph


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _provider(device: str) -> str:
    name = "cpu" if device == "auto" else device.split(":", maxsplit=1)[0]
    if name not in _PROVIDERS:
        raise RequestError(
            f"device={device!r} is unknown to onnxruntime; choose one of auto, {', '.join(_PROVIDERS)}"
        )
    if _PROVIDERS[name] not in ort.get_available_providers():
        raise BackendUnavailable(
            f'device={device!r} needs onnxruntime-gpu; install it with: pip install "tintype[gpu]"'
        )
    return _PROVIDERS[name]
