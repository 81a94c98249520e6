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
from kvcore.protocol.machine import (
    Boot,
    Command,
    CopyDone,
    CopyStopped,
    Effect,
    Input,
    Machine,
    ReadDone,
    Received,
    Send,
    StartCopy,
    WindowClosed,
)
from kvcore.protocol.messages import (
    Clear,
    Committed,
    End,
    Expelled,
    Fetch,
    Inc,
    Key,
    Registered,
    Release,
    Retain,
    Rid,
    StoreRequest,
    event_name,
)
from kvcore.protocol.worker import Worker
from kvcore.scenario.check_ghosts import ALIVE, EARLY, EXCUSED, LAPSED, OVER, Ghost, Ghosts, PinSeen, Place
from kvcore.scenario.check_quiet import quiet_lines
from kvcore.scenario.check_shadow import RetentionSeen, Shadow, deltas
from kvcore.scenario.check_slots import recount, short
from kvcore.scenario.check_truth import watch_controller
from kvcore.scenario.result import Violation as Violation

Content = Callable[[str, str, int], Optional[bytes]]
"""(node, location, slot) -> the key whose bytes are there; None: no key's."""

NONE_SEEN: Tuple[str, int, int] = ("", 0, -1)


@final
class Write:
    """A copy that runs: which slots it may write into, and who would have to say that it has ended."""

    def __init__(self, writer: str, writer_epoch: int, node: str, location: str, slots: Tuple[int, ...]) -> None:
        self.writer: str = writer
        self.writer_epoch: int = writer_epoch
        self.node: str = node
        self.location: str = location
        self.slots: Tuple[int, ...] = slots


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
            if not self.faults:
                for location, pool in shadow.pools.items():
                    for key in pool.slots:
                        self._holds(shadow, location, key, 1)
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
        if not self.faults:
            for location, pool in shadow.pools.items():
                for key in pool.slots:
                    self._holds(shadow, location, key, -1)
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
        message = item.msg if type(item) is Received else None
        whole = shadow.whole(worker)
        named = None if whole else deltas(effects)
        all_new: List[Tuple[str, List[Key]]] = []
        for pool in worker.pool_list:
            old = shadow.pools[pool.name]
            look = None if named is None else named.get(pool.name, {})
            new, gone = old.compare(pool, look)
            slots = {key: old.drop(key) for key in gone}
            for key in new:
                if key not in old.slots:
                    self._holds(shadow, pool.name, key, 1)
                entry = pool.index[key]
                old.put(key, entry.slot, entry.parent)
            if slots:
                self._gone(now, node, shadow, worker, pool.name, slots, item, message)
            if type(message) is Clear and message.location == pool.name and message.inc == old.inc:
                self.cleared[(node, pool.name)] = self.ghosts.ends
                if pool.index:
                    self.say("Clear", node, now, f"{pool.name} holds {len(pool.index)} chunks after a clear")
            old.inc = pool.inc
            all_new.append((pool.name, new))
        self._pins(node, shadow, worker)
        self._retentions(now, node, shadow, worker, item, message, effects)
        self._writes(now, node, shadow, worker, item, effects)
        if whole:
            for line in recount(worker):
                self.say("Free", node, now, line)
        for location, new in all_new:
            self._bytes(now, node, location, None if whole else [shadow.pools[location].slots[key] for key in new])
        if type(item) is ReadDone and not item.ok:
            self.say("Byte", node, now, f"an engine that loads KV (read {item.fid}) found wrong bytes")

    # ---- entries that have vanished
    def _gone(
        self, now: int, node: str, shadow: Shadow, worker: Worker, location: str, slots: Dict[Key, int], item: Input,
        message: Optional[object],
    ) -> None:  # fmt: skip
        place = (node, location)
        kind = type(message)
        evicts = kind is Fetch or kind is StoreRequest or (type(item) is Command and item.what == "evict")
        for key, slot in slots.items():
            if kind is Release:
                assert isinstance(message, Release)
                self._moved_away(now, node, shadow, location, key, slot, message)
                continue
            if kind is Clear:
                self.ghosts.cleared(place, key)
            elif evicts:
                self._evicted(now, node, worker, location, key)
            else:
                what = kind.__name__ if message is not None else type(item).__name__
                self.say("Loss", node, now, f"{short(key)} has vanished from {location} at {what}")
                self.ghosts.cleared(place, key)
            self._holds(shadow, location, key, -1)
        if kind is not Clear:
            kids = shadow.pools[location].kids
            for key in slots:
                if key in kids:
                    event = message.event if isinstance(message, Release) else 0
                    self.say("Shared", node, now, f"{short(key)} was dropped, its child is still in {location}", event)

    def _evicted(self, now: int, node: str, worker: Worker, location: str, key: Key) -> None:
        for event, retention in worker.destination.retentions.items():
            if retention.pool.name == location and key in retention.keys:
                text = f"{short(key)} was evicted from {location} while event {event_name(event)} retains it"
                self.say("Retention", node, now, text, event)
        self.ghosts.evicted((node, location), key)

    def _moved_away(
        self, now: int, node: str, shadow: Shadow, location: str, key: Key, slot: int, m: Release
    ) -> None:  # fmt: skip
        ghost = self.ghosts.open.get(m.event)
        outcome = self.ghosts.outcome(m.event)
        name = event_name(m.event)
        if outcome is not None and outcome[0] == "failed":
            self.say("Truth", node, now, f"event {name} has failed, and deletes {short(key)}", m.event)
        elif ghost is None:
            self.say("Loss", node, now, f"event {name} is over, and deletes {short(key)}", m.event)
        else:
            why = self._unjust(ghost, node, location, key, slot, m)
            if why:
                self.say("Loss", node, now, f"event {name} deletes {short(key)} from {location}, but {why}", m.event)
            ghost.drops[node] = ghost.drops.get(node, 0) + 1
        rank = ghost.src.index(node) if ghost is not None and node in ghost.src else shadow.rank
        self.ghosts.taken_away((node, location), key, ghost, rank)
        was_whole = not self.faults and self._whole(key, shadow.ranks)
        self._holds(shadow, location, key, -1)
        if was_whole and not self._whole(key, shadow.ranks):
            self.say("Instance", node, now, f"{short(key)} is whole at no instance any more", m.event)

    def _unjust(self, ghost: Ghost, node: str, location: str, key: Key, slot: int, m: Release) -> str:
        """Why event ``ghost`` must not delete this entry; "" if it may."""
        if ghost.copy:
            return "it is a copy"
        i = ghost.position.get(key, -1)
        if i < 0 or node not in ghost.src or location != ghost.src_location:
            return "it does not move it"
        pin = ghost.pins.get(node)
        if pin is None:
            return "it has no pin here"
        if pin.late:
            return "its pin was made after the decision"
        if i >= len(pin.slots) or pin.slots[i] != slot:
            return "its pin does not hold that slot"
        if i >= m.n:
            return f"only {m.n} chunks are released"
        for address in ghost.dst:
            n = ghost.commits[address][1] if address in ghost.commits else 0
            if n < m.n:
                return f"{address} has committed {n} of {m.n}"
        rank = ghost.src.index(node)
        rider = ghost.riders.get((rank, key))
        if rider == EXCUSED:
            return ""
        if rider == (node, location):
            return "that is the entry on which its own commit relies"
        if rider is None or not rider[0]:
            return f"what {ghost.dst[rank]} committed is not there any more, without an excuse"
        return ""

    # ---- pins and retentions
    def _pins(self, node: str, shadow: Shadow, worker: Worker) -> None:
        pins = worker.source.pins
        seen = shadow.pins
        if len(pins) == len(seen) and all(seen.get(event) == pin.pid for event, pin in pins.items()):
            return
        spent: List[int] = []
        for event in [event for event in seen if event not in pins or pins[event].pid != seen[event]]:
            del seen[event]
            ghost = self.ghosts.open.get(event)
            if ghost is not None and ghost.pins.pop(node, None) is not None:
                spent.append(event)
        for event, pin in pins.items():
            if event not in seen:
                seen[event] = pin.pid
                ghost = self.ghosts.open.get(event)
                if ghost is not None:
                    ghost.pins[node] = PinSeen(pin.pid, pin.slots, ghost.decided >= 0)
        for event in spent:
            self.ghosts.forget_if_spent(event)

    def _retentions(
        self, now: int, node: str, shadow: Shadow, worker: Worker, item: Input, message: Optional[object],
        effects: Sequence[Effect],
    ) -> None:  # fmt: skip
        live = worker.destination.retentions
        seen = shadow.retained
        if isinstance(message, (Fetch, Retain)) and message.event in seen:
            held = seen[message.event]
            if message.event in live and live[message.event].rid == held.rid:
                held.until_ns = now + held.retain_ns
        for event in [e for e, held in seen.items() if e not in live or live[e].rid != held.rid]:
            held = seen.pop(event)
            ghost = self.ghosts.open.get(event)
            if ghost is not None:
                ghost.retained[node] = _how_it_ended(now, held, event, message)
                self.ghosts.forget_if_spent(event)
        if len(seen) == len(live):
            return
        for event, retention in live.items():
            if event not in seen:
                seen[event] = RetentionSeen(retention, now)
                self._committed(now, node, shadow, event, retention.pool.name, retention.pool.inc, effects)

    def _committed(
        self, now: int, node: str, shadow: Shadow, event: int, location: str, inc: Inc, effects: Sequence[Effect]
    ) -> None:
        """An event has just committed here."""
        outcome = self.ghosts.outcome(event)
        place = (node, location)
        if outcome is not None and outcome[2] < self.cleared.get(place, 0):
            text = f"event {event_name(event)} was over before {location} was cleared, and commits there after it"
            self.say("Clear", node, now, text, event)
        ghost = self.ghosts.open.get(event)
        if ghost is None or node not in ghost.dst:
            return
        n = _said_committed(event, effects)
        slots = shadow.pools[location].slots
        visible = 0
        while visible < n and ghost.keys[visible] in slots:
            visible += 1
        if visible < n:
            text = f"event {event_name(event)} commits {n} chunks, {visible} are visible in {location}"
            self.say("Truth", node, now, text, event)
        ghost.commits[node] = (inc, n, visible)
        ghost.retained[node] = ALIVE
        rank = ghost.dst.index(node)
        for key in ghost.keys[:n]:
            self.ghosts.seat(ghost, rank, key, place)

    # ---- copies that run, and bytes
    def _writes(
        self, now: int, node: str, shadow: Shadow, worker: Worker, item: Input, effects: Sequence[Effect]
    ) -> None:
        if worker.epoch != shadow.epoch:
            # A push to an epoch that is over never lands.
            into = self.writes.get(node, {})
            for rid in [rid for rid, write in into.items() if write.writer != node and shadow.epoch]:
                del into[rid]
            shadow.epoch = worker.epoch
        if type(item) is WindowClosed:
            shadow.closed[item.peer] = max(item.epoch, shadow.closed.get(item.peer, 0))
            into = self.writes.get(node, {})
            for rid in [rid for rid, w in into.items() if w.writer == item.peer and w.writer_epoch <= item.epoch]:
                del into[rid]
        elif type(item) is CopyDone or type(item) is CopyStopped:
            self._write_ended(now, node, item.rid)
        for effect in effects:
            if type(effect) is StartCopy:
                self._write_begins(node, shadow, effect)
        destination = worker.destination
        for rid, write in self.writes.get(node, {}).items():
            if rid not in destination.by_rid and rid not in destination.quarantines:
                refs = worker.pools[write.location].refs
                used = [slot for slot in write.slots if slot in refs]
                if used:
                    text = f"{write.location}: slots {used} are in use again, and copy {rid[1]} may still write there"
                    self.say("Free", node, now, text)

    def _write_begins(self, node: str, shadow: Shadow, e: StartCopy) -> None:
        if e.read:
            write = Write(node, shadow.epoch, node, e.location, e.slots)
        else:
            peer = self.shadows.get(e.peer)
            if peer is None or peer.epoch != e.peer_epoch or peer.closed.get(node, 0) >= shadow.epoch:
                return
            write = Write(node, shadow.epoch, e.peer, e.peer_location, e.peer_slots)
        self.writes.setdefault(write.node, {})[e.rid] = write

    def _write_ended(self, now: int, node: str, rid: Rid) -> None:
        for writes in self.writes.values():
            write = writes.get(rid)
            if write is not None and write.writer == node:
                del writes[rid]
                self._bytes(now, write.node, write.location, list(write.slots))
                return

    def touched(
        self, now: int, node: str, machine: Machine, location: str = "", slots: Optional[Sequence[int]] = None
    ) -> None:
        """Bytes under a node were changed by somebody else: a push, or a write that landed late. ``location`` and
        ``slots``: look at these only."""
        shadow = self.shadows.get(node)
        if shadow is not None:
            for name in [location] if location else list(shadow.pools):
                self._bytes(now, node, name, slots)

    def _bytes(self, now: int, node: str, location: str, slots: Optional[Sequence[int]]) -> None:
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
    def _holds(self, shadow: Shadow, location: str, key: Key, change: int) -> None:
        if self.faults:
            return
        held = self.holders.setdefault(key, {})
        place = (shadow.instance, location)
        left = held.get(place, 0) + change
        if left:
            held[place] = left
        else:
            held.pop(place, None)

    def _whole(self, key: Key, ranks: int) -> bool:
        return any(count == ranks for count in self.holders.get(key, {}).values())

    # ---- once quiet
    def quiet(self, now: int, machines: Mapping[str, Machine]) -> None:
        """Nothing is under way: messages have arrived or are lost for good, deadlines and leases have passed."""
        for number, ghost in sorted(self.ghosts.open.items()):
            if not ghost.state:
                self.say("Ends", "ctl", now, f"event {event_name(number)} has not ended", number)
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
                    self._bytes(now, node, pool.name, None)

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


def _how_it_ended(now: int, held: RetentionSeen, event: int, message: Optional[object]) -> str:
    if isinstance(message, End) and message.event == event:
        return OVER
    if isinstance(message, Clear) and message.location == held.location:
        return OVER
    if isinstance(message, (Registered, Expelled)):
        return LAPSED
    return LAPSED if now >= held.until_ns else EARLY


def _said_committed(event: int, effects: Sequence[Effect]) -> int:
    """How many chunks the rank says it has committed."""
    sent = [effect.msg for effect in effects if type(effect) is Send]
    return max([m.n for m in sent if type(m) is Committed and m.event == event], default=0)


def _copied(faults: bool, *state: Any) -> Checker:
    checker = Checker(None, faults)
    checker.violations, checker.ghosts, checker.shadows = state[:3]
    checker.cleared, checker.writes, checker.holders, checker.said = state[3:]
    return checker
