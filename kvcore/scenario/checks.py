"""The protocol's properties, evaluated step by step while it runs, whoever drives it.

    checker.step(now, node, machine, input, effects)     # after every input
    checker.touched(now, node, machine)                  # bytes there were changed by somebody else
    checker.died(node); checker.boot(node, machine)      # a life ends, a life begins
    checker.quiet(now, machines)                         # when nothing is under way any more

Byte, Loss, Known, Shared, Clear, Free, Truth, Retention and (without faults) Instance hold at every step; Ends, Leak
and View once quiet. docs/protocol.md says what each means. A checker looks at machines and keeps none.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, final

from kvcore.protocol.controller import Controller
from kvcore.protocol.machine import Boot, Effect, Input, Machine, ReadDone, Received, Send
from kvcore.protocol.messages import Clear, Cleared, Inc, Key, Rid, event_name
from kvcore.protocol.pool import Pool
from kvcore.protocol.worker import Worker
from kvcore.scenario.check_commit import Write, watch_pins, watch_retentions, watch_shown, watch_writes
from kvcore.scenario.check_ghosts import Ghosts, Place
from kvcore.scenario.check_loss import Scene, unmounts, vanished
from kvcore.scenario.check_quiet import quiet_lines
from kvcore.scenario.check_shadow import Shadow, deltas
from kvcore.scenario.check_slots import recount, short
from kvcore.scenario.check_truth import watch_controller
from kvcore.scenario.result import Violation as Violation

Content = Callable[[str, str, int], Optional[bytes]]
"""(node, location, slot) -> the key whose bytes are there; None: no key's."""


@final
class Checker:
    """``content``: what is really in a slot; None where bytes are checked elsewhere. ``faults``: crashes, lost messages
    and the like may happen, so Instance is not asked for. A pickled copy has no ``content``: set its own."""

    def __init__(self, content: Optional[Content] = None, faults: bool = True) -> None:
        self.content: Optional[Content] = content
        self.faults: bool = faults
        self.violations: List[Violation] = []
        self.ghosts: Ghosts = Ghosts()
        self.shadows: Dict[str, Shadow] = {}
        #: place -> how many events had ended when it was last cleared
        self.cleared: Dict[Place, int] = {}
        #: node written into -> copies that may write there
        self.writes: Dict[str, Dict[Rid, Write]] = {}
        #: key -> (instance, location) -> ranks that hold it; only without faults
        self.holders: Dict[Key, Dict[Place, int]] = {}
        self.said: Dict[Tuple[str, str, str], None] = {}

    def __reduce__(self) -> Tuple[Callable[..., Checker], Tuple[Any, ...]]:
        state = (self.violations, self.ghosts, self.shadows, self.cleared, self.writes, self.holders, self.said)
        return _copied, (self.faults, *state)

    def say(self, prop: str, node: str, now: int, text: str, event: int = 0) -> None:
        """Each violation once, however long it lasts."""
        what = (prop, node, text)
        if what not in self.said:
            self.said[what] = None
            self.violations.append(Violation(prop, node, now, text, event))

    # ---- lives
    def boot(self, node: str, machine: Machine) -> None:
        """A fresh life: what the old one held has died with it."""
        if node in self.shadows:
            self.died(node)
        if isinstance(machine, Worker):
            shadow = self.shadows[node] = Shadow(node, machine, 0)
            self._holds_all(shadow, 1)
        elif isinstance(machine, Controller):
            for number in list(self.ghosts.open):
                outcome = machine.moves.ended.get(number)
                if outcome is not None:
                    self.ghosts.open[number].state = outcome.state
                    self.ghosts.end(number, outcome.state, outcome.num_tokens)
                    self.ghosts.forget_if_spent(number)

    def died(self, node: str) -> None:
        """The process is gone, and with it its memory and all that it was about to write."""
        shadow = self.shadows.pop(node, None)
        if shadow is None:
            return
        self._holds_all(shadow, -1)
        self.ghosts.excuse_node(node)
        self.writes.pop(node, None)
        for writes in self.writes.values():
            for rid in [rid for rid, write in writes.items() if write.writer == node]:
                del writes[rid]

    # ---- steps
    def step(self, now: int, node: str, machine: Machine, item: Input, effects: Sequence[Effect]) -> None:
        """After every input of every node, in the order of time."""
        if isinstance(machine, Worker):
            if type(item) is Boot or node not in self.shadows:
                self.boot(node, machine)
            self._worker(now, node, machine, item, effects)
        elif isinstance(machine, Controller):
            if type(item) is Boot:
                self.boot(node, machine)
            watch_controller(self, now, node, machine, effects)

    def _worker(self, now: int, node: str, worker: Worker, item: Input, effects: Sequence[Effect]) -> None:
        shadow = self.shadows[node]
        scene = Scene(now, node, shadow, worker, item, item.msg if type(item) is Received else None)
        whole = shadow.whole(worker)
        named = None if whole else deltas(effects)
        changed: List[Tuple[str, List[int]]] = []
        for pool in worker.pool_list:
            look = None if named is None else named.get(pool.name, {})
            changed.append((pool.name, self._index(scene, pool, look)))
            if _cleared(scene, shadow.pools[pool.name].inc, pool.name, effects):
                self.cleared[(node, pool.name)] = self.ghosts.ends
                if pool.index:
                    self.say("Clear", node, now, f"{pool.name} holds {len(pool.index)} chunks after a clear")
            shadow.pools[pool.name].inc = pool.inc
        watch_pins(self, scene)
        watch_retentions(self, scene, effects)
        watch_writes(self, scene, effects)
        watch_shown(self, scene, effects)
        if whole:
            for line in recount(worker):
                self.say("Free", node, now, line)
            for location, pool_shadow in shadow.pools.items():
                for key in pool_shadow.unreachable():
                    self.say("Shared", node, now, f"{short(key)} is in {location}, what it follows is not")
        for location, slots in changed:
            self.look(now, node, location, None if whole else slots)
        if type(item) is ReadDone and not item.ok:
            self.say("Byte", node, now, f"an engine that loads KV (read {item.fid}) found wrong bytes")

    def _index(self, s: Scene, pool: Pool, named: Optional[Dict[Key, None]]) -> List[int]:
        """What has changed in one index; the slots that are new in it."""
        old = s.shadow.pools[pool.name]
        new, gone = old.compare(pool, named)
        lost = {key: old.drop(key) for key in gone}
        for key in new:
            if key not in old.slots:
                self.holds(s.shadow, pool.name, key, 1)
            entry = pool.index[key]
            old.put(key, entry.slot, entry.parent)
        if lost:
            vanished(self, s, pool.name, lost)
        return [old.slots[key] for key in new]

    # ---- bytes
    def touched(
        self, now: int, node: str, machine: Machine, location: str = "", slots: Optional[Sequence[int]] = None
    ) -> None:
        """Bytes under a node were changed by somebody else: a push, or a write that landed late. ``location`` and
        ``slots``: look at these only."""
        shadow = self.shadows.get(node)
        if shadow is not None:
            for name in [location] if location else list(shadow.pools):
                self.look(now, node, name, slots)

    def look(self, now: int, node: str, location: str, slots: Optional[Sequence[int]]) -> None:
        """Do visible chunks in these slots (None: in all) hold their bytes?"""
        content = self.content
        shadow = self.shadows.get(node)
        if content is None or shadow is None:
            return
        by_slot = shadow.pools[location].by_slot
        for slot in by_slot if slots is None else slots:
            key = by_slot.get(slot)
            if key is not None:
                held = content(node, location, slot)
                if held != key:
                    what = short(held) if held is not None else "no key's bytes"
                    self.say("Byte", node, now, f"{short(key)} in slot {slot} of {location} holds {what}")

    # ---- where keys are whole
    def holds(self, shadow: Shadow, location: str, key: Key, change: int) -> None:
        """``change``: +1 or -1 rank of an instance holds the key. Not counted with faults."""
        if self.faults:
            return
        held = self.holders.setdefault(key, {})
        place = (shadow.instance, location)
        left = held.get(place, 0) + change
        if left:
            held[place] = left
        else:
            held.pop(place, None)

    def _holds_all(self, shadow: Shadow, change: int) -> None:
        for location, pool in shadow.pools.items():
            for key in pool.slots:
                self.holds(shadow, location, key, change)

    def whole(self, key: Key, ranks: int) -> bool:
        """Is a key at every rank of some instance? Not known with faults."""
        return not self.faults and any(count == ranks for count in self.holders.get(key, {}).values())

    # ---- once quiet
    def quiet(self, now: int, machines: Mapping[str, Machine]) -> None:
        """Nothing is under way: messages have arrived or are lost for good, deadlines and leases have passed."""
        controller = next((node for node in sorted(machines) if isinstance(machines[node], Controller)), "ctl")
        for number, ghost in sorted(self.ghosts.open.items()):
            if not ghost.state:
                self.say("Ends", controller, now, f"event {event_name(number)} has not ended", number)
        for prop, node, text in quiet_lines(machines):
            self.say(prop, node, now, text)
        for node in sorted(machines):
            machine = machines[node]
            shadow = self.shadows.get(node)
            if isinstance(machine, Worker) and shadow is not None:
                for pool in machine.pool_list:
                    new, gone = shadow.pools[pool.name].compare(pool, None)
                    if new or gone:
                        self.say("Loss", node, now, f"{pool.name}: {len(new)} added, {len(gone)} gone unseen")
                    self.look(now, node, pool.name, None)

    # ---- what the search must tell apart
    def state(self) -> Any:
        """Plain lists, equal for checkers that will judge the same future alike."""
        ghosts = self.ghosts
        ended = [(number, seen[2]) for table in (ghosts.ended, ghosts.over) for number, seen in table.items()]
        barred = [
            [place, sorted(number for number, order in ended if order < count)]
            for place, count in sorted(self.cleared.items())
        ]
        writes = [(node, sorted(held)) for node, held in sorted(self.writes.items()) if held]
        closed = [(node, sorted(shadow.closed.items())) for node, shadow in sorted(self.shadows.items())]
        return [ghosts.summary(), barred, writes, closed, len(self.violations)]


def _cleared(s: Scene, inc: Inc, location: str, effects: Sequence[Effect]) -> bool:
    """Emptied by an injected fault, or by a Clear of this life of the location that was heard (without an epoch none
    is, nor is an old controller's)."""
    m = s.message
    if unmounts(s.item, location):
        return True
    if type(m) is not Clear or m.location != location or m.inc != inc:
        return False
    return any(type(effect) is Send and type(effect.msg) is Cleared for effect in effects)


def _copied(faults: bool, *state: Any) -> Checker:
    checker = Checker(None, faults)
    checker.violations, checker.ghosts, checker.shadows = state[:3]
    checker.cleared, checker.writes, checker.holders, checker.said = state[3:]
    return checker
