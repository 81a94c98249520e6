"""A finished history, examined: each node's inputs through fresh machines again, and every property checked on the way.

The simulator checks the properties while it runs; what happened for real is checked here, from the log.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest
from typing import Final

import msgspec

from kvcore.protocol.machine import Boot, Machine
from kvcore.scenario.build import Built
from kvcore.scenario.checks import Checker
from kvcore.scenario.faults import Crash, FaultPlan
from kvcore.scenario.history import Header, HistoryError, Line, Replayed, replay
from kvcore.scenario.result import Violation

_LONGEST: Final = 200


class Replay(msgspec.Struct, frozen=True):
    """``nodes``: inputs replayed a node, ``world/address``. ``differs``: the first unequal step of each bad node."""

    equal: bool
    nodes: dict[str, int]
    differs: tuple[str, ...] = ()

    def __add__(self, other: Replay) -> Replay:
        return Replay(self.equal and other.equal, {**self.nodes, **other.nodes}, (*self.differs, *other.differs))


def examine(header: Header, lines: Iterable[Line], *, quiet: bool) -> tuple[Replay, list[Violation]]:
    """Replay, and check each property at every step; ``quiet``: those of a quiet end too. HistoryError for a log that
    cannot be replayed."""
    built = header.built
    if built is None:
        raise HistoryError(f"the history of {header.scenario} does not say what was built, so it cannot be replayed")
    checker = Checker(faults=bool(built.faults))
    machines: dict[str, Machine] = {}
    nodes: dict[str, int] = {}
    differs: dict[str, str] = {}
    now = 0
    for step in replay(header, lines):
        line, node = step.line, step.line.node
        now = line.t
        if isinstance(line.input, Boot):
            checker.boot(node, step.machine)
            machines[node] = step.machine
        checker.step(now, node, step.machine, line.input, step.effects)
        name = f"{header.world}/{node}"
        nodes[name] = nodes.get(name, 0) + 1
        if not step.equal and name not in differs:
            differs[name] = f"{name}: {difference(step)}"
    if quiet:
        gone = _may_stay_dead(built)
        checker.quiet(now, {node: machine for node, machine in machines.items() if node not in gone})
    return Replay(not differs, nodes, tuple(differs.values())), checker.violations


def replayed(header: Header, lines: Iterable[Line]) -> Replay:
    """Only the replay, for a history whose properties were checked while it ran."""
    nodes: dict[str, int] = {}
    differs: dict[str, str] = {}
    for step in replay(header, lines):
        name = f"{header.world}/{step.line.node}"
        nodes[name] = nodes.get(name, 0) + 1
        if not step.equal and name not in differs:
            differs[name] = f"{name}: {difference(step)}"
    return Replay(not differs, nodes, tuple(differs.values()))


def _may_stay_dead(built: Built) -> set[str]:
    """Nodes that a fault kills for good: a log does not say who was alive at its end."""
    plan = FaultPlan(built.faults, built.config, built.nodes)
    actions = [action for found in plan.actions.values() for action in found]
    return {action.node for action in actions if isinstance(action, Crash) and action.restart_after_ns < 0}


def difference(step: Replayed) -> str:
    """The first effect that differs, short enough for a line."""
    line = step.line
    for was, now in zip_longest(line.out, step.effects):
        if was != now:
            return f"at {line.t} ns on {_short(line.input)}: recorded {_short(was)}, replayed {_short(now)}"
    return f"at {line.t} ns: equal"


def _short(thing: object) -> str:
    text = "nothing" if thing is None else str(thing)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
