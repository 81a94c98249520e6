"""All sections of a report, in the order of the page."""

from __future__ import annotations

from kvmove.output import plural, size
from kvmove.reports import safety, speed
from kvmove.reports.sources import Found
from kvmove.reports.verdict import verdict
from kvmove.reports.words import Section, Table


def sections(found: Found) -> list[Section]:
    """In the order of the page; those that have nothing to say are left out."""
    bench = found.bench
    every = [
        verdict(found),
        machine(found),
        speed.throughput(bench),
        speed.latency(bench),
        speed.control(bench),
        speed.prediction(bench),
        speed.contention(bench),
        safety.faults(bench.outcomes),
        safety.hardware(found.suites),
        speed.beside(bench),
        safety.left_out(found),
    ]
    return [one for one in every if one is not None]


def machine(found: Found) -> Section:
    bench = found.bench
    text: tuple[str, ...] = (f"Found on {bench.begun[:10]}.",) if bench.begun else ()
    if found.commands:
        text = (
            f"Measured {bench.begun}, in {plural(round(bench.took_s / 60), 'minute')}; seed {bench.seed};"
            f" {plural(bench.repeats, 'repeat')} of everything after {bench.warmup} to warm up, ours and the limits in"
            " turns. Figures are medians; in brackets stand the quartiles, between which half of the samples lie. A"
            " move's time is from its request until its event is done and its source released.",
        )
    checked = sum(cell.checked_bytes for cell in bench.cells)
    if checked:
        text = (*text, f"{size(checked)} of moved KV were compared with what had been stored, after their turns.")
    said = (("This machine", bench.machine), ("Versions", bench.versions))
    tables = tuple(Table(caption, ("", ""), tuple(what.items())) for caption, what in said if what)
    commands = (*found.commands, *(one.command for one in found.suites if one.command))
    return Section("machine", "What machine, what was run", text, code=commands, tables=tables)
