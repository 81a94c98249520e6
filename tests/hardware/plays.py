"""Scenarios for the hardware suite, and what must be true of each run of one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from kvcore.scenario.build import Built, build
from kvcore.scenario.history import read
from kvcore.scenario.loader import loads
from kvcore.scenario.result import EventPhases, Result
from kvcore.scenario.units import Size
from kvmove.examine import examine
from kvreal.pool import Lender, Pool
from kvreal.run import run
from tests.hardware.found import KINDS, Case, Layout

MOVE = """
  - store: {{at: {source}, prompt: warm, tokens: 1}}
  - move: {{from: {source}, to: {target}, prompt: warm, as: warm-up}}
  - store: {{at: {source}, prompt: p, tokens: {tokens}}}
  - settle
  - move: {{from: {source}, to: {target}, prompt: p, as: m}}
  - settle
  - use: {{at: {target}, prompt: p, as: used}}
"""


def scenario(
    steps: str, places: Mapping[str, Mapping[str, int]], layout: Layout, *, ranks: int = 1, direction: str = "read",
    constants: str = "{}", faults: str = "", order: str = "racing", deadline_s: int = 300,
) -> Built:  # fmt: skip
    """``places``: instance -> location -> tokens that it must have room for, over whole chunks and two more."""
    slot = layout.chunk_tokens * layout.bytes_per_token
    lines = []
    for instance, locations in places.items():
        sizes = {name: (-(-tokens // layout.chunk_tokens) + 2) * slot for name, tokens in locations.items()}
        room = ", ".join(f"{name}: {Size(size)}" for name, size in sizes.items())
        lines.append(f"  {instance}: {{ranks: {ranks}, locations: {{{room}}}}}")
    kv = f"bytes_per_token: {Size(layout.bytes_per_token)}, chunk: {layout.chunk_tokens} tokens, direction: {direction}"
    return build(
        loads(
            f"name: hardware\norder: {order}\nkv: {{{kv}}}\nconstants: {constants}\ndeadline: {deadline_s} s\n"
            + "instances:\n"
            + "\n".join(lines)
            + f"\nsteps:{steps}"
            + (f"faults:{faults}" if faults else ""),
            "hardware.yaml",
        )
    )


def of_case(case: Case, within: bool = False) -> Built:
    """Store at ``a``, move, use at ``b``, or at ``a`` too if it is ``within``."""
    source, target = KINDS[case.source], KINDS[case.target]
    other = "a" if within else "b"
    places: dict[str, dict[str, int]] = {"a": {source: case.tokens}}
    places.setdefault(other, {})[target] = case.tokens
    steps = MOVE.format(source=f"a/{source}", target=f"{other}/{target}", tokens=case.tokens)
    return scenario(steps, places, case.layout, ranks=case.ranks, direction=case.direction)


def unreached(result: Result) -> None:
    """Skip if no transport of the pool reaches what a copy was to go between: that is its nature, and it says so."""
    for copy in result.copies:
        if copy.state == "failed" and copy.why.startswith("no transport between"):
            pytest.skip(copy.why)


def sound(result: Result, log: Path) -> None:
    """Nothing violated, nobody hung, every node's log replays, every property holds over all of it."""
    assert not result.hung, result.hung
    replay, violations = examine(*read(log), quiet=True)
    assert not result.violations and not violations, (result.violations, violations)
    assert replay.equal, replay.differs


def moved(
    case: Case, built: Built, pool: Pool, log: Path, elsewhere: Mapping[str, Lender] | None = None
) -> tuple[Result, EventPhases]:
    """Run it; every byte of the prompt is at the target, and what is free was overwritten before it was looked at."""
    result = run(built, pool=pool, history=log, elsewhere=elsewhere)
    unreached(result)
    sound(result, log)
    states = {one.op: (one.state, one.num_tokens) for one in result.operations}
    assert states["m"] == ("done", case.tokens), result.operation("m")
    assert states["used"] == ("ok", case.tokens), result.operation("used")
    nbytes = case.tokens * case.layout.bytes_per_token
    assert result.metrics["bytes_checked"] == nbytes + case.layout.bytes_per_token  # the warm-up's token, too
    assert result.metrics["chunks_spoiled"] == 0
    (place,) = result.placement
    assert result.placement[place] == {"p": case.tokens, "warm": 1}
    (phases,) = [phases for phases in result.phases if phases.op == "m"]
    assert phases.bytes == nbytes and result.transport
    return result, phases


def row(case: Case, result: Result, phases: EventPhases) -> dict[str, object]:
    """For the table and the report."""
    speed = phases.bytes / phases.copy_ns if phases.copy_ns else 0.0
    return {
        "transport": case.transport, "from": case.source, "to": case.target, "direction": case.direction,
        "layout": case.layout.name, "ranks": case.ranks, "carried by": result.transport or "",
        "MiB": round(phases.bytes / 2**20, 2), "GB/s": round(speed, 2),
        "bytes checked": result.metrics["bytes_checked"], "total_ms": round(phases.total_ns / 1e6, 3),
        "control_ms": round(phases.control_ns / 1e6, 3), "queue_ms": round(phases.queue_ns / 1e6, 3),
        "copy_ms": round(phases.copy_ns / 1e6, 3), "commit_ms": round(phases.commit_ns / 1e6, 3),
    }  # fmt: skip
