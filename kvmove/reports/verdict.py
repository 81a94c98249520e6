"""What a report says first: a few sentences and the goals, computed from what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvmove.bench.result import MOVE, Bench
from kvmove.output import plural, size
from kvmove.reports import numbers
from kvmove.reports.numbers import Judged
from kvmove.reports.sources import Found
from kvmove.reports.words import REFERENCE, SMALL_BYTES, Section, Table, move, plain, seconds, shown, times


def verdict(found: Found) -> Section:
    bench = found.bench
    judged = [numbers.judge(goal, bench) for goal in bench.goals]
    said = [*_fastest(bench), *_against_reference(bench), *_goals(judged), *_predicted(bench), *_survived(found)]
    return Section("verdict", "Verdict", tuple(said), tables=tuple([_goal_table(judged)] if judged else []))


def _fastest(bench: Bench) -> Iterable[str]:
    single = [c for c in bench.cells if c.concurrency == 1 and c.of(MOVE) is not None and c.carried != "arena"]
    if not single:
        return
    most = max(cell.nbytes for cell in single)
    best = max((cell for cell in single if cell.nbytes == most), key=lambda one: numbers.rate(one, move(one).median))
    middle, by = move(best), best.carried or best.transport
    text = (
        f"The largest moves, {shown(best)}, run fastest over {by}: {seconds(middle.median)}"
        f" from request to released source, {numbers.rate(best, middle.median):.3g} GB/s"
    )
    ours = best.of(MOVE)
    for name, words in (("bare nixl", "bare NIXL"), ("raw", "a raw socket"), ("memcpy", "one memcpy")):
        limit = numbers.fastest(best, name)
        if limit is not None and ours is not None:
            text += f", {numbers.ratio(ours, limit).median:.2f} of what {words} does there"
            break
    yield text + "."


def _against_reference(bench: Bench) -> Iterable[str]:
    parts = []
    for cell in bench.cells:
        ours, theirs = cell.of(MOVE), cell.of(REFERENCE)
        if ours is not None and theirs is not None:
            factor = numbers.ratio(ours, theirs).median
            amount = plural(cell.tokens, "token") if cell.nbytes <= SMALL_BYTES else size(cell.nbytes)
            parts.append(f"{factor:.1f} times as fast for {amount}")
    if parts:
        yield f"Against the reference's own move, by the same definition and in turns, ours is {' and '.join(parts)}."


def _goals(judged: Sequence[Judged]) -> Iterable[str]:
    measured = [one for one in judged if one.found is not None]
    if measured:
        missed = [one.goal.say for one in measured if not one.met]
        text = f"{sum(one.met for one in measured)} of {plural(len(measured), 'goal')} met"
        yield f"{text}; missed: {'; '.join(missed)}." if missed else f"{text}."
    unknown = len(judged) - len(measured)
    if unknown:
        yield f"{plural(unknown, 'goal')} could not be judged: the table says why."


def _predicted(bench: Bench) -> Iterable[str]:
    moves = numbers.errors(bench)
    error = numbers.median_error(moves)
    if error is not None:
        yield f"The simulator, with {bench.profile}, is off by {error:.0%} (median over {len(moves)} moves)."


def _survived(found: Found) -> Iterable[str]:
    outcomes = found.bench.outcomes
    if outcomes:
        bad = sum(not one.good for one in outcomes)
        fired = sum(sum(one.fired.values()) for one in outcomes)
        where = " and ".join(
            f"{sum(one.world == world for one in outcomes):,} {word}"
            for world, word in (("sim", "in simulation"), ("real", "on real processes"))
            if any(one.world == world for one in outcomes)
        )
        end = "nothing was lost, wrong or left behind" if not bad else f"{bad:,} of them went WRONG"
        yield f"{plural(len(outcomes), 'run')} with faults ({where}; {plural(fired, 'fault')} fired): {end}."
    for suite in found.suites:
        failed = suite.count("failed")
        yield (
            f"The hardware suite: {suite.count('passed'):,} passed,"
            f" {f'{failed:,} FAILED' if failed else 'none failed'}, {suite.count('skipped'):,} skipped for what this"
            " machine lacks."
        )


def _goal_table(judged: Sequence[Judged]) -> Table:
    rows = []
    for one in judged:
        goal = one.goal
        asked = goal.least if goal.least is not None else goal.most or 0.0
        bound = seconds(asked) if goal.median else f"{asked:g}"
        shown_bound = f"{'at least' if goal.least is not None else 'at most'} {bound}"
        if one.found is None:
            rows.append((goal.say, shown_bound, "-", f"not measured: {one.why}"))
            continue
        unit = "" if goal.median or goal.ratio else f" {one.unit}"
        found = times(one.found) if goal.median else plain(one.found) + unit
        rows.append((goal.say, shown_bound + unit, found, "✓ met" if one.met else "✗ missed"))
    return Table("Goals: what was asked, and the median found (with the middle half of the samples)",
                 ("goal", "asked", "found", ""), tuple(rows))  # fmt: skip
