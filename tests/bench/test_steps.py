"""Where a step's time goes: rows of shapes whose weights are never written."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from tintype_bench import steps
from tintype_bench.agreement import COMPONENT_DB
from tintype_bench.random_weights import unwritten
from tintype_bench.runners import diffusers_denoiser
from tintype_bench.shapes import SHAPES, find_shape

TINY = ["--tiny", "--device", "cpu", "--execution", "eager", "--steps", "2"]


@pytest.mark.parametrize("shape", ["sd15", "sd3-medium"])
def test_rows_say_what_a_call_takes_and_what_took_it(shape, tmp_path, monkeypatch, capsys):
    target = tmp_path / "steps.json"
    told = [shape, *TINY, "--stage", "step", "decode", "--precision", "fp32", "--json", str(target)]
    monkeypatch.setattr(sys, "argv", ["steps", *told])
    steps.main()
    report = json.loads(target.read_text(encoding="utf-8"))
    assert [(row["shape"], row["stage"]) for row in report["rows"]] == [
        (shape, "step"),
        (shape, "decode"),
    ]
    for row in report["rows"]:
        assert row["milliseconds"] > 0
        most = [each["milliseconds"] for each in row["kernels"]]
        assert most == sorted(most, reverse=True)
        assert 0 < most[0] <= row["kernel_milliseconds"]
    assert capsys.readouterr().out.count("in kernels") == 2
    steps.main()  # what is known is left alone
    assert json.loads(target.read_text(encoding="utf-8"))["rows"] == report["rows"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_the_peer_agrees_on_the_same_weights_and_inputs(shape, tmp_path):
    pytest.importorskip("diffusers")
    options = SimpleNamespace(device="cpu", steps=1)
    checkpoint = unwritten(find_shape(shape, tiny=True), tmp_path / shape)
    row = steps.measure_peer(checkpoint, shape, "eager", options)
    assert row["execution"] == "diffusers"
    assert row["agreement_db"] > COMPONENT_DB["bf16"]
    assert row["milliseconds"] > 0
    assert "compile_seconds" not in row


# A tiny UNet's C++ takes a minute to compile, so of two models the graphs that Inductor is given run as they are.
@pytest.mark.parametrize(
    ("shape", "generated"), [("sd15", False), ("sd3-medium", True), ("flux1-dev", False)]
)
def test_the_compiled_peer_agrees_too(shape, generated, tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    if not generated:
        monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda graph, *_, **__: graph)
    checkpoint = unwritten(find_shape(shape, tiny=True), tmp_path / shape)
    options = SimpleNamespace(device="cpu", steps=1)
    row = steps.measure_peer(checkpoint, shape, "compiled", options)
    assert (row["stage"], row["execution"]) == ("denoise", "diffusers-compiled")
    assert row["agreement_db"] > COMPONENT_DB["bf16"]
    assert 1e3 * row["compile_seconds"] > row["milliseconds"] > 0
    assert f" dB, compiled in {row['compile_seconds']:.0f} s" in steps.line(row)


@pytest.mark.parametrize(
    ("shape", "modes"),
    [
        ("sd15", ["max-autotune"]),
        ("sd3-medium", 2 * ["max-autotune-no-cudagraphs"]),
        ("flux1-dev", 4 * ["max-autotune-no-cudagraphs"]),
    ],
)
def test_a_gpu_compiles_a_unet_whole_and_of_a_transformer_each_block(
    shape, modes, tmp_path, monkeypatch
):
    pytest.importorskip("diffusers")
    checkpoint = unwritten(find_shape(shape, tiny=True), tmp_path / shape)
    model = diffusers_denoiser._model(checkpoint, "cpu", torch.float32)
    asked = []

    def compiled(function, *, mode, fullgraph):
        assert fullgraph
        asked.append(mode)
        return function

    monkeypatch.setattr(torch, "compile", compiled)
    with diffusers_denoiser._compiled(model, checkpoint.family, "cuda"):
        assert torch._inductor.config.conv_1x1_as_mm
    assert asked == modes
    assert not torch._inductor.config.conv_1x1_as_mm  # ours is compiled with its own
    assert {m.fused_projections for m in model.modules() if hasattr(m, "fused_projections")} == {
        True
    }


def test_a_picture_says_how_it_was_drawn_and_what_its_stages_took(tmp_path, monkeypatch, capsys):
    target = tmp_path / "steps.json"
    told = ["sd3-medium", *TINY, "--stage", "picture", "--precision", "bf16", "fp8"]
    monkeypatch.setattr(sys, "argv", ["steps", *told, "--pictures", "2", "--json", str(target)])
    steps.main()
    rows = json.loads(target.read_text(encoding="utf-8"))["rows"]
    assert [(row["stage"], row["precision"]) for row in rows] == [
        ("picture", "bf16"),
        ("picture", "fp8"),
    ]
    for row in rows:
        # Published are 28 steps at guidance 7; a tiny case has one for each twenty and one.
        assert (row["steps"], row["guidance"], row["pictures"]) == (2, 7.0, 2)
        lower, upper = row["quartiles"]
        assert lower <= row["milliseconds"] <= upper
        assert set(row["stage_seconds"]) == {"encode", "denoise", "decode"}
        assert 0 < 1e3 * sum(row["stage_seconds"].values()) <= row["milliseconds"] * 1.001
    assert capsys.readouterr().out.count("2 steps, guidance 7: encode") == 2
    steps.main()
    assert json.loads(target.read_text(encoding="utf-8"))["rows"] == rows
    assert capsys.readouterr().out == ""


def test_peers_that_are_known_are_left_alone(monkeypatch):
    measured = []

    def measure(_checkpoint, _shape, peer, _options):
        measured.append(peer)
        return {}

    monkeypatch.setattr(steps, "measure_peer", measure)
    options = SimpleNamespace(
        precision=[], stage=[], execution="graph", device="cpu", peer=["eager", "compiled"]
    )
    known = {("sd15", "denoise", "bf16", "diffusers")}
    assert len(list(steps._rows(None, "sd15", options, known))) == 1
    assert measured == ["compiled"]


def test_a_precision_that_fails_says_why(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["steps", "sd15", *TINY, "--precision", "int2"])
    steps.main()
    assert "dtype='int2' is unknown" in capsys.readouterr().out


def test_weights_that_are_never_written_are_the_same_each_time(tmp_path):
    checkpoint = unwritten(find_shape("sd15", tiny=True), tmp_path / "sd15")
    first, second = (checkpoint.component("vae", torch.bfloat16).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {tensor.dtype for tensor in first.values()} == {torch.bfloat16}
