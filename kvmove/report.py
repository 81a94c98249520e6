"""What a run says of itself: text for people, JSON for programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from kvcore.scenario.result import Operation, Result
from kvmove import evidence
from kvmove.compare import Comparison, answer, answer_text
from kvmove.examine import Replay
from kvmove.output import duration, grid, percent, plural

if TYPE_CHECKING:
    from rich.console import Console

    from kvmove.play import Played

#: Operations listed of a long workload; the rest is counted.
SHOWN: Final = 20
WORLD: Final = {"sim": "in simulation", "real": "for real"}


# ---- text -----------------------------------------------------------------------------------------------------------
def print_run(screen: Console, played: Played, *, kept: bool) -> None:
    scenario = played.scenario
    screen.print(f"[bold]{scenario.name}[/bold]  ({played.path}, seed {played.built.seed}, {scenario.order})")
    for world, result in played.results.items():
        screen.print(f"\n[bold]{WORLD[world]}[/bold]{_carried(result)}, {played.wall_s[world]:.2f} s of wall time")
        print_operations(screen, result)
        for line in verdicts(played, world):
            screen.print("  " + line, markup=False, soft_wrap=True)
        if kept:
            screen.print(f"  history: {played.histories[world]}", markup=False)
    if played.skipped:
        screen.print(f"\n[bold]for real[/bold]: skipped: {played.skipped}", soft_wrap=True)
    if played.replay is not None:
        screen.print("\n[bold]compared[/bold]")
        print_replay(screen, played.replay)
    if played.comparison is not None:
        print_comparison(screen, played.comparison)
    screen.print(f"{_verdict(played)}\n")


def _verdict(played: Played) -> str:
    if not played.good:
        return "[bold red]FAILED[/bold red]"
    return "[bold yellow]skipped[/bold yellow]" if played.skipped else "[bold green]ok[/bold green]"


def print_line(screen: Console, played: Played) -> None:
    """A good run among several."""
    told = []
    for world, result in played.results.items():
        by = f" over {result.transport}" if world == "real" and result.transport else ""
        told.append(f"{plural(len(result.operations), 'operation')} {WORLD[world]}{by}")
    if played.comparison is not None:
        told.append("equal" if played.comparison.outcome.order == "strict" else "met")
    screen.print(f"ok  {played.path}: {', '.join(told)}", markup=False, soft_wrap=True)


def _carried(result: Result) -> str:
    return f", bytes carried by {result.transport}" if result.transport and result.world == "real" else ""


def print_operations(screen: Console, result: Result) -> None:
    table = grid("op", "what", "answer", "time", right=("time",))
    for operation in result.operations[:SHOWN]:
        table.add_row(
            operation.op, operation.text or operation.what, op_answer(operation), duration(operation.duration_ns)
        )
    screen.print(table)
    more = len(result.operations) - SHOWN
    if more > 0:
        states: dict[str, int] = {}
        for operation in result.operations[SHOWN:]:
            states[operation.state] = states.get(operation.state, 0) + 1
        screen.print(
            f"  and {more:,} more: " + ", ".join(f"{count:,} {state}" for state, count in sorted(states.items()))
        )


def op_answer(operation: Operation) -> str:
    """One cell: the answer, and for moves what became of the source."""
    if operation.what in ("settle", "sleep", "wait"):
        return operation.state
    if operation.what == "lookup":
        found = ", ".join(f"{one.num_tokens:,} at {one.instance}/{one.location}" for one in operation.found)
        return f"{operation.state}: {found or 'nowhere'}"
    text = answer_text(answer(operation))
    if operation.what == "move" and operation.source:
        text += f"; source: {source_text(operation)}"
    return text


def source_text(operation: Operation) -> str:
    """What the source did with the moved chunks, summed over its ranks."""
    unknown = sum(1 for one in operation.source if one.deleted < 0)
    deleted = sum(one.deleted for one in operation.source if one.deleted > 0)
    kept = sum(one.kept for one in operation.source)
    why = ", ".join(dict.fromkeys(one.why for one in operation.source if one.why))
    parts = [f"{plural(deleted, 'chunk')} deleted"] if deleted else []
    parts += [f"{plural(kept, 'chunk')} kept"] if kept else []
    parts += [f"unknown at {plural(unknown, 'rank')}"] if unknown else []
    return ("; ".join(parts) or "kept") + (f" ({why})" if why else "")


def verdicts(played: Played, world: str) -> Iterator[str]:
    """What failed, each with the few events that show it; or one line that nothing did."""
    result = played.results[world]
    expected = len(played.scenario.expect)
    unexpected = played.unexpected(world)
    if not unexpected and not result.hung and not played.failures[world]:
        met = f", {plural(expected, 'expectation')} met" if expected else ""
        meant = " and ".join(played.scenario.violates)
        yield f"every property holds{f' but {meant}, as is meant' if meant else ''}{met}"
        return
    for who in result.hung:
        yield f"HUNG at its deadline: {who}"
    for violation in unexpected:
        yield f"VIOLATION {violation.property} at {violation.node}, {duration(violation.t)}: {violation.text}"
        yield from ("    " + line for line in evidence.of_violation(played.histories[world], violation))
    shown = ""
    for failure in played.failures[world]:
        yield f"EXPECTED {failure}"
        step = failure.partition(":")[0]
        if step != shown:  # once is enough for all that is expected of a step
            yield from ("    " + line for line in evidence.of_step(played.histories[world], step))
        shown = step


def print_replay(screen: Console, replay: Replay) -> None:
    steps = sum(replay.nodes.values())
    equal = "equal effects, each time" if replay.equal else "effects DIFFER"
    screen.print(f"  replay: {steps:,} inputs of {plural(len(replay.nodes), 'node')} through fresh machines: {equal}")
    for line in replay.differs:
        screen.print("    " + line, markup=False, soft_wrap=True)


def print_comparison(screen: Console, comparison: Comparison) -> None:
    outcome = comparison.outcome
    if outcome.order == "strict":
        verdict = "equal answers, equal final placement" if outcome.equal else "answers or placement DIFFER"
        screen.print(f"  outcome: {verdict}")
    else:
        tried = plural(outcome.schedules, "simulated schedule")
        verdict = f"each real answer is met within {tried}" if outcome.equal else f"NOT met within {tried}"
        screen.print(f"  outcome: {verdict}")
    for line in outcome.differs:
        screen.print("    " + line, markup=False, soft_wrap=True)
    if comparison.time:
        print_times(screen, comparison)


def print_times(screen: Console, comparison: Comparison) -> None:
    table = grid("move", "phase", "predicted", "measured", "error", right=("predicted", "measured", "error"))
    for number, op in enumerate(comparison.time[:SHOWN]):
        if number and op.phases:
            table.add_row()
        for name, phase in op.phases.items():
            row = (duration(phase.predicted_ns), duration(phase.measured_ns), percent(phase.error))
            table.add_row("", name, *row)
        table.add_row(op.op, "whole", duration(op.predicted_ns), duration(op.measured_ns), percent(op.error))
    screen.print(table)


def print_summary(screen: Console, runs: Sequence[Played]) -> None:
    bad = [played for played in runs if not played.good]
    screen.print(f"{plural(len(runs), 'scenario')}: {len(runs) - len(bad):,} ok, {len(bad):,} failed")
    for played in bad:
        screen.print(f"  failed: {played.path}", markup=False)


# ---- JSON -----------------------------------------------------------------------------------------------------------
def encode(runs: Sequence[Played]) -> bytes:
    """One run: its object. Several: ``{"runs": [...]}``, one object a file."""
    bodies = [run_body(played) for played in runs]
    body = bodies[0] if len(bodies) == 1 else {"runs": bodies}
    return msgspec.json.format(msgspec.json.encode(body), indent=2)


def run_body(played: Played) -> dict[str, Any]:
    body: dict[str, Any] = {
        "scenario": played.scenario.name,
        "file": played.path,
        "seed": played.built.seed,
        "order": played.scenario.order,
        "good": played.good,
        "worlds": {world: world_body(played, world) for world in played.results},
    }
    if played.comparison is not None:
        body["comparison"] = played.comparison
    elif played.replay is not None:
        body["comparison"] = {"replay": played.replay}
    if played.skipped:
        body["skipped"] = played.skipped
    return body


def world_body(played: Played, world: str) -> dict[str, Any]:
    """Times are from request to end of event; -1: it has not ended."""
    body = played.results[world].to_json()
    body["metrics"] = {**body["metrics"], "wall_s": played.wall_s[world]}
    return {**body, "expectations_failed": played.failures[world]}
