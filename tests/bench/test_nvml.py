"""What the driver tells of a GPU, by a library of no GPU's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tintype_bench import nvml


def answering(megahertz, status=0):
    """A library whose clocks are `megahertz` and twice that at most; above 0, `status` is an error."""

    def clock(times):
        def ask(handle, kind, number):
            number._obj.value = times * megahertz
            return status

        return ask

    return SimpleNamespace(
        nvmlDeviceGetClockInfo=clock(1),
        nvmlDeviceGetMaxClockInfo=clock(2),
        nvmlDeviceGetName=lambda *arguments: 1,
        nvmlSystemGetDriverVersion=lambda *arguments: 1,
    )


def test_clocks_are_told_where_the_driver_does(monkeypatch):
    monkeypatch.setattr(nvml, "_opened", lambda: (answering(900), None))
    assert nvml.clock() == 900
    assert nvml.describe() == {
        "sm_now_mhz": 900, "sm_max_mhz": 1800, "memory_now_mhz": 900, "memory_max_mhz": 1800
    }  # fmt: skip


@pytest.mark.parametrize("opened", [None, (answering(900, status=3), None)])
def test_no_clock_is_told_without_a_driver_or_where_it_does_not_say(monkeypatch, opened):
    monkeypatch.setattr(nvml, "_opened", lambda: opened)
    assert nvml.clock() is None
    assert nvml.describe() == {}
