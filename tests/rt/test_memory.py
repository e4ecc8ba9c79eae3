"""Predicted memory against what torch's profiler sees its allocator give while a real picture is made."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

import small_checkpoints
import small_flow_checkpoints as small
import small_unclip_checkpoint
import tintype
from tintype import memory
from tintype.backends import slicing
from tintype.backends.offloading import OFFLOADS
from tintype.checkpoints import open_checkpoint
from tintype.cli import BAD_USAGE, main
from tintype.commands import inspect
from tintype.errors import ProfileError, RequestError
from tintype.steps import STEPS
from tolerances import MODULE_FP32, relative_error

SIZE = {"width": 128, "height": 96}
REQUEST = {**SIZE, "num_inference_steps": 1, "seed": 0, "output_type": "np"}
KINDS = ["sd35", "flux-dev"]


@pytest.fixture(scope="module", params=KINDS)
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.save(request.param, tmp_path_factory.mktemp("memory") / "model")


def allocated(pipeline: Any, trace: Path, **request: Any) -> int:
    """The most bytes that a call had from the allocator at once, beside the weights that were there before."""
    pipeline("", **REQUEST | request)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, profile_memory=True) as profiler:
        pipeline("", **REQUEST | request)
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    found = [each["args"] for each in events if each["name"] == "[memory]"]
    live: dict[int, int] = {}
    most = 0
    for event in sorted(found, key=lambda event: event["Ev Idx"]):
        if event["Bytes"] > 0:
            live[event["Addr"]] = event["Bytes"]
            most = max(most, sum(live.values()))
        else:  # of memory from before, whose size torch may remember from another trace, nothing counts
            live.pop(event["Addr"], None)
    return most


def weights(pipeline: Any) -> int:
    """The bytes of the weights that are loaded."""
    modules = pipeline.family.backend._components.values()
    return sum(t.nbytes for module in modules for t in module.state_dict().values())


@pytest.mark.parametrize("offload", [None, *OFFLOADS])
def test_the_prediction_is_within_a_tenth_of_what_is_measured(
    folder: Path, tmp_path: Path, offload: str | None
) -> None:
    predicted = memory.predict(open_checkpoint(folder), **SIZE, offload=offload)["peak"]
    pipeline = tintype.load(folder, device="cpu", batch_invariant=False, offload=offload)
    measured = allocated(pipeline, tmp_path / "trace.json")
    measured += 0 if offload else weights(pipeline)
    assert predicted == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("offload", [None, *OFFLOADS])
def test_a_cascades_prediction_is_within_a_tenth_of_what_is_measured(
    tmp_path: Path, offload: str | None
) -> None:
    source = small_unclip_checkpoint.save("unclip", tmp_path / "model")
    size = {"width": 32, "height": 32}
    predicted = memory.predict(open_checkpoint(source), **size, offload=offload)["peak"]
    pipeline = tintype.load(source, device="cpu", batch_invariant=False, offload=offload)
    measured = allocated(pipeline, tmp_path / "trace.json", **size)
    measured += 0 if offload else weights(pipeline)
    assert predicted == pytest.approx(measured, rel=0.1)


def test_tiles_bound_what_decoding_takes(tmp_path: Path) -> None:
    source = small.save("flux-dev", tmp_path / "model")
    size = {"width": 1024, "height": 528}
    checkpoint, peaks = open_checkpoint(source), {}
    for tiled in (False, True):
        peaks[tiled] = memory.predict(checkpoint, **size, vae_tiling=tiled)["decode"]
    assert peaks[True] < 0.7 * peaks[False]
    pipeline = tintype.load(source, device="cpu", batch_invariant=False, vae_tiling=True)
    measured = allocated(pipeline, tmp_path / "trace.json", **size) + weights(pipeline)
    assert peaks[True] == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("attention", ["fused", "whole", "sliced"])
def test_scores_are_predicted_with_a_kernel_that_spares_them_and_without(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attention: memory.Attention
) -> None:
    monkeypatch.setattr(slicing, "SCORES", 1 << 14)
    setting = {"offload": "sequential"}
    predicted = memory.predict(open_checkpoint(folder), **SIZE, **setting, attention=attention)
    setting |= {"device": "cpu", "attention_slicing": attention == "sliced"}
    pipeline = tintype.load(folder, batch_invariant=False, **setting)
    with nullcontext() if attention == "fused" else sdpa_kernel(SDPBackend.MATH):
        # Decoding a picture of this size takes more than any attention, and its text is remembered.
        measured = allocated(pipeline, tmp_path / "trace.json", output_type="latent")
    (step,) = (predicted[stage] for stage in STEPS if stage in predicted)
    assert step == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloading_changes_no_picture(folder: Path, offload: str) -> None:
    expected = tintype.load(folder)("red", **REQUEST).images
    pipeline = tintype.load(folder, device="cpu", offload=offload)
    for _ in range(2):
        # Sums run in another order where weights lie elsewhere in memory.
        actual = pipeline("red", **REQUEST).images
        assert relative_error(actual, expected) <= MODULE_FP32


@pytest.mark.parametrize("offload", OFFLOADS)
def test_what_is_computed_in_float32_waits_as_it_is_stored(tmp_path: Path, offload: str) -> None:
    source = small.save("sd35", tmp_path / "model")
    for path in source.glob("*/*.safetensors"):
        halves = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
        save_file(halves, path, metadata={"format": "pt"})
    expected = tintype.load(source, device="cpu")("red", **REQUEST).images
    pipeline = tintype.load(source, device="cpu", offload=offload)
    assert relative_error(pipeline("red", **REQUEST).images, expected) <= MODULE_FP32
    if offload == "sequential":  # of the other, the last component that ran is still there
        components = pipeline.family.backend._components.values()
        assert {p.dtype for each in components for p in each.parameters()} == {torch.bfloat16}


def test_sequential_offloading_holds_a_block_and_the_next(tmp_path: Path) -> None:
    source = small.save("sd35", tmp_path / "model")
    pipeline = tintype.load(source, device="cpu", offload="sequential")
    module = pipeline.family.backend.module("denoise").transformer
    home = {name: value.data_ptr() for name, value in module.named_parameters()}
    seen = []

    def away(*_: Any) -> None:
        names = {n for n, value in module.named_parameters() if value.data_ptr() != home[n]}
        seen.append({n.split(".")[1] for n in names if n.startswith("transformer_blocks.")})

    for block in module.transformer_blocks:
        block.norm1.register_forward_hook(away)
    pipeline("red", **REQUEST)
    assert seen[:2] == [{"0", "1"}, {"1"}]
    assert {n: value.data_ptr() for n, value in module.named_parameters()} == home


def test_inspect_prints_every_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = small.save("flux-dev", tmp_path / "model")
    assert main(["inspect", str(source), "--memory", "--size", "128x96", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["memory"]
    assert [{name: row[name] for name in inspect._SETTING} for row in rows] == memory.settings()
    peaks = {row["offload"]: row["peak"] for row in rows if not row["vae_tiling"]}
    assert peaks["sequential"] <= peaks["model"] < peaks[None]
    (line,) = inspect._memory_lines(rows[-1] | {"peak": 1.2e9})
    told = "memory offload=sequential vae_tiling=True attention=fused: 1.20 GB (encode 0.00, "
    assert line.startswith(told)


def test_a_model_that_inpaints_is_told_with_a_picture_and_a_mask(tmp_path: Path) -> None:
    folder = small_checkpoints.save("sd_inpainting", tmp_path / "model")
    predicted = memory.predict(open_checkpoint(folder), **SIZE)
    pipeline = tintype.load(folder, device="cpu", batch_invariant=False)
    edit = {"image": np.zeros((96, 128, 3)), "mask_image": np.ones((96, 128))}
    measured = allocated(pipeline, tmp_path / "trace.json", **edit) + weights(pipeline)
    assert predicted["peak"] == pytest.approx(measured, rel=0.1)
    assert {"encode_image", "denoise"} <= predicted.keys()


@pytest.mark.parametrize("kind", ["sd1", "sd_inpainting"])
def test_a_size_that_no_memory_holds_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    source = small_checkpoints.save(kind, tmp_path / "model")
    capsys.readouterr()
    assert main(["inspect", str(source), "--memory", "--size", "999999x999999"]) == BAD_USAGE
    error = capsys.readouterr().err
    assert "size 999999x999999 does not fit into memory" in error
    assert error.count("\n") == 1


def test_a_picture_to_be_varied_is_told_of_its_own_size_alone(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(
        small_unclip_checkpoint.save("unclip_variation", tmp_path / "model")
    )
    assert "embed_image" in memory.predict(checkpoint)
    with pytest.raises(ProfileError, match="size 999999x999999 is not in this model"):
        memory.predict(checkpoint, width=999999, height=999999)


def test_inspect_tells_what_slices_save_where_there_is_no_fused_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slicing, "SCORES", 1 << 16)
    source = small.save("flux-dev", tmp_path / "model")
    arguments = ["--memory", "--unfused", "--size", "128x96", "--json"]
    assert main(["inspect", str(source), *arguments]) == 0
    rows = json.loads(capsys.readouterr().out)["memory"]
    assert [row["attention"] for row in rows] == ["whole"] * 6 + ["sliced"] * 6
    steps = {row["attention"]: row["step"] for row in rows if row["offload"] == "sequential"}
    assert steps["sliced"] < 0.5 * steps["whole"]


def test_unknown_and_impossible_settings_are_named(folder: Path) -> None:
    with pytest.raises(RequestError, match="offload='disk' is unknown; choose None, model, sequ"):
        tintype.load(folder, offload="disk")
    with pytest.raises(RequestError, match="offload='model' is for checkpoints"):
        tintype.load("postcard", offload="model")
