"""Rates of several ways beside each other: interleaved, so that a busy moment hits all of them alike."""

from __future__ import annotations

import statistics
import time
from typing import Callable, Dict, List


def interleaved(ways: Dict[str, Callable[[], object]], rounds: int, limit_s: float = 15.0) -> Dict[str, List[float]]:
    """Seconds of each call, after one that does not count; no round begins after ``limit_s``."""
    found: Dict[str, List[float]] = {name: [] for name in ways}
    end = time.perf_counter() + limit_s
    for number in range(-1, rounds):
        if number > 0 and time.perf_counter() > end:
            break
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if number >= 0:
                found[name].append(time.perf_counter() - start)
    return found


def table(title: str, nbytes: int, seconds: Dict[str, List[float]], to: str) -> str:
    """GB/s (median, worst and best round), ms a GB, and the share of the rate of ``to``."""
    base = statistics.median(seconds[to])
    lines = [f"\n{title}", f"  {'':34}{'GB/s':>8}{'worst':>8}{'best':>8}{'ms/GB':>9}{'of ' + to:>12}"]
    for name, each in seconds.items():
        middle = statistics.median(each)
        rates = "".join([f"{nbytes / second / 1e9:8.1f}" for second in (middle, max(each), min(each))])
        lines.append(f"  {name:34}{rates}{middle * 1e12 / nbytes:9.2f}{base / middle:12.2f}")
    return "\n".join(lines)
