"""Two benches side by side: what became faster or slower, and by how much more than chance would have it."""

from __future__ import annotations

from typing import Final

from kvmove.bench.result import MOVE, Bench, Cell, Series
from kvmove.reports.words import Section, Table, plain, times
from kvmove.spread import spread

SAME: Final = 0.05
"""Medians that are closer than this are called alike."""
MACHINE: Final = ("CPU", "cores", "GPUs", "system")


def sections(a: Bench, b: Bench) -> list[Section]:
    """``a`` is before, ``b`` after."""
    rows: list[tuple[str, ...]] = []
    faster: list[str] = []
    slower: list[str] = []
    for cell, other in _pairs(a, b):
        for series in cell.series:
            after = other.of(series.what)
            if after is None:
                continue
            change, word = _change(series, after)
            rows.append((cell.name, series.what, _text(series), _text(after), f"{change:+.1%}", word))
            if series.what == MOVE and word != "alike":
                (faster if word == "▼ faster" else slower).append(f"{cell.name} {change:+.0%}")
    compared = sum(row[1] == MOVE for row in rows)
    alike = compared - len(faster) - len(slower)
    said = [f"{compared} cells are in both: {len(faster)} faster, {len(slower)} slower, {alike} alike."]
    said += [f"Faster: {', '.join(faster)}."] if faster else []
    said += [f"Slower: {', '.join(slower)}."] if slower else []
    differ = [key for key in MACHINE if a.machine.get(key) != b.machine.get(key)]
    if differ:
        said.append(f"They ran on different machines ({', '.join(differ)}): what differs may be theirs.")
    head = ("cell", "series", "before", "after", "time", "")
    about = (
        "Faster or slower: the medians are more than 5% apart, and the middle halves of the samples do not overlap."
        " The limits are compared too: where they changed alike, it was the machine."
    )
    found = [
        Section("verdict", "What changed", tuple(said)),
        Section("cells", "Cell by cell", (about,), tables=(Table("Medians", head, tuple(rows), (2, 3, 4)),)),
    ]
    figures = _figures(a, b)
    if figures.rows:
        found.append(Section("figures", "Figures", tables=(figures,)))
    return [*found, _made(a, b)]


def _pairs(a: Bench, b: Bench) -> list[tuple[Cell, Cell]]:
    others = {cell.name: cell for cell in b.cells}
    return [(cell, others[cell.name]) for cell in a.cells if cell.name in others]


def _text(series: Series) -> str:
    return times(spread(series.seconds))


def _change(before: Series, after: Series) -> tuple[float, str]:
    """(by how much longer it takes, a word for it)."""
    old, new = spread(before.seconds), spread(after.seconds)
    change = new.median / old.median - 1
    apart = new.low > old.high or new.high < old.low
    if abs(change) <= SAME or not apart:
        return change, "alike"
    return change, "▼ faster" if change < 0 else "▲ slower"


def _figures(a: Bench, b: Bench) -> Table:
    others = {one.name: one for one in b.figures}
    rows = []
    for one in a.figures:
        other = others.get(one.name)
        if other is not None:
            old, new = spread(one.samples), spread(other.samples)
            rows.append((one.name, plain(old), plain(new), one.unit))
    return Table("Medians", ("", "before", "after", "unit"), tuple(rows), (1, 2))


def _made(a: Bench, b: Bench) -> Section:
    keys = dict.fromkeys([*a.machine, *b.machine])
    rows = [(key, a.machine.get(key, "-"), b.machine.get(key, "-")) for key in keys]
    for key in dict.fromkeys([*a.versions, *b.versions]):
        rows.append((key, a.versions.get(key, "-"), b.versions.get(key, "-")))
    rows += [("measured", a.begun, b.begun), ("repeats", str(a.repeats), str(b.repeats))]
    lost = sorted({cell.name for cell in a.cells} ^ {cell.name for cell in b.cells})
    text = (f"In one of them only: {', '.join(lost)}.",) if lost else ()
    table = Table("Before and after", ("", "before", "after"), tuple(rows))
    return Section("made", "What was compared", text, code=(a.command, b.command), tables=(table,))
