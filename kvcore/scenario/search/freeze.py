"""A world's state as bytes: snapshots that fork cheaply, and a canonical digest that tells equal states.

Snapshots pickle each machine by itself, without its dispatch tables and its spec, so that a step pays for the nodes it
touches only. The digest walks the state generically: a field that a machine gains is part of it from that day on.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import msgspec

from kvcore.protocol.config import Config, ControllerSpec, Rules, WorkerSpec
from kvcore.protocol.controller import Controller
from kvcore.protocol.machine import Machine, Timers
from kvcore.protocol.registry import Place
from kvcore.protocol.worker import Worker
from kvcore.scenario.world import Letter, World

_TABLES = ("on_message", "on_birth", "on_input", "on_timer", "commands")
_SHARED = (Config, Rules, WorkerSpec, ControllerSpec)


class Freezer:
    """Holds what never changes within one search (specs, configs), so that snapshots only refer to it."""

    def __init__(self) -> None:
        self.shared: List[Any] = []
        self.index: Dict[int, int] = {}
        self.letters: Dict[Letter, bytes] = {}

    def dumps(self, value: Any) -> bytes:
        buffer = io.BytesIO()
        pickler = pickle.Pickler(buffer, pickle.HIGHEST_PROTOCOL)
        pickler.dispatch_table = dict.fromkeys(_SHARED, self._reduce)
        pickler.dump(value)
        return buffer.getvalue()

    def _reduce(self, value: Any) -> Tuple[Callable[..., Any], Tuple[Any, ...]]:
        at = self.index.get(id(value))
        if at is None:
            at = self.index[id(value)] = len(self.shared)
            self.shared.append(value)
        return _shared, (at,)

    def loads(self, data: bytes) -> Any:
        _current[0] = self.shared
        return pickle.loads(data)

    def letter(self, letter: Letter) -> bytes:
        """A message's digest, computed once."""
        known = self.letters.get(letter)
        if known is None:
            known = self.letters[letter] = digest(letter)
        return known

    def machine(self, machine: Machine) -> bytes:
        fields = vars(machine)
        tables = {name: fields.pop(name) for name in _TABLES if name in fields}
        ended = None
        if isinstance(machine, Controller):
            ended = machine.moves.on_ended
            machine.moves.on_ended = None
        try:
            return self.dumps(machine)
        finally:
            fields.update(tables)
            if isinstance(machine, Controller):
                machine.moves.on_ended = ended

    def thaw(self, data: bytes) -> Machine:
        machine: Machine = self.loads(data)
        if isinstance(machine, (Worker, Controller)):
            machine.wire()
        return machine


_current: List[List[Any]] = [[]]
"""The shared objects of the freezer whose snapshot is being read. pickle gives reducers no other way to reach them."""


def _shared(at: int) -> Any:
    return _current[0][at]


class Machines(Dict[str, Machine]):
    """Machines that are thawed when they are touched; ``frozen`` keeps the others as bytes."""

    def __init__(self, frozen: Dict[str, bytes], freezer: Freezer) -> None:
        super().__init__()
        self.frozen: Dict[str, bytes] = frozen
        self.freezer: Freezer = freezer

    def __missing__(self, name: str) -> Machine:
        machine = self[name] = self.freezer.thaw(self.frozen[name])
        return machine

    def __contains__(self, name: object) -> bool:
        return name in self.frozen or super().__contains__(name)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401

    def pop(self, name: str, *default: Any) -> Any:
        self.frozen.pop(name, None)
        return super().pop(name, *default)

    def names(self) -> List[str]:
        return sorted({**dict.fromkeys(self.frozen), **dict.fromkeys(super().keys())})

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def items(self) -> Any:
        return [(name, self[name]) for name in self.names()]


class State:
    """One frozen world: machines as bytes, the rest as shallow copies, the checker and its ghosts as bytes."""

    __slots__ = ("machines", "digests", "rest", "extra", "digest", "depth")

    def __init__(
        self, machines: Dict[str, bytes], digests: Dict[str, bytes], rest: Dict[str, Any], extra: bytes, depth: int
    ) -> None:
        self.machines = machines
        self.digests = digests
        self.rest = rest
        self.extra = extra
        self.depth = depth
        self.digest = b""


_REST = ("now", "lives", "sent", "copies", "fills", "reads", "windows")


def freeze(world: World, freezer: Freezer, before: Optional[State], extra: Any, extra_digest: Any, depth: int) -> State:
    """Freeze a world. ``before``: the state it was forked from, whose untouched machines are taken over as they are."""
    machines: Dict[str, bytes] = {}
    digests: Dict[str, bytes] = {}
    live = world.machines
    for name in live:
        if isinstance(live, Machines) and not dict.__contains__(live, name) and before is not None:
            machines[name] = before.machines[name]
            digests[name] = before.digests[name]
        else:
            machines[name] = freezer.machine(live[name])
            digests[name] = digest(live[name])
    rest = {name: _copy(getattr(world, name)) for name in _REST}
    rest["fresh"] = dict(world.fresh)
    rest["memory"] = {at: dict(slots) for at, slots in world.memory.items()}
    rest["journal"] = list(world.journal)
    state = State(machines, digests, rest, freezer.dumps(extra), depth)
    # A network that only grows: in which order messages were first sent makes no difference.
    letters = sorted(freezer.letter(letter) for letter in world.sent)
    tables = [_listed(rest[name]) if isinstance(rest[name], dict) else rest[name] for name in _REST if name != "sent"]
    memory = [[at, slots] for at, slots in rest["memory"].items()]
    state.digest = digest([sorted(digests.items()), letters, tables, memory, extra_digest])
    return state


def _copy(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else value


def thaw(template: World, state: State, freezer: Freezer) -> Tuple[World, Any]:
    """A world in that state, and the extra value that was frozen with it."""
    world = World.__new__(World)
    world.specs = template.specs
    world.observe = None
    world.machines = Machines(dict(state.machines), freezer)
    for name in _REST:
        setattr(world, name, _copy(state.rest[name]))
    world.fresh = dict(state.rest["fresh"])
    world.memory = {at: dict(slots) for at, slots in state.rest["memory"].items()}
    world.journal = list(state.rest["journal"])
    world.answers = {}
    world.notes = []
    return world, freezer.loads(state.extra)


def digest(value: Any) -> bytes:
    """Sixteen bytes, equal for equal states.

    The order of every table's keys counts, not only that of a pool's index: that may tell apart states that behave
    alike, never the other way round. Stale timers and counts of what was ever set are no part of a state.
    """
    return hashlib.blake2b(_ENCODER.encode(value), digest_size=16).digest()


_SKIP = frozenset({*_TABLES, "spec", "config", "rules", "on_ended", "born_ns", "content"})


def _plain(value: Any) -> Any:
    """A machine's own object as plain values; what that holds comes here in turn."""
    if isinstance(value, Timers):
        return sorted([name, when[0]] for name, when in value.deadlines.items())
    if isinstance(value, Place):
        return [value.instance, value.location]
    fields = vars(value)
    return [
        type(value).__name__,
        *[_listed(held) if type(held) is dict else held for name, held in fields.items() if name not in _SKIP],
    ]


def _listed(table: Dict[Any, Any]) -> Any:
    """A table whose keys msgpack cannot hold, as pairs."""
    for key in table:
        return [[held, other] for held, other in table.items()] if type(key) in (tuple, Place) else table
    return table


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_plain)
