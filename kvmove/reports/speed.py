"""The sections about time: throughput, latency, control cost, prediction, contention, and us beside the reference."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Final

from kvmove.bench.result import MOVE, Bench, Cell, Phases, Series
from kvmove.output import plural, size
from kvmove.reports import charts, numbers
from kvmove.reports.charts import Chart, Line, Stack
from kvmove.reports.words import (
    REFERENCE,
    SMALL_BYTES,
    Section,
    Table,
    gb_per_s,
    move,
    plain,
    route,
    seconds,
    shown,
    times,
)
from kvmove.spread import spread

PHASES: Final = ("control", "queue", "commit", "to the client and back")
PHASE_WORDS: Final = (
    "control: the source pins its chunks, the destination reserves room; queue: the copy waits for its transport;"
    " commit: the bytes are made visible there and released here; the rest is the way of request and answer."
)


# ---- throughput -----------------------------------------------------------------------------------------------------
ARENA: Final = "arena"
"""It hands slots over and copies no byte: its rate is no rate, and stands in the table alone."""
LIMITS: Final = (("memcpy", "memcpy"), ("bare nixl", "bare NIXL"),
                 ("merged nixl", "bare NIXL, merged"), ("raw", "raw socket"))  # fmt: skip


def throughput(bench: Bench) -> Section | None:
    cells = [one for one in bench.cells if one.concurrency == 1 and one.of(MOVE) is not None and not one.of(REFERENCE)]
    if not cells:
        return None
    drawn: list[Chart] = []
    tables: list[Table] = []
    for way in dict.fromkeys(one.route for one in cells):
        here = [one for one in cells if one.route == way]
        copied = _once([one for one in here if one.carried != ARENA])
        if len({one.nbytes for one in copied}) > 1:
            drawn.append(_throughput_chart(copied, f"throughput-{len(drawn) + 1}"))
        tables.append(_throughput_table(here))
    text = (
        "Each rate is that of a whole move, protocol included. Dashed lines are the limits of the same run: what the"
        " bytes alone take, without a protocol. Of several of a kind, the fastest counts. The columns of limits say how"
        " many times as fast as the limit ours is: 1 is as fast. An arena hands memory over and copies no byte: it is"
        " in the table, not in the chart.",
    )
    return Section("throughput", "Throughput against size", text, charts=tuple(drawn), tables=tuple(tables))


def _once(cells: Sequence[Cell]) -> list[Cell]:
    """Of the same move in several parts of a matrix, the one with most limits beside it."""
    found: dict[tuple[str, int, int], Cell] = {}
    for cell in sorted(cells, key=lambda one: -len(one.series)):
        found.setdefault((cell.transport, cell.chunk_bytes, cell.nbytes), cell)
    return list(found.values())


def _throughput_table(cells: Sequence[Cell]) -> Table:
    named = [(name, words) for name, words in LIMITS if any(numbers.fastest(cell, name) for cell in cells)]
    rows = []
    for cell in cells:
        middle = move(cell)
        limits = []
        for name, _ in named:
            series, ours = numbers.fastest(cell, name), cell.of(MOVE)
            limits.append(f"{numbers.ratio(ours, series).median:.2f}" if series and ours else "-")
        shape = (size(cell.nbytes), size(cell.chunk_bytes))
        rows.append((cell.carried or cell.transport, *shape, times(middle), gb_per_s(cell, middle), *limits))
    head = ("carried by", "size", "chunks", "time", "GB/s", *[f"of {words}" for _, words in named])
    return Table(f"Moves one at a time, {route(cells[0])}", head, tuple(rows), tuple(range(1, len(head))))


def _throughput_chart(cells: Sequence[Cell], name: str) -> Chart:
    found: list[Line] = []
    chunks = {one.chunk_bytes for one in cells}
    for transport, chunk in dict.fromkeys((one.transport, one.chunk_bytes) for one in cells):
        mine = sorted((c for c in cells if (c.transport, c.chunk_bytes) == (transport, chunk)), key=lambda c: c.nbytes)
        label = transport if len(chunks) == 1 else f"{transport}, {size(chunk)} chunks"
        found.append(_line(label, mine, lambda cell: cell.of(MOVE)))
    for prefix, words in LIMITS:
        limits: dict[int, Cell] = {}
        for cell in sorted(cells, key=lambda one: one.chunk_bytes):  # the largest chunks bound most
            if numbers.fastest(cell, prefix) is not None:
                limits[cell.nbytes] = cell
        bounded = [cell for _, cell in sorted(limits.items())]
        if bounded:
            found.append(_line(words, bounded, lambda c, p=prefix: numbers.fastest(c, p), True))  # type: ignore[misc]
    best = [f"{line.name} reaches {max(line.y):.3g} GB/s at {size(int(line.x[line.y.index(max(line.y))]))}"
            for line in found]  # fmt: skip
    alt = f"Gigabytes a second against size, {route(cells[0])}: {'; '.join(best)}. The table has every point."
    return charts.lines(name, alt, found, "size of a move", "GB/s", of_bytes=True)


def _line(name: str, cells: Sequence[Cell], pick: Callable[[Cell], Series | None], limit: bool = False) -> Line:
    xs, ys, lows, highs = [], [], [], []
    for cell in cells:
        series = pick(cell)
        assert series is not None
        around = spread(series.seconds)
        xs.append(float(cell.nbytes))
        ys.append(numbers.rate(cell, around.median))
        lows.append(numbers.rate(cell, around.high))
        highs.append(numbers.rate(cell, around.low))
    return Line(name, tuple(xs), tuple(ys), tuple(lows), tuple(highs), limit)


# ---- latency --------------------------------------------------------------------------------------------------------
def latency(bench: Bench) -> Section | None:
    found: list[tuple[str, Sequence[float]]] = []
    for cell in bench.cells:
        if cell.nbytes > SMALL_BYTES or cell.concurrency > 1:
            continue
        for series in cell.series:
            if series.what in (MOVE, REFERENCE):
                who = f"the reference, {size(cell.nbytes)}" if series.what == REFERENCE else cell.name
                found.append((who, [one * 1e3 for one in series.seconds]))
    for figure in bench.figures:
        if figure.unit == "ms" and len(figure.samples) > 1:
            found.append((figure.name, figure.samples))
    if not found:
        return None
    rows = []
    for name, samples in found:
        around = spread(samples)
        tail = sorted(samples)[min(len(samples) - 1, int(0.95 * len(samples)))]
        row = (around.least, around.low, around.median, around.high, tail, around.most)
        rows.append((name, str(around.count), *[f"{one:.3g}" for one in row]))
    middles = "; ".join(f"{name}: {statistics.median(samples):.3g} ms" for name, samples in found)
    alt = f"Milliseconds of small moves, every sample a dot, boxes around the middle half. Medians: {middles}."
    head = ("move", "samples", "least", "quartile", "median", "quartile", "95%", "most")
    return Section("latency", "Latency of small moves",
                   ("From the request until the event is done and its source released, in milliseconds.",),
                   charts=(charts.boxes("latency", alt, found, "ms, on a logarithmic scale"),),
                   tables=(Table("Latency, ms", head, tuple(rows), tuple(range(1, len(head)))),))  # fmt: skip


# ---- control cost ---------------------------------------------------------------------------------------------------
def _cost(phases: Sequence[Phases]) -> tuple[float, ...]:
    """Medians in ms: control, queue, commit, the way there and back, copy."""
    way = [max(0.0, p.total_s - p.control_s - p.queue_s - p.copy_s - p.commit_s) for p in phases]
    columns = ([p.control_s for p in phases], [p.queue_s for p in phases], [p.commit_s for p in phases], way,
               [p.copy_s for p in phases])  # fmt: skip
    return tuple(statistics.median(one) * 1e3 for one in columns)


def control(bench: Bench) -> Section | None:
    cells = [cell for cell in bench.cells if cell.phases and cell.concurrency == 1]
    if not cells:
        return None
    costs = {cell.name: _cost(cell.phases) for cell in cells}
    rows = tuple((name, *[f"{one:.3f}" for one in cost]) for name, cost in costs.items())
    picked = dict(list(costs.items())[:16])
    worst = max(costs, key=lambda name: sum(costs[name][:4]))
    alt = (
        f"Milliseconds of each move that are not its copy, split into {', '.join(PHASES)}. They are"
        f" {min(sum(one[:4]) for one in costs.values()):.2f} to {sum(costs[worst][:4]):.2f} ms; most for {worst}."
    )
    found = [Stack(name, cost[:4]) for name, cost in picked.items()]
    text = ("All that a move costs besides its bytes. " + PHASE_WORDS,)
    return Section("control", "Control cost by phase", text,
                   charts=(charts.stacks("control", alt, PHASES, found, "ms"),),
                   tables=(Table("Medians, ms", ("move", *PHASES, "copy"), rows, (1, 2, 3, 4, 5)),))  # fmt: skip


# ---- prediction -----------------------------------------------------------------------------------------------------
def prediction(bench: Bench) -> Section | None:
    pairs = numbers.errors(bench)
    if not pairs:
        return None
    rows = tuple((name, seconds(p), seconds(m), f"{p / m - 1:+.0%}") for name, p, m in pairs)
    error = numbers.median_error(pairs) or 0.0
    within = sum(abs(p / m - 1) <= 0.15 for _, p, m in pairs)
    text = [f"Simulated with {bench.profile} from the same scenarios. The median error is {error:.0%}; {within} of"
            f" {plural(len(pairs), 'move')} within 15%."]  # fmt: skip
    if bench.timings:
        only = numbers.median_error([(one.file, one.predicted_s, one.measured_s) for one in bench.timings]) or 0.0
        text.append(f"On scenarios alone, which no profile is made from: {only:.0%}.")
    alt = (
        f"Predicted against measured milliseconds of {plural(len(pairs), 'move')}; {within} lie within 15% of the line."
    )
    dots = [(m * 1e3, p * 1e3) for _, p, m in pairs]
    return Section("prediction", "Predicted and measured", tuple(text),
                   charts=(charts.scatter("prediction", alt, dots, "measured, ms", "predicted, ms"),),
                   tables=(Table("Moves", ("move", "predicted", "measured", "error"), rows, (1, 2, 3)),))  # fmt: skip


# ---- contention -----------------------------------------------------------------------------------------------------
def contention(bench: Bench) -> Section | None:
    groups: dict[tuple[str, tuple[str, str], int, int], list[Cell]] = {}
    for cell in bench.cells:
        if cell.of(MOVE) is not None:
            groups.setdefault((cell.transport, cell.route, cell.nbytes, cell.chunk_bytes), []).append(cell)
    many = {key: sorted(cells, key=lambda c: c.concurrency) for key, cells in groups.items()
            if len({c.concurrency for c in cells}) > 1}  # fmt: skip
    figures = [one for one in bench.figures if "small" in one.name]
    if not many and not figures:
        return None
    rows, found = [], []
    for (transport, _, nbytes, _), cells in many.items():
        name = f"{transport}, {size(nbytes)} each"
        ys = []
        for cell in cells:
            middle = move(cell)
            singles = spread(cell.singles or (middle.median,))
            ys.append(numbers.rate(cell, middle.median))
            rows.append((name, str(cell.concurrency), gb_per_s(cell, middle), times(singles)))
        found.append(Line(name, tuple(float(c.concurrency) for c in cells), tuple(ys)))
    drawn, tables = [], []
    if found:
        said = "; ".join(f"{one.name}: {one.y[0]:.3g} GB/s alone, {one.y[-1]:.3g} with {one.x[-1]:g}" for one in found)
        alt = f"Gigabytes a second of all moves together against how many run at once. {said}."
        drawn.append(charts.lines("contention", alt, found, "moves at once", "GB/s together", of_bytes=False))
        tables.append(
            Table("Moves at once", ("moves", "at once", "GB/s together", "each takes"), tuple(rows), (1, 2, 3))
        )
    if figures:
        kept = tuple((one.name, plain(spread(one.samples)), one.unit, one.about) for one in figures)
        tables.append(Table("A small move beside a large one", ("", "median", "unit", ""), kept, (1,)))
    return Section("contention", "Contention", ("Several moves share what carries them.",), charts=tuple(drawn),
                   tables=tuple(tables))  # fmt: skip


# ---- us beside the reference -----------------------------------------------------------------------------------------
def beside(bench: Bench) -> Section | None:
    rows = []
    for cell in bench.cells:
        ours, theirs = cell.of(MOVE), cell.of(REFERENCE)
        if ours is None or theirs is None:
            continue
        around = numbers.ratio(ours, theirs)
        rows.append((cell.name, shown(cell), times(spread(ours.seconds)),
                     times(spread(theirs.seconds)), plain(around)))  # fmt: skip
    figures = [one for one in bench.figures if "small" not in one.name]
    if not rows and not figures:
        return None
    tables = []
    if rows:
        head = ("move", "what", "ours", "the reference", "times as fast")
        tables.append(Table("The same move over HTTP, ours and the reference's", head, tuple(rows), (2, 3, 4)))
    if figures:
        kept = tuple((one.name, f"{max(one.samples):.3g}", one.unit, one.about) for one in figures)
        tables.append(Table("Services, the most that was seen", ("", "most", "unit", ""), kept, (1,)))
    return Section("services", "As services", ("A controller and two instances, asked over HTTP.",),
                   tables=tuple(tables))  # fmt: skip
