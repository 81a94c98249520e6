"""The middle of some samples, and how far they lie around it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

import msgspec


class Spread(msgspec.Struct, frozen=True):
    """The middle, and what lies around it: half of all samples are between ``low`` and ``high``."""

    median: float
    low: float
    high: float
    least: float
    most: float
    count: int

    @property
    def percent(self) -> float:
        """Half of the middle half's width, in percent of the middle."""
        return 50.0 * (self.high - self.low) / self.median if self.median else 0.0


def spread(samples: Iterable[float]) -> Spread:
    """Of at least one sample."""
    ordered = sorted(samples)
    low, _, high = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else [ordered[0]] * 3
    return Spread(statistics.median(ordered), low, high, ordered[0], ordered[-1], len(ordered))
