"""What a checker remembers of one rank: its indexes as they were after the last input, and what it then held.

Changes are found by looking at the index. A small one is compared whole; in a large one, only what the Delta of the
step names is looked at, and everything now and then.
"""

from __future__ import annotations

from typing import Dict, Final, List, Optional, Sequence, Tuple, final

from kvcore.protocol.machine import Effect, Send
from kvcore.protocol.messages import Delta, Inc, Key, Pid, Rid
from kvcore.protocol.pool import Pool
from kvcore.protocol.reservation import Retention
from kvcore.protocol.worker import Worker

SMALL: Final = 64
"""An index of so many entries is compared whole after every input."""

PACE: Final = 8
"""Entries of a large index that one input pays for: after len / PACE inputs it is looked at whole."""


@final
class PoolShadow:
    def __init__(self, pool: Pool) -> None:
        self.inc: Inc = pool.inc
        self.slots: Dict[Key, int] = {}
        self.by_slot: Dict[int, Key] = {}
        self.parents: Dict[Key, Key] = {}
        self.kids: Dict[Key, int] = {}
        for key, entry in pool.index.items():
            self.put(key, entry.slot, entry.parent)

    def put(self, key: Key, slot: int, parent: Key) -> None:
        old = self.slots.get(key)
        if old is None:
            self.parents[key] = parent
            self.kids[parent] = self.kids.get(parent, 0) + 1
        elif self.by_slot.get(old) == key:
            del self.by_slot[old]
        self.slots[key] = slot
        self.by_slot[slot] = key

    def drop(self, key: Key) -> int:
        """Forget a key; the slot it had."""
        slot = self.slots.pop(key)
        if self.by_slot.get(slot) == key:
            del self.by_slot[slot]
        parent = self.parents.pop(key)
        left = self.kids[parent] - 1
        if left:
            self.kids[parent] = left
        else:
            del self.kids[parent]
        return slot

    def unreachable(self) -> List[Key]:
        """Chunks whose parent is not here: every lookup stops before them."""
        slots = self.slots
        return [key for key, parent in self.parents.items() if parent and parent not in slots]

    def compare(self, pool: Pool, named: Optional[Dict[Key, None]]) -> Tuple[List[Key], List[Key]]:
        """(keys that are new or have another slot, keys that are gone). ``named``: look at these only, if the size
        agrees with them."""
        index = pool.index
        slots = self.slots
        if named is not None:
            new = [key for key in named if key in index and slots.get(key) != index[key].slot]
            gone = [key for key in named if key in slots and key not in index]
            added = sum(1 for key in new if key not in slots)
            if len(slots) + added - len(gone) == len(index):
                return new, gone
        new = [key for key, entry in index.items() if slots.get(key) != entry.slot]
        gone = [key for key in slots if key not in index] if len(slots) + len(new) != len(index) else []
        return new, gone


@final
class RetentionSeen:
    """A live retention: of which reservation, where, and until when as the newest renewal says."""

    def __init__(self, retention: Retention, now: int) -> None:
        self.rid: Rid = retention.rid
        self.location: str = retention.pool.name
        self.retain_ns: int = retention.retain_ns
        self.until_ns: int = now + retention.retain_ns
        self.keys: Tuple[Key, ...] = retention.keys


@final
class Shadow:
    """One rank."""

    def __init__(self, node: str, worker: Worker, now: int) -> None:
        spec = worker.spec
        self.rank: int = spec.rank
        self.ranks: int = spec.namespace.ranks
        self.instance: str = node.rpartition("/")[0] or node
        self.epoch: int = worker.epoch
        self.pools: Dict[str, PoolShadow] = {pool.name: PoolShadow(pool) for pool in worker.pool_list}
        #: event -> pid of its live pin
        self.pins: Dict[int, Pid] = {event: pin.pid for event, pin in worker.source.pins.items()}
        self.retained: Dict[int, RetentionSeen] = {}
        #: (location, key) -> the events that retain it
        self.bars: Dict[Tuple[str, Key], Dict[int, None]] = {}
        for event, retention in worker.destination.retentions.items():
            self.retain(event, RetentionSeen(retention, now))
        #: peer -> highest epoch whose window is closed here
        self.closed: Dict[str, int] = {}
        self.credit: int = 0

    def whole(self, worker: Worker) -> bool:
        """Is it time to look at everything?"""
        entries = sum([len(pool.index) for pool in worker.pool_list])
        if entries <= SMALL:
            return True
        self.credit += PACE
        if self.credit < entries:
            return False
        self.credit = 0
        return True

    def retain(self, event: int, seen: RetentionSeen) -> None:
        self.retained[event] = seen
        for key in seen.keys:
            self.bars.setdefault((seen.location, key), {})[event] = None

    def unretain(self, event: int) -> RetentionSeen:
        seen = self.retained.pop(event)
        for key in seen.keys:
            events = self.bars[(seen.location, key)]
            del events[event]
            if not events:
                del self.bars[(seen.location, key)]
        return seen

    def barred(self, location: str, key: Key) -> List[int]:
        """The events whose retention bars a key from eviction."""
        return list(self.bars.get((location, key), ()))


def deltas(effects: Sequence[Effect]) -> Dict[str, Dict[Key, None]]:
    """location -> the keys that this step's Deltas name."""
    named: Dict[str, Dict[Key, None]] = {}
    for effect in effects:
        if type(effect) is Send and type(effect.msg) is Delta:
            keys = named.setdefault(effect.msg.location, {})
            for entry in effect.msg.adds:
                keys[entry.key] = None
            for key in effect.msg.drops:
                keys[key] = None
    return named
