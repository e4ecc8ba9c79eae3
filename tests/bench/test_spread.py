"""The bench's law: what a run states as noise is what a second run stays within, and what it finds slower is slower."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tintype_bench.spread import allowance, between_rounds, joined, noise, spread

ROWS, ROUNDS, RUNS = 20, 2, 5


def synthetic_run(rng, seconds, *, process, jitter):
    """Rows of rounds of timings: each process has a speed of its own, each run some jitter and, at times, a hiccup."""
    rows = []
    for median in seconds:
        speeds = rng.lognormal(0, process, ROUNDS)
        hiccups = 1 + 0.3 * (rng.random((ROUNDS, RUNS)) < 0.05)
        rows.append(median * speeds[:, None] * rng.lognormal(0, jitter, (ROUNDS, RUNS)) * hiccups)
    return [row.tolist() for row in rows]


def medians_and_noises(rows):
    between = between_rounds(rows)
    return [(joined(row).median, noise(row, between)) for row in rows]


def slower(first, second):
    """The rows of `second` that a comparison calls slower than in `first`."""
    pairs = zip(medians_and_noises(first), medians_and_noises(second), strict=True)
    return [after / before - 1 > allowance(n, m, 0.0) for (before, n), (after, m) in pairs]


@pytest.mark.parametrize(("process", "jitter"), [(0.005, 0.01), (0.02, 0.02), (0.06, 0.1)])
def test_two_runs_of_one_machine_agree_within_their_stated_noise(process, jitter):
    rng = np.random.default_rng(5)
    seconds = rng.uniform(0.01, 2, ROWS)
    runs = [synthetic_run(rng, seconds, process=process, jitter=jitter) for _ in range(100)]
    pairs = zip(runs[::2], runs[1::2], strict=True)
    agreeing = sum(not any(slower(*pair)) for pair in pairs)
    assert agreeing >= 46  # of 50; all twenty rows of a pair must agree at once


def test_a_row_that_became_a_tenth_slower_is_found_on_a_quiet_machine():
    rng = np.random.default_rng(6)
    seconds = rng.uniform(0.01, 2, ROWS)
    changed = seconds * np.where(np.arange(ROWS) == 7, 1.1, 1.0)
    found = [
        slower(
            synthetic_run(rng, seconds, process=0.005, jitter=0.01),
            synthetic_run(rng, changed, process=0.005, jitter=0.01),
        )[7]
        for _ in range(50)
    ]
    assert sum(found) >= 48


def test_noise_grows_with_jitter_and_with_what_rounds_differ_by_and_shrinks_with_runs():
    rng = np.random.default_rng(7)

    def row(jitter, runs=40):
        return rng.lognormal(0, jitter, (2, runs)).tolist()

    assert noise(row(0.2), 0.01) > noise(row(0.02), 0.01)
    assert noise(row(0.02), 0.2) > noise(row(0.02), 0.01)
    assert noise(row(0.2, runs=400), 0.0) < noise(row(0.2, runs=10), 0.0)


def test_a_spread_is_scipys_and_numpys():
    samples = np.random.default_rng(8).lognormal(size=23)
    found = spread(samples.tolist())
    assert found.median == pytest.approx(np.median(samples))
    assert (found.lower, found.upper) == pytest.approx(tuple(np.quantile(samples, [0.25, 0.75])))
    assert found.variation == pytest.approx(stats.variation(samples, ddof=1))
    assert spread([2.0]).median == spread([2.0]).upper == 2.0


def test_what_rounds_differ_by_is_pooled_over_rows():
    """Two rounds at 1 +- d have the deviation sqrt(2) d."""
    rows = [[[1 - d, 1 - d], [1 + d, 1 + d]] for d in (0.01, 0.03)]
    assert between_rounds(rows) == pytest.approx(np.sqrt(np.mean([2 * 0.01**2, 2 * 0.03**2])))


def test_a_drift_of_the_machine_is_allowed_for():
    assert allowance(0.03, 0.04, 0.1) == pytest.approx(0.15)
    assert allowance(0.03, 0.04, -0.1) == pytest.approx(0.15)
