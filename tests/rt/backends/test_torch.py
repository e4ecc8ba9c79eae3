"""The eager backend: faces, threads, batches, and what happens when 16 bits overflow."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tintype
from tintype.backends import execution
from tintype.backends.torch import TorchBackend
from tintype.checkpoints import open_checkpoint
from tintype.errors import BackendUnavailable, CheckpointError, RequestError, TintypeError
from tintype.loading import BOX
from tintype.models.quantised import QuantisedLinear
from tintype_export.profiles import example_inputs
from tolerances import MODULE_FP16, MODULE_FP32, relative_error

Saved = Callable[[str], Path]
VAE = "vae/diffusion_pytorch_model.safetensors"


def noise(rows: int, size: int = 2) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, 4, size, size)).astype(np.float32)


def denoise_inputs(rows: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    return {
        "sample": noise(rows, 8),
        "timestep": np.linspace(1, 900, rows, dtype=np.float32),
        "encoder_hidden_states": random.standard_normal((rows, 77, 64)).astype(np.float32),
    }


@pytest.fixture
def backend(saved: Saved) -> TorchBackend:
    return TorchBackend(open_checkpoint(saved("sd1")), device="cpu")


@pytest.fixture
def loud(saved: Saved, tmp_path: Path) -> Path:
    """A checkpoint whose decoder is finite in float32 and overflows float16."""
    folder = Path(shutil.copytree(saved("sd1"), tmp_path / "loud"))
    tensors = {key: value.clone() for key, value in load_file(folder / VAE).items()}
    for key in ("decoder.conv_in.weight", "decoder.conv_in.bias"):
        tensors[key] *= 2.0**17
    (folder / VAE).unlink()
    save_file(tensors, folder / VAE)
    return folder


def upcast_hint(folder: Path, hint: bool) -> None:
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"force_upcast": hint}))


def test_every_stage_is_there_and_any_shape_runs(backend: TorchBackend) -> None:
    assert backend.stages == (
        "encode",
        "denoise",
        "step",
        "guided_step",
        "decode",
        "encode_image",
    )
    assert all(backend.profiles(stage) is None for stage in backend.stages)
    for size in (2, 3):
        image = backend.run("decode", "", {"latents": noise(1, size)})["image"]
        assert image.shape == (1, 8 * size, 8 * size, 3)
        assert image.dtype == np.float32
        assert 0 <= image.min() <= image.max() <= 1


def test_an_unknown_stage_is_refused_with_those_there_are(backend: TorchBackend) -> None:
    with pytest.raises(RequestError, match=r"'upscale'; it has encode, denoise"):
        backend.run("upscale", "", {})


@pytest.mark.parametrize(("stage", "make"), [("decode", None), ("denoise", denoise_inputs)])
def test_a_row_is_the_same_bytes_alone_and_in_a_batch(
    backend: TorchBackend, stage: str, make: Callable[[int], dict[str, np.ndarray]] | None
) -> None:
    inputs = make(4) if make else {"latents": noise(4)}
    (together,) = backend.run(stage, "", inputs).values()
    for row in range(4):
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        (alone,) = backend.run(stage, "", one).values()
        assert alone.tobytes() == together[row : row + 1].tobytes()


def test_a_seed_is_the_same_picture_alone_and_in_a_batch(saved: Saved) -> None:
    pipe = tintype.load(saved("sd1"))
    settings = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np"}
    batch = pipe(["red", "the", "blue", "red"], seed=[3, 4, 5, 6], **settings).images
    alone = pipe("blue", seed=5, **settings).images
    assert alone[0].tobytes() == batch[2].tobytes()


def test_threads_share_a_backend_without_disturbing_each_other(saved: Saved) -> None:
    expected = TorchBackend(open_checkpoint(saved("sd1"))).run("denoise", "", denoise_inputs(4))
    shared = TorchBackend(open_checkpoint(saved("sd1")))

    def one(row: int) -> np.ndarray:
        inputs = {name: value[row : row + 1] for name, value in denoise_inputs(4).items()}
        return shared.run("denoise", "", inputs)["model_output"]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(one, [0, 1, 2, 3] * 3))
    for index, result in enumerate(results):
        assert result.tobytes() == expected["model_output"][index % 4][None].tobytes()


def test_read_only_inputs_run_without_a_warning(backend: TorchBackend) -> None:
    latents = noise(1)
    latents.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend.run("decode", "", {"latents": latents})


def test_a_stage_that_overflows_16_bits_runs_again_in_float32(loud: Path) -> None:
    upcast_hint(loud, False)
    checkpoint = open_checkpoint(loud)
    expected = TorchBackend(checkpoint, dtype="float32").run("decode", "", {"latents": noise(2)})
    half = TorchBackend(checkpoint, dtype="float16", batch_invariant=False)
    with pytest.warns(RuntimeWarning, match="stage decode met NaN or infinity in float16"):
        actual = half.run("decode", "", {"latents": noise(2)})
    assert relative_error(actual["image"], expected["image"]) <= MODULE_FP16


def test_a_decoder_that_says_it_overflows_is_scaled_for_float16(loud: Path) -> None:
    upcast_hint(loud, True)
    checkpoint = open_checkpoint(loud)
    expected = TorchBackend(checkpoint, dtype="float32").run("decode", "", {"latents": noise(1)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = TorchBackend(checkpoint, dtype="float16").run("decode", "", {"latents": noise(1)})
    assert relative_error(actual["image"], expected["image"]) <= MODULE_FP16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_broken_weights_fail_with_the_stages_name(saved: Saved, tmp_path: Path, dtype: str) -> None:
    folder = Path(shutil.copytree(saved("sd1"), tmp_path / "broken"))
    tensors = {key: value.clone() for key, value in load_file(folder / VAE).items()}
    tensors["decoder.conv_in.bias"][0] = torch.nan
    (folder / VAE).unlink()
    save_file(tensors, folder / VAE)
    backend = TorchBackend(open_checkpoint(folder), dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with pytest.raises(TintypeError, match="stage decode met NaN or infinity in float32"):
            backend.run("decode", "", {"latents": noise(1)})


def test_a_tokenizer_of_another_model_is_told_from_its_ids(backend: TorchBackend) -> None:
    ids = np.full((1, 77), 49407)
    with pytest.raises(
        CheckpointError, match="tokenizer gives id 49407, the text encoder knows 518"
    ):
        backend.run("encode", "", {"input_ids": ids})


@pytest.mark.parametrize("options", [{"dtype": "float8"}, {"device": "abacus"}], ids=str)
def test_unknown_options_say_what_there_is(saved: Saved, options: dict[str, str]) -> None:
    with pytest.raises(RequestError, match="choose auto"):
        TorchBackend(open_checkpoint(saved("sd1")), **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_named(saved: Saved) -> None:
    with pytest.raises(BackendUnavailable, match="cuda"):
        TorchBackend(open_checkpoint(saved("sd1")), device="cuda")


def test_a_compiled_stage_gives_what_the_eager_one_gives(saved: Saved) -> None:
    checkpoint, latents = open_checkpoint(saved("sd1")), {"latents": noise(1, 2)}
    expected = TorchBackend(checkpoint).run("decode", "", latents)["image"]
    actual = TorchBackend(checkpoint, execution="compiled").run("decode", "", latents)["image"]
    assert relative_error(actual, expected) < MODULE_FP32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"execution": "graph"}, "needs a CUDA device"),
        ({"execution": "lazy"}, "choose one of eager, compiled, graph"),
        ({"execution": "compiled", "offload": "model"}, "leave out offload"),
    ],
    ids=str,
)
def test_executions_that_cannot_be_are_refused(saved: Saved, options, message) -> None:
    with pytest.raises(RequestError, match=message):
        TorchBackend(open_checkpoint(saved("sd1")), **options)


class PlayedGraph:
    """A CUDA graph whose replay does again what was captured."""

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        outputs = self.call(*self.inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for own, new in zip(self.outputs, outputs, strict=True):
            own.copy_(new)


@pytest.fixture
def captured(monkeypatch) -> list[PlayedGraph]:
    """The graphs in the order of their capture, which needs a GPU; what surrounds it is the same on any device."""
    graphs = []

    def capture(self, call, inputs):
        self._inputs = [tensor.clone() for tensor in inputs]
        outputs = call(*self._inputs)
        self.outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        self._graph = PlayedGraph()
        self._graph.call, self._graph.inputs, self._graph.outputs = (
            call,
            self._inputs,
            self.outputs,
        )
        graphs.append(self._graph)

    monkeypatch.setattr(execution._Capture, "__init__", capture)
    return graphs


def test_a_replayed_call_takes_new_inputs_and_keeps_what_it_gave(captured) -> None:
    replayed = execution.Replayed(lambda x, y: (x + y, x * y))
    first = replayed(torch.ones(2), torch.full((2,), 3.0))
    second = replayed(torch.full((2,), 5.0), torch.full((2,), 2.0))
    assert [t.tolist() for t in first] == [[4, 4], [3, 3]]
    assert [t.tolist() for t in second] == [[7, 7], [10, 10]]
    assert [graph.replays for graph in captured] == [2]
    replayed(torch.ones(3), torch.ones(3))
    assert len(captured) == 2


REMEMBERING = pytest.mark.parametrize(
    ("family", "stage"),
    [
        *product(("sd1", "sdxl", "sd3", "sd35"), ("denoise", "step", "guided_step")),
        *product(("flux-dev",), ("denoise", "step")),
        *product(("unclip",), ("denoise", "step", "guided_step", "prior", "prior_step")),
        *product(("unclip",), ("prior_guided_step", "enlarge", "enlarge_last_step")),
    ],
)


@pytest.fixture
def given(saved: Saved, family: str, stage: str):
    """The module of a stage, and what gives its changing inputs and what it is told."""
    checkpoint = open_checkpoint(saved(family))
    module = TorchBackend(checkpoint).module(stage).double()  # these models amplify rounding

    def changing_and_told(seed):
        arrays = example_inputs(checkpoint, module.inputs, stage, "32x32-b2", seed=seed)
        tensors = [torch.from_numpy(arrays[name]) for name in module.inputs]
        return tensors[: module.changing], tensors[module.changing :]

    return module, changing_and_told


@REMEMBERING
def test_what_a_picture_tells_is_worked_out_once_for_all_its_steps(given, captured) -> None:
    module, changing_and_told = given
    (first, told), (second, others) = changing_and_told(0), changing_and_told(1)
    replayed = execution.prepared(module, "graph", torch.device("cuda"))
    with torch.inference_mode():
        for changing, pairs, tellings in (
            (first, told, 1),
            (second, told, 1),
            (second, others, 2),
            (first, [t.clone() for t in others], 3),  # inference tensors do not say if they changed
            (first, told, 4),
        ):
            expected = module(*changing, *pairs)
            expected = expected if isinstance(expected, tuple) else (expected,)
            for found, right in zip(replayed(*changing, *pairs), expected, strict=True):
                assert relative_error(found, right) < 1e-5
            assert captured[0].replays == tellings
        told[0] *= 2
        replayed(*first, *told)
        assert captured[0].replays == 5
    assert len(captured) == 2


@REMEMBERING
@torch.no_grad()
def test_what_times_tell_is_worked_out_once_where_they_are_known_before(given, captured) -> None:
    module, changing_and_told = given
    (changing, told), (_, others) = changing_and_told(0), changing_and_told(1)
    replayed = execution.prepared(module, "graph", torch.device("cuda"))
    asked = []
    at = module.at
    module.at = lambda remembered, times: asked.append(times.shape) or at(remembered, times)

    def compared(time, told, times):
        module.time(*changing)[:] = time
        expected = module(*changing, *told)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for found, right in zip(replayed(*changing, *told, times=times), expected, strict=True):
            assert relative_error(found, right) < 1e-5

    times, others_times = torch.tensor([999.0, 500.5, 1.0]), torch.linspace(1000, 0, 64)
    compared(500.5, told, times)
    worked_out = len(asked)
    for time in (999.0, 1.0, 500.5):
        compared(time, told, times)
    assert len(asked) == worked_out  # no step asks again, and no graph was captured that does
    compared(1.0, others, times)
    compared(float(others_times[7]), others, others_times)
    assert len(asked) == worked_out + 2
    assert len(captured) == 2
    compared(float(times[1]), told, torch.linspace(1, 500.5, 1000))  # for which there is no room
    assert len(captured) == 4


@pytest.mark.parametrize(("dtype", "limit"), [("int8", 0.03), ("fp8", 0.08), ("int4", 0.3)])
def test_the_denoisers_linear_layers_are_kept_in_codes_where_asked(
    dtype: str, limit: float
) -> None:
    checkpoint, random = open_checkpoint(BOX / "postcard"), np.random.default_rng(1)
    inputs = {
        "sample": random.standard_normal((1, 4, 16, 16), np.float32),
        "timestep": np.array([500.0], np.float32),
        "encoder_hidden_states": random.standard_normal((1, 77, 192), np.float32),
    }
    expected = TorchBackend(checkpoint).run("denoise", "", inputs)["model_output"]
    backend = TorchBackend(checkpoint, dtype=dtype)
    actual = backend.run("denoise", "", inputs)["model_output"]
    assert 1e-4 < relative_error(actual, expected) < limit
    layers = [m for m in backend.module("denoise").modules() if isinstance(m, QuantisedLinear)]
    assert {layer.scheme.weights for layer in layers} == {dtype}
    decoder = backend.module("decode").modules()
    assert not any(isinstance(module, QuantisedLinear) for module in decoder)


@torch.no_grad()
def test_large_pictures_are_encoded_in_diffusers_tiles(saved: Saved) -> None:
    image = np.random.default_rng(2).random((1, 528, 640, 3), np.float32)
    # In float64: over a tile's 512x512 pixels PyTorch's own group norm is 3e-5 off in float32.
    theirs = diffusers.AutoencoderKL.from_pretrained(saved("sd1") / "vae").double()
    theirs.enable_tiling()
    # What a published autoencoder of 512 pixels has.
    theirs.tile_sample_min_size, theirs.tile_latent_min_size = 512, 64
    pixels = torch.from_numpy(image).permute(0, 3, 1, 2).double() * 2 - 1
    expected = theirs.encode(pixels).latent_dist.mean * theirs.config.scaling_factor
    errors = {}
    for tiled in (False, True):
        ours = TorchBackend(open_checkpoint(saved("sd1")), device="cpu", vae_tiling=tiled)
        actual = ours.run("encode_image", "", {"image": image})["latents"]
        errors[tiled] = relative_error(actual, expected)
    assert errors[True] <= MODULE_FP32 < errors[False]
