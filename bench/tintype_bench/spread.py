"""What a list of timings says, and how far two such lists may differ by chance.

A row is timed in rounds, each in fresh processes. Samples of one round differ by jitter; medians of rounds differ by
what stays the same within a process: where its memory lies, what else the machine does for minutes. The second kind
is estimated over all rows of a run together, since a row alone has too few rounds to tell.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Rounds = Sequence[Sequence[float]]

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


def between_rounds(rows: Sequence[Rounds]) -> float:
    """The relative deviation of round medians, pooled over rows; a guess where no row has two rounds."""
    squares, freedom = 0.0, 0
    for rounds in rows:
        if len(rounds) > 1:
            squares += _relative_deviation(rounds) ** 2 * (len(rounds) - 1)
            freedom += len(rounds) - 1
    return math.sqrt(squares / freedom) if freedom else _BETWEEN_UNKNOWN


def noise(rounds: Rounds, between: float) -> float:
    """How far, relatively, the median of such a row may be from another run's by chance alone."""
    whole = joined(rounds)
    jitter = _MEDIAN * (whole.upper - whole.lower) / _QUARTILES / math.sqrt(whole.count)
    own = _relative_deviation(rounds) if len(rounds) > 1 else 0.0
    rounds_error = max(between, own) / math.sqrt(len(rounds))
    return max(_LEAST, _ERRORS * math.hypot(jitter / whole.median, rounds_error))


def allowance(first: float, second: float, drift: float) -> float:
    """How far two rows of these noises may differ, on a machine whose own ceilings moved by `drift` between them."""
    return math.hypot(first, second) + abs(drift)


def _relative_deviation(rounds: Rounds) -> float:
    medians = [statistics.median(samples) for samples in rounds]
    return statistics.stdev(medians) / statistics.fmean(medians)
