"""What a list of timings says, and how far two such lists may differ by chance.

A row is timed in rounds, each in fresh processes and minutes apart. Samples of one round differ by jitter; medians of
rounds differ by what stays the same within a process, such as where its memory lies, and by what the machine does for
minutes. The second kind is estimated over all rows of a run together, since a row alone has too few rounds to tell,
and is never taken to be less than what the probe saw of the machine. Between two runs the machine may have changed for
as long as either took; that a run cannot know, and a comparison reads it from both runs' probes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

Rounds = Sequence[Sequence[float]]
Reading = Mapping[str, float]  # seconds of each part of the probe

# Half-width of a row's stated noise in standard errors: with some twenty rows compared at once, a chance difference
# in one of them is then rarer than one comparison in fifteen.
_ERRORS = 3.0
_LEAST = 0.01  # two processes agree no better than this on any machine with an operating system
# What rounds of a run are taken to differ by where there was only one.
_BETWEEN_UNKNOWN = 0.03
NOISY = 0.05  # a row whose stated noise or coefficient of variation is above this is flagged
# Standard error of a median of normals over that of their mean, and a normal's quartile distance in deviations.
_MEDIAN, _QUARTILES = math.sqrt(math.pi / 2), 1.349


@dataclass(frozen=True)
class Spread:
    """Some timings in one unit; ``lower`` and ``upper`` are their quartiles."""

    count: int
    median: float
    lower: float
    upper: float
    mean: float
    deviation: float
    least: float
    most: float

    @property
    def variation(self) -> float:
        """The coefficient of variation."""
        return self.deviation / self.mean if self.mean else 0.0


def spread(samples: Sequence[float]) -> Spread:
    """The median, quartiles, mean and deviation of at least one sample."""
    lower, median, upper = (
        statistics.quantiles(samples, n=4, method="inclusive")
        if len(samples) > 1
        else [samples[0]] * 3
    )
    deviation = statistics.stdev(samples) if len(samples) > 1 else 0.0
    mean = statistics.fmean(samples)
    return Spread(len(samples), median, lower, upper, mean, deviation, min(samples), max(samples))


def joined(rounds: Rounds) -> Spread:
    """The spread of the samples of all rounds."""
    return spread([sample for samples in rounds for sample in samples])


def typical(readings: Sequence[Reading]) -> Reading:
    """The median of each part of the probe."""
    return {part: statistics.median(each[part] for each in readings) for part in readings[0]}


def relative_deviation(values: Collection[float]) -> float:
    """The standard deviation over the mean; 0 of one value, which tells nothing of it."""
    return statistics.stdev(values) / statistics.fmean(values) if len(values) > 1 else 0.0


def between_rounds(rows: Sequence[Rounds]) -> float:
    """The relative deviation of round medians, pooled over rows; a guess where no row has two rounds."""
    squares, freedom = 0.0, 0
    for rounds in rows:
        if len(rounds) > 1:
            squares += relative_deviation(_medians(rounds)) ** 2 * (len(rounds) - 1)
            freedom += len(rounds) - 1
    return math.sqrt(squares / freedom) if freedom else _BETWEEN_UNKNOWN


def noise(rounds: Rounds, between: float, drift: float) -> float:
    """How far, relatively, the median of such a row may be from another run's by chance alone.

    `between` is what rounds of the run's rows differ by, `drift` what the probe's readings do.
    """
    whole = joined(rounds)
    jitter = _MEDIAN * (whole.upper - whole.lower) / _QUARTILES / math.sqrt(whole.count)
    rounds_error = max(between, relative_deviation(_medians(rounds)), drift) / math.sqrt(
        len(rounds)
    )
    return max(_LEAST, _ERRORS * math.hypot(jitter / whole.median, rounds_error))


def allowed(noises: tuple[float, float], paces: Iterable[float]) -> tuple[float, float]:
    """The least and the most that a row of the second run may take of its time in the first.

    `noises` are the row's in both; `paces` how many times longer each part of the probe took in the second. Work is a
    mixture of the probe's parts and of what neither slows, so the machine explains whatever lies between.
    """
    slack = 1 + math.hypot(*noises)
    explained = (1.0, *paces)
    return min(explained) / slack, max(explained) * slack


def _medians(rounds: Rounds) -> list[float]:
    return [statistics.median(samples) for samples in rounds]
