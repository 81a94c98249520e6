"""Entries that have vanished from a rank's index: was that allowed? Loss, Shared, Retention, Instance and Truth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Dict, Optional, final

from kvcore.protocol.machine import Command, Input
from kvcore.protocol.messages import Clear, Fetch, Key, Release, StoreRequest, Wire, event_name
from kvcore.protocol.worker import Worker
from kvcore.scenario.check_ghosts import EXCUSED, Ghost
from kvcore.scenario.check_shadow import Shadow
from kvcore.scenario.check_slots import short

if TYPE_CHECKING:
    from kvcore.scenario.checks import Checker


@final
class Scene:
    """One input of one rank, and where in it we are."""

    def __init__(self, now: int, node: str, shadow: Shadow, worker: Worker, item: Input, m: Optional[Wire]) -> None:
        self.now: int = now
        self.node: str = node
        self.shadow: Shadow = shadow
        self.worker: Worker = worker
        self.item: Input = item
        self.message: Optional[Wire] = m


def vanished(c: Checker, s: Scene, location: str, slots: Dict[Key, int]) -> None:
    """``slots``: key -> slot of each entry that was in the index before this input and is not there after it."""
    m = s.message
    if isinstance(m, Release):
        for key, slot in slots.items():
            _moved_away(c, s, location, key, slot, m)
    elif isinstance(m, Clear) or unmounts(s.item, location):
        for key in slots:
            c.ghosts.cleared((s.node, location), key)
            c.holds(s.shadow, location, key, -1)
        return
    else:
        evicts = isinstance(m, (Fetch, StoreRequest)) or (isinstance(s.item, Command) and s.item.what == "evict")
        for key in slots:
            if evicts:
                _evicted(c, s, location, key)
            else:
                what = type(s.item if m is None else m).__name__
                c.say("Loss", s.node, s.now, f"{short(key)} has vanished from {location} at {what}")
                c.ghosts.cleared((s.node, location), key)
            c.holds(s.shadow, location, key, -1)
    kids = s.shadow.pools[location].kids
    for key in slots:
        if key in kids:
            text = f"{short(key)} was dropped, its child is still in {location}"
            c.say("Shared", s.node, s.now, text, m.event if isinstance(m, Release) else 0)


def unmounts(item: Input, location: str) -> bool:
    """Does an injected fault take the location away, with all that is in it?"""
    return isinstance(item, Command) and item.what == "unmount" and item.args == (location, "on")


def _evicted(c: Checker, s: Scene, location: str, key: Key) -> None:
    live = s.worker.destination.retentions
    for event in s.shadow.barred(location, key):
        # One whose time ran out before this input's turn bars nothing any more.
        if event in live:
            text = f"{short(key)} was evicted from {location} while event {event_name(event)} retains it"
            c.say("Retention", s.node, s.now, text, event)
    c.ghosts.evicted((s.node, location), key)


def _moved_away(c: Checker, s: Scene, location: str, key: Key, slot: int, m: Release) -> None:
    ghost = c.ghosts.open.get(m.event)
    outcome = c.ghosts.outcome(m.event)
    name = event_name(m.event)
    if outcome is not None and outcome[0] == "failed":
        c.say("Truth", s.node, s.now, f"event {name} has failed, and deletes {short(key)}", m.event)
    elif ghost is None:
        c.say("Loss", s.node, s.now, f"event {name} is over, and deletes {short(key)}", m.event)
    else:
        why = _unjust(ghost, s.node, location, key, slot, m)
        if why:
            c.say("Loss", s.node, s.now, f"event {name} deletes {short(key)} from {location}, but {why}", m.event)
    if ghost is not None:
        ghost.drops[s.node] = ghost.drops.get(s.node, 0) + 1
    rank = ghost.src.index(s.node) if ghost is not None and s.node in ghost.src else s.shadow.rank
    c.ghosts.taken_away((s.node, location), key, ghost, rank)
    was_whole = c.whole(key, s.shadow.ranks)
    c.holds(s.shadow, location, key, -1)
    # What was cleared or evicted at the destination is no loss of the move that goes on to delete here.
    excused = ghost is not None and any(ghost.riders.get((r, key)) == EXCUSED for r in range(len(ghost.dst)))
    if was_whole and not excused and not c.whole(key, s.shadow.ranks):
        c.say("Instance", s.node, s.now, f"{short(key)} is whole at no instance any more", m.event)


def _unjust(ghost: Ghost, node: str, location: str, key: Key, slot: int, m: Release) -> str:
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
