"""The parts of a page, and words for its numbers."""

from __future__ import annotations

from typing import Final

import msgspec

from kvmove.bench.result import MOVE, Cell
from kvmove.output import duration, size
from kvmove.reports import numbers
from kvmove.reports.charts import Chart
from kvmove.spread import Spread, spread

SMALL_BYTES: Final = 4 << 20
"""Moves up to this size are looked at by latency, larger ones by rate."""
REFERENCE: Final = "reference"


class Table(msgspec.Struct, frozen=True):
    """``right``: which columns hold numbers."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: tuple[int, ...] = ()


class Section(msgspec.Struct, frozen=True):
    """``code``: shown as typed."""

    name: str
    heading: str
    text: tuple[str, ...] = ()
    code: tuple[str, ...] = ()
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()


def seconds(value: float) -> str:
    """Three figures and a unit."""
    return duration(value * 1e9)


def times(one: Spread) -> str:
    """``12.1 ms (11.8 to 12.9)``: the median, and where the middle half lies."""
    return f"{seconds(one.median)} ({seconds(one.low)} to {seconds(one.high)})"


def plain(one: Spread, digits: int = 3) -> str:
    return f"{one.median:.{digits}g} ({one.low:.{digits}g} to {one.high:.{digits}g})"


def gb_per_s(cell: Cell, one: Spread) -> str:
    return f"{numbers.rate(cell, one.median):.2f} ({numbers.rate(cell, one.high):.2f} to"\
           f" {numbers.rate(cell, one.low):.2f})"  # fmt: skip


def move(cell: Cell) -> Spread:
    series = cell.of(MOVE)
    assert series is not None
    return spread(series.seconds)


def route(cell: Cell) -> str:
    """``a/CPU to b/Disk``."""
    return " to ".join(one.replace("Local", "").replace("Backend", "") for one in cell.route)


def shown(cell: Cell) -> str:
    return f"{size(cell.nbytes)} in chunks of {size(cell.chunk_bytes)}"
