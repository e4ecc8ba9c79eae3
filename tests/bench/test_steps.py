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
    row = steps.measure_peer(checkpoint, shape, options)
    assert row["agreement_db"] > COMPONENT_DB["bf16"]
    assert row["milliseconds"] > 0


def test_a_precision_that_fails_says_why(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["steps", "sd15", *TINY, "--precision", "int2"])
    steps.main()
    assert "dtype='int2' is unknown" in capsys.readouterr().out


def test_weights_that_are_never_written_are_the_same_each_time(tmp_path):
    checkpoint = unwritten(find_shape("sd15", tiny=True), tmp_path / "sd15")
    first, second = (checkpoint.component("vae", torch.bfloat16).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {tensor.dtype for tensor in first.values()} == {torch.bfloat16}
