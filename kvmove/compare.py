"""Two runs of one scenario, one simulated and one real: what is equal, what differs, and how wrong the prediction is.

Four parts, of which the first three are asserted and the last is only reported:

* replay: the history of each node, through a fresh machine, gives equal effects (in both worlds);
* violations: no property of the protocol is broken in either history;
* outcome: ``strict``: equal answers and final placement. ``racing``: each real answer, and the real final placement,
  is one that some simulated schedule gives, out of a stated number of them;
* time: predicted and measured, for each move and each of its phases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final

import msgspec

from kvcore.scenario.result import EventPhases, Operation, Result
from kvmove.examine import Replay

PHASES: Final = ("control", "queue", "copy", "commit")
#: Simulated schedules that a racing answer is looked for in, before it counts as one that none gives.
BUDGET: Final = 200

Answer = tuple[str, int, str, str]
"""(state, num_tokens, reason, more) of an operation: what an outcome is compared by. ``more``: what a lookup found and
where, what each source rank of a move deleted and kept."""
Placement = dict[str, dict[str, int]]


class Outcome(msgspec.Struct, frozen=True):
    """``schedules``: how many simulated ones the real run was compared with."""

    equal: bool
    order: str
    schedules: int
    differs: tuple[str, ...] = ()


class Span(msgspec.Struct, frozen=True):
    """``error``: predicted / measured - 1; None where nothing was measured."""

    predicted_ns: int
    measured_ns: int
    error: float | None


class OpTime(msgspec.Struct, frozen=True):
    """One move, from request to end of event, and its phases."""

    op: str
    predicted_ns: int
    measured_ns: int
    error: float | None
    phases: dict[str, Span] = {}


class Comparison(msgspec.Struct, frozen=True):
    replay: Replay
    outcome: Outcome
    time: tuple[OpTime, ...]

    @property
    def equal(self) -> bool:
        return self.replay.equal and self.outcome.equal


# ---- outcome --------------------------------------------------------------------------------------------------------
def answer(operation: Operation) -> Answer:
    found = [f"{one.num_tokens} at {one.instance}/{one.location}" for one in operation.found]
    source = []
    for one in operation.source:
        deleted = "unknown" if one.deleted < 0 else f"deleted {one.deleted}"
        source.append(f"rank {one.rank}: {deleted}, kept {one.kept} {one.why}".rstrip())
    return operation.state, operation.num_tokens, operation.reason, "; ".join([*sorted(found), *source])


def answer_text(given: Answer) -> str:
    """``done, 12 tokens`` or ``failed (nothing_held), 0 tokens``."""
    state, num_tokens, reason, _ = given
    why = f" ({reason})" if reason else ""
    return f"{state}{why}, {num_tokens:,} token{'' if num_tokens == 1 else 's'}"


def _whole_text(given: Answer) -> str:
    return answer_text(given) + (f" [{given[3]}]" if given[3] else "")


def outcome(order: str, sim: Result, real: Result, schedules: Callable[[], Iterator[Result]] | None = None) -> Outcome:
    """Compare by the scenario's ``order``. ``schedules`` gives further simulated results, as many as the budget allows;
    it is asked only for a racing scenario, and only until each real answer has been met."""
    if order == "strict":
        differs = (*_unequal_answers(sim, real), *_unequal_placement(sim.placement, real.placement))
        return Outcome(not differs, order, 1, differs)
    return _reachable(sim, real, schedules)


def _unequal_answers(sim: Result, real: Result) -> list[str]:
    ours = {operation.op: answer(operation) for operation in sim.operations}
    theirs = {operation.op: answer(operation) for operation in real.operations}
    found = []
    for op in [*ours, *(op for op in theirs if op not in ours)]:
        if ours.get(op) != theirs.get(op):
            left, right = (_whole_text(side[op]) if op in side else "never asked" for side in (ours, theirs))
            found.append(f"{op}: {left} in simulation, {right} for real")
    return found


def _unequal_placement(sim: Placement, real: Placement) -> list[str]:
    found = []
    for place in sorted({*sim, *real}):
        ours, theirs = sim.get(place, {}), real.get(place, {})
        for prompt in sorted({*ours, *theirs}):
            if ours.get(prompt, 0) != theirs.get(prompt, 0):
                found.append(
                    f"{place} ends with {ours.get(prompt, 0):,} tokens of {prompt} in simulation,"
                    f" {theirs.get(prompt, 0):,} for real"
                )
    return found


def _reachable(sim: Result, real: Result, schedules: Callable[[], Iterator[Result]] | None) -> Outcome:
    missing = {operation.op: answer(operation) for operation in real.operations}
    placed = False
    seen: dict[str, list[Answer]] = {op: [] for op in missing}
    tried = 0
    for result in _first_and(sim, schedules):
        tried += 1
        for operation in result.operations:
            given = answer(operation)
            if given not in seen.setdefault(operation.op, []):
                seen[operation.op].append(given)
            if missing.get(operation.op) == given:
                del missing[operation.op]
        placed = placed or not _unequal_placement(result.placement, real.placement)
        if not missing and placed:
            return Outcome(True, "racing", tried)
    differs = [
        f"{op}: {_whole_text(given)} for real; {tried} simulated schedules give only "
        + " or ".join(_whole_text(one) for one in sorted(seen[op]))
        for op, given in missing.items()
    ]
    if not placed:
        where = "; ".join(_unequal_placement(sim.placement, real.placement))
        differs.append(f"the real final placement is none that {tried} simulated schedules give: {where}")
    return Outcome(False, "racing", tried, tuple(differs))


def _first_and(first: Result, more: Callable[[], Iterator[Result]] | None) -> Iterator[Result]:
    yield first
    if more is not None:
        yield from more()


# ---- time -----------------------------------------------------------------------------------------------------------
def span(predicted_ns: int, measured_ns: int) -> Span:
    return Span(predicted_ns, measured_ns, predicted_ns / measured_ns - 1 if measured_ns > 0 else None)


def times(sim: Result, real: Result) -> tuple[OpTime, ...]:
    """One entry for each move that ended in both worlds, in the order in which they were asked for."""
    measured = {operation.op: operation for operation in real.operations}
    sim_phases, real_phases = _phases_by_op(sim.phases), _phases_by_op(real.phases)
    found = []
    for operation in sim.operations:
        other = measured.get(operation.op)
        if operation.what != "move" or other is None or operation.end_ns < 0 or other.end_ns < 0:
            continue
        whole = span(operation.end_ns - operation.start_ns, other.end_ns - other.start_ns)
        ours, theirs = sim_phases.get(operation.op), real_phases.get(operation.op)
        phases = {}
        if ours is not None and theirs is not None:
            phases = {name: span(_phase(ours, name), _phase(theirs, name)) for name in PHASES}
        found.append(OpTime(operation.op, whole.predicted_ns, whole.measured_ns, whole.error, phases))
    return tuple(found)


def _phases_by_op(phases: Iterable[EventPhases]) -> dict[str, EventPhases]:
    """An operation asked twice (one idempotency key) has one event; the first is kept."""
    found: dict[str, EventPhases] = {}
    for one in phases:
        found.setdefault(one.op, one)
    return found


def _phase(phases: EventPhases, name: str) -> int:
    value = getattr(phases, f"{name}_ns")
    assert isinstance(value, int)
    return value
