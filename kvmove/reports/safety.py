"""The sections about what went wrong on purpose, what the hardware suite found, and what is not here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from kvmove.bench.result import Outcome
from kvmove.output import plural
from kvmove.reports.sources import Found, Suite
from kvmove.reports.words import Section, Table

WORLD: Final = {"sim": "in simulation", "real": "real processes"}


def faults(outcomes: Sequence[Outcome]) -> Section | None:
    if not outcomes:
        return None
    kinds: dict[tuple[str, str], list[int]] = {}
    for one in outcomes:
        for fault, count in one.fired.items():
            row = kinds.setdefault((fault.partition(" at ")[0], WORLD.get(one.world, one.world)), [0, 0])
            row[0] += 1
            row[1] += count
    rows = tuple((kind, world, str(runs), str(count)) for (kind, world), (runs, count) in sorted(kinds.items()))
    listed = tuple(
        (one.file, WORLD.get(one.world, one.world), _ends(one.moves), "✓ survived" if one.good else f"✗ {one.why}")
        for one in sorted(outcomes, key=lambda o: (o.good, o.world != "real", o.file))
    )
    good = sum(one.good for one in outcomes)
    text = (
        f"{good:,} of {plural(len(outcomes), 'run')} ended as they must: every property held at every step, every"
        " expectation was met, nothing was left pinned. A move that fails is no damage; bytes that are lost, wrong or"
        " left behind are.",
    )
    tables = (
        Table("Faults that fired", ("fault", "where", "runs", "times"), rows, (2, 3)),
        Table("Every run", ("scenario", "where", "moves ended", ""), listed),
    )
    return Section("faults", "Faults survived", text, tables=tables)


def _ends(moves: dict[str, int]) -> str:
    return ", ".join(f"{count} {state}" for state, count in sorted(moves.items())) or "-"


SHOWN: Final = ("transport", "from", "to", "direction", "layout", "ranks", "MiB", "GB/s", "total_ms", "carried by")


def hardware(suites: Sequence[Suite]) -> Section | None:
    if not suites:
        return None
    tables: list[Table] = []
    text: list[str] = []
    for suite in suites:
        groups: dict[str, list[int]] = {}
        for case in suite.cases:
            row = groups.setdefault(case.group, [0, 0, 0])
            row[("passed", "failed", "skipped").index(case.outcome)] += 1
        rows = tuple((name, *[str(one) for one in row]) for name, row in sorted(groups.items()))
        tables.append(Table(f"Tests of {suite.file}", ("group", "passed", "failed", "skipped"), rows, (1, 2, 3)))
        reasons: dict[str, int] = {}
        for case in suite.cases:
            if case.outcome == "skipped":
                reasons[case.why or "no reason given"] = reasons.get(case.why or "no reason given", 0) + 1
        if reasons:
            why = tuple((str(count), reason) for reason, count in sorted(reasons.items(), key=lambda one: -one[1]))
            tables.append(Table("What this machine lacks", ("tests", "skipped because"), why, (0,)))
        moves = [row for row in suite.measured if "carried by" in row]
        if moves:
            head = tuple(name for name in SHOWN if any(name in row for row in moves))
            listed = tuple(tuple(str(row.get(name, "")) for name in head) for row in moves)
            numbers = tuple(at for at, name in enumerate(head) if name in SHOWN[5:])
            tables.append(Table("Moves that it measured", head, listed, numbers))
        for case in suite.cases:
            if case.outcome == "failed":
                text.append(f"FAILED: {case.group} {case.name}: {case.why}")
    return Section("hardware", "The hardware suite", tuple(text), tables=tuple(tables))


def left_out(found: Found) -> Section | None:
    bench = found.bench
    rows = [(what, f"✗ FAILED: {why}") for what, why in bench.failed.items()] + list(bench.skipped.items())
    if not found.commands:
        rows.append(("figures", "not measured: kvmove bench --out DIR"))
    if not found.suites:
        rows.append(("the hardware suite", "not run: pytest tests/hardware --junit-xml DIR/hardware.xml"))
    if not bench.outcomes:
        rows.append(("faults", "none of these runs played scenarios with faults"))
    if not rows:
        return None
    return Section("left-out", "What is not here", (), tables=(Table("Left out", ("what", "why"), tuple(rows)),))
