"""What appears at a rank: pins, commits with their retentions (Truth, Clear), copies that may still write (Free)."""

from __future__ import annotations

from typing import TYPE_CHECKING, List, Sequence, Tuple, final

from kvcore.protocol.machine import CopyDone, CopyStopped, Effect, Send, StartCopy, WindowClosed
from kvcore.protocol.messages import (
    Clear,
    Committed,
    End,
    Expelled,
    Fenced,
    Fetch,
    Pin,
    Pushed,
    Registered,
    Reserved,
    Retain,
    Rid,
    event_name,
)
from kvcore.protocol.reservation import Retention
from kvcore.scenario.check_ghosts import ALIVE, EARLY, LAPSED, OVER, PinSeen
from kvcore.scenario.check_loss import Scene, unmounts
from kvcore.scenario.check_shadow import RetentionSeen

if TYPE_CHECKING:
    from kvcore.scenario.checks import Checker


# ---- pins
def watch_pins(c: Checker, s: Scene) -> None:
    pins = s.worker.source.pins
    seen = s.shadow.pins
    if len(pins) == len(seen):
        # A pin appears at Pin only, so elsewhere as many are the same; there, one may have lapsed and been made anew.
        m = s.message
        if not isinstance(m, Pin) or m.event not in pins or seen.get(m.event) == pins[m.event].pid:
            return
    unpinned: List[int] = []
    for event in [event for event in seen if event not in pins or pins[event].pid != seen[event]]:
        del seen[event]
        ghost = c.ghosts.open.get(event)
        if ghost is not None and ghost.pins.pop(s.node, None) is not None:
            unpinned.append(event)
    for event, pin in pins.items():
        if event not in seen:
            seen[event] = pin.pid
            ghost = c.ghosts.open.get(event)
            if ghost is not None:
                ghost.pins[s.node] = PinSeen(pin.pid, pin.slots, ghost.decided >= 0)
    for event in unpinned:
        c.ghosts.forget_if_spent(event)


# ---- retentions, which begin with a commit
def watch_retentions(c: Checker, s: Scene, effects: Sequence[Effect]) -> None:
    live = s.worker.destination.retentions
    seen = s.shadow.retained
    if not seen and not live:
        return
    if isinstance(s.message, (Fetch, Retain)) and s.message.event in seen:
        held = seen[s.message.event]
        if s.message.event in live and live[s.message.event].rid == held.rid:
            held.until_ns = s.now + held.retain_ns
    said = [effect.msg.event for effect in effects if type(effect) is Send and type(effect.msg) is Committed]
    if len(seen) == len(live) and all(e not in live or e in seen and live[e].rid == seen[e].rid for e in said):
        return
    for event in [event for event, held in seen.items() if event not in live or live[event].rid != held.rid]:
        ended = _how_it_ended(s, s.shadow.unretain(event), event)
        ghost = c.ghosts.open.get(event)
        if ghost is not None:
            ghost.retained[s.node] = ended
            c.ghosts.forget_if_spent(event)
    if len(seen) < len(live):
        for event, retention in live.items():
            if event not in seen:
                s.shadow.retain(event, RetentionSeen(retention, s.now))
                _committed(c, s, event, retention, effects)


def _how_it_ended(s: Scene, held: RetentionSeen, event: int) -> str:
    m = s.message
    if isinstance(m, End) and m.event == event:
        return OVER
    if (isinstance(m, Clear) and m.location == held.location) or unmounts(s.item, held.location):
        return OVER
    if isinstance(m, (Registered, Expelled)):
        return LAPSED
    return LAPSED if s.now >= held.until_ns else EARLY


def _committed(c: Checker, s: Scene, event: int, retention: Retention, effects: Sequence[Effect]) -> None:
    """An event has just committed here."""
    location = retention.pool.name
    place = (s.node, location)
    name = event_name(event)
    outcome = c.ghosts.outcome(event)
    if outcome is not None and outcome[2] < c.cleared.get(place, 0):
        text = f"event {name} was over before {location} was cleared, and commits there after it"
        c.say("Clear", s.node, s.now, text, event)
    ghost = c.ghosts.open.get(event)
    if ghost is None or s.node not in ghost.dst:
        return
    sent = [effect.msg for effect in effects if type(effect) is Send]
    n = max([m.n for m in sent if type(m) is Committed and m.event == event], default=0)
    slots = s.shadow.pools[location].slots
    visible = 0
    while visible < n and ghost.keys[visible] in slots:
        visible += 1
    if visible < n:
        text = f"event {name} commits {n} chunks, the first {visible} are visible in {location}"
        c.say("Truth", s.node, s.now, text, event)
    ghost.commits[s.node] = (retention.inc, n, visible)
    ghost.retained[s.node] = ALIVE
    rank = ghost.dst.index(s.node)
    for key in ghost.keys[:n]:
        c.ghosts.seat(ghost, rank, key, place)


# ---- what a move that goes in steps shows before its end
def watch_shown(c: Checker, s: Scene, effects: Sequence[Effect]) -> None:
    """Truth: when a destination says for the first time that a prefix is visible, it is. (Said again, on being asked
    again, it may have been taken away by another move meanwhile; the next step puts it back.)"""
    if not isinstance(s.message, (Fenced, Pushed)):
        return
    for effect in effects:
        m = effect.msg if type(effect) is Send else None
        if type(m) is not Reserved or not m.shown:
            continue
        ghost = c.ghosts.open.get(m.event)
        if ghost is None:
            continue
        slots = s.shadow.pools[ghost.dst_location].slots
        visible = next((i for i, key in enumerate(ghost.keys[: m.shown]) if key not in slots), m.shown)
        if visible < m.shown:
            text = f"event {event_name(m.event)} shows {m.shown} chunks, the first {visible} are visible"
            c.say("Truth", s.node, s.now, f"{text} in {ghost.dst_location}", m.event)


# ---- copies that run
@final
class Write:
    """A copy that runs: which slots it may write into, and who would have to say that it has ended."""

    def __init__(self, writer: str, writer_epoch: int, node: str, location: str, slots: Tuple[int, ...]) -> None:
        self.writer: str = writer
        self.writer_epoch: int = writer_epoch
        self.node: str = node
        self.location: str = location
        self.slots: Tuple[int, ...] = slots


def watch_writes(c: Checker, s: Scene, effects: Sequence[Effect]) -> None:
    shadow = s.shadow
    into = c.writes.get(s.node, {})
    if s.worker.epoch != shadow.epoch:
        # A push to an epoch that is over never lands.
        for rid in [rid for rid, write in into.items() if write.writer != s.node and shadow.epoch]:
            del into[rid]
        shadow.epoch = s.worker.epoch
    item = s.item
    if type(item) is WindowClosed:
        shadow.closed[item.peer] = max(item.epoch, shadow.closed.get(item.peer, 0))
        for rid in [rid for rid, w in into.items() if w.writer == item.peer and w.writer_epoch <= item.epoch]:
            del into[rid]
    elif type(item) is CopyDone or type(item) is CopyStopped:
        _ended(c, s, item.rid)
    for effect in effects:
        if type(effect) is StartCopy:
            _begins(c, s, effect)
    destination = s.worker.destination
    for rid, write in c.writes.get(s.node, {}).items():
        if rid not in destination.by_rid and rid not in destination.quarantines:
            refs = s.worker.pools[write.location].refs
            used = [slot for slot in write.slots if slot in refs]
            if used:
                text = f"{write.location}: slots {used} are in use again, and copy {rid[1]} may still write there"
                c.say("Free", s.node, s.now, text)


def _begins(c: Checker, s: Scene, e: StartCopy) -> None:
    epoch = s.shadow.epoch
    if e.read:
        write = Write(s.node, epoch, s.node, e.location, e.slots)
    else:
        peer = c.shadows.get(e.peer)
        if peer is None or peer.epoch != e.peer_epoch or peer.closed.get(s.node, 0) >= epoch:
            return
        write = Write(s.node, epoch, e.peer, e.peer_location, e.peer_slots)
    c.writes.setdefault(write.node, {})[e.rid] = write


def _ended(c: Checker, s: Scene, rid: Rid) -> None:
    for writes in c.writes.values():
        write = writes.get(rid)
        if write is not None and write.writer == s.node:
            del writes[rid]
            c.look(s.now, write.node, write.location, write.slots)
            return
