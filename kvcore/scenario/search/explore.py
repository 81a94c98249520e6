"""Breadth first through everything that can happen in a small world, with the checkers watching every step.

The network is a set that only grows: each message may arrive at any later step, any number of times, or never. Timers
fire at any step. Faults are limited by the budget of the world. From every n-th state a copy is driven to quiet (faults
stop, messages arrive, retries run, deadlines and then leases end), and what must hold then is checked.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import msgspec

from kvcore.protocol.config import Config, S
from kvcore.protocol.machine import Command, Effect, Input, Received
from kvcore.protocol.messages import (
    Alive,
    Answer,
    Beat,
    CancelRequest,
    Clear,
    Delta,
    Expelled,
    Key,
    MoveRequest,
    Probe,
    Register,
    Registered,
    RegisterRefused,
    Resync,
    Snap,
    StoreRequest,
    Wire,
)
from kvcore.protocol.worker import Worker
from kvcore.scenario.checks import Checker, Violation
from kvcore.scenario.search.freeze import Freezer, Machines, State, freeze, thaw
from kvcore.scenario.world import Letter, World, specs

SEARCH_CONFIG = Config(
    retry_ns=2 * S,
    lease_ns=10 * S,
    renew_ns=3 * S,
    retain_ns=30 * S,
    deadline_ns=40 * S,
    release_give_up_ns=14 * S,
    beat_ns=1_000_000 * S,
    dead_ns=2_000_000 * S,
    events_kept_ns=3_000_000 * S,
)
"""Few timers, far apart: here they fire when the search wants them to. Beats are the search's to send."""

_INVENTORY = (Delta, Snap, Resync, Beat)
_BIRTH = (Register, Registered, RegisterRefused, Probe, Alive, Expelled, Beat)

Action = Tuple[Any, ...]


class Budget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How often each kind of fault may happen in one run of a world."""

    crash: Tuple[str, ...] = ()
    """Nodes that may be killed (once each), and booted again."""
    lapse: int = 0
    """Pin leases that end."""
    evict: int = 0
    store: int = 0
    """Stores of a foreign chunk (or of a moved one) by an engine."""
    clear: int = 0
    cancel: int = 0
    pause: int = 0
    """Long silences: every deadline up to a retention's passes."""
    fail: int = 0
    """Copies that fail."""
    timeout: int = 0
    """Reservations that end because nobody answered."""
    late: int = 0
    """Bytes of a copy that land once more before it is known to have ended."""
    ids: int = 2
    """Pins, and reservations, that a node may make; beyond that a run is not followed."""


class Case(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One world to search. ``stores``: (node, keys) done first; ``requests``: outstanding from the start."""

    name: str
    instances: Dict[str, int]
    stores: Tuple[Tuple[str, Tuple[Key, ...]], ...]
    requests: Tuple[MoveRequest, ...]
    ranks: int = 1
    push: bool = False
    budget: Budget = Budget()
    foreign: Tuple[Tuple[str, Key], ...] = ()
    """What engines may store during the run: (node, key)."""
    view: bool = False
    """Search inventories too."""
    reach: Tuple[str, ...] = ()
    """Events that the search must meet, or it has not looked where it says."""
    locations: Tuple[str, ...] = ("cpu",)


class Found(msgspec.Struct):
    """What a search came to."""

    case: str
    states: int = 0
    steps: int = 0
    depth: int = 0
    complete: bool = False
    quiets: int = 0
    reached: Dict[str, int] = {}
    missing: Tuple[str, ...] = ()
    violations: List[Violation] = []
    trace: List[str] = []

    @property
    def ok(self) -> bool:
        """Nothing violated, and everything met that had to be."""
        return not self.violations and not self.missing


class Explorer:
    def __init__(self, case: Case, config: Config = SEARCH_CONFIG, quiet_every: int = 20) -> None:
        self.case: Case = case
        self.config: Config = msgspec.structs.replace(config, direction="push" if case.push else "read")
        self.quiet_every: int = quiet_every
        self.freezer: Freezer = Freezer()
        self.found: Found = Found(case.name, reached={}, violations=[], trace=[])
        self.parents: Dict[bytes, Tuple[bytes, Action]] = {}
        self.template: World = self._start()

    # ---- the first state
    def _start(self) -> World:
        case = self.case
        world = World(specs(case.instances, self.config, case.ranks, case.locations))
        for node, keys in case.stores:
            world.request(StoreRequest("store", case.locations[0], keys, (1,) * len(keys)), node)
            world.settle()
        world.sent.clear()
        return world

    def _first(self) -> State:
        world = self.template
        checker = Checker(_content(world), faults=self._faulty())
        for name, machine in world.machines.items():
            checker.boot(name, machine)
        used: Dict[str, int] = {}
        for request in self.case.requests:
            self._watch(world, checker, "ctl", Received("client", request), used)
        return freeze(world, self.freezer, None, (checker, used), [checker.state(), sorted(used.items())], 0)

    def _faulty(self) -> bool:
        budget = self.case.budget
        return bool(budget.crash or budget.evict or budget.clear or budget.store)

    def _watch(self, world: World, checker: Checker, node: str, item: Input, used: Dict[str, int]) -> None:
        """One input to one machine, seen by the checker."""
        world.observe = lambda w, name, what, effects: self._observe(checker, w, name, what, effects)
        world.give(node, item)

    def _observe(self, checker: Checker, world: World, node: str, item: Input, effects: Sequence[Effect]) -> None:
        checker.content = _content(world)
        checker.step(world.now, node, world.machines[node], item, effects)
        self._reach(item, effects)

    def _reach(self, item: Input, effects: Sequence[Effect]) -> None:
        reached = self.found.reached
        for effect in effects:
            message = getattr(effect, "msg", None)
            kind = type(message).__name__
            name = ""
            if isinstance(message, Answer) and message.state in ("done", "failed"):
                deleted = sum(max(0, item.deleted) for item in message.source)
                name = f"{message.state}:{message.reason}" if message.reason else message.state
                if message.state == "done":
                    name += " deleted" if deleted else " kept"
            elif kind == "Refused":
                name = f"refused:{message.why}"  # type: ignore[union-attr]
            elif kind == "Released" and message.why:  # type: ignore[union-attr]
                name = f"released:{message.why}"  # type: ignore[union-attr]
            elif kind == "Reserved" and message.shown:  # type: ignore[union-attr]
                name = f"shown:{message.shown}"  # type: ignore[union-attr]
            elif kind in ("Stopped", "Resync"):
                name = kind
            elif type(effect).__name__ == "Note":
                name = effect.kind  # type: ignore[union-attr]
            if name:
                reached[name] = reached.get(name, 0) + 1

    # ---- what can happen
    def actions(self, world: World, used: Dict[str, int]) -> Iterator[Action]:
        case = self.case
        budget = case.budget
        for letter in world.sent:
            if self._open(letter) and letter[1] in world.machines:
                yield ("deliver", letter)
        for (node, rid), (_, stopping) in world.copies.items():
            yield ("copy", node, rid, True)
            if not stopping and used.get("fail", 0) < budget.fail:
                yield ("copy", node, rid, False)
            if stopping and used.get("late", 0) < budget.late:
                yield ("land", node, rid)
        for node, fid in world.fills:
            yield ("fill", node, fid)
        for window in world.windows:
            yield ("window", *window)
        yield from self._timers(world, used)
        yield from self._faults(world, used)

    def _open(self, letter: Letter) -> bool:
        kind = type(letter[2])
        if kind in _BIRTH and self.case.budget.crash:
            return True
        return kind not in _INVENTORY or self.case.view

    def _timers(self, world: World, used: Dict[str, int]) -> Iterator[Action]:
        lapse = used.get("lapse", 0) < self.case.budget.lapse
        kinds = {"retry", "fanout", "quarantine", "probe"}
        kinds |= {"reservation"} if used.get("timeout", 0) < self.case.budget.timeout else set()
        kinds |= {"lease"} if lapse else set()
        kinds |= {"beat"} if self.case.view else set()
        for node in world.machines:
            for name in sorted(world.machines[node].timers.deadlines):
                if name[0] in kinds:
                    yield ("timer", node, name)

    def _faults(self, world: World, used: Dict[str, int]) -> Iterator[Action]:
        case = self.case
        budget = case.budget
        for node in budget.crash:
            if node not in world.machines:
                yield ("boot", node)
            elif not used.get(f"crash {node}"):
                yield ("crash", node)
        workers = [name for name in world.machines if name != "ctl"]
        if used.get("evict", 0) < budget.evict:
            yield from (("evict", node) for node in workers)
        if used.get("clear", 0) < budget.clear:
            yield from (("clear", node) for node in workers)
        if used.get("store", 0) < budget.store:
            yield from (("store", node, key) for node, key in case.foreign if node in world.machines)
        if used.get("pause", 0) < budget.pause:
            yield ("pause",)
        if used.get("cancel", 0) < budget.cancel and "ctl" in world.machines:
            yield from (("cancel", number) for number in world.controller().moves.events)

    def do(self, world: World, checker: Checker, used: Dict[str, int], action: Action) -> None:
        kind = action[0]
        world.observe = lambda w, name, what, effects: self._observe(checker, w, name, what, effects)
        location = self.case.locations[0]
        if kind == "deliver":
            world.deliver(action[1])
        elif kind == "copy":
            peer = world.copies[(action[1], action[2])][0].peer
            if not action[3]:
                used["fail"] = used.get("fail", 0) + 1
            world.finish_copy(action[1], action[2], action[3])
            self._touch(checker, world, action[1], peer)
        elif kind == "land":
            used["late"] = used.get("late", 0) + 1
            peer = world.copies[(action[1], action[2])][0].peer
            world.land(action[1], action[2])
            self._touch(checker, world, action[1], peer)
        elif kind == "fill":
            world.finish_fill(action[1], action[2])
        elif kind == "window":
            world.close_window(action[1], action[2], action[3])
        elif kind == "timer":
            budgeted = {"lease": "lapse", "reservation": "timeout"}.get(action[2][0])
            if budgeted is not None:
                used[budgeted] = used.get(budgeted, 0) + 1
            world.fire(action[1], action[2])
        elif kind == "crash":
            used[f"crash {action[1]}"] = 1
            world.crash(action[1])
            checker.died(action[1])
        elif kind == "boot":
            self._boot(world, checker, action[1])
        else:
            used[kind] = used.get(kind, 0) + 1
            if kind == "evict":
                world.give(action[1], Command("evict", (location,)))
            elif kind == "clear":
                worker = world.worker(action[1])
                inc = worker.pools[location].inc
                world.deliver(("ctl", action[1], _clear(world, location, inc)))
            elif kind == "store":
                world.request(StoreRequest("foreign", location, (action[2],), (1,)), action[1])
            elif kind == "pause":
                world.pause(self.config.retain_ns)
            elif kind == "cancel":
                world.request(CancelRequest("cancel", action[1]))

    def _touch(self, checker: Checker, world: World, *nodes: str) -> None:
        checker.content = _content(world)
        for node in nodes:
            if node in world.machines:
                checker.touched(world.now, node, world.machines[node])

    def _boot(self, world: World, checker: Checker, name: str) -> None:
        observe = world.observe
        world.observe = None
        world.boot(name)
        checker.content = _content(world)
        checker.boot(name, world.machines[name])
        world.observe = observe

    # ---- the search
    def run(self, max_states: int, on_progress: Optional[Callable[[Found], None]] = None) -> Found:
        """Search until everything has been seen, something is violated, or ``max_states`` have been met."""
        found = self.found
        first = self._first()
        seen = {first.digest: None}
        self.parents[first.digest] = (b"", ())
        frontier = [first]
        found.states = 1
        while frontier:
            following: List[State] = []
            for state in frontier:
                if found.states % 1000 < 10 and on_progress is not None:
                    on_progress(found)
                for action, after in self._successors(state):
                    found.steps += 1
                    if after.digest in seen:
                        continue
                    seen[after.digest] = None
                    self.parents[after.digest] = (state.digest, action)
                    found.states += 1
                    found.depth = max(found.depth, after.depth)
                    following.append(after)
                    if found.states % self.quiet_every == 0 and not found.violations:
                        self._quiet(after)
                    if found.violations:
                        found.trace = self._trace(after.digest)
                        return found
                    if found.states >= max_states:
                        return self._end(False)
            frontier = following
        return self._end(True)

    def _end(self, complete: bool) -> Found:
        self.found.complete = complete
        self.found.missing = tuple(name for name in self.case.reach if not self.found.reached.get(name))
        return self.found

    def _successors(self, state: State) -> Iterator[Tuple[Action, State]]:
        world, (_, used) = thaw(self.template, state, self.freezer)
        for action in list(self.actions(world, used)):
            world, (checker, used) = thaw(self.template, state, self.freezer)
            self.do(world, checker, used, action)
            world.observe = None
            checker.content = None
            if self._beyond(world):
                continue
            if checker.violations:
                self.found.violations.extend(checker.violations)
            yield (
                action,
                freeze(
                    world,
                    self.freezer,
                    state,
                    (checker, used),
                    [checker.state(), sorted(used.items())],
                    state.depth + 1,
                ),
            )

    def _beyond(self, world: World) -> bool:
        """Too many pins or reservations were made at one node: not followed."""
        ids = self.case.budget.ids
        machines = world.machines
        touched = machines.values() if not isinstance(machines, Machines) else dict.values(machines)
        return any(isinstance(m, Worker) and max(m.source.counter, m.destination.counter) > ids for m in touched)

    def _quiet(self, state: State) -> None:
        """Faults stop; messages arrive, retries run, then deadlines and leases end. What holds when quiet must hold."""
        self.found.quiets += 1
        world, (checker, _) = thaw(self.template, state, self.freezer)
        world.observe = lambda w, name, what, effects: self._observe(checker, w, name, what, effects)
        for name in self.case.budget.crash:
            if name not in world.machines:
                self._boot(world, checker, name)
        self._calm(world, checker)
        limit = world.now + 20 * self.config.retain_ns
        while world.now < limit:
            due = [
                (deadline[0], name)
                for name, machine in world.machines.items()
                if (deadline := _next(machine.timers.deadlines)) is not None
            ]
            if not due:
                break
            when, name = min(due)
            world.now = max(world.now, when)
            for timer in _due(world.machines[name].timers.deadlines, world.now):
                world.fire(name, timer)
            self._calm(world, checker)
        for name, machine in world.machines.items():
            if isinstance(machine, Worker):
                world.fire(name, ("beat", 0, 0))
                self._calm(world, checker)
        checker.content = _content(world)
        checker.quiet(world.now, world.machines)
        self.found.violations.extend(checker.violations)

    def _calm(self, world: World, checker: Checker) -> None:
        """Everything under way arrives and ends, oldest first."""
        limit = 5000
        while limit > 0:
            limit -= 1
            if world.fresh:
                world.deliver(next(iter(world.fresh)))
            elif world.copies:
                node, rid = next(iter(world.copies))
                peer = world.copies[(node, rid)][0].peer
                world.finish_copy(node, rid)
                self._touch(checker, world, node, peer)
            elif not world.step():
                return

    def _trace(self, digest: bytes) -> List[str]:
        lines: List[str] = []
        while digest:
            digest, action = self.parents[digest]
            if action:
                lines.append(describe(action))
        return lines[::-1]


def describe(action: Action) -> str:
    """One step of a run, as a person reads it."""
    if action[0] == "deliver":
        src, dst, message = action[1]
        fields = ", ".join(f"{name}={getattr(message, name)}" for name in _shown(message))
        return f"deliver {type(message).__name__}({fields}) {src} -> {dst}"
    return " ".join(str(part) for part in action)


def _shown(message: Wire) -> List[str]:
    names = ("event", "pid", "rid", "n", "delete", "alive", "ok", "why", "inc", "epoch", "seq")
    return [name for name in names if name in message.__struct_fields__]


def _clear(world: World, location: str, inc: Tuple[int, int]) -> Wire:
    return Clear(world.controller().incarnation if "ctl" in world.machines else 1, 0, location, inc)


def _content(world: World) -> Callable[[str, str, int], Optional[bytes]]:
    memory = world.memory
    return lambda node, location, slot: memory.get((node, location), {}).get(slot)


def _quiet_timer(name: Tuple[str, int, int]) -> bool:
    return name[0] not in ("beat", "dead", "forget", "restored", "hold")


def _next(deadlines: Dict[Tuple[str, int, int], Tuple[int, int]]) -> Optional[Tuple[int, int]]:
    return min((when for name, when in deadlines.items() if _quiet_timer(name)), default=None)


def _due(deadlines: Dict[Tuple[str, int, int], Tuple[int, int]], now: int) -> List[Tuple[str, int, int]]:
    ordered = sorted(deadlines.items(), key=lambda item: item[1])
    return [name for name, when in ordered if when[0] <= now and _quiet_timer(name)]
