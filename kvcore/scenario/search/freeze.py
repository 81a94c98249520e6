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
from kvcore.scenario.world import World

_TABLES = ("on_message", "on_birth", "on_input", "on_timer", "commands")
_SHARED = (Config, Rules, WorkerSpec, ControllerSpec)


class Freezer:
    """Holds what never changes within one search (specs, configs), so that snapshots only refer to it."""

    def __init__(self) -> None:
        self.shared: List[Any] = []
        self.index: Dict[int, int] = {}

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
            digests[name] = _digest(canonical(live[name]))
    rest = {name: _copy(getattr(world, name)) for name in _REST}
    rest["fresh"] = dict(world.fresh)
    rest["memory"] = {at: dict(slots) for at, slots in world.memory.items()}
    rest["journal"] = list(world.journal)
    state = State(machines, digests, rest, freezer.dumps(extra), depth)
    parts = [sorted(digests.items()), canonical({name: rest[name] for name in (*_REST, "memory")}), extra_digest]
    # A network that only grows: in which order messages were first sent makes no difference.
    parts[1] = [sorted(_digest(canonical(letter)) for letter in world.sent), parts[1]]
    state.digest = _digest(parts)
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


def _digest(value: Any) -> bytes:
    return hashlib.blake2b(_ENCODER.encode(value), digest_size=16).digest()


_ENCODER = msgspec.msgpack.Encoder(enc_hook=lambda value: canonical(value))
_SKIP = frozenset({*_TABLES, "spec", "config", "rules", "on_ended", "count", "heap", "sent", "born_ns"})


def canonical(value: Any) -> Any:
    """Nested lists of plain values, equal for equal states. The order of every table's keys counts, not only that of a
    pool's index: that may tell apart states that behave alike, never the other way round."""
    kind = type(value)
    if kind in (int, str, bytes, bool, float) or value is None:
        return value
    if kind is dict:
        return [[canonical(key), canonical(held)] for key, held in value.items()]
    if kind in (list, tuple):
        return [canonical(item) for item in value]
    if kind is Timers:
        return sorted([list(name), when[0]] for name, when in value.deadlines.items())
    if kind is Place:
        return [value.instance, value.location]
    if isinstance(value, msgspec.Struct):
        return [kind.__name__, *[canonical(getattr(value, name)) for name in value.__struct_fields__]]
    fields = vars(value)
    return [kind.__name__, *[canonical(fields[name]) for name in fields if name not in _SKIP]]
