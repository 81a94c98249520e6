"""One location's memory: what is visible, which slots are in use and why, and what may be evicted.

A slot is free when nothing refers to it. References: the index, pins, reservations (own slots and held present ones),
quarantines, local readers, user pins. Deleting drops the index's reference and nothing else.
"""

from __future__ import annotations

from typing import Dict, Final, List, Sequence, Tuple, TypeVar

import msgspec

from kvcore.protocol.config import Rules
from kvcore.protocol.messages import Delta, Entry, Inc, Key

SORTED_FOR: Final = 16
"""Free slots are put in order before some are taken if there are at most so many times more of them."""
FEW: Final = 8
"""Fewer are seen to one by one."""

Name = TypeVar("Name", int, bytes)


class Indexed(msgspec.Struct, gc=False, eq=False):
    """A visible chunk: where it is, and what an inventory says of it."""

    slot: int
    parent: Key
    num_tokens: int
    last_use_ns: int


# A move has thousands of chunks where they are small. What is done to all of them is done at once where they are alike,
# which is nearly always, and else one by one.
def count_up(counts: Dict[Name, int], names: Sequence[Name]) -> None:
    """One more for each name; names without a count have 0."""
    if len(names) >= FEW:
        found = list(map(counts.get, names))
        if found.count(found[0]) == len(found):
            alike = dict.fromkeys(names, (found[0] or 0) + 1)
            if len(alike) == len(names):
                counts.update(alike)
                return
    for name in names:
        counts[name] = counts.get(name, 0) + 1


def count_down(counts: Dict[Name, int], names: Sequence[Name], by: int = 1) -> Sequence[Name]:
    """So many less for each name. Returns those that have come to 0, and have no count any more."""
    if len(names) >= FEW:
        found = list(map(counts.get, names))
        first = found[0]
        if first is not None and found.count(first) == len(found):
            if first == by:
                for name in names:
                    del counts[name]
                return names
            alike = dict.fromkeys(names, first - by)
            if len(alike) == len(names):
                counts.update(alike)
                return ()
    gone: List[Name] = []
    for name in names:
        left = counts[name] - by
        if left:
            counts[name] = left
        else:
            del counts[name]
            gone.append(name)
    return gone


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
        self.retained: Dict[Key, Tuple[int, ...]] = {}
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

    def ref_all(self, slots: Sequence[int]) -> None:
        count_up(self.refs, slots)

    def unref_all(self, slots: Sequence[int], by: int = 1) -> None:
        """Let go of so many references to each."""
        if len(slots) < FEW and by == 1:
            for slot in reversed(slots):
                self.unref(slot)
        else:
            self.free.extend(reversed(count_down(self.refs, slots, by)))

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

    def take_all(self, count: int, evict: bool) -> List[int]:
        """``take`` of as many as there are, at most ``count``. They ascend, with few gaps if possible: chunks that lie
        one after another at both ends of a copy are one range of it."""
        if count < 2:
            slot = self.take(evict) if count else -1
            return [slot] if slot >= 0 else []
        if self.full:
            return []
        free = self.free
        if len(free) <= count * SORTED_FOR:
            free.sort(reverse=True)
        taken = free[: -count - 1 : -1]
        del free[-count:]
        fresh = self.fresh
        self.fresh = min(fresh + count - len(taken), self.slots)
        taken.extend(range(fresh, self.fresh))
        while len(taken) < count and evict and self.evict():
            taken.append(free.pop())
        taken.sort()
        self.refs.update(dict.fromkeys(taken, 1))
        return taken

    def take_for(self, held: Sequence[int], evict: bool) -> List[int]:
        """A slot of one's own for each chunk that is not here (``held`` -1), -1 for the others; fewer than asked for
        if there are not as many."""
        if max(held, default=-1) < 0:
            return self.take_all(len(held), evict)
        lacking = [i for i, slot in enumerate(held) if slot < 0]
        taken = self.take_all(len(lacking), evict)
        own = [-1] * (lacking[len(taken)] if len(taken) < len(lacking) else len(held))
        for i, slot in zip(lacking, taken):
            own[i] = slot
        return own

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

    def retain(self, keys: Sequence[Key], slots: Sequence[int]) -> None:
        """Each key is not evicted, or (without h33) not while it lies in that slot."""
        retained = self.retained
        if retained.keys().isdisjoint(keys):
            retained.update(zip(keys, zip(slots)))
            return
        for key, slot in zip(keys, slots):
            retained[key] = (*retained.get(key, ()), slot)

    def unretain(self, keys: Sequence[Key], slots: Sequence[int]) -> None:
        """One retention of these less."""
        retained = self.retained
        for key, slot in zip(keys, slots):
            held = retained.pop(key)
            if len(held) > 1:
                at = held.index(slot)
                retained[key] = held[:at] + held[at + 1 :]

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

    def new_from(self, keys: Sequence[Key]) -> int:
        """The least n for which none of keys[n:] is here."""
        if self.index.keys().isdisjoint(keys):
            return 0
        n = len(keys)
        while n and keys[n - 1] not in self.index:
            n -= 1
        return n

    def put_all(self, keys: Sequence[Key], slots: Sequence[int], lens: Sequence[int], first: int, now: int) -> None:
        """``put`` of keys[first:], tail first. None of them is here, and each one's parent is the key before it."""
        n = len(keys) - first
        inner = keys[first:-1] if n >= FEW else ()
        kids = dict.fromkeys(inner, 1)
        if len(kids) < n - 1 or n < 2 or keys[-1] in kids or not self.kids.keys().isdisjoint(inner):
            for i in range(len(keys) - 1, first - 1, -1):
                self.put(keys[i], slots[i], parent_of(keys, i), lens[i], now)
            return
        self.kids.update(kids)
        count_up(self.kids, (parent_of(keys, first),))
        back = slice(None, first - 1 if first else None, -1)
        tail, slots, lens = keys[back], slots[back], lens[back]
        parents = [*tail[1:], parent_of(keys, first)]
        whens = [now] * len(tail)
        self.index.update(zip(tail, map(Indexed, slots, parents, lens, whens)))
        self.adds.extend(map(Entry, tail, parents, lens, whens))

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

    def drop_all(self, keys: Sequence[Key], slots: Sequence[int]) -> bool:
        """``drop``, tail first, of the end of a chain that lies in these slots, all but the references to them: those
        are the caller's now. False, and nothing is dropped, if they are not that, or if some are retained or in a
        user's pin."""
        index, kids = self.index, self.kids
        inner = keys[:-1]
        try:
            found = [index[key] for key in keys]
        except KeyError:
            return False
        if (
            keys[-1] in kids
            or list(map(kids.get, inner)).count(1) < len(inner)
            or [entry.parent for entry in found[1:]] != list(inner)
            or [entry.slot for entry in found] != list(slots)
            or (self.user and not self.user.keys().isdisjoint(slots))
            or (self.retained and not self.retained.keys().isdisjoint(keys))
        ):
            return False
        for key in keys:
            del index[key]
        for key in inner:
            del kids[key]
        count_down(kids, (found[0].parent,))
        self.drops.extend(reversed(keys))
        return True

    def touch(self, key: Key, now: int) -> None:
        """Most recently used. Callers go through a chain tail first."""
        entry = self.index.pop(key)
        entry.last_use_ns = now
        self.index[key] = entry

    def prefix(self, keys: Tuple[Key, ...]) -> List[int]:
        """The slots of the longest visible prefix of ``keys``."""
        index = self.index
        try:
            return [index[key].slot for key in keys]
        except KeyError:
            pass
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
        self.unref_all([entry.slot for entry in self.index.values()])
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


def parent_of(keys: Sequence[Key], i: int) -> Key:
    """The chunk before: every sequence of keys starts at its root."""
    return keys[i - 1] if i else b""
