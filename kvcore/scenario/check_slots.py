"""The slots of one rank, counted anew from everything that refers to them: a slot in use has one use."""

from __future__ import annotations

from typing import Dict, List, Tuple, final

from kvcore.protocol.messages import Key
from kvcore.protocol.pool import Pool
from kvcore.protocol.worker import Worker


@final
class Count:
    """References to one pool's slots. ``sole``: slots whose holder must be alone, and who that is."""

    def __init__(self) -> None:
        self.refs: Dict[int, int] = {}
        self.sole: List[Tuple[int, str]] = []
        self.moving: Dict[int, int] = {}
        self.user: Dict[int, int] = {}
        self.retained: Dict[Key, List[int]] = {}

    def use(self, slot: int) -> None:
        if slot >= 0:
            self.refs[slot] = self.refs.get(slot, 0) + 1

    def own(self, slot: int, who: str) -> None:
        if slot >= 0:
            self.use(slot)
            self.sole.append((slot, who))


def recount(worker: Worker) -> List[str]:
    """What does not agree with a count from the index, pins, reservations, quarantines, fills, reads and holds."""
    counts = {pool.name: Count() for pool in worker.pool_list}
    _count_moves(worker, counts)
    _count_engine(worker, counts)
    wrong: List[str] = []
    for pool in worker.pool_list:
        _compare(pool, counts[pool.name], wrong)
    alive = {pin.pid: event for event, pin in worker.source.pins.items()}
    if alive != worker.source.alive:
        wrong.append(f"live pin ids are {sorted(worker.source.alive)}, pins have {sorted(alive)}")
    return wrong


def _count_moves(worker: Worker, counts: Dict[str, Count]) -> None:
    for pin in worker.source.pins.values():
        count = counts[pin.pool.name]
        for slot in pin.slots:
            count.use(slot)
            if pin.move:
                count.moving[slot] = count.moving.get(slot, 0) + 1
    destination = worker.destination
    holds = worker.spec.config.rules.h07
    for event, r in destination.reservations.items():
        count = counts[r.pool.name]
        for slot in r.own:
            count.own(slot, f"event {event} copies into it")
        if holds:
            for slot in r.held:
                count.use(slot)
    for rid, quarantine in destination.quarantines.items():
        for slot in quarantine.slots:
            counts[quarantine.pool.name].own(slot, f"it is in quarantine {rid[1]}")
    for retention in destination.retentions.values():
        retained = counts[retention.pool.name].retained
        for key, slot in zip(retention.keys, retention.slots):
            retained.setdefault(key, []).append(slot)


def _count_engine(worker: Worker, counts: Dict[str, Count]) -> None:
    engine = worker.engine
    for fill in engine.fills.values():
        count = counts[fill.pool.name]
        for slot in fill.own:
            count.own(slot, f"store {fill.op} writes into it")
        for slot in fill.held:
            count.use(slot)
    if worker.spec.config.rules.h27:
        for read in engine.reads.values():
            for slot in read.slots:
                counts[read.pool.name].use(slot)
    for hold in engine.holds.values():
        count = counts[hold.pool.name]
        for slot in hold.slots:
            count.use(slot)
            count.user[slot] = count.user.get(slot, 0) + 1


def _compare(pool: Pool, count: Count, wrong: List[str]) -> None:
    named: Dict[int, Key] = {}
    kids: Dict[Key, int] = {}
    for key, entry in pool.index.items():
        count.use(entry.slot)
        kids[entry.parent] = kids.get(entry.parent, 0) + 1
        if entry.slot in named:
            wrong.append(f"{pool.name}: slot {entry.slot} holds both {short(named[entry.slot])} and {short(key)}")
        named[entry.slot] = key
    for slot, who in count.sole:
        if count.refs[slot] > 1:
            wrong.append(f"{pool.name}: slot {slot} has {count.refs[slot]} uses, but {who}")
    if count.refs != pool.refs:
        for slot in sorted({**count.refs, **pool.refs}):
            have, want = pool.refs.get(slot, 0), count.refs.get(slot, 0)
            if have != want:
                wrong.append(f"{pool.name}: slot {slot} counts {have} references, {want} refer to it")
    free = dict.fromkeys(pool.free)
    both = [slot for slot in pool.free if slot in pool.refs]
    if both:
        wrong.append(f"{pool.name}: slots {both} are free and in use")
    elif len(free) != len(pool.free):
        wrong.append(f"{pool.name}: a slot is free twice")
    elif len(free) + len(pool.refs) != pool.fresh or pool.fresh > pool.slots:
        wrong.append(
            f"{pool.name}: {len(free)} free and {len(pool.refs)} used of {pool.fresh} begun of {pool.slots} slots"
        )
    for name, have_table, want_table in (("moving", pool.moving, count.moving), ("user", pool.user, count.user)):
        if have_table != want_table:
            wrong.append(f"{pool.name}: {name} is {_items(have_table)}, counted {_items(want_table)}")
    if kids != pool.kids:
        wrong.append(f"{pool.name}: the counts of children are wrong")
    if {key: sorted(slots) for key, slots in pool.retained.items()} != {
        key: sorted(slots) for key, slots in count.retained.items()
    }:
        wrong.append(f"{pool.name}: what is retained is not what the retentions say")


def leftover(worker: Worker) -> List[str]:
    """Slots still in use when nothing is under way, beyond the index and users' pins."""
    kept: Dict[str, Dict[int, None]] = {pool.name: {} for pool in worker.pool_list}
    for hold in worker.engine.holds.values():
        kept[hold.pool.name].update(dict.fromkeys(hold.slots))
    lines: List[str] = []
    for pool in worker.pool_list:
        held = kept[pool.name]
        held.update(dict.fromkeys([entry.slot for entry in pool.index.values()]))
        lost = sorted(slot for slot in pool.refs if slot not in held)
        if lost:
            lines.append(f"{pool.name}: slots {lost} are in use and nothing holds them")
    return lines


def _items(table: Dict[int, int]) -> List[Tuple[int, int]]:
    return sorted(table.items())


def short(key: Key) -> str:
    """A key as people read it: a test's letters as they are, a digest by its first bytes."""
    text = key[:8]
    return text.decode() if text.isascii() and text.decode().isprintable() and len(key) <= 8 else key[:4].hex()
