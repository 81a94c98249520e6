"""What a destination keeps of a copy: the room it has made, part by part; what may still be written into; what is kept.
"""

from __future__ import annotations

from typing import List, Optional, Tuple, final

from kvcore.protocol.messages import NO_ID, Fetch, Inc, Key, Pid, Rid, Terms
from kvcore.protocol.pool import Pool


@final
class Part:
    """keys[start:end] of a reservation, and the one copy that brings what of them is not here. COPYING until the bytes
    are there, then FENCING (read only) until the source says that they were good, then GOOD."""

    def __init__(self, rid: Rid, start: int, end: int, after: Rid) -> None:
        self.rid: Rid = rid
        #: the copy whose bytes go before this one's
        self.after: Rid = after
        self.start: int = start
        self.end: int = end
        #: how many tokens of it have come, as last heard
        self.moved: int = 0
        self.copied: bool = False
        self.good: bool = False
        self.fence: Optional[bool] = None


@final
class Reservation:
    """Of one event: all its slots are taken at once, and filled part by part. A move that is not asked to go in steps
    is one part.

    Parts begin in the order of their chunks, some at once (``step_window``), each one's bytes behind those of the one
    before it. Each is asked about at the source by its own fence. They become visible in order only, whichever is good
    first: a chunk without those before it is of no use. What is visible already is held as present chunks are (H07),
    until all of it is, and is retained.
    """

    def __init__(self, rid: Rid, pool: Pool, m: Fetch, n: int, held: List[int], own: List[int], controller: str):
        self.rid: Rid = rid
        self.pool: Pool = pool
        self.event: int = m.event
        self.keys: Tuple[Key, ...] = m.keys[:n]
        self.lens: Tuple[int, ...] = m.lens[:n]
        self.held: List[int] = held
        self.own: List[int] = own
        #: which of keys were here before; nothing is copied for them
        self.present: Tuple[int, ...] = tuple([i for i, slot in enumerate(own) if slot < 0]) if min(own) < 0 else ()
        self.step: int = m.step if 0 < m.step < n else n
        #: under way, in order; the first of them is not good yet
        self.parts: List[Part] = []
        #: keys[:begun] are shown or in a part
        self.begun: int = 0
        #: of the copy that was begun last
        self.newest: Rid = NO_ID
        #: keys[:shown] are visible
        self.shown: int = 0
        #: tokens of keys that were here before, tokens that have come
        self.before: int = sum([self.lens[i] for i in self.present]) if self.present else 0
        self.moved: int = 0
        self.src: str = m.src
        self.src_epoch: int = m.src_epoch
        self.src_location: str = m.src_location
        self.src_slots: Tuple[int, ...] = m.slots
        self.pid: Pid = m.pid
        self.push: bool = m.push
        self.endpoint: str = m.src_endpoint
        self.terms: Optional[Terms] = m.terms
        self.retain_ns: int = m.retain_ns
        self.controller: str = controller
        self.incarnation: int = m.incarnation
        self.stamp: int = m.stamp
        self.via: str = ""
        self.chosen: str = ""

    @property
    def fencing(self) -> bool:
        """All its bytes are here, and the source has still to say that they were good."""
        return self.begun == len(self.keys) and all(part.copied for part in self.parts)

    def part(self, rid: Rid) -> Part:
        """The one that this copy is for; ``by_rid`` has it."""
        first = self.parts[0]
        return first if first.rid == rid else next(part for part in self.parts if part.rid == rid)

    def own_of(self, part: Part) -> List[int]:
        """The slots that its copy writes into."""
        return [slot for slot in self.own[part.start : part.end] if slot >= 0]

    def to_copy(self, part: Part) -> Tuple[Tuple[int, ...], Tuple[int, ...], Tuple[int, ...], Tuple[Key, ...]]:
        """(my slots, the source's slots, lens in tokens, keys) of the part's chunks that were not here."""
        own = self.own
        start, end = part.start, part.end
        if not self.present and end - start == len(own):
            return tuple(own), self.src_slots[: len(own)], self.lens, self.keys
        new = [i for i in range(start, end) if own[i] >= 0]
        return (
            tuple([own[i] for i in new]),
            tuple([self.src_slots[i] for i in new]),
            tuple([self.lens[i] for i in new]),
            tuple([self.keys[i] for i in new]),
        )


@final
class Quarantine:
    """Slots into which an aborted copy may still write."""

    def __init__(self, pool: Pool, slots: List[int], src: str, src_epoch: int, push: bool) -> None:
        self.pool: Pool = pool
        self.slots: List[int] = slots
        self.src: str = src
        self.src_epoch: int = src_epoch
        self.push: bool = push


@final
class Retention:
    """From commit until the event is over: its keys are not evicted here."""

    def __init__(self, r: Reservation, keys: Tuple[Key, ...], slots: List[int]) -> None:
        pool = r.pool
        self.pool: Pool = pool
        #: how many chunks were counted; that all of them are here is what H07 and H19 see to
        self.n: int = len(r.keys)
        self.keys: Tuple[Key, ...] = keys
        self.slots: List[int] = slots
        self.inc: Inc = pool.inc
        self.rid: Rid = r.rid
        self.retain_ns: int = r.retain_ns
        self.present: Tuple[int, ...] = r.present
        self.via: str = r.via
        self.chosen: str = r.chosen
