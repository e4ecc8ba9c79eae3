"""Small reports of `tintype bench`, of any numbers, for tests of what reads them."""

from __future__ import annotations

from dataclasses import asdict

from tintype_bench.campaign import FORMAT
from tintype_bench.rows import state_noise
from tintype_bench.spread import joined
from tintype_bench.work import Work

CEILINGS = {"flops": {"fp32": 1e11, "bf16": 4e11}, "bandwidth": 1e10}
WORK = Work("", 128, 128, 1, 20, 4.0)


def row(who, seconds, *, ours=False, kind="warm", jitter=0.0, product=0.04, joules=None):
    """A timed row; samples are `seconds` times 1 +- jitter, in two rounds; `product` is the probe's."""
    rounds = [[seconds * (1 - jitter), seconds, seconds * (1 + jitter)]] * 2
    found = joined(rounds)
    return {
        "who": who,
        "ours": ours,
        "kind": kind,
        "status": "timed",
        "agreement_db": 58.123,
        "seconds": asdict(found),
        "variation": found.variation,
        "rounds": rounds,
        "probe": [{"product": product, "copy": 0.01}] * 2,
        "floor": {"denoise": 0.1},
        "flops": 1e9,
        "bytes": 1e8,
        "percent_of_limit": 10 / seconds,
        "lost": [{"stage": "denoise", "seconds": seconds - 0.1, "share": 0.5}],
        "peak_megabytes": {"host": 512.0, "device": None},
        "joules": joules,
    }


def untimed(who, status, reason):
    return {"who": who, "ours": False, "kind": "warm", "status": status, "reason": reason}


def report(rows, *, case="postcard 128x128", work=WORK):
    """A report of one case."""
    cases = [{"case": case, "work": asdict(work), "rows": rows}]
    drift = state_noise(cases)
    return {
        "format": FORMAT,
        "suite": "quick",
        "conditions": {
            "cpu": "a processor",
            "cores": 2,
            "date": "2026-01-01",
            "versions": {"a": "1"},
        },
        "ceilings": {"before": CEILINGS, "after": CEILINGS},
        "settlings": [{"medians": [0.05] * 5, "seconds": 5.0, "steady": True}],
        "drift": drift,
        "cases": cases,
    }
