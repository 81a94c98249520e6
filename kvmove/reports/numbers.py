"""Medians, spreads, rates and ratios of what a bench measured. Nothing is rounded here."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

import msgspec

from kvmove.bench.result import MOVE, Bench, Cell, Goal, Series
from kvmove.spread import Spread, spread


def rate(cell: Cell, seconds: float) -> float:
    """GB a second."""
    return cell.total_bytes / seconds / 1e9


def fastest(cell: Cell, beginning: str) -> Series | None:
    """The series whose name begins so and whose median is least: the strictest of several limits of a kind."""
    found = [one for one in cell.series if one.what == beginning or one.what.startswith(f"{beginning} ")]
    return min(found, key=lambda one: statistics.median(one.seconds), default=None)


def ratio(of: Series, over: Series) -> Spread:
    """How fast ``of`` is in units of ``over``: 1 is as fast, 0.5 takes twice as long. The median is that of the two
    medians; the spread is of samples that were taken in the same round."""
    pairs = [b / a for a, b in zip(of.seconds, over.seconds)]
    around = spread(pairs)
    middle = statistics.median(over.seconds) / statistics.median(of.seconds)
    return Spread(middle, around.low, around.high, around.least, around.most, around.count)


class Judged(msgspec.Struct, frozen=True):
    """A goal, held against what was measured. ``found`` is None where it was not: ``why``."""

    goal: Goal
    found: Spread | None
    unit: str
    met: bool
    why: str = ""


def judge(goal: Goal, bench: Bench) -> Judged:
    found, unit, why = _found(goal, bench)
    if found is None:
        return Judged(goal, None, unit, False, why)
    met = found.median >= goal.least if goal.least is not None else found.median <= (goal.most or 0.0)
    return Judged(goal, found, unit, met)


def _found(goal: Goal, bench: Bench) -> tuple[Spread | None, str, str]:
    if goal.figure:
        figures = [one for one in bench.figures if one.name.startswith(goal.figure)]
        if not figures:
            return None, "", f"no figure is called {goal.figure}"
        worst = max(figures, key=lambda one: statistics.median(one.samples))
        return spread(worst.samples), worst.unit, ""
    cell = next((one for one in bench.cells if one.name == goal.cell), None)
    if cell is None:
        return None, "", f"no cell is called {goal.cell}"
    if goal.median:
        series = fastest(cell, goal.median)
        return (spread(series.seconds), "s", "") if series else (None, "s", f"no {goal.median} was measured")
    assert goal.ratio is not None
    of, over = (fastest(cell, name) for name in goal.ratio)
    if of is None or over is None:
        return None, "", f"no {goal.ratio[0] if of is None else goal.ratio[1]} was measured"
    return ratio(of, over), "times as fast", ""


def errors(bench: Bench) -> list[tuple[str, float, float]]:
    """(what, predicted s, measured s) of every move that was both simulated and run."""
    found = [(f"{one.file}: {one.op}", one.predicted_s, one.measured_s) for one in bench.timings]
    for cell in bench.cells:
        move = cell.of(MOVE)
        if cell.predicted is not None and move is not None and cell.concurrency == 1:
            found.append((cell.name, cell.predicted.total_s, statistics.median(move.seconds)))
    return found


def median_error(pairs: Iterable[tuple[str, float, float]]) -> float | None:
    """The median of |predicted / measured - 1|."""
    found = [abs(predicted / measured - 1) for _, predicted, measured in pairs if measured > 0]
    return statistics.median(found) if found else None
