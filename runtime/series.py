"""Histograms that cost a list entry to count in, and a moment when they are read."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from functools import cache

FAST = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
SLOW = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Bounds for what takes milliseconds, and for what takes seconds."""


_FINENESS = 1.25
"""How far apart the bounds are at most that percentiles are read from."""


class Series:
    """One histogram: counts by bucket, and their sum. One thread counts; others may read.

    It counts between finer bounds than it is scraped with, so that percentiles are at most a quarter off.
    """

    __slots__ = ("_fine", "bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self._fine = _refined(bounds)
        self.counts = [0] * (len(self._fine) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self._fine, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts by upper bound, as Prometheus wants them."""
        below = dict(zip((*self._fine, math.inf), itertools.accumulate(self.counts), strict=True))
        found = [(str(bound), float(below[bound])) for bound in self.bounds]
        return [*found, ("+Inf", float(below[math.inf]))]

    def mean(self) -> float | None:
        """None where nothing was measured."""
        count = sum(self.counts)
        return self.total / count if count else None

    def percentile(self, share: float) -> float | None:
        """The value below which `share` of the measurements lie, interpolated within its bucket; beyond the largest
        bound, that bound. None where nothing was measured."""
        wanted = share * sum(self.counts)
        if not wanted:
            return None
        below, low = 0, 0.0
        for bound, count in zip(self._fine, self.counts, strict=False):
            if below + count >= wanted:
                return low + (bound - low) * (wanted - below) / count
            below, low = below + count, bound
        return self.bounds[-1]


@cache
def _refined(bounds: tuple[float, ...]) -> tuple[float, ...]:
    """The bounds, and between two of them as many more as it takes, at equal ratios."""
    found = [*bounds[:1]]
    for low, high in itertools.pairwise(bounds):
        steps = math.ceil(math.log(high / low, _FINENESS) - 1e-9)
        found += [low * (high / low) ** (step / steps) for step in range(1, steps)]
        found.append(high)
    return tuple(found)
