"""The bench's law: what a run states as noise is what a second run stays within, and what it finds slower is slower."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tintype_bench.spread import (
    allowed,
    between_rounds,
    joined,
    noise,
    relative_deviation,
    spread,
    typical,
)

ROWS, CASES, ROUNDS, RUNS = 20, 4, 2, 5


def steady(rng):
    """The machine's slowness at each round of each case, in the order in which they are timed."""
    return np.ones((ROUNDS, CASES))


def slow_at_first(rng):
    """Other work goes on for the first cases of one run in two, and is then over."""
    pace = np.ones((ROUNDS, CASES))
    pace[0, : rng.integers(0, CASES + 1)] = rng.choice([1.0, 1.25])
    return pace


def wandering(rng):
    """A random walk from round to round."""
    steps = rng.normal(0, 0.02, ROUNDS * CASES).cumsum()
    return np.exp(steps).reshape(ROUNDS, CASES)


def restless(rng):
    """Every round at a pace of its own."""
    return rng.lognormal(0, 0.03, (ROUNDS, CASES))


def of_another_hour(rng):
    """As steady as can be, at a level of the hour's own."""
    return np.full((ROUNDS, CASES), rng.choice([1.0, 1.1, 1.25]))


def synthetic_run(rng, seconds, *, process, jitter, machine=steady):
    """Rows of timings and of probe readings by rounds.

    Each process has a speed of its own, each run some jitter and, at times, a hiccup. The machine slows products and
    copies apart, and a row by some mixture of both.
    """
    product, copy = machine(rng), machine(rng) ** 0.5
    rows = []
    for number, median in enumerate(seconds):
        case, share = number % CASES, number / ROWS
        pace = share * product[:, case] + (1 - share) * copy[:, case]
        speeds = pace * rng.lognormal(0, process, ROUNDS)
        hiccups = 1 + 0.3 * (rng.random((ROUNDS, RUNS)) < 0.05)
        times = median * speeds[:, None] * rng.lognormal(0, jitter, (ROUNDS, RUNS)) * hiccups
        probe = [{"product": product[n, case], "copy": copy[n, case]} for n in range(ROUNDS)]
        rows.append((times.tolist(), probe))
    return rows


def told(run):
    """Of each row its median, its stated noise, and the machine's typical pace."""
    between = between_rounds([times for times, _ in run])
    drift = relative_deviation({sum(reading.values()) for _, probe in run for reading in probe})
    return [
        (joined(times).median, noise(times, between, drift), typical(probe)) for times, probe in run
    ]


def slower(first, second):
    """Which rows of `second` a comparison calls slower than in `first`."""
    verdicts = []
    for before, after in zip(told(first), told(second), strict=True):
        paces = [after[2][part] / before[2][part] for part in ("product", "copy")]
        verdicts.append(after[0] / before[0] > allowed((before[1], after[1]), paces)[1])
    return verdicts


def agree(first, second):
    """Whether a row's medians in two runs are within both runs' noise, by nothing but these."""
    least, most = allowed((first[1], second[1]), [])
    return least <= second[0] / first[0] <= most


@pytest.mark.parametrize("machine", [steady, slow_at_first, restless, wandering, of_another_hour])
@pytest.mark.parametrize(("process", "jitter"), [(0.005, 0.01), (0.02, 0.02), (0.06, 0.1)])
def test_two_runs_of_one_machine_agree_within_their_stated_noise(process, jitter, machine):
    rng = np.random.default_rng(5)
    seconds = rng.uniform(0.01, 2, ROWS)
    runs = [
        synthetic_run(rng, seconds, process=process, jitter=jitter, machine=machine)
        for _ in range(60)
    ]
    pairs = zip(runs[::2], runs[1::2], strict=True)
    agreeing = sum(not any(slower(*pair)) for pair in pairs)
    assert agreeing >= 27  # of 30; all twenty rows of a pair must agree at once


@pytest.mark.parametrize("machine", [slow_at_first, restless])
def test_the_stated_noise_alone_holds_what_minutes_of_the_machine_do(machine):
    """Somebody who reads two tables has no probe to look at."""
    rng = np.random.default_rng(9)
    seconds = rng.uniform(0.01, 2, ROWS)
    runs = [
        synthetic_run(rng, seconds, process=0.005, jitter=0.01, machine=machine) for _ in range(60)
    ]
    pairs = zip(map(told, runs[::2]), map(told, runs[1::2]), strict=True)
    assert sum(all(map(agree, *pair)) for pair in pairs) >= 25  # of 30


@pytest.mark.parametrize("machine", [steady, of_another_hour])
def test_a_row_that_became_a_tenth_slower_is_found_on_a_quiet_machine(machine):
    rng = np.random.default_rng(6)
    seconds = rng.uniform(0.01, 2, ROWS)
    changed = seconds * np.where(np.arange(ROWS) == 7, 1.1, 1.0)
    hour = machine(rng)
    found = [
        slower(
            synthetic_run(rng, seconds, process=0.005, jitter=0.01, machine=lambda _: hour),
            synthetic_run(rng, changed, process=0.005, jitter=0.01, machine=lambda _: hour),
        )[7]
        for _ in range(50)
    ]
    assert sum(found) >= 48


def test_noise_grows_with_jitter_and_what_rounds_or_the_machine_differ_by_and_shrinks_with_runs():
    rng = np.random.default_rng(7)

    def row(jitter, runs=40):
        return rng.lognormal(0, jitter, (2, runs)).tolist()

    assert noise(row(0.2), 0.01, 0.0) > noise(row(0.02), 0.01, 0.0)
    assert noise(row(0.02), 0.2, 0.0) > noise(row(0.02), 0.01, 0.0)
    same = row(0.02)
    assert noise(same, 0.01, 0.2) == noise(same, 0.2, 0.01) > noise(same, 0.01, 0.01)
    assert noise(row(0.2, runs=400), 0.0, 0.0) < noise(row(0.2, runs=10), 0.0, 0.0)


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


def test_the_machine_explains_no_more_than_the_part_of_it_that_changed_most():
    assert allowed((0.03, 0.04), [1.0, 1.0]) == pytest.approx((1 / 1.05, 1.05))
    assert allowed((0.03, 0.04), [1.2, 1.1]) == pytest.approx((1 / 1.05, 1.2 * 1.05))
    assert allowed((0.03, 0.04), [0.8, 1.1]) == pytest.approx((0.8 / 1.05, 1.1 * 1.05))
