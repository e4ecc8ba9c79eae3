"""The table of fastest forms: measured once, remembered on disk, the same for any batch."""

from __future__ import annotations

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from tintype_kernels import choice
from tintype_kernels.choice import Choices, shape_class
from tintype_kernels.dispatch import KernelUnavailable, select
from tintype_kernels.ops.scaled_matmul import ROWS_FORWARD


class Clock:
    """A timer that knows how long each form takes, and counts what it was asked."""

    def __init__(self, **milliseconds):
        self.forms = {name: (lambda name=name: name) for name in milliseconds}
        self.milliseconds, self.asked = milliseconds, []

    def __call__(self, form):
        self.asked.append(form())
        return self.milliseconds[form()]


def test_the_fastest_is_measured_once_and_remembered(tmp_path):
    path, clock = tmp_path / "kernels" / "gpu.json", Clock(triton=2.0, reference=1.0)
    choices = Choices(path, clock)
    assert choices.fastest("key", clock.forms, measure=True) == "reference"
    assert choices.fastest("key", clock.forms, measure=True) == "reference"
    assert Choices(path, clock).fastest("key", clock.forms, measure=False) == "reference"
    assert clock.asked == ["triton", "reference"]


def test_nothing_is_measured_unless_asked_for(tmp_path):
    clock = Clock(triton=2.0, reference=1.0)
    choices = Choices(tmp_path / "gpu.json", clock)
    assert choices.fastest("key", clock.forms, measure=False) == ""
    assert not clock.asked
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("variable", "within", "expected"),
    [(None, True, True), (None, False, False), ("", True, True), ("1", False, True), ("0", True, False)],
)  # fmt: skip
def test_what_will_be_repeated_is_measured_unless_the_variable_says_otherwise(
    variable, within, expected, monkeypatch
):
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(choice.VARIABLE, variable)
    with choice.measuring() if within else nullcontext():
        assert choice.measures() is expected
    assert not choice.measures() or variable == "1"


@pytest.mark.parametrize(("obstacle", "expected"), [("", "library"), ("codes are int8", "")])
def test_where_nothing_was_measured_an_op_has_its_default_if_that_can_run(
    obstacle, expected, monkeypatch
):
    monkeypatch.setattr(choice, "on_gpu", lambda *_: "")
    monkeypatch.setattr(ROWS_FORWARD, "unmeasured", "library")
    monkeypatch.setitem(ROWS_FORWARD.obstacles, "library", lambda *_: obstacle)
    tensor = SimpleNamespace(device=torch.device("cuda"))
    assert ROWS_FORWARD._fastest(["triton", "reference"], tensor, ()) == expected


def test_of_the_forms_that_can_run_the_fastest_is_known_from_one_measurement(tmp_path):
    clock = Clock(triton=1.0, native=3.0, reference=2.0)
    choices = Choices(tmp_path / "gpu.json", clock)
    assert choices.fastest("key", clock.forms, measure=True) == "triton"
    rest = {name: form for name, form in clock.forms.items() if name != "triton"}
    assert choices.fastest("key", rest, measure=False) == "reference"
    assert len(clock.asked) == 3


def test_a_form_that_is_new_is_measured_with_the_others(tmp_path):
    old, new = Clock(triton=1.0), Clock(triton=1.0, triton_roles=0.5)
    Choices(tmp_path / "gpu.json", old).fastest("key", old.forms, measure=True)
    choices = Choices(tmp_path / "gpu.json", new)
    assert choices.fastest("key", new.forms, measure=False) == ""
    assert choices.fastest("key", new.forms, measure=True) == "triton_roles"


def test_two_processes_keep_each_others_findings(tmp_path):
    path, clock = tmp_path / "gpu.json", Clock(triton=1.0, reference=2.0)
    first, second = Choices(path, clock), Choices(path, clock)
    first.fastest("a", clock.forms, measure=True)
    second.fastest("b", clock.forms, measure=True)
    assert set(json.loads(path.read_text())) == {"a", "b"}


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_damaged_table_is_made_again(tmp_path, text):
    path, clock = tmp_path / "gpu.json", Clock(triton=1.0, reference=2.0)
    path.write_text(text)
    assert Choices(path, clock).fastest("key", clock.forms, measure=True) == "triton"


def test_a_shape_leaves_out_the_batch_and_rounds_up():
    def key(batch, tokens, dtype=torch.float16):
        q = torch.empty(batch, 8, tokens, 40, dtype=dtype)
        return shape_class("attention", (q, None, 0.5))

    assert key(1, 4096) == key(8, 4096) == key(1, 4000)
    assert key(1, 4096) != key(1, 77)
    assert key(1, 77) != key(1, 77, torch.bfloat16)


def test_a_quantised_weight_counts_whole():
    def key(tokens, outputs):
        x, codes = torch.empty(tokens, 64), torch.empty(outputs, 64, dtype=torch.int8)
        return shape_class("int8_linear", (x, codes, torch.empty(outputs)))

    assert key(1, 640) == key(4096, 640)
    assert key(1, 640) != key(1, 5120)


def test_kernels_in_codes_count_whole_and_so_does_a_stride():
    def key(batch, outputs, stride):
        x, codes = torch.empty(batch, 8, 4, 4), torch.empty(outputs, 8, 3, 3, dtype=torch.int8)
        return shape_class("int8_conv2d", (x, codes, torch.empty(outputs), None, stride))

    assert key(1, 32, 1) == key(8, 32, 1)
    assert key(1, 32, 1) != key(1, 64, 1)
    assert key(1, 32, 1) != key(1, 32, 2)


def test_pictures_that_lie_channels_last_have_a_key_of_their_own():
    def key(batch, layout, dtype=torch.float16):
        x = torch.empty(batch, 8, 4, 4, dtype=dtype).contiguous(memory_format=layout)
        return shape_class("group_norm_silu", (x, torch.empty(8)))

    plain, last = torch.contiguous_format, torch.channels_last
    assert key(1, plain) == key(8, plain)
    assert key(1, last) == key(8, last)
    assert key(1, plain) != key(1, last)
    assert key(1, plain, torch.int8) == key(
        1, last, torch.int8
    )  # kernels are held as ours reads them


def test_pictures_in_codes_leave_out_the_batch():
    def key(batch, side):
        codes, weight = (torch.empty(n, side, side, 8, dtype=torch.int8) for n in (batch, 32))
        return shape_class("quantized_pictures_conv2d", (codes, torch.empty(batch), weight))

    assert key(1, 4) == key(8, 4)
    assert key(1, 4) != key(1, 8)


def test_what_was_measured_is_taken_unless_overridden(monkeypatch):
    def chosen(**obstacles):
        return select(**obstacles, fastest=lambda able: "reference")

    monkeypatch.setenv("TINTYPE_KERNELS", "auto")
    assert chosen(triton="", native="no") == "reference"
    monkeypatch.setenv("TINTYPE_KERNELS", "triton")
    assert chosen(triton="", native="no") == "triton"
    with pytest.raises(KernelUnavailable, match="no GPU"):
        chosen(triton="no GPU", native="no")


def test_a_variant_goes_first_unless_it_cannot_or_another_is_measured_or_asked_for(monkeypatch):
    def chosen(obstacle="", fastest=""):
        variants = {"triton_roles": obstacle}
        return select(triton="", native="", variants=variants, fastest=lambda able: fastest)

    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setenv("TINTYPE_KERNELS", "auto")
    assert chosen() == "triton_roles"
    assert chosen("an old chip") == "triton"
    assert chosen(fastest="triton") == "triton"
    monkeypatch.setenv("TINTYPE_KERNELS", "triton")
    assert chosen() == "triton"
    monkeypatch.setenv("TINTYPE_KERNELS", "triton_roles")
    assert chosen() == "triton_roles"
    assert select(triton="", native="") == "triton"  # an op without that variant
    with pytest.raises(KernelUnavailable, match="cannot run here: an old chip; .*auto, triton, na"):
        chosen("an old chip")
