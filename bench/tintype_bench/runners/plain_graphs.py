"""onnxruntime and OpenVINO alone: their own sessions with their own defaults on a bundle's graphs, in a plain loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tintype.backends.graphs import graph_file, read_graph
from tintype.bundle import Bundle, open_bundle
from tintype.errors import RequestError
from tintype.profiles import Profile
from tintype.schedulers import default_name, make_table
from tintype.tokenizer import ClipTokenizer
from tintype_bench.runners import Pictures, Running
from tintype_bench.runners.component import denoiser_inputs
from tintype_bench.work import Runner, Work

Arrays = Mapping[str, NDArray[Any]]
Session = Callable[[Arrays], NDArray[np.float32]]  # inputs -> the first output


def load(work: Work, runner: Runner) -> Running:
    """Sessions of the bundle's graphs, made by the engine that the runner names."""
    bundle = open_bundle(runner.bundle)
    if bundle.family != "latent_unet" or "encode_2" in bundle.stages:
        raise RequestError(
            f"{runner.kind} alone drives a UNet with one text encoder; {bundle.name} is another kind"
        )
    if runner.kind == "openvino" and runner.device != "cpu":
        raise RequestError(f"openvino alone is timed on cpu; asked was {runner.device}")
    kind = PlainComponent if work.component else PlainPictures
    return kind(bundle, work, runner)


def session(bundle: Bundle, stage: str, profile: str, runner: Runner) -> Session:
    """The engine's own session of one graph, with its own defaults."""
    make = _openvino_session if runner.kind == "openvino" else _onnxruntime_session
    return make(bundle, graph_file(bundle.stages, stage, profile), runner)


def _onnxruntime_session(bundle: Bundle, relative: str, runner: Runner) -> Session:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(bundle.folder)
    )
    provider = "CPUExecutionProvider" if runner.device == "cpu" else "CUDAExecutionProvider"
    opened = ort.InferenceSession(read_graph(bundle, relative), options, providers=[provider])
    return lambda inputs: np.asarray(opened.run(None, dict(inputs))[0])


def _openvino_session(bundle: Bundle, relative: str, runner: Runner) -> Session:
    """Its loader follows paths from the graph's own folder, so the graph is handed over with its weights in it."""
    import openvino as ov

    from tintype.backends.graphs import MappedWeights
    from tintype.backends.onnx_weights import read_from_memory

    kept = MappedWeights(bundle)
    core = ov.Core()
    model = core.read_model(read_from_memory(read_graph(bundle, relative), kept.place))
    precision = "bf16" if runner.precision == "bf16" else "f32"
    options = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(model, "CPU", options)
    request = compiled.create_infer_request()

    def run(inputs: Arrays, kept: Any = kept) -> NDArray[np.float32]:  # the weights live as long
        return np.array(request.infer(dict(inputs))[compiled.output(0)])

    return run


class _Graphs:
    """The sessions, each made when it is first needed."""

    def __init__(self, bundle: Bundle, runner: Runner) -> None:
        self._of = cache(lambda stage, profile: session(bundle, stage, profile, runner))

    def run(self, stage: str, profile: str, inputs: Arrays) -> NDArray[np.float32]:
        result: NDArray[np.float32] = self._of(stage, profile)(inputs)
        return result


class PlainPictures:
    """Whole pictures, one after the other: encode both texts, walk the table in numpy, decode."""

    def __init__(self, bundle: Bundle, work: Work, runner: Runner) -> None:
        self._graphs = _Graphs(bundle, runner)
        self._tokenize = ClipTokenizer(bundle.path(bundle.tokenizers[0]))
        config = {"clip_sample": False, **bundle.scheduler}
        name = work.scheduler or bundle.defaults.get("scheduler") or default_name(config)
        self._table = make_table(name, config, work.steps)
        self._work = work
        channels = int(bundle.defaults.get("latent_channels", 4))
        self._noise = work.latents(channels, int(bundle.defaults.get("latent_factor", 8)))
        self._timings: dict[str, float] = {}

    def run(self) -> Pictures:
        self._timings = {}
        return np.concatenate([self._picture(noise[None]) for noise in self._noise])

    def stages(self) -> dict[str, float]:
        self.run()
        return self._timings

    def _picture(self, noise: NDArray[np.float32]) -> NDArray[np.float32]:
        work = self._work
        texts = [self._run("encode", "b1", input_ids=self._tokenize(t)) for t in ("", work.prompt)]
        latents = self._walk(noise, np.concatenate(texts))
        return self._run("decode", Profile(work.width, work.height, 1).name, latents=latents)

    def _walk(self, noise: NDArray[np.float32], text: NDArray[np.float32]) -> NDArray[np.float32]:
        table, guided = self._table, self._work.guidance > 1
        rows = 2 if guided else 1
        profile = Profile(self._work.width, self._work.height, rows).name
        x = np.float32(table.init_scale) * noise
        history: list[NDArray[np.float32]] = []
        for step, row in enumerate(table.rows):
            sample = np.repeat(np.float32(table.c_in[step]) * x, rows, axis=0)
            told = np.full(rows, table.timesteps[step], np.float32)
            hidden = text if guided else text[1:]
            m = self._run(
                "denoise", profile, sample=sample, timestep=told, encoder_hidden_states=hidden
            )
            g = m[:1] + np.float32(self._work.guidance) * (m[1:] - m[:1]) if guided else m
            history = [np.float32(row.u_x) * x + np.float32(row.u_m) * g, *history][
                : len(row.b) + 1
            ]
            moved = sum(np.float32(b) * h for b, h in zip(row.b, history, strict=False))
            x = np.float32(row.a) * x + np.float32(row.c) * g + moved
        return np.asarray(x, np.float32)

    def _run(self, stage: str, profile: str, **inputs: NDArray[Any]) -> NDArray[np.float32]:
        begin = time.perf_counter()
        output = self._graphs.run(stage, profile, inputs)
        self._timings[stage] = self._timings.get(stage, 0.0) + time.perf_counter() - begin
        return output


class PlainComponent:
    """One call of the denoiser."""

    def __init__(self, bundle: Bundle, work: Work, runner: Runner) -> None:
        self._graphs = _Graphs(bundle, runner)
        self._profile = Profile(work.width, work.height, work.batch).name
        self._inputs = denoiser_inputs(work)

    def run(self) -> Pictures:
        return self._graphs.run("denoise", self._profile, self._inputs)

    def stages(self) -> dict[str, float]:
        return {}
