"""One location's memory: what is visible, which slots are in use and why, and what may be evicted.

A slot is free when nothing refers to it. References: the index, pins, reservations (own slots and held present ones),
quarantines, local readers, user pins. Deleting drops the index's reference and nothing else.
"""

from __future__ import annotations

from typing import Dict, List, Tuple

from kvcore.protocol.config import Rules
from kvcore.protocol.messages import Delta, Entry, Inc, Key


class Indexed:
    """A visible chunk: where it is, and what an inventory says of it."""

    def __init__(self, slot: int, parent: Key, num_tokens: int, last_use_ns: int) -> None:
        self.slot: int = slot
        self.parent: Key = parent
        self.num_tokens: int = num_tokens
        self.last_use_ns: int = last_use_ns


class Pool:
    def __init__(self, name: str, slots: int, rules: Rules) -> None:
        self.name: str = name
        self.slots: int = slots
        self.rules: Rules = rules
        self.inc: Inc = (0, 0)
        self.seq: int = 0
        self.clears: int = 0
        #: in order of use, least recent first; a chain is used tail first, so a child stands before its parent
        self.index: Dict[Key, Indexed] = {}
        #: parent key -> number of visible children
        self.kids: Dict[Key, int] = {}
        #: slot -> references; a slot that is not here is free
        self.refs: Dict[int, int] = {}
        #: slot -> live pins of moves (not copies) that refer to it: what it holds is leaving
        self.moving: Dict[int, int] = {}
        #: slot -> user pins that refer to it
        self.user: Dict[int, int] = {}
        #: key -> slot of each retention (more than one event may retain a key)
        self.retained: Dict[Key, List[int]] = {}
        self.free: List[int] = []
        self.fresh: int = 0
        #: an injected fault: nothing can be taken
        self.full: bool = False
        self.adds: List[Entry] = []
        self.drops: List[Key] = []

    # ---- slots
    def ref(self, slot: int) -> None:
        self.refs[slot] += 1

    def unref(self, slot: int) -> None:
        left = self.refs[slot] - 1
        if left:
            self.refs[slot] = left
        else:
            del self.refs[slot]
            self.free.append(slot)

    def take(self, evict: bool) -> int:
        """A slot with one reference, the caller's; -1 if there is none. Nobody waits for space (H23)."""
        if self.full:
            return -1
        if self.free:
            slot = self.free.pop()
        elif self.fresh < self.slots:
            slot = self.fresh
            self.fresh = slot + 1
        elif evict and self.evict():
            slot = self.free.pop()
        else:
            return -1
        self.refs[slot] = 1
        return slot

    def evict(self) -> bool:
        """Drop the least recently used chunk that nothing else refers to and no child needs. False: there is none."""
        refs = self.refs
        kids = self.kids
        for key, entry in self.index.items():
            if refs[entry.slot] == 1 and key not in kids and not self._retains(key, entry.slot):
                self.drop(key)
                return True
        return False

    def _retains(self, key: Key, slot: int) -> bool:
        held = self.retained.get(key)
        if held is None:
            return False
        # A retention bars the key, whatever slot the index names: a later move may have replaced the entry (H33).
        return True if self.rules.h33 else slot in held

    # ---- the index
    def put(self, key: Key, slot: int, parent: Key, num_tokens: int, now: int) -> None:
        """Make ``key`` visible in ``slot``; the caller's reference becomes the index's. An old entry is replaced."""
        old = self.index.pop(key, None)
        if old is not None:
            self.unref(old.slot)
        else:
            self.kids[parent] = self.kids.get(parent, 0) + 1
        self.index[key] = Indexed(slot, parent, num_tokens, now)
        self.adds.append(Entry(key, parent, num_tokens, now))

    def drop(self, key: Key) -> None:
        """Take ``key`` out of the index. Its slot lives on as long as something else refers to it."""
        entry = self.index.pop(key)
        left = self.kids[entry.parent] - 1
        if left:
            self.kids[entry.parent] = left
        else:
            del self.kids[entry.parent]
        self.unref(entry.slot)
        self.drops.append(key)

    def touch(self, key: Key, now: int) -> None:
        """Most recently used. Callers go through a chain tail first."""
        entry = self.index.pop(key)
        entry.last_use_ns = now
        self.index[key] = entry

    def prefix(self, keys: Tuple[Key, ...]) -> List[int]:
        """The slots of the longest visible prefix of ``keys``."""
        index = self.index
        slots: List[int] = []
        for key in keys:
            entry = index.get(key)
            if entry is None:
                break
            slots.append(entry.slot)
        return slots

    def clear(self) -> int:
        """A clear is a restart of the location: the index is emptied and the incarnation raised (H20)."""
        count = len(self.index)
        for entry in self.index.values():
            self.unref(entry.slot)
        self.index.clear()
        self.kids.clear()
        self.adds.clear()
        self.drops.clear()
        if self.rules.h20:
            self.clears += 1
            self.inc = (self.inc[0], self.clears)
        self.seq = 0
        return count

    # ---- inventories
    def delta(self) -> Delta:
        """What has changed since the last call; only called when something has."""
        self.seq += 1
        delta = Delta(self.name, self.inc, self.seq, tuple(self.adds), tuple(self.drops))
        self.adds.clear()
        self.drops.clear()
        return delta

    def entries(self) -> Tuple[Entry, ...]:
        return tuple(Entry(key, e.parent, e.num_tokens, e.last_use_ns) for key, e in self.index.items())


def parent_of(keys: Tuple[Key, ...], i: int) -> Key:
    """The chunk before: every sequence of keys starts at its root."""
    return keys[i - 1] if i else b""
